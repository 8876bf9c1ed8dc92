"""Sets are merged, or written in other parts, bit for bit; incompatible sets give an error that names both."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data import merge as module
from cfjax.data.check import check_dataset
from cfjax.data.lmdb_paths import describe_lmdb
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.merge import duplicates, merge, merge_writer, name_of, open_members
from cfjax.data.parts import SetWriter
from cfjax.data.precompute import LatentWriter
from cfjax.data.records import Layout
from cfjax.data.sets import has_ground_truth, identity, open_dataset, without_ground_truth
from tests.data.lmdbs import rows_of, write_lmdb

SHAPE, ROWS, WIDTH = (3, 4, 4, 16), 5, 4
LAYOUT = Layout(SHAPE, ROWS, WIDTH)
ABOUT = {"text_encoder": {"name": "t", "world": "w"}, "world_path": "worlds/w", "codec": {"fingerprint": "c"}}


def text_of(caption):
    out = np.zeros((ROWS, WIDTH), np.float32)
    out[: 1 + len(caption) % (ROWS - 1)] = len(caption) + 1
    return out


def latents_of(name):
    return np.random.default_rng(list(name.encode())).standard_normal(SHAPE).astype(np.float16)


def make(path, names, *, layout=LAYOUT, part_items=2, negative=2.0, latents=latents_of, **about):
    """A set of these names, whose captions are "of NAME"; a name that ends in "!" is left out."""
    source = {"name": "clips", "path": str(path), **about.pop("source", {})}
    description = {**ABOUT, "source": source, **about}
    writer = SetWriter(
        path, items=len(names), part_items=part_items, layout=layout, job={"of": names}, description=description
    )
    writer.write_negative(np.full((1, WIDTH), negative))
    for index in writer.todo():
        with writer.part(index) as part:
            for item in part.items:
                name = names[item]
                kept = {key: latents(name) for key in layout.arrays() if key == "latents"}
                if "trajectory" in layout.arrays():
                    kept["trajectory"] = np.stack([latents(f"{name}{j}") for j in range(layout.trajectory_points)])
                if name.endswith("!"):
                    part.skip(name, item, "unreadable: it is")
                else:
                    part.add(name, item, f"of {name}", text_of(name), **kept)
    assert writer.finish()
    return path


def join(paths, output, part_items=0, *, shard=0, shards=1):
    members = open_members([str(path) for path in paths])
    complete, twice = merge(
        merge_writer(members, output, part_items), members, shard=shard, shards=shards, progress=False
    )
    return complete, [(name_of(members, item), name_of(members, earlier)) for item, earlier in twice]


def records(path):
    dataset = open_dataset(path)
    return [dataset.record(i) for i in range(len(dataset))]


def same(one, other):
    """Two records that hold the same, bit for bit, under whatever numbers."""
    assert (one.name, one.caption, one.arrays.keys()) == (other.name, other.caption, other.arrays.keys())
    for key, array in one.arrays.items():
        assert array.dtype == other.arrays[key].dtype and array.tobytes() == other.arrays[key].tobytes()


def test_joined_sets_hold_every_record_as_it_was_under_new_numbers(tmp_path):
    one, two = make(tmp_path / "one", ["a", "b!", "c", "d"]), make(tmp_path / "two", ["e", "f", "g"], part_items=1)
    assert join([one, two], tmp_path / "all") == (True, [])
    joined, before = records(tmp_path / "all"), records(one) + records(two)
    assert [record.item for record in joined] == list(range(6)) and len(before) == 6
    for record, old in zip(joined, before, strict=True):
        same(record, old)
    manifest = open_dataset(tmp_path / "all").manifest
    assert {key: manifest[key] for key in ABOUT} == ABOUT and manifest["items"] == 6
    assert manifest["source"]["sets"] == [
        {
            "path": str(path),
            "items": span,
            "identity": identity(open_dataset(path)),
            "source": {"name": "clips", "path": str(path)},
        }
        for path, span in ((one, [0, 3]), (two, [3, 6]))
    ]
    assert not list(check_dataset(tmp_path / "all", progress=False))
    np.testing.assert_array_equal(open_dataset(tmp_path / "all").negative_text_SE, open_dataset(one).negative_text_SE)


def test_one_set_alone_gets_other_parts(tmp_path):
    make(tmp_path / "fine", list("abcdefg"), part_items=1)
    assert join([tmp_path / "fine"], tmp_path / "coarse", 5)[0]
    assert [part["records"] for part in open_dataset(tmp_path / "coarse").manifest["parts"]] == [5, 2]
    for record, old in zip(records(tmp_path / "coarse"), records(tmp_path / "fine"), strict=True):
        same(record, old)


def test_a_stopped_merge_goes_on_and_is_shared_whatever_its_sets_are_called_now(tmp_path, monkeypatch):
    one, two = make(tmp_path / "one", list("abcd")), make(tmp_path / "two", list("efgh"))
    assert join([one, two], tmp_path / "whole", 3)[0]
    copy, copied = module._copy, []

    def stops(part, members, ends, item, bar):
        if item == 4:
            raise KeyboardInterrupt
        copied.append(item)
        return copy(part, members, ends, item, bar)

    monkeypatch.setattr(module, "_copy", stops)
    with pytest.raises(KeyboardInterrupt):
        join([one, two], tmp_path / "all", 3)
    monkeypatch.setattr(module, "_copy", copy)
    with pytest.raises(UserError, match="unfinished"):
        open_dataset(tmp_path / "all")
    two = two.rename(tmp_path / "moved")
    assert copied == [0, 1, 2, 3] and join([one, two], tmp_path / "all", shard=1, shards=2) == (False, [])
    assert join([one, two], tmp_path / "all", shard=0, shards=2)[0]
    for record, old in zip(records(tmp_path / "all"), records(tmp_path / "whole"), strict=True):
        same(record, old)
    assert join([one, two], tmp_path / "all")[0], "once more says that it is there"
    with pytest.raises(UserError, match="begun with another merge"):
        join([two, one], tmp_path / "all")


def test_records_that_two_sets_share_are_reported_and_kept(tmp_path):
    """What is the same by content, whatever it is called; a set's own repetitions are its own affair."""
    alike = lambda name: latents_of("x")
    make(tmp_path / "one", ["a", "b", "c"])
    make(tmp_path / "two", ["c", "d", "b"])
    make(tmp_path / "own", ["p", "p"], latents=alike)
    complete, twice = join([tmp_path / name for name in ("own", "one", "two")], tmp_path / "all", 2)
    assert complete and twice == [
        (f"{tmp_path}/two: c", f"{tmp_path}/one: c"),
        (f"{tmp_path}/two: b", f"{tmp_path}/one: b"),
    ]
    assert [record.name for record in records(tmp_path / "all")] == ["p", "p", "a", "b", "c", "c", "d", "b"]
    assert json.loads((tmp_path / "all" / "report.json").read_text())["duplicates"] == [[5, 4], [7, 3]]


