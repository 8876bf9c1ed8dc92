"""Wan2.2-TI2V-5B from a miniature release: converted and back, generated from, also with a picture, trained on."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from cfjax import plan
from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.core.errors import UserError
from cfjax.data.requests import read_image
from cfjax.data.sets import open_dataset
from cfjax.experiment.build import build
from cfjax.experiment.runs import open_run
from cfjax.experiment.stream_plan import decoders_of, stream_shapes
from cfjax.training.checkpoint import open_role, read_meta
from cfjax.worlds.wan import read_record
from cfjax.worlds.world import WorldParts
from tests.commands import ROOT, cfjax
from tests.data.videos import write_video
from tests.synthetic import (
    as_torch,
    dit_weights,
    prefixed,
    save_pt,
    taehv_weights,
    vae_2_2_weights,
    write_ti2v_folder,
    write_wan_folder,
)

SIDE = 32  # pixels: 2 x 2 latents, one token
CHANNELS = {"in_dim": 48, "out_dim": 48}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`wan`, the release with its world; `dmd`, a student of LongLive 2.0's layout, blocks of 8, in the same world."""
    root = tmp_path_factory.mktemp("ti2v")
    torch.set_num_threads(1)
    assert cfjax("convert", "convert.py", root / "wan", source=write_ti2v_folder(root / "release"), **QUIET) == 0
    student = {"generator": prefixed(as_torch(dit_weights(7, **CHANNELS)))}
    layout = {"experiment__blocks__frames": 8, "latents": "(16,2,2)", "world": root / "wan" / "world"}
    source = save_pt(root / "longlive.pt", student)
    assert cfjax("convert", "convert.py:dmd", root / "dmd", source=source, **layout, **QUIET) == 0
    return root


def generate(root: Path, workdir: Path, run: str, frames: int, **keys: object) -> int:
    sizes = {"height": SIDE, "width": SIDE, "frames": frames}
    asked = {"run": root / run, "precision": "float32", "save_latents": True, "text_cache": root / "cache"}
    return cfjax("generate", "generate.py:wan_2_2", workdir, **{**sizes, **asked, **QUIET, **keys})


def latents(workdir: Path) -> np.ndarray:
    (file,) = workdir.glob("*.safetensors")
    return load_file(file)["latents_FHWC"]


def test_the_release_becomes_a_run(root):
    meta = read_meta(root / "wan")
    assert meta["latent_shape"] == [31, 44, 80, 48] and meta["image_start"] is True
    assert read_record(root / "wan" / "world")["fps"] == 24
    assert read_meta(root / "wan" / "world" / "vae")["model"]["residual"] is True
    assert "image_start" not in read_meta(root / "dmd")


def test_back_out_to_the_release_and_by_way_of_diffusers(root, tmp_path):
    release, pipeline = tmp_path / "release", tmp_path / "pipeline"
    assert cfjax("convert", "convert.py", release, source=root / "wan", to="safetensors", **QUIET) == 0
    assert json.loads((release / "config.json").read_text())["model_type"] == "ti2v"
    for stem, weights in (("diffusion_pytorch_model", dit_weights(**CHANNELS)), ("Wan2.2_VAE", vae_2_2_weights())):
        found = load_file(release / f"{stem}.safetensors")
        assert found.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(found[name], array)
    assert cfjax("convert", "convert.py", pipeline, source=root / "wan", to="diffusers", **QUIET) == 0
    assert json.loads((pipeline / "model_index.json").read_text())["expand_timesteps"] is True
    again = tmp_path / "again"
    assert cfjax("convert", "convert.py", again, source=pipeline, **QUIET) == 0
    for folder, role in (("", "student"), ("world/vae", "vae")):
        one, other = open_role(root / "wan" / folder, role), open_role(again / folder, role)
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array.read(), other[name].read())


def test_a_world_of_other_channels_is_refused(root, tmp_path, capsys):
    """By convert, and by generate, before any sampling."""
    assert cfjax("convert", "convert.py", tmp_path / "old", source=write_wan_folder(tmp_path / "r"), **QUIET) == 0
    capsys.readouterr()
    other = {"world": tmp_path / "old" / "world"}
    assert cfjax("convert", "convert.py", tmp_path / "x", source=root / "longlive.pt", **other, **QUIET) == 2
    assert "made for latents of 48 channels" in capsys.readouterr().err
    assert generate(root, tmp_path / "y", "wan", 5, **other) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "was trained in another world" in line


def test_a_picture_is_the_first_latent_of_all_frames_at_once(root, tmp_path, capsys):
    picture = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(picture)
    few = {"sampler__solver_steps": 2, "image": picture}
    assert generate(root, tmp_path / "out", "wan", 9, **few) == 0
    made, settings = latents(tmp_path / "out"), json.loads((tmp_path / "out" / "settings.json").read_text())
    assert made.shape == (3, 2, 2, 48)
    assert (settings["given_frames"], settings["network_calls"], settings["fps"]) == (1, 4, 24.0)
    run = open_run(str(root / "wan"), precision="float32")
    run, world = replace(run, sampler=replace(run.sampler, steps=2)), run.world
    first = world.encode(jnp.asarray(read_image(str(picture), SIDE, SIDE, "cover"))[None])
    np.testing.assert_allclose(made[:1], first[0], atol=1e-5)
    asked = {"frames": 9, "height": SIDE, "width": SIDE}
    pixels, decoded = np.asarray(Image.open(picture)), world.codec.decode(jnp.asarray(made[None]))
    for start in ({"image": pixels}, {"given_BFHWC": run.encode(pixels[None])}):
        video = run.generate(["A cat surfs on a wave at sunset"], **asked, **start)
        np.testing.assert_allclose(video, decoded, atol=1e-4)
    with pytest.raises(UserError, match="goes on from one, a picture's"):
        run.generate(["A cat"], **asked, given_BFHWC=np.zeros((1, 2, 2, 2, 48)))
    assert generate(root, tmp_path / "no", "wan", 9, video=picture.with_suffix(".mp4"), given_frames=1) == 2
    assert "give it a picture (image)" in capsys.readouterr().err


