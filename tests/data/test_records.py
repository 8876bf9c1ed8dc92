"""Records are bytes and back; sets are written in parts that are whole or absent, by any number of processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cfjax.core.errors import Temporary, UserError
from cfjax.data import parts
from cfjax.data.ingest import PromptSource, ingest
from cfjax.data.latents import make_iterator, read_json
from cfjax.data.parts import SetWriter, part_size
from cfjax.data.pictures import Unusable
from cfjax.data.precompute import digest
from cfjax.data.records import Layout, Record, RecordDataset, pack, trim_text, unpack
from cfjax.data.sets import open_dataset

SHAPE, ROWS, WIDTH = (2, 2, 2, 3), 6, 4
LAYOUT = Layout(SHAPE, ROWS, WIDTH)


def encode_text(captions):
    """One row per letter, each saying which letter; zeros beyond."""
    out = np.zeros((len(captions), ROWS, WIDTH), np.float32)
    for i, caption in enumerate(captions):
        for j, letter in enumerate(caption[: ROWS - 1] + "."):
            out[i, j] = ord(letter)
    return out


class Numbers:
    """Latents that say their own number; every seventh cannot be used, item 9 is not finite."""

    def __init__(self, count, breaks_at=None):
        self.count, self.breaks_at = count, breaks_at

    def __len__(self):
        return self.count

    def name(self, index):
        return f"n{index}"

    def caption(self, index):
        return str(index)

    def load(self, index):
        if index == self.breaks_at:
            raise KeyboardInterrupt
        if index % 7 == 6:
            raise Unusable("too short: by far")
        return {"latents": np.full(SHAPE, np.inf if index == 9 else index, np.float32)}


USABLE = [i for i in range(23) if i % 7 != 6 and i != 9]


def writer(path, count=23, part_items=4, layout=LAYOUT, **job):
    return SetWriter(
        path,
        items=count,
        part_items=part_items,
        layout=layout,
        job={"seed": 0, **job},
        description={"source": {"n": 1}},
    )


def make(path, source=None, shard=0, shards=1, **options):
    source = source or Numbers(23)
    out = writer(path, len(source), **options)
    out.write_negative(encode_text(["no"])[0])
    return ingest(out, source, encode_text=encode_text, shard=shard, shards=shards, batch_size=3, progress=False)


def values(dataset):
    return [int(dataset[i]["latents_FHWC"][0, 0, 0, 0]) for i in range(len(dataset))]


def test_a_record_survives_its_bytes():
    arrays = {"latents": np.arange(24, dtype=np.float16).reshape(SHAPE), "text": np.ones((2, 4), ml_dtypes.bfloat16)}
    back = unpack(pack(Record("dir/ä.mp4", 7, "größer\n", arrays)))
    assert (back.name, back.item, back.caption, back.arrays.keys()) == ("dir/ä.mp4", 7, "größer\n", arrays.keys())
    for name, array in arrays.items():
        assert back.arrays[name].dtype == array.dtype and (back.arrays[name] == array).all()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"x" + b, lambda b: b[:20], bytes])
def test_damaged_bytes_are_no_record(damage):
    data = pack(Record("a", 0, "c", {"text": np.ones((2, 4), np.float32)}))
    if damage(data) == data:
        assert unpack(data).caption == "c"
    else:
        with pytest.raises(ValueError, match="record"):
            unpack(damage(data))


def test_only_real_text_rows_are_stored(tmp_path):
    make(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    assert len(dataset.record(0).arrays["text"]) == 2 and dataset.record(0).arrays["text"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(dataset[0]["text_SE"], encode_text(["0"])[0])
    np.testing.assert_array_equal(dataset.negative_text_SE, encode_text(["no"])[0])
    assert len(trim_text(np.zeros((3, 2)))) == 0


def test_a_set_holds_what_could_be_used_and_reports_the_rest(tmp_path):
    assert make(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    assert isinstance(dataset, RecordDataset) and values(dataset) == USABLE
    assert [dataset.caption(i) for i in range(len(dataset))] == [str(i) for i in USABLE]
    assert dataset.latent_shape == SHAPE and dataset.text_shape == (ROWS, WIDTH) and dataset.has_latents
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["left_out"] == {"too short": 3, "not finite": 1} and report["records"] == len(USABLE)
    assert [(s["name"], s["item"]) for s in report["skipped"]] == [("n6", 6), ("n9", 9), ("n13", 13), ("n20", 20)]
    assert not list((tmp_path / "set").glob(".*"))


def test_batches_come_out_of_the_common_iterator(tmp_path):
    make(tmp_path / "set")
    batch = next(make_iterator(open_dataset(tmp_path / "set"), 4, 0))
    assert batch["latents_BFHWC"].shape == (4, *SHAPE) and batch["text_BSE"].dtype == np.float32
    first = batch["latents_BFHWC"][:, 0, 0, 0, 0]
    np.testing.assert_array_equal(first, [USABLE[i] for i in batch["index_B"]])
    np.testing.assert_array_equal(batch["text_BSE"][:, 0, 0], [ord(str(int(n))[0]) for n in first])


def test_shards_are_disjoint_and_complete(tmp_path):
    done = [make(tmp_path / "set", shard=shard, shards=3) for shard in (2, 0, 1)]
    assert done == [False, False, True]
    assert values(open_dataset(tmp_path / "set")) == USABLE
    make(tmp_path / "one")
    for file in ("manifest.json", "report.json"):
        assert (tmp_path / "set" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_an_interrupted_job_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", Numbers(23, breaks_at=17))
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(tmp_path / "set")
    assert not list((tmp_path / "set").glob(".*")), "the part that was under way leaves no trace"
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").glob("part-*")}
    assert len(before) == 8  # four parts of four, each with its record
    assert writer(tmp_path / "set").todo(0, 2) == [4] and writer(tmp_path / "set").todo(1, 2) == [5]
    assert make(tmp_path / "set")
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").glob("part-*")}
    assert before.items() < after.items() and values(open_dataset(tmp_path / "set")) == USABLE


def test_a_killed_process_loses_only_its_part(tmp_path):
    """SIGKILL in the middle of the fourth part, with bytes of it on disk; the same command then completes the set."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from tests.data.test_records import Numbers, make

        class Deadly(Numbers):
            def load(self, index):
                if index == 15:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().load(index)

        make(Path(sys.argv[1]), Deadly(23))
    """
    code = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "set")]
    root = Path(__file__).parents[2]
    died = subprocess.run(code, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert len(list((tmp_path / "set").glob("part-*.json"))) == 3
    assert list((tmp_path / "set").glob(".part-00003*.partial")), "a kill leaves the file it was writing"
    assert make(tmp_path / "set") and values(open_dataset(tmp_path / "set")) == USABLE
    assert not list((tmp_path / "set").glob(".*"))


def test_a_full_disk_is_a_failure_that_may_pass(tmp_path):
    """The kernel refuses bytes beyond a limit, as a full disk does; with room again, the same command goes on."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
        with pytest.raises(Temporary, match="set: cannot write there"):
            make(tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert make(tmp_path / "set") and values(open_dataset(tmp_path / "set")) == USABLE


def test_a_lost_part_is_made_again(tmp_path):
    make(tmp_path / "set")
    (tmp_path / "set" / "part-00002.array_record").unlink()
    with pytest.raises(UserError, match=r"part-00002\.array_record: missing"):
        open_dataset(tmp_path / "set")
    assert writer(tmp_path / "set").todo() == [2]
    assert make(tmp_path / "set") and values(open_dataset(tmp_path / "set")) == USABLE


def test_finishing_again_changes_nothing(tmp_path):
    make(tmp_path / "set")
    before = {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    assert make(tmp_path / "set", shard=1, shards=2)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}


def test_another_job_is_refused(tmp_path):
    make(tmp_path / "set")
    with pytest.raises(UserError, match="begun with another seed"):
        writer(tmp_path / "set", seed=1)
    with pytest.raises(UserError, match="another items"):
        writer(tmp_path / "set", count=24)
    with pytest.raises(UserError, match="another part_items"):
        writer(tmp_path / "set", part_items=5)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(UserError, match="holds other files"):
        writer(tmp_path / "thesis")
    with pytest.raises(UserError, match="shard=3 of shards=3"):
        writer(tmp_path / "set").todo(3, 3)


def test_parts_are_of_a_sensible_number_whatever_the_sets_size():
    assert [part_size(n) for n in (1, 64, 65_536, 65_537, 80_000, 1_000_000)] == [64, 64, 64, 65, 79, 977]
    assert part_size(6000, at_least=16) == 16 and part_size(80_000, at_least=16) == 79
    for items in (80_000, 1_000_000, 1_048_576, 1_048_577, 123_456_789):
        assert -(-items // part_size(items)) <= 1024


def test_the_default_goes_on_with_the_parts_that_a_folder_was_begun_with(tmp_path):
    """An older version's or an explicit number stays; without a folder it is the sensible one."""
    assert writer(tmp_path / "new", part_items=0).part_items == 64
    assert writer(tmp_path / "begun").part_items == 4
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "begun", Numbers(23, breaks_at=17))
    going_on = writer(tmp_path / "begun", part_items=0)
    assert (going_on.part_items, going_on.todo()) == (4, [4, 5])
    assert make(tmp_path / "begun", part_items=0) and values(open_dataset(tmp_path / "begun")) == USABLE
    assert make(tmp_path / "begun", part_items=0), "and says so again"


def test_what_is_done_once_per_set_does_not_grow_with_its_square(tmp_path, monkeypatch):
    """Twice as many parts: twice as many files are read to see what is done, to finish and to report."""
    reads = []
    monkeypatch.setattr(parts, "read_json", lambda file: reads.append(file) or read_json(file))

    def count(number):
        make(tmp_path / str(number), Numbers(number), part_items=1)
        out = writer(tmp_path / str(number), number, part_items=1)
        reads.clear()
        assert not out.todo() and out.finish() and len(out.skipped()) == number // 7 + 1
        return len(reads)

    assert count(28) == 2 * count(14)


LISTING = [("a.mp4", "a cat"), ("b.mp4", "a dog"), ("c.mp4", "no caption: none")]


@pytest.mark.parametrize(
    ("now", "output"),
    [
        (
            [*LISTING, ("d.mp4", "a cow")],
            r"\(3 then, 4 now\): 1 new \(d.mp4\); choose .* folder of the new ones .*--merge=",
        ),
        (LISTING[1:], r"\(3 then, 2 now\): 1 gone \(a.mp4\); choose another --config.output for all of them$"),
        ([("a.mp4", "a fox"), *LISTING[1:]], r"1 with another caption \(a.mp4\); choose"),
        ([(f"{i}.mp4", "") for i in range(9)], r"9 new \(0.mp4, 1.mp4, 2.mp4, ...\), 3 gone \(a.mp4, b.mp4, c.mp4\)"),
    ],
)
def test_a_folder_that_changed_is_reported_clip_by_clip(tmp_path, now, output):
    def begin(listing):
        job = {"clips": digest({"clips": [list(item) for item in listing]})}
        about = {"job": job, "description": {}, "listing": listing}
        return SetWriter(tmp_path, items=len(listing), part_items=0, layout=LAYOUT, **about)

    begin(LISTING)
    assert begin(LISTING).items == 3
    with pytest.raises(UserError, match=output):
        begin(now)
    (tmp_path / "items.json").unlink()  # as older versions left it: then without names
    with pytest.raises(UserError, match="begun with another clips"):
        begin(now)


def test_processes_may_begin_a_set_at_the_same_time(tmp_path, monkeypatch):
    """One finds what the other is about to rename; then, while it looks, the other's set begins."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".job.json.0123456789ab.partial").touch()
    writer(tmp_path / "set")
    looked, iterdir = [], Path.iterdir

    def begins(folder):
        if not looked:
            looked.append(folder)
            writer(tmp_path / "other")
        return iterdir(folder)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(Path, "iterdir", begins)
    assert writer(tmp_path / "other").todo() == writer(tmp_path / "set").todo() and looked == [tmp_path / "other"]


def test_a_source_without_one_usable_item_says_so(tmp_path):
    class Nothing(Numbers):
        def load(self, index):
            raise Unusable("unreadable: all of them")

    with pytest.raises(UserError, match="none of 5 items can be used; the first: unreadable"):
        make(tmp_path / "set", Nothing(5))
    assert json.loads((tmp_path / "set" / "report.json").read_text())["left_out"] == {"unreadable": 5}


def test_every_item_must_be_accounted_for(tmp_path):
    with pytest.raises(ValueError, match="neither added nor skipped"), writer(tmp_path / "set").part(0) as part:
        part.skip("n0", 0, "why: not")
    with pytest.raises(ValueError, match="came twice"), writer(tmp_path / "set").part(0) as part:
        part.skip("n0", 0, "why: not")
        part.skip("n0", 0, "why: not")
    assert not list((tmp_path / "set").glob("part*")) and not list((tmp_path / "set").glob(".*"))


def test_prompts_need_no_latents_and_little_disk(tmp_path):
    (tmp_path / "prompts.txt").write_text("one  \n\n  two\u2028too\n")
    source = PromptSource.read(tmp_path / "prompts.txt")
    prompts = source.prompts
    assert prompts == [
        "one",
        "",
        "  two\u2028too",
    ]  # only the end is stripped, blank lines stay (reference: `TextDataset`)
    layout = Layout((21, 60, 104, 16), ROWS, WIDTH, kept_in="none")
    assert make(tmp_path / "set", source, layout=layout)
    dataset = open_dataset(tmp_path / "set")
    assert [dataset.caption(i) for i in range(3)] == prompts and not dataset.has_latents
    assert dataset.latent_shape == (21, 60, 104, 16)
    batch = next(make_iterator(dataset, 2, 0))
    assert batch["latents_BFHWC"].shape == (2, 21, 60, 104, 16) and np.isnan(batch["latents_BFHWC"]).all()
    size = sum(file.stat().st_size for file in (tmp_path / "set").glob("part-*"))
    assert size < 200_000


def test_a_prompt_file_must_hold_prompts(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Café".encode("cp1252"))
    for name, message in (("empty.txt", "no prompts"), ("latin.txt", "not UTF-8"), ("none.txt", "cannot read")):
        with pytest.raises(UserError, match=message):
            PromptSource.read(tmp_path / name)
