"""`cfjax precompute` from the command line: real clips, LMDBs and prompts of a toy world, into sets that train."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.core.errors import UserError
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.sets import open_dataset
from cfjax.data.shapes import ShapesConfig
from cfjax.data.video import ClipFormat, read_clip, to_float
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.precompute import video_encoder
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.world import World, make_world
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
    return root


USABLE = ["a.mp4", "b.webm", "c.gif", "deep/d.mov", "e.mp4", "f.mp4", "g.mp4"]


@pytest.fixture(scope="module")
def encoded(clips, world, tmp_path_factory) -> Path:
    """The clips, encoded by three processes one after another."""
    output = tmp_path_factory.mktemp("sets") / "clips"
    for shard in (1, 2, 0):
        assert precompute(clips, world, output, shard=shard, shards=3, part_items=2) == 0
    return output


def test_clips_become_latents_and_mistakes_are_reported(clips, world, encoded):
    dataset, codec = open_dataset(encoded), World.load(world).codec
    names = [dataset.record(i).name for i in range(len(dataset))]
    assert names == USABLE and dataset.latent_shape == (9, 2, 4, 16)
    for i, name in enumerate(names):
        video = to_float(read_clip(clips / name, ClipFormat(9, 16, 32)))
        np.testing.assert_allclose(dataset[i]["latents_FHWC"], codec.encode(jnp.asarray(video)[None])[0], atol=4e-3)
        assert dataset.caption(i) == CAPTION
        np.testing.assert_array_equal(dataset[i]["text_SE"], World.load(world).text.encode([CAPTION])[0])
    report = json.loads((encoded / "report.json").read_text())
    assert {s["name"]: s["reason"].partition(":")[0] for s in report["skipped"]} == {
        "h_short.mp4": "too short",
        "i_cut.mp4": "unreadable",
        "j_mute.mp4": "no caption",
        "k_small.mp4": "wrong size",
    }
    assert report["items"] == 11 and report["records"] == 7
    assert dataset.manifest["text_encoder"]["world"] == World.load(world).fingerprint()


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
        ({"world": "/nowhere"}, "no world there"),
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


# ---- a codec that compresses time


@jax.tree_util.register_static
class HalvingCodec:
    """Streams as Wan's VAE does: the first frame alone, then two at a time, each latent with the sum of all before."""

    stride = (2, 1, 1)

    def init_encode_state(self, batch):
        return jnp.zeros((batch, 0, 1, 1, 1))

    def encode_step(self, video_BPHWC, state):
        lone = 1 - state.shape[1] % 2
        frames = video_BPHWC.mean(axis=(2, 3, 4), keepdims=True)
        sums = jnp.cumsum(jnp.concatenate([state, frames], axis=1), axis=1)[:, state.shape[1] :]
        return sums[:, 1 - lone :: 2], jnp.concatenate([state, frames], axis=1)

    def encode(self, video_BPHWC):
        return self.encode_step(video_BPHWC, self.init_encode_state(len(video_BPHWC)))[0]


def test_encoding_in_pieces_is_encoding_at_once():
    video = np.random.default_rng(0).integers(0, 255, (2, 11, 4, 4, 3)).astype(np.uint8)
    codec = HalvingCodec()
    whole = video_encoder(codec, 0)(video)
    assert whole.shape == (2, 6, 1, 1, 1)
    np.testing.assert_allclose(whole, np.asarray(codec.encode(jnp.asarray(to_float(video)))), atol=1e-5)
    for frames in (2, 4, 16):
        np.testing.assert_allclose(video_encoder(codec, frames)(video), whole, atol=1e-5)
    with pytest.raises(UserError, match="encode_frames=3: use a multiple of 2"):
        video_encoder(codec, 3)


# ---- LMDBs and prompts


def test_an_lmdb_trains_where_it_lies(world, tmp_path, capsys):
    rows = rows_of(5, 6)
    source = write_lmdb(tmp_path / "ode", rows, [CAPTION, "a blue square moving up"] * 2 + [CAPTION])
    damage(source, "prompts_3_data", None)
    assert cfjax("precompute", "precompute.py", source=source, world=world, progress=False, **SIZES) == 0
    dataset = open_dataset(source)  # by the LMDB's own path
    assert len(dataset) == 4 and dataset.trajectory_points == 5 and dataset.has_latents
    expected = LmdbRows(source).arrays(4)
    np.testing.assert_array_equal(dataset[3]["latents_FHWC"], expected["latents"].astype(np.float32))
    np.testing.assert_array_equal(dataset[3]["trajectory_JFHWC"], expected["trajectory"].astype(np.float32))
    np.testing.assert_array_equal(dataset[3]["text_SE"], World.load(world).text.encode([CAPTION])[0])
    assert "left out ode/3: no caption" in capsys.readouterr().out
    assert dataset.record(3).arrays.keys() == {"text"}  # the latents are not on disk twice
    copied = tmp_path / "copied"
    assert precompute(source, world, copied, copy_latents=True) == 0
    moved = open_dataset(copied)
    source.rename(tmp_path / "gone")
    for name, array in dataset[3].items():
        np.testing.assert_array_equal(moved[3][name], array)


def test_an_lmdb_without_text_says_what_to_do(tmp_path, capsys):
    source = write_lmdb(tmp_path / "clean", rows_of(2, 1), ["a", "b"])
    keys = {"data__path": tmp_path, "data__name": "clean", "flag_workdir": tmp_path / "run"}
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


# ---- the validator


def test_the_validator_passes_what_is_good(encoded, capsys):
    code, said = check(encoded, capsys)
    assert code == 0 and said == [f"{encoded}: every record is good"]