def test_latents_in_lmdbs_are_copied_and_ode_pairs_stay_what_they_are(tmp_path):
    rows = rows_of(3, 6)
    opened = LmdbRows(write_lmdb(tmp_path / "ode", rows, ["of a", "of b", "of c"]))
    layout = Layout(SHAPE, ROWS, WIDTH, kept_in="lmdb", trajectory_points=5)
    make(tmp_path / "ode.text", ["a", "b", "c"], layout=layout, lmdb=describe_lmdb(opened, tmp_path / "ode.text"))
    make(tmp_path / "own", ["d"], layout=replace(layout, kept_in="records"))
    assert join([tmp_path / "ode", tmp_path / "own"], tmp_path / "all")[0]
    (tmp_path / "ode").rename(tmp_path / "gone")
    joined = open_dataset(tmp_path / "all")
    for i in range(3):
        np.testing.assert_array_equal(joined[i]["latents_FHWC"], np.moveaxis(rows[i, 5], -3, -1).astype(np.float32))
        expected = np.moveaxis(rows[i, :5], -3, -1).astype(np.float32)
        np.testing.assert_array_equal(joined[i]["trajectory_JFHWC"], expected)
    assert joined.record(3).name == "d" and has_ground_truth(joined.manifest)
    assert without_ground_truth(joined).trajectory_points == 6


