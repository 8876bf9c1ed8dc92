"""`cfjax precompute` from the command line: real clips, LMDBs and prompts of a toy world, into sets that train."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

from cfjax import precompute as module
from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.core.errors import UserError
from cfjax.data.clips import ClipFile
from cfjax.data.ingest import ClipSource
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.pictures import ClipFormat, to_float
from cfjax.data.precompute import LatentWriter
from cfjax.data.records import Record, pack
from cfjax.data.sets import open_dataset
from cfjax.data.shapes import ShapesConfig
from cfjax.data.video import read_clip
from cfjax.experiment.data import data_of
from cfjax.models.text_cache import TextCache
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.worlds.toy import ToyWorld, make_world
from cfjax.worlds.wan import WanWorld
from tests.commands import ROOT
from tests.data.lmdbs import damage, rows_of, write_lmdb
from tests.data.videos import truncate, write_video
from tests.tiny import BATCH, CONFIG, SHAPE, TEXT_LEN

CAPTION = "a red circle moving left"
SIZES = {"frames": 9, "height": 16, "width": 32, "latent_shape": "(3,4,4,16)", "text_dtype": "float32"}


def cfjax(verb: str, config: str, **keys: object) -> int:
    """One command; a leading `flag_` makes it a flag of the verb's own."""
    argv = [verb, f"--config={ROOT}/configs/{config}"]
    for name, value in keys.items():
        argv.append(
            f"--{name[5:]}={value}" if name.startswith("flag_") else f"--config.{name.replace('__', '.')}={value}"
        )
    return main(argv)


def precompute(source: Path, world: Path, output: Path | str, **keys: object) -> int:
    keys = {**SIZES, "progress": False, "part_items": 4, **keys}
    return cfjax("precompute", "precompute.py", source=source, world=world, output=output, **keys)


def check(path: Path, capsys, **keys: object) -> tuple[int, list[str]]:
    """(exit code, what was said)."""
    capsys.readouterr()
    code = cfjax("precompute", "precompute.py", flag_check=path, progress=False, **SIZES, **keys)
    return code, capsys.readouterr().out.splitlines()


def merge(*paths: Path, **keys: object) -> int:
    return cfjax("precompute", "precompute.py", flag_merge=",".join(map(str, paths)), progress=False, **keys)


