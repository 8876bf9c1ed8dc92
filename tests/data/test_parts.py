"""Parts whose records were emptied or truncated by a power failure are written again, and the set is the same."""

import json
from pathlib import Path

import pytest

from cfjax.core.errors import Temporary, UserError
from cfjax.data.sets import open_dataset
from tests.data.test_records import USABLE, make, writer

MADE_AGAIN = ("job.json", "part-00001.json", "part-00001.array_record", "negative_text.npy", "manifest.json")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("set") / "out"
    assert make(folder)
    assert len(open_dataset(folder)) == len(USABLE)
    return files(folder)


def copied(whole: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("cut", [0, 10], ids=["empty", "cut"])
@pytest.mark.parametrize("name", MADE_AGAIN)
def test_what_a_power_failure_took_is_made_again(whole, tmp_path, name, cut):
    folder = copied(whole, tmp_path / "out")
    (folder / name).write_bytes(whole[name][:cut])
    assert make(folder)
    assert files(folder) == whole
    assert [open_dataset(folder).whole(i).item for i in range(len(USABLE))] == USABLE


def test_a_job_that_lost_its_record_is_reported_by_its_parts(whole, tmp_path):
    """Another command does not go on with them, nor any with those of a version that did not note it."""
    folder = copied(whole, tmp_path / "out")
    (folder / "job.json").write_bytes(b"")
    with pytest.raises(UserError, match="empty or cut, and there are parts that this command did not begin"):
        writer(folder, seed=1)
    part = folder / "part-00002.json"
    about = json.loads(part.read_text())
    del about["job"]
    part.write_text(json.dumps(about))
    with pytest.raises(UserError, match="empty or cut"):
        writer(folder)


def test_a_share_is_one_processs(tmp_path):
    out = writer(tmp_path / "out")
    with out.share(0, 2) as mine, out.share(1, 2) as theirs:
        assert (mine, theirs) == ([0, 2, 4], [1, 3, 5])
        with pytest.raises(Temporary, match="writes there"), out.share(0, 2):
            pass
    with pytest.raises(UserError, match="shard=2"), out.share(2, 2):
        pass
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"job.json"}
