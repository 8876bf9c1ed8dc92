"""Bits of checkpoints: a flipped one anywhere is reported by file, and the first save of a run is read back."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from cfjax.core.checksums import SUMS
from cfjax.core.errors import Temporary, UserError
from cfjax.training import checkpoint, stored, sums
from cfjax.training.checkpoint import CheckpointStore, load_role, open_role, read_meta
from cfjax.training.stored import read_back
from cfjax.training.sums import Damaged, faults, verify
from tests.training.test_checkpoint import fill, fresh
from tests.training.toy import Linear


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two checkpoints, which no test changes."""
    workdir = tmp_path_factory.mktemp("sums") / "run"
    fill(workdir, steps=2)
    return workdir


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    warned: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warned.append(message % args))
    return warned


def flip(file: Path, count: int = 64) -> None:
    """Inverts so many bytes in the middle."""
    data = bytearray(file.read_bytes())
    first = max(0, len(data) // 2 - count // 2)
    data[first : first + count] = bytes(byte ^ 255 for byte in data[first : first + count])
    file.write_bytes(data)


def files_of(workdir: Path, step: int) -> list[str]:
    folder = workdir / "checkpoints" / str(step)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_flipped_bytes_in_any_file_are_reported_and_the_checkpoint_before_is_used(run, tmp_path, lines):
    names = files_of(run, 2)
    assert {SUMS, "record/metadata", "state/manifest.ocdbt"} <= set(names) and len(names) > 10
    for number, name in enumerate(names):
        damaged = tmp_path / str(number)
        shutil.copytree(run, damaged)
        flip(damaged / "checkpoints/2" / name)
        lines.clear()
        store = CheckpointStore(damaged)
        assert int(store.restore_latest(fresh())[0].step) == 1, name
        store.close()
        assert len(lines) == 1 and f"checkpoints/2 is broken and is passed over (Damaged: {name}" in lines[0]
        assert (damaged / "checkpoints_broken/2" / name).exists()


def test_one_flipped_bit_is_seen_by_all_who_read_a_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/2"
    load_role(tmp_path / "run", "critic", Linear(jax.random.key(0)))  # it was good, and this process has seen so
    largest = max(newest.rglob("d/*"), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 1
    largest.write_bytes(data)
    older = load_role(tmp_path / "run", "critic", Linear(jax.random.key(0))).kernel[...]
    np.testing.assert_array_equal(open_role(tmp_path / "run", "critic")["kernel"].read(), older)
    np.testing.assert_allclose(open_role(run, "critic")["kernel"].read(), older + 1)  # each step of `fill` adds one
    assert read_meta(tmp_path / "run")["step"] == 2  # whose record is whole


def test_every_process_compares_its_share(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/2"
    for name in files_of(run, 2):
        if name != SUMS:
            flip(folder / name)
    shares = [list(faults(folder, part=part, parts=3)) for part in range(3)]
    together = [line for share in shares for line in share]
    assert sorted(together) == sorted(faults(folder)) and len(together) == len(files_of(run, 2)) - 1
    assert all(len(share) > 2 for share in shares)


def test_a_checkpoint_without_sums_is_read_and_reported_once(run, tmp_path, lines):
    shutil.copytree(run, tmp_path / "run")
    for file in tmp_path.rglob(SUMS):
        file.unlink()
    for _ in range(2):
        assert open_role(tmp_path / "run", "critic") and read_meta(tmp_path / "run")["step"] == 2
    assert [line.partition("has ")[2] for line in lines] == [
        "no checksums (an older version's, or checksums=False): taken as it is"
    ]


def test_sums_are_left_away_when_asked_and_go_with_their_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "without", checksums=False)
    store.save(1, fresh(), {}, {"stage": "toy"})
    store.close()
    assert not list(tmp_path.rglob(SUMS))
    store = CheckpointStore(tmp_path / "with", keep=1)
    for step in (1, 2):
        store.save(step, fresh(), {}, {"stage": "toy"})
    store.close()
    assert [path.parent.name for path in tmp_path.rglob(SUMS)] == ["2"]


def test_a_bad_place_on_a_disk_is_a_fault_of_its_file_and_a_lost_mount_is_not(run, monkeypatch):
    def failing(code):
        def read(file):
            raise OSError(code, os.strerror(code))

        return read

    folder = run / "checkpoints/1"
    monkeypatch.setattr(sums, "_checked", set())
    monkeypatch.setattr("cfjax.core.checksums.crc32", failing(5))
    with pytest.raises(Damaged, match=r"record/metadata: cannot be read \(input/output error\) \(and \d+ more\)"):
        verify(folder)
    monkeypatch.setattr("cfjax.core.checksums.crc32", failing(107))
    with pytest.raises(Temporary, match="cannot be reached"):
        verify(folder)


# ---- the first save


def test_the_first_save_is_read_back_and_only_that(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(checkpoint, "read_back", lambda folder, _: looked.append(folder.name))
    fill(tmp_path, steps=3)
    store = CheckpointStore(tmp_path)
    store.save(9, fresh(), {}, {"stage": "toy"})
    store.close()
    assert looked == ["1"]


def lose(folder: Path) -> None:
    for file in folder.rglob("d/*"):
        file.unlink()


def change(folder: Path) -> None:
    for file in folder.rglob("d/*"):
        flip(file)


@pytest.mark.parametrize("damage", [lose, change])
def test_a_storage_that_loses_the_first_save_ends_the_run(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(stored, "PAUSES", (0.0,))
    monkeypatch.setattr(checkpoint, "read_back", lambda folder, arrays: damage(folder) or read_back(folder, arrays))
    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match=r"the first checkpoint.*name another --workdir") as caught:
        store.save(1, fresh(), {}, {"stage": "toy"})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert store.steps() == [] and (tmp_path / "checkpoints_broken/1").is_dir()
    store.close()


def test_reading_back_compares_every_bit(run):
    """Not values: -0.0 is another state than 0.0, and NaN is what it was."""
    saved = {name: array.read() for name, array in open_role(run, "critic").items()}
    folder, name = run / "checkpoints/2", "params/critic/kernel"
    assert read_back(folder, {name: saved["kernel"]}) is None
    assert read_back(folder, {name: jax.numpy.asarray(saved["kernel"])}) is None
    other = saved["kernel"].copy()
    other.view(np.uint32)[0, 0] ^= 1
    assert f"{name} of the first checkpoint is not read back" in str(read_back(folder, {name: other}))
    for wrong in (saved["kernel"].astype(np.float16), saved["kernel"][:2]):
        assert isinstance(read_back(folder, {name: wrong}), UserError)
