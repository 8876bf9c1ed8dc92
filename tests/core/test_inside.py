"""File names read from a file stay inside its folder, and links lead only into the Hugging Face cache."""

import pytest

from cfjax.core.errors import UserError
from cfjax.core.inside import inside, resolved_inside


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/hostname", "C:\\x", "..\\x", "", ".", "a\0b", 3, None, ["x"]]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"index\.json: .* is no name of a file in"):
        inside(tmp_path, name, "index.json")


def test_links_stay_in_their_folder(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home / "below", other):
        folder.mkdir(parents=True)
    (home / "a").write_text("a")
    (other / "b").write_text("b")
    (home / "below" / "near").symlink_to(home / "a")
    (home / "far").symlink_to(other / "b")
    (home / "round").symlink_to(home / "round")
    (tmp_path / "named").symlink_to(home)
    assert inside(home, "a", "x") == home / "a" and inside(home, "below/near", "x").read_text() == "a"
    assert resolved_inside(tmp_path / "named" / "a", tmp_path / "named").read_text() == "a"
    assert inside(home, "new", "x") == home / "new"
    with pytest.raises(UserError, match=r"far leads to .*other/b, outside of"):
        inside(home, "far", "x")
    with pytest.raises(UserError, match="round"):
        inside(home, "round", "x")


def test_snapshots_of_a_cache_are_links_into_its_blobs(tmp_path):
    snapshot = tmp_path / "hub" / "models--Wan-AI--Wan2.1" / "snapshots" / "0a1b"
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot / "vae", blobs, tmp_path / "local"):
        folder.mkdir(parents=True)
    (blobs / "c0de").write_text("x")
    (snapshot / "vae" / "x.json").symlink_to("../../../blobs/c0de")
    assert inside(snapshot, "vae/x.json", "x").read_text() == "x"
    (tmp_path / "local" / "x.json").symlink_to(blobs / "c0de")  # as older downloads to a folder are
    assert inside(tmp_path / "local", "x.json", "x").read_text() == "x"