def test_a_causal_student_in_blocks_of_eight(root, tmp_path):
    """Sixteen latent frames, two blocks; and from a picture, a block of its own, then eight."""
    assert generate(root, tmp_path / "out", "dmd", 61) == 0
    assert latents(tmp_path / "out").shape == (16, 2, 2, 48)
    picture = tmp_path / "photo.png"
    Image.fromarray(np.full((SIDE, SIDE, 3), 99, np.uint8)).save(picture)
    keys = {"image": picture, "independent_first_frame": True}
    assert generate(root, tmp_path / "from", "dmd", 33, **keys) == 0
    assert latents(tmp_path / "from").shape == (9, 2, 2, 48)


def test_a_session_streams_what_generate_makes(root):
    run = open_run(str(root / "dmd"), precision="float32")
    session = run.session("A cat surfs", seed=3)
    video = np.concatenate([np.asarray(session.next().video_BPHWC) for _ in range(2)], axis=1)
    (streamed,) = [np.concatenate(list(run.stream(["A cat surfs"], seed=3)), axis=1)]
    assert video.shape == (1, 61, SIDE, SIDE, 3)
    np.testing.assert_allclose(video, streamed, atol=1e-4)


def test_its_tiny_decoder(root, tmp_path):
    """taew2_2, added to the world as taew2_1 is; what is decoded has the size that the VAE gives."""
    weights = taehv_weights(z_dim=48, patch=2)
    added = {"source": save_pt(tmp_path / "taew2_2.pth", as_torch(weights)), "parts": "tiny_vae"}
    assert cfjax("convert", "convert.py", root / "wan", **added, **QUIET) == 0
    run = open_run(str(root / "dmd"), parts=WorldParts("tiny_vae"), precision="float32")
    assert run.world.codec.stride == (4, 16, 16)
    assert jax.eval_shape(run.world.codec.decode, jnp.zeros((1, 3, 2, 2, 48))).shape == (1, 9, SIDE, SIDE, 3)
    out = {"source": root / "wan", "to": "safetensors", "parts": "tiny_vae"}
    assert cfjax("convert", "convert.py", tmp_path / "back", **out, **QUIET) == 0
    back = load_file(tmp_path / "back" / "taew2_2.safetensors")
    assert back.keys() == weights.keys() and all(np.array_equal(back[name], x) for name, x in weights.items())


def test_clips_are_encoded_and_trained_on(root, tmp_path):
    for i in range(2):
        write_video(tmp_path / "clips" / f"{i}.mp4", 12, size=(SIDE, SIDE)).with_suffix(".txt").write_text("a cat\n")
    sizes = {"frames": 9, "height": SIDE, "width": SIDE, "latent_shape": "(3,2,2,48)"}
    keys = {"source": tmp_path / "clips", "world": root / "wan" / "world", "output": tmp_path / "set"}
    asked = [f"--config.{name}={value}" for name, value in {**sizes, **keys, **QUIET}.items()]
    assert main(["precompute", f"--config={ROOT}/configs/precompute.py", *asked]) == 0
    assert open_dataset(tmp_path / "set").latent_shape == (3, 2, 2, 48)
    data = {"data__path": tmp_path, "data__name": "set", "data__batch_size": 2, "guard__enabled": False}
    few = {"steps": 1, "sample_every": 0, "roles__student__preset": "toy", "objective__image_start": 0.5}
    assert cfjax("train", "bidirectional.py", tmp_path / "run", **data, **few, **QUIET) == 0
    meta = read_meta(tmp_path / "run")
    assert meta["latent_shape"] == [3, 2, 2, 48] and meta["image_start"] is True


def test_plans_know_its_sizes(tmp_path):
    flags = {"frames": 121, "height": 704, "width": 1280, "text": 512}
    argv = [f"--config={ROOT}/configs/bidirectional.py", "--config.roles.student.preset=wan_2_2_5b"]
    e = build(parse("plan", argv, description="", extra_flags=plan.FLAGS[1:], default_workdir="w")[0])
    assert plan.shapes_of(e, flags).latents == (31, 44, 80, 48)
    argv = [
        f"--config={ROOT}/configs/bench.py:wan",
        "--config.preset=wan_2_2_5b",
        "--config.frames=93",
        "--config.height=704",
        "--config.width=1280",
    ]
    c = parse("plan", argv, description="", extra_flags=plan.FLAGS[1:], default_workdir="w")[0]
    run, sizes, parts = stream_shapes(c, 512)
    assert sizes.pixels() == (93, 704, 1280)
    decoders = decoders_of(run, parts)
    assert {name: codec.stride for name, codec in decoders.items()} == dict.fromkeys(("vae", "tiny_vae"), (4, 16, 16))