def train_config(config: str, root: Path, name: str, **keys: object) -> ConfigDict:
    """The config of a training on the dataset `name` in `root`; `keys` of its data."""
    data = {"path": root, "name": name, "source": "", **keys}
    argv = [f"--config={ROOT}/configs/{config}", *(f"--config.data.{key}={value}" for key, value in data.items())]
    return parse("train", argv, description="", default_workdir="runs")[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("worlds") / "world"
    make_world(ShapesConfig(), channels=16, text_length=8).save(path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Eleven files: seven good ones of several kinds, and one of each mistake."""
    root = tmp_path_factory.mktemp("clips")
    for name, options in {
        "a.mp4": {},
        "b.webm": {},
        "c.gif": {},
        "deep/d.mov": {"fps": 30, "frames": 30},
        "e.mp4": {"size": (24, 50), "fps": 24, "frames": 20},
        "f.mp4": {"size": (22, 32)},
        "g.mp4": {},
        "h_short.mp4": {"frames": 5},
        "i_cut.mp4": {},
        "j_mute.mp4": {},
        "k_small.mp4": {"size": (8, 16)},
    }.items():
        file = write_video(root / name, options.pop("frames", 12), **options)
        if name != "j_mute.mp4":
            file.with_suffix(".txt").write_text(f"{CAPTION}\n")
    truncate(root / "i_cut.mp4", 0.6)
    (root / "notes.md").touch()
    return root


USABLE = ["a.mp4", "b.webm", "c.gif", "deep/d.mov", "e.mp4", "f.mp4", "g.mp4"]


@pytest.fixture(scope="module")
def encoded(clips, world, tmp_path_factory) -> Path:
    """The clips, encoded by three processes one after another."""
    output = tmp_path_factory.mktemp("sets") / "clips"
    for shard in (1, 2, 0):
        assert precompute(clips, world, output, shard=shard, shards=3, part_items=2) == 0
    return output


def test_a_refused_job_leaves_nothing_that_refuses_the_next(clips, world, tmp_path, capsys):
    """Here one that can use no clip; the report stays, and the corrected command begins anew."""
    only = tmp_path / "clips"
    only.mkdir()
    for file in ("h_short.mp4", "h_short.txt"):
        shutil.copy(clips / file, only / file)
    assert precompute(only, world, tmp_path / "set") == 2
    assert "none of 1 item can be used; the first: too short" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "set").iterdir()] == ["report.json"]
    assert precompute(only, world, tmp_path / "set", frames=5, latent_shape="(2,4,4,16)") == 0
    assert len(open_dataset(tmp_path / "set")) == 1


def test_clips_become_latents_and_mistakes_are_reported(clips, world, encoded):
    dataset, codec = open_dataset(encoded), ToyWorld.load(world).codec
    names = [dataset.record(i).name for i in range(len(dataset))]
    assert names == USABLE and dataset.latent_shape == (9, 2, 4, 16)
    for i, name in enumerate(names):
        video = to_float(read_clip(clips / name, ClipFormat(9, 16, 32)))
        np.testing.assert_allclose(dataset[i]["latents_FHWC"], codec.encode(jnp.asarray(video)[None])[0], atol=4e-3)
        assert dataset.caption(i) == CAPTION
        np.testing.assert_array_equal(dataset[i]["text_SE"], ToyWorld.load(world).text.encode([CAPTION])[0])
    report = json.loads((encoded / "report.json").read_text())
    assert {s["name"]: s["reason"].partition(":")[0] for s in report["skipped"]} == {
        "h_short.mp4": "too short",
        "i_cut.mp4": "unreadable",
        "j_mute.mp4": "no caption",
        "k_small.mp4": "wrong size",
    }
    assert report["items"] == 11 and report["records"] == 7 and report["passed_over"] == {".md": 1}
    assert dataset.manifest["text_encoder"]["world"] == ToyWorld.load(world).fingerprint()


def test_parts_of_long_videos_are_cut_out_by_a_tables_time_stamps(world, tmp_path, capsys):
    """As Panda-70M's tables have them: a video's ID, and lists of times and captions that pandas printed."""
    write_video(tmp_path / "videos" / "-a1_B.mp4", 60)
    (tmp_path / "t.csv").write_text(
        "videoID,url,timestamp,caption,matching_score\n"
        f"-a1_B,u,\"[['0:00:00.5', '0:00:01.5'], ['0:00:02', '0:00:03']]\",\"['{CAPTION}', '{CAPTION}']\",\"[1, 1]\"\n"
    )
    keys = {"captions": tmp_path / "t.csv", "parts": True}
    assert precompute(tmp_path / "videos", world, tmp_path / "set", **keys) == 0
    assert "t.csv: columns: caption by 'caption', file by 'videoID', times by 'timestamp'" in capsys.readouterr().out
    dataset, codec = open_dataset(tmp_path / "set"), ToyWorld.load(world).codec
    for i, (name, start) in enumerate((("-a1_B.mp4[0.5-1.5]", 0.5), ("-a1_B.mp4[2-3]", 2.0))):
        video = to_float(read_clip(tmp_path / "videos" / "-a1_B.mp4", ClipFormat(9, 16, 32), start=start))
        np.testing.assert_allclose(dataset[i]["latents_FHWC"], codec.encode(jnp.asarray(video)[None])[0], atol=4e-3)
        assert dataset.record(i).name == name and dataset.caption(i) == CAPTION


def test_the_same_command_again_says_that_all_is_there(clips, world, encoded, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in encoded.glob("part-*")}
    assert precompute(clips, world, encoded, part_items=2) == 0
    assert "7 records of 11 items, 4 left out" in capsys.readouterr().out
    assert before == {file.name: file.stat().st_mtime_ns for file in encoded.glob("part-*")}


def test_one_shard_of_three_leaves_the_rest_to_the_others(clips, world, tmp_path, capsys):
    assert precompute(clips, world, tmp_path / "set", shard=1, shards=3, part_items=2) == 0
    said = capsys.readouterr().out
    assert "2 of 6 parts are there" in said and "left out h_short.mp4: too short: 5 of 9 frames" not in said
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert main(["precompute", f"--config={ROOT}/configs/precompute.py", f"--check={tmp_path / 'set'}"]) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": ""}, "source=''"),
        ({"output": ""}, "output=''"),
        ({"source": "/nowhere"}, "no such folder"),
        ({"world": "/nowhere"}, "no world here"),
        ({"world": ""}, "no world here"),
        ({"height": 20}, "multiples of 8 and 8"),
        ({"fit": "letterbox"}, "fit='letterbox'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"shard": 3, "shards": 3}, "shard=3 of shards=3"),
        ({"frames": 8}, "begun with another"),
    ],
)
def test_mistakes_are_one_line(clips, world, encoded, tmp_path, capsys, keys, message):
    output = encoded if "frames" in keys else tmp_path / "set"
    keys = {"source": clips, "world": world, "output": output, "part_items": 2, **keys}
    assert precompute(keys.pop("source"), keys.pop("world"), keys.pop("output"), **keys) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("set/part*"))


def test_the_current_folder_may_be_the_world(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (tmp_path / "prompts.txt").write_text(CAPTION)
    assert precompute(tmp_path / "prompts.txt", ".", tmp_path / "set") == 0
    assert open_dataset(tmp_path / "set").caption(0) == CAPTION


# ---- LMDBs and prompts


def test_an_lmdb_is_trained_on_in_place(world, tmp_path, capsys):
    rows = rows_of(5, 6)
    source = write_lmdb(tmp_path / "ode", rows, [CAPTION, "a blue square moving up"] * 2 + [CAPTION])
    damage(source, "prompts_3_data", None)
    assert cfjax("precompute", "precompute.py", source=source, world=world, progress=False, **SIZES) == 0
    dataset = open_dataset(source)  # by the LMDB's own path
    assert len(dataset) == 4 and dataset.trajectory_points == 5 and dataset.has_latents
    expected = LmdbRows(source).arrays(4)
    np.testing.assert_array_equal(dataset[3]["latents_FHWC"], expected["latents"].astype(np.float32))
    np.testing.assert_array_equal(dataset[3]["trajectory_JFHWC"], expected["trajectory"].astype(np.float32))
    np.testing.assert_array_equal(dataset[3]["text_SE"], ToyWorld.load(world).text.encode([CAPTION])[0])
    assert "left out ode/3: no caption" in capsys.readouterr().out
    assert dataset.record(3).arrays.keys() == {"text"}  # the latents are not on disk twice
    copied = tmp_path / "copied"
    assert precompute(source, world, copied, copy_latents=True) == 0
    moved = open_dataset(copied)
    source.rename(tmp_path / "gone")
    for name, array in dataset[3].items():
        np.testing.assert_array_equal(moved[3][name], array)


@pytest.fixture
def moved(world, tmp_path) -> Path:
    """An LMDB and its text that were made in one folder and now lie in another, as on another machine."""
    old, new = tmp_path / "old", tmp_path / "new"
    write_lmdb(old / "clean", rows_of(3, 1), [CAPTION, "a blue square moving up", CAPTION])
    assert precompute(old / "clean", world, "") == 0
    return old.rename(new)


def latents_of_row(row: int, seed: int = 0) -> np.ndarray:
    return np.moveaxis(rows_of(3, 1, seed)[row, 0], -3, -1).astype(np.float32)


@pytest.mark.parametrize("older", [False, True])
def test_a_set_and_its_lmdb_move_together(moved, world, tmp_path, capsys, older):
    """By either path, and precompute goes on there; so do sets of older versions, which knew the place alone."""
    text = moved / "clean.text"
    if older:
        for file in (text / "job.json", text / "manifest.json"):
            values = json.loads(file.read_text())
            values["lmdb"] = {"path": str(tmp_path / "old" / "clean"), "ground_truth": True}
            file.write_text(json.dumps(values))
    for path in (moved / "clean", text):
        np.testing.assert_array_equal(open_dataset(path)[1]["latents_FHWC"], latents_of_row(1))
    assert check(text, capsys) == (0, [f"{text}: every record is good"])
    assert precompute(moved / "clean", world, "") == 0
    assert "3 records of 3 items" in capsys.readouterr().out
    assert open_dataset(text).manifest["lmdb"]["path"] == str(moved / "clean"), "it now knows its place"


def test_a_set_apart_from_its_lmdb_finds_it_as_it_lay_from_there(world, tmp_path):
    source = write_lmdb(tmp_path / "here" / "lmdbs" / "clean", rows_of(3, 1), [CAPTION] * 3)
    assert precompute(source, world, tmp_path / "here" / "sets" / "clean") == 0
    (tmp_path / "here").rename(tmp_path / "there")
    dataset = open_dataset(tmp_path / "there" / "sets" / "clean")
    np.testing.assert_array_equal(dataset[2]["latents_FHWC"], latents_of_row(2))


def test_an_lmdb_that_went_elsewhere_is_named_by_a_key(moved, world, tmp_path, capsys):
    """In training, for the validator and in a merge; without it, the line names where was looked, and the key."""
    text, away = moved / "clean.text", tmp_path / "away" / "rows"
    away.parent.mkdir()
    (moved / "clean").rename(away)
    code, said = check(text, capsys)
    assert code == 1 and len(said) == 2
    for problem in (
        f"{tmp_path}/old/clean (no LMDB",
        f"{moved}/clean (no LMDB",
        "--config.lmdb=",
        "--config.data.lmdb=",
    ):
        assert problem in said[0]
    assert check(text, capsys, lmdb=away)[0] == 0
    data = data_of(train_config("ar_diffusion.py:toy", moved, "clean.text", lmdb=away)).open().dataset
    np.testing.assert_array_equal(data[0]["latents_FHWC"], latents_of_row(0))
    with pytest.raises(UserError, match=r"is not at .*old/clean \(no LMDB there\) nor at .*--config.data.lmdb=PATH"):
        data_of(train_config("ar_diffusion.py:toy", moved, "clean.text")).open()
    assert merge(text, output=tmp_path / "copy", lmdb=away) == 0
    np.testing.assert_array_equal(open_dataset(tmp_path / "copy")[2]["latents_FHWC"], latents_of_row(2))


@pytest.mark.parametrize("older", [False, True])
def test_another_lmdb_is_not_taken_for_it(moved, world, tmp_path, capsys, older):
    """Rows and shapes are the same; what they hold is not. Nor is it this job's."""
    text, other = moved / "clean.text", write_lmdb(tmp_path / "other", rows_of(3, 1, seed=5), ["x", "y", "z"])
    if older:
        manifest = json.loads((text / "manifest.json").read_text())
        del manifest["lmdb"]["fingerprint"]
        (text / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"other \(an LMDB of other (rows|prompts)"):
        open_dataset(text, lmdb=other)
    assert check(text, capsys, lmdb=other)[0] == 1
    assert precompute(other, world, text) == 2 and "begun with another lmdb" in capsys.readouterr().err
    shutil.rmtree(moved / "clean")
    write_lmdb(moved / "clean", rows_of(4, 1), [CAPTION] * 4)
    with pytest.raises(UserError, match=r"4 rows of latents .* not 3 rows of latents"):
        open_dataset(moved / "clean")


@pytest.mark.parametrize("older", [False, True])
def test_what_was_left_half_copied_at_the_old_place_is_passed_over(moved, world, tmp_path, older):
    """Its name is tried first, and LMDB must not map it; the whole one beside the set serves."""
    (tmp_path / "old" / "clean").mkdir(parents=True)
    data = (moved / "clean" / "data.mdb").read_bytes()
    (tmp_path / "old" / "clean" / "data.mdb").write_bytes(data[:-1])
    np.testing.assert_array_equal(open_dataset(moved / "clean.text")[1]["latents_FHWC"], latents_of_row(1))
    (moved / "clean").rename(moved / "aside")
    problem = r"old/clean \(.*cut off.*\) nor at .*new/clean \(no LMDB there\); name its place"
    with pytest.raises(UserError, match=problem):
        open_dataset(moved / "clean.text")
    (moved / "aside").rename(moved / "clean")
    if older:
        values = json.loads((moved / "clean.text" / "job.json").read_text())
        values["lmdb"] = {"path": str(tmp_path / "old" / "clean"), "ground_truth": True}
        (moved / "clean.text" / "job.json").write_text(json.dumps(values))
    assert precompute(moved / "clean", world, "") == 0


def test_a_key_for_an_lmdb_of_a_set_without_one_is_a_mistake(encoded, tmp_path):
    with pytest.raises(UserError, match="keeps its latents in no LMDB"):
        data_of(train_config("ar_diffusion.py:toy", encoded.parent, encoded.name, lmdb=tmp_path)).open()


@pytest.mark.parametrize("copied", [False, True])
def test_pairs_without_clean_clips_train_with_one_flag(world, tmp_path, capsys, copied):
    """Prepared with the defaults or as what they are: the last entry is the ODE's end, and stands for the clip."""
    rows = rows_of(4, 5)
    source = write_lmdb(tmp_path / "pairs", rows, [CAPTION] * 4)
    assert precompute(source, world, tmp_path / "default", copy_latents=copied) == 0
    assert precompute(source, world, tmp_path / "right", copy_latents=copied, ground_truth=False) == 0
    with pytest.raises(UserError, match=r"has 4 states per clip.*--config\.data\.ground_truth=False"):
        data_of(train_config("ode_regression.py:toy", tmp_path, "default")).open()
    expected = np.moveaxis(rows, -3, -1).astype(np.float32)
    for name, keys in (("default", {"ground_truth": False}), ("right", {}), ("right", {"ground_truth": False})):
        dataset = data_of(train_config("ode_regression.py:toy", tmp_path, name, **keys)).open().dataset
        assert dataset.trajectory_points == 5
        for i in range(4):
            np.testing.assert_array_equal(dataset[i]["trajectory_JFHWC"], expected[i])
            np.testing.assert_array_equal(dataset[i]["latents_FHWC"], expected[i, 4])


def test_the_flag_is_refused_for_pairs_with_clean_clips(world, tmp_path):
    source = write_lmdb(tmp_path / "pairs", rows_of(2, 6), [CAPTION] * 2)
    assert precompute(source, world, "") == 0
    assert data_of(train_config("ode_regression.py:toy", tmp_path, "pairs")).open().dataset.trajectory_points == 5
    with pytest.raises(UserError, match=r"has 6 states.*leave out --config\.data\.ground_truth=False"):
        data_of(train_config("ode_regression.py:toy", tmp_path, "pairs", ground_truth=False)).open()


# ---- sets that grew, and joining sets


def test_a_clip_more_in_the_folder_is_reported_by_name_and_joined_in(world, tmp_path, capsys):
    for name, colour in {"a": "red", "b": "green", "c": "blue"}.items():
        folder = tmp_path / ("new" if name == "c" else "old")
        write_video(folder / f"{name}.mp4", 12).with_suffix(".txt").write_text(f"a {colour} circle moving left")
    assert precompute(tmp_path / "old", world, tmp_path / "set") == 0
    shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
    capsys.readouterr()
    assert precompute(tmp_path / "old", world, tmp_path / "set") == 2
    problem = capsys.readouterr().err
    assert "(2 then, 3 now): 1 new (c.mp4);" in problem and f"--merge={tmp_path}/set,NEW" in problem
    assert precompute(tmp_path / "new", world, tmp_path / "more") == 0
    assert merge(tmp_path / "set", tmp_path / "more", output=tmp_path / "all") == 0
    assert f"{tmp_path}/all: 3 records of 3 items" in capsys.readouterr().out
    joined = open_dataset(tmp_path / "all")
    assert [joined.record(i).name for i in range(3)] == ["a.mp4", "b.mp4", "c.mp4"]
    assert check(tmp_path / "all", capsys)[0] == 0
    # what both hold is told, and kept
    assert precompute(tmp_path / "old", world, tmp_path / "again") == 0
    capsys.readouterr()
    assert merge(tmp_path / "set", tmp_path / "again", output=tmp_path / "both", part_items=2) == 0
    said = capsys.readouterr().out
    assert f"the same twice: {tmp_path}/again: a.mp4, and {tmp_path}/set: a.mp4" in said
    assert "2 records hold the same as one of another set" in said and "5 records of 5 items" in said


def test_mistakes_of_merging_are_one_line(world, encoded, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    assert precompute(tmp_path / "prompts.txt", world, tmp_path / "prompts") == 0
    capsys.readouterr()
    for paths, keys, message in (
        ([encoded], {}, "name the new --config.output"),
        ([encoded], {"output": tmp_path / "x", "source": tmp_path}, "without a source"),
        ([encoded, tmp_path / "prompts"], {"output": tmp_path / "x"}, f"{encoded} and {tmp_path}/prompts differ in"),
        ([encoded], {"output": encoded}, "one of the sets to join"),
    ):
        assert merge(*paths, **keys) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_an_lmdb_without_text_says_what_to_do(tmp_path, capsys):
    source = write_lmdb(tmp_path / "clean", rows_of(2, 1), ["a", "b"])
    keys = {"data__path": tmp_path, "data__name": "clean", "flag_workdir": tmp_path / "run", "roles__student__init": ""}
    assert cfjax("train", "ar_diffusion.py", **keys) == 2
    assert f"--config.source={source}" in capsys.readouterr().err


def test_prompts_serve_stage_three_and_no_other(world, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{CAPTION}\n\na blue square moving up\n")
    assert precompute(tmp_path / "prompts.txt", world, tmp_path / "prompts") == 0
    dataset = open_dataset(tmp_path / "prompts")
    assert [dataset.caption(i) for i in range(3)] == [CAPTION, "", "a blue square moving up"]
    assert dataset.latent_shape == (3, 4, 4, 16)
    keys = {"data__path": tmp_path, "data__name": "prompts", "data__source": "", "flag_workdir": tmp_path / "run"}
    assert cfjax("train", "ar_diffusion.py:toy", **keys) == 2
    assert "holds prompts alone" in capsys.readouterr().err


@pytest.mark.parametrize("make", [generator_loss, critic_loss])
def test_stage_three_asks_latents_only_for_their_shape(make):
    """What a set of prompts gives as latents, NaN, reaches no operation of either loss."""
    loss = make(DMDConfig(SelfForcing(sigmas=(1.0,)), real_guidance=0.0), Blocks(6))
    models = dict.fromkeys(("student", "critic", "real_score"), jax.eval_shape(lambda: Wan(CONFIG, jax.random.key(0))))
    text = jax.ShapeDtypeStruct((BATCH, TEXT_LEN, CONFIG.text_dim), jnp.float32)
    batch = {"text_BSE": text, "negative_text_SE": jnp.zeros(text.shape[1:])}

    def value(latents_BFHWC, text_BSE, models):
        return loss(models, {**batch, "text_BSE": text_BSE, "latents_BFHWC": latents_BFHWC}, jax.random.key(0))

    program = jax.make_jaxpr(value)(jax.ShapeDtypeStruct(SHAPE, jnp.float32), text, models).jaxpr
    latents, rows = program.invars[:2]
    used = [variable for equation in program.eqns for variable in equation.invars]
    assert latents.aval.shape == SHAPE and not any(variable is latents for variable in used)
    assert any(variable is rows for variable in used)


def test_a_wan_worlds_captions_are_encoded_first_and_once(tmp_path, monkeypatch):
    """The text encoder is read once for all captions of a process's parts, and not at all when they are there."""

    class Encoder:
        def encode(self, captions):
            return np.stack(
                [np.pad(np.full((len(c), 4), 1.0, np.float32), ((0, 99 - len(c)), (0, 0))) for c in captions]
            )

        def fingerprint(self):
            return "f"

    loads = []
    monkeypatch.setattr("cfjax.worlds.wan.load_text", lambda *_: loads.append(1) or Encoder())
    monkeypatch.setattr("cfjax.worlds.wan.open_cache", lambda path, folder, length: TextCache(folder, "f", length))
    world = WanWorld(tmp_path, None, None, 99, 4, "worst quality", 16.0, text_cache=str(tmp_path / "cache"))
    clips = [ClipFile(f"{i}.mp4", f"caption {i % 40}", "no caption: none" if i == 5 else "") for i in range(90)]
    source = ClipSource(tmp_path, clips, ClipFormat())
    for _ in range(2):
        world.cache_text(module.captions_of(source, range(60)), progress=False)
        assert len(loads) == 1
    cache = TextCache(tmp_path / "cache", "f", 99)
    known = [
        caption for caption in ("worst quality", *(f"caption {i}" for i in range(40))) if cache.get(caption) is not None
    ]
    assert len(known) == 41
    world.cache_text(module.captions_of(source, range(60, 90)), progress=False)
    assert len(loads) == 1  # the rest says nothing new


# ---- ODE pairs


def copies_of_noise(model, clean, text, negative, noise, *, config, blocks, method):
    """Stands for the teacher's ODE: what is tested here is how the job is cut, not what it solves."""
    return jnp.stack([noise] * len(config.steps) + [clean], axis=1)


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A command that makes seven pairs of small clips, and where its set lies."""
    latents = np.random.default_rng(0).standard_normal((9, 6, 2, 2, 16))
    with LatentWriter(tmp_path / "clips", records=9, latent_shape=(6, 2, 2, 16)) as writer:
        writer.append(latents, np.arange(9) % 3)
        writer.write_text(["a", "b", "c"], np.arange(1, 4)[:, None, None] * np.ones((3, 8, 64)), np.ones((8, 64)))
    monkeypatch.setattr("cfjax.experiment.networks.NetworkRole.initial", lambda *_: None)
    monkeypatch.setattr(module, "ode_pairs", copies_of_noise)

    def run(output: str, **keys: object) -> tuple[int, Path]:
        keys = {"pairs": 7, "part_items": 3, "data__batch_size": 2, "roles__teacher__init": "", **keys}
        keys |= {"data__path": tmp_path, "data__source": "", "output": output, "progress": False}
        return cfjax("precompute", "ode_pairs.py:toy", **keys), tmp_path / output

    return run


def test_pairs_do_not_depend_on_how_the_job_is_cut(pairs, tmp_path):
    assert pairs("whole")[0] == 0
    for shard in (1, 0, 2):
        assert pairs("cut", shard=shard, shards=3, data__batch_size=3)[0] == 0
    whole, cut, clips = (open_dataset(tmp_path / name) for name in ("whole", "cut", "clips"))
    assert len(whole) == len(cut) == 7 and whole.trajectory_points == 5
    first = [whole[i]["trajectory_JFHWC"][0] for i in range(7)]
    assert np.unique(np.stack(first)[:, 0, 0, 0, 0]).size == 7  # each pair has noise of its own
    for i in range(7):
        for name, array in whole[i].items():
            np.testing.assert_array_equal(cut[i][name], array)
        for name in ("latents_FHWC", "text_SE"):
            np.testing.assert_array_equal(whole[i][name], clips[i][name])
        np.testing.assert_array_equal(whole[i]["trajectory_JFHWC"][4], clips[i]["latents_FHWC"])
        assert whole.caption(i) == clips.caption(i)
    np.testing.assert_array_equal(whole.negative_text_SE, clips.negative_text_SE)


def test_a_stopped_job_of_pairs_goes_on(pairs, monkeypatch, capsys):
    class Stop(Exception):
        pass

    calls = []

    def stops(*args, **kwargs):
        calls.append(1)
        raise Stop

    def solve_parts(c, data, writer, todo, solve):
        original(c, data, writer, todo[:1], solve)
        original(c, data, writer, todo[1:], stops)

    original = module._solve_parts
    monkeypatch.setattr(module, "_solve_parts", solve_parts)
    with pytest.raises(Stop):
        pairs("set")
    monkeypatch.setattr(module, "_solve_parts", original)
    path = pairs("whole")[1]
    left = sorted(file.name for file in path.with_name("set").iterdir())
    assert left == ["job.json", "negative_text.npy", "part-00000.array_record", "part-00000.json"] and len(calls) == 1
    assert pairs("set")[0] == 0 and "7 records of 7 items" in capsys.readouterr().out
    for i in range(7):
        np.testing.assert_array_equal(
            open_dataset(path.with_name("set"))[i]["trajectory_JFHWC"], open_dataset(path)[i]["trajectory_JFHWC"]
        )
    assert pairs("set", part_items=2) == (0, path.with_name("set"))  # complete: kept, and said so
    assert "exists already" in capsys.readouterr().out
    assert pairs("set", seed=1)[0] == 2 and "was made with seed=0, not 1" in capsys.readouterr().err


def test_pairs_of_another_seed_do_not_mix(pairs, capsys):
    assert pairs("set", shard=0, shards=2)[0] == 0
    assert pairs("set", shard=1, shards=2, seed=1)[0] == 2
    assert "begun with another seed" in capsys.readouterr().err
    assert pairs("other", pairs=10)[0] == 2 and "holds 9 clips" in capsys.readouterr().err


# ---- the validator


def test_the_validator_passes_what_is_good(encoded, capsys):
    code, said = check(encoded, capsys)
    assert code == 0 and said == [f"{encoded}: every record is good"]


def test_the_validator_finds_every_planted_fault_in_records(encoded, tmp_path, capsys):
    """One of each: a part gone, one cut off, a flipped bit, a record twice, shapes, numbers, bytes that are none."""
    path = tmp_path / "set"
    shutil.copytree(encoded, path)
    dataset = open_dataset(encoded)
    good = [dataset.record(i) for i in range(7)]

    def plant(name: str, records: list[bytes]) -> dict[str, object]:
        writer = ArrayRecordWriter(str(path / name), "group_size:1,uncompressed")
        for data in records:
            writer.write(data)
        writer.close()
        return {"file": name, "records": len(records), "bytes": (path / name).stat().st_size}

    def changed(record: Record, item: int, **arrays: np.ndarray) -> bytes:
        return pack(replace(record, item=item, arrays={**record.arrays, **arrays}))

    latents, text = good[0].arrays["latents"], good[0].arrays["text"]
    spoilt = latents.copy()
    spoilt[1, 0, 0, 3] = np.nan
    parts = [
        plant(
            "part-00000.array_record",
            [
                pack(good[0]),
                pack(good[0]),
                changed(good[0], 1, latents=spoilt),
                changed(good[0], 2, latents=latents[:-1]),
                changed(good[0], 3, latents=np.zeros_like(latents)),
                changed(good[0], 4, text=text[:0]),
                changed(good[0], 99),
                b"bytes that are no record",
                changed(good[0], 5),
            ],
        ),
        plant("part-00001.array_record", [changed(good[1], 6), changed(good[2], 7), changed(good[3], 8)]),
        plant("part-00002.array_record", [changed(good[4], 9)]),
        {"file": "part-00099.array_record", "records": 1, "bytes": 1},
    ]
    flipped = bytearray((path / "part-00001.array_record").read_bytes())
    flipped[flipped.find(good[2].arrays["latents"].tobytes()) + 50] ^= 4
    (path / "part-00001.array_record").write_bytes(flipped)
    truncate(path / "part-00002.array_record", 0.5)
    np.save(path / "negative_text.npy", np.full((1, dataset.text_shape[1]), np.inf, np.float32))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"parts": parts, "records": 15}
    (path / "manifest.json").write_text(json.dumps(manifest))
    code, said = check(path, capsys)
    first, second, third, lost = (path / str(part["file"]) for part in parts)
    expected = [
        (path / "manifest.json", "its parts have 14 records, not 15"),
        (path / "negative_text.npy", "not finite"),
        (f"{first}, record 1", "item 0 (a.mp4) is in part-00000.array_record, record 0 already"),
        (f"{first}, record 2", "not finite: latents"),
        (f"{first}, record 3", "wrong shape: latents float16 (8, 2, 4, 16)"),
        (f"{first}, record 4", "constant: latents is 0 everywhere"),
        (f"{first}, record 5", "wrong shape: 0 text rows"),
        (f"{first}, record 6", "its item 99 is none of the source's 11"),
        (f"{first}, record 7", "cannot be read: not a record of this format"),
        (f"{second}, record 1", "cannot be read: Corrupted"),
        (third, "65536 bytes instead of 131072"),
        (third, "0 records can be found instead of 1"),
        (lost, "missing"),
    ]
    assert code == 1 and said[-1] == f"{path}: {len(expected)} faults"
    for line, (place, what) in zip(said[:-1], expected, strict=True):
        assert line.startswith(f"{place}: {what}"), line


def test_the_validator_finds_every_planted_fault_in_an_lmdb(world, tmp_path, capsys):
    source = write_lmdb(tmp_path / "ode", rows_of(7, 6), [CAPTION] * 7)
    damage(source, "latents_1_data", b"short")
    damage(source, "latents_2_data", None)
    damage(source, "prompts_3_data", b"\xff\xfe")
    damage(source, "prompts_4_data", None)
    damage(source, "latents_5_data", np.full(6 * 3 * 16 * 16, np.inf, np.float16).tobytes())
    damage(source, "latents_6_data", np.zeros(6 * 3 * 16 * 16, np.float16).tobytes())
    code, said = check(source, capsys)
    expected = [
        (1, "5 bytes of latents instead of 9216"),
        (2, "no latents"),
        (3, "the prompt is no UTF-8"),
        (4, "no prompt"),
        (5, "not finite"),
        (6, "constant: latents is 0 everywhere"),
    ]
    assert code == 1 and said == [
        *(f"{source}, record {row}: {what}" for row, what in expected),
        f"{source}: {len(expected)} faults",
    ]
    # its text set knows which rows it left out, and is good unless a row that it uses went bad
    assert precompute(source, world, tmp_path / "text") == 0
    assert check(tmp_path / "text", capsys)[1] == [
        f"{source}, record 6: {expected[5][1]}",
        f"{tmp_path}/text: 1 fault",
    ]


def test_the_validator_finds_every_planted_fault_in_arrays(tmp_path, capsys):
    path = tmp_path / "toy"
    latents = np.random.default_rng(0).standard_normal((4, 2, 2, 2, 3))
    with LatentWriter(path, records=4, latent_shape=(2, 2, 2, 3)) as writer:
        writer.append(latents, np.arange(4) % 2)
        writer.write_text(["a", "b"], np.ones((2, 3, 4)), np.ones((3, 4)))
    assert check(path, capsys) == (0, [f"{path}: every record is good"])
    stored = np.load(path / "latents.npy")
    stored[1, 0, 0, 0, 0], stored[2] = np.nan, 0.5
    np.save(path / "latents.npy", stored)
    np.save(path / "caption_id.npy", np.array([0, 1, 2, 0], np.int32))
    np.save(path / "text.npy", np.ones((2, 3, 5), np.float32))
    (path / "negative_text.npy").unlink()
    code, said = check(path, capsys)
    whole = sorted(line for line in said if ", record" not in line)
    assert code == 1 and [line for line in said if ", record" in line] == [
        f"{path}/caption_id.npy, record 2: caption 2 is none of the 2",
        f"{path}/latents.npy, record 1: not finite",
        f"{path}/latents.npy, record 2: constant: latents is 0.5 everywhere",
    ]
    assert len(whole) == 3 and whole[2] == f"{path}: 5 faults"
    assert whole[0].startswith(f"{path}/negative_text.npy: cannot be read")
    assert whole[1].startswith(f"{path}/text.npy: holds float32 [2, 3, 5]")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 7}', '{"version": 2}'])
def test_the_validator_survives_a_broken_manifest(tmp_path, capsys, text):
    (tmp_path / "manifest.json").write_text(text)
    code, said = check(tmp_path, capsys)
    assert code == 1 and len(said) == 2 and said[0].startswith(f"{tmp_path}/manifest.json: ")


def test_checking_nothing_is_a_mistake(tmp_path, capsys):
    assert check(tmp_path, capsys)[0] == 2
