"""Untrusted tables, clips and sets: a bad text or file costs only its own record, and sizes are bounded."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.data import captions, ingest, pictures, tables, video
from cfjax.data.check import check_dataset
from cfjax.data.clips import read_listing
from cfjax.data.ingest import PromptSource
from cfjax.data.listing import hashed, listed, unhashed
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.pictures import ClipFormat, Unusable, over_white, read_picture
from cfjax.data.readers import BrokenRecord
from cfjax.data.sets import open_dataset
from cfjax.data.tables import read_table
from cfjax.data.tolerant import TolerantDataset
from cfjax.data.video import read_clip
from tests.data.lmdbs import damage, write_lmdb
from tests.data.test_records import LAYOUT, USABLE, make
from tests.data.videos import write_video

HALF = b"\xed\xa0\x80"  # what UTF-8 would be of half a surrogate pair


@pytest.fixture
def made(tmp_path):
    """A set of records in six parts."""
    make(tmp_path / "set")
    return tmp_path / "set"


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# ---- sets


@pytest.mark.parametrize("name", ["../other.array_record", "/etc/hostname", "", 3])
def test_parts_lie_in_their_set(made, name):
    parts = json.loads((made / "manifest.json").read_text())["parts"]
    edit(made, parts=[{**parts[0], "file": name}, *parts[1:]])
    with pytest.raises(UserError, match=r"manifest\.json: "):
        open_dataset(made)
    assert any("manifest.json" in str(fault) for fault in check_dataset(made, progress=False))


def test_numbers_of_a_manifest_are_checked(made):
    layout = LAYOUT.to_json()
    for change, words in (
        ({"text_rows": 10**9}, "text_rows is 1000000000; it must be a whole number from 1"),
        ({"latent_shape": [2**20, 2**10, 2**10, 16]}, "too many numbers for one record"),
        ({"latent_shape": [True, 2, 2, 2]}, "latent_shape.0. is True"),
        ({"dtypes": "float16"}, "layout.dtypes is unknown"),
        ({"kept_in": "none", "trajectory_points": 3}, "trajectories without latents"),
    ):
        edit(made, layout={**layout, **change})
        with pytest.raises(UserError, match=words):
            open_dataset(made)
    edit(made, layout=layout, items=10**12)
    with pytest.raises(UserError, match="items is 1000000000000"):
        open_dataset(made)


def test_records_are_held_against_the_sets_shape(made):
    edit(made, layout={**LAYOUT.to_json(), "latent_shape": list(reversed(LAYOUT.latent_shape))})
    with pytest.raises(BrokenRecord, match=r"part-00000\.array_record, record 0: wrong shape: latents"):
        open_dataset(made)[0]


def test_a_part_of_zeros_costs_its_own_records(made):
    part = made / "part-00001.array_record"
    part.write_bytes(bytes(part.stat().st_size))
    lines: list[str] = []
    dataset = TolerantDataset(open_dataset(made), 0.5, lines.append)
    lost = [i for i, item in enumerate(USABLE) if item // 4 == 1]
    read = [int(dataset[i]["latents_FHWC"][0, 0, 0, 0]) for i in range(len(dataset))]
    assert [read[i] for i in range(len(read)) if i not in lost] == [x for x in USABLE if x // 4 != 1]
    assert sorted(dataset.corrupt) == lost and len(lines) == len(lost)


def test_kept_listings():
    assert unhashed(json.loads(json.dumps(hashed([("a", "b")])))) == hashed([("a", "b")])
    for wrong in ({"a": "b"}, [["a"]], [["a", 1]], None):
        with pytest.raises(UserError, match=r"items\.json: no list of items"):
            unhashed(wrong)


def test_an_lmdb_has_no_more_rows_than_keys(tmp_path):
    path = write_lmdb(tmp_path / "lmdb", np.zeros((2, 2, 3, 2, 2), np.float16), ["a", "b"])
    for shape in ("1000000000 2 3 2 2", "-1 2 3 2 2", "2 0 3 2 2", "2 2 3 -2 -2", "2 99999 99999 99999 99999"):
        damage(path, "latents_shape", shape.encode())
        with pytest.raises(UserError, match="latents_shape"):
            LmdbRows(path)


# ---- texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"good\n" + HALF + b"\nfine\n"),
        ("x.csv", b"prompt\ngood\n" + HALF + b"\nfine\n"),
        ("x.jsonl", b'{"prompt": "good"}\n{"prompt": "\\ud800"}\n{"prompt": "fine"}\n'),
        ("x.json", b'["good", "\\ud800", "fine"]'),
    ],
)
def test_half_a_surrogate_pair_costs_its_own_prompt(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = PromptSource.read(tmp_path / name)
    assert [source.caption(0), source.caption(2)] == ["good", "fine"]
    with pytest.raises(Unusable, match="half of a surrogate pair"):
        source.caption(1)


def test_a_name_that_is_no_utf8_costs_its_own_clip(tmp_path):
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt", b"good.mp4", b"notes.\xe9"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"a caption")
    (tmp_path / "captions.jsonl").write_text('{"file": "good.mp4", "text": "a"}\n{"file": "\\udce9", "text": "b"}')
    found = read_listing(tmp_path)
    faults = {clip.name: clip.fault.partition(":")[0] for clip in found.clips}
    assert faults == {"good.mp4": "", "caf\\udce9.mp4": "unreadable name", "\\udce9": "missing"}
    clips = ingest.ClipSource(tmp_path, found.clips, ClipFormat())
    json.dumps([hashed(listed(clips)), dict(found.passed_over)], ensure_ascii=False).encode()


def test_texts_and_lines_that_nobody_means(tmp_path, monkeypatch):
    for module in (captions, ingest):
        monkeypatch.setattr(module, "CAPTION", 20)
    for name in ("x.txt", "x.csv"):
        (tmp_path / name).write_text("prompt\n" + "a" * 21 + "\nfine\n")
        source = PromptSource.read(tmp_path / name)
        assert source.caption(len(source) - 1) == "fine"
        with pytest.raises(Unusable, match="21 characters, more than 20"):
            source.caption(len(source) - 2)
    monkeypatch.setattr(tables, "LINE", 20)
    with pytest.raises(UserError, match=r"x\.txt, line 2: a line of more than 20"):
        list(read_table(tmp_path / "x.txt"))
    monkeypatch.setattr(tables, "LIST_BYTES", 20)
    (tmp_path / "x.json").write_text(json.dumps(["a"] * 10))
    with pytest.raises(UserError, match=r"x\.json: it has more than the 20 bytes"):
        list(read_table(tmp_path / "x.json"))


# ---- pictures and videos


def test_pictures_are_bounded_before_they_are_unpacked(tmp_path, monkeypatch):
    Image.new("L", (60, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "PICTURE_PIXELS", 60 * 40 - 1)
    with pytest.raises(Unusable, match="too large: 60 x 40, more than 2399 pixels"):
        read_picture(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "PICTURE_PIXELS", 60 * 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)  # beyond it Pillow warns, and warnings are errors here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(tmp_path / "x.png").shape == (40, 60, 3)


def test_large_pictures_are_blended_in_strips(monkeypatch):
    rgba = np.random.default_rng(0).integers(0, 256, (11, 5, 4), np.uint8)
    whole = over_white(rgba)
    monkeypatch.setattr(pictures, "ROWS", 4)
    np.testing.assert_array_equal(over_white(rgba), whole)


def test_videos_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    write_video(tmp_path / "x.mp4", 4, fps=4)
    wanted = ClipFormat(2, 8, 8, 4.0, upscale=True, max_crop=1.0)
    assert len(read_clip(tmp_path / "x.mp4", wanted)) == 2
    monkeypatch.setattr(video, "VIDEO_PIXELS", 100)
    with pytest.raises(Unusable, match=r"too large: .* more than 100 pixels"):
        read_clip(tmp_path / "x.mp4", wanted)