def test_the_toys_arrays_become_records(tmp_path):
    latents = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float16)
    with LatentWriter(tmp_path / "toy", records=4, latent_shape=SHAPE, description=ABOUT) as writer:
        writer.append(latents, np.arange(4) % 2)
        writer.write_text(["a", "bc"], np.stack([text_of("a"), text_of("bc")]), np.ones((ROWS, WIDTH)))
    make(tmp_path / "own", ["a"], layout=Layout(SHAPE, ROWS, WIDTH, text_dtype="float32"), negative=1.0)
    with pytest.raises(UserError, match="negative text"):  # one row there, five here
        join([tmp_path / "toy", tmp_path / "own"], tmp_path / "all")
    assert join([tmp_path / "toy"], tmp_path / "all")[0]
    old, new = open_dataset(tmp_path / "toy"), open_dataset(tmp_path / "all")
    for i in range(4):
        assert new.caption(i) == old.caption(i) and new.record(i).name == f"toy/{i}"
        for name, array in old[i].items():
            np.testing.assert_array_equal(new[i][name], array)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layout": replace(LAYOUT, latent_shape=(3, 4, 4, 8))}, "layout.latent_shape: (3, 4, 4, 16) and (3, 4, 4, 8)"),
        ({"layout": replace(LAYOUT, text_dtype="float32")}, "layout.text_dtype: bfloat16 and float32"),
        ({"layout": replace(LAYOUT, kept_in="none")}, "layout.kept_in: records and none"),
        ({"text_encoder": {"name": "t", "world": "v"}}, "text encoder (world): w and v"),
        ({"codec": {"fingerprint": "d"}}, "codec: "),
        ({"negative": 3.0}, "negative text: its rows and other rows"),
    ],
)
def test_sets_that_were_made_otherwise_are_refused(tmp_path, other, message):
    shape = other.get("layout", LAYOUT).latent_shape
    one = make(tmp_path / "one", ["a"])
    two = make(tmp_path / "two", ["b"], latents=lambda name: latents_of(name)[..., : shape[-1]], **other)
    with pytest.raises(UserError) as caught:
        join([one, two], tmp_path / "all")
    assert f"{one} and {two} differ in {message}" in str(caught.value) and not (tmp_path / "all").exists()


def test_pairs_of_other_objectives_are_refused(tmp_path):
    layout = replace(LAYOUT, trajectory_points=2)
    pairs = {"objective": {"steps": [2, 1], "shift": 5.0}, "blocks": {"frames": 3}, "seed": 0}
    other = {**pairs, "objective": {"steps": [2, 1], "shift": 8.0}}
    one = make(tmp_path / "one", ["a"], layout=layout, source={"pairs": pairs})
    two = make(tmp_path / "two", ["b"], layout=layout, source={"pairs": other})
    three = make(tmp_path / "three", ["c"], layout=layout, source={"pairs": {**pairs, "seed": 1}})
    with pytest.raises(UserError, match="differ in pairs' objective"):
        join([one, two], tmp_path / "all")
    assert join([one, three], tmp_path / "all")[0]
    assert open_dataset(tmp_path / "all").manifest["source"]["pairs"] == pairs


def test_mistakes_of_naming_are_reported(tmp_path):
    one, two = make(tmp_path / "one", ["a"]), make(tmp_path / "two", ["b"])
    cases = [
        ([one, one], tmp_path / "all", "named twice"),
        ([one, two], two, "is one of the sets to join"),
        ([], tmp_path / "all", "name the sets"),
        ([one, tmp_path / "none"], tmp_path / "all", "no dataset there"),
        (["gs://bucket/set"], tmp_path / "all", "--merge=gs://bucket/set: sets are read from this machine"),
    ]
    for paths, output, message in cases:
        with pytest.raises(UserError, match=message):
            join(paths, output)
    with pytest.raises(UserError, match="names one LMDB"):
        open_members([one, two], lmdb=tmp_path)
    with pytest.raises(UserError, match="in no LMDB"):
        open_members([one], lmdb=tmp_path)


def test_a_damaged_record_is_left_out_and_reported(tmp_path):
    make(tmp_path / "one", ["a", "b"])
    part = tmp_path / "one" / "part-00000.array_record"
    data = bytearray(part.read_bytes())
    data[bytes(data).index(latents_of("a").tobytes()) + 9] ^= 4
    part.write_bytes(data)
    assert join([tmp_path / "one"], tmp_path / "all")[0]
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["left_out"] == {"unreadable": 1} and report["skipped"][0]["name"] == "one/0"
    assert [record.name for record in records(tmp_path / "all")] == ["b"]


def test_duplicates_need_no_record_to_be_read(tmp_path, monkeypatch):
    one, two = make(tmp_path / "one", ["a"]), make(tmp_path / "two", ["a"])
    members = open_members([one, two])
    writer = merge_writer(members, tmp_path / "all", 0)
    merge(writer, members, progress=False)
    monkeypatch.setattr(type(members[0].dataset), "whole", None)
    assert duplicates(writer, [1, 2]) == [(1, 0)]
