"""`cfjax generate` on a miniature Wan system, from release files to mp4: what it writes is what the library makes."""

import gc
import importlib
import itertools
import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import save_file

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.data.requests import read_image, read_latents
from cfjax.evaluation.video import to_uint8, write_mp4
from cfjax.experiment.job import tiled_decoder
from cfjax.experiment.runs import Run, open_run
from cfjax.generate import encode_texts
from cfjax.models.text_cache import TextCache
from cfjax.models.vae_tiling import decode_tiled
from cfjax.models.wan import Wan, embed_text
from cfjax.models.weight_storage import STORAGE_DTYPES
from cfjax.nn.visibility import Blocks
from cfjax.rollout.clips import Clips, Times
from cfjax.rollout.generate import FewStep, ManyStep, generate_few_step
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline, decode_step, seeded_noise, stream_latents
from cfjax.training.checkpoint import CheckpointStore, load_role, read_meta
from cfjax.worlds.records import placed_template
from cfjax.worlds.wan import WanWorld
from cfjax.worlds.world import WorldParts
from tests.commands import cfjax
from tests.conversion.repacked import comfy_t5, save_raw, scaled
from tests.synthetic import (
    dit_weights,
    save_safetensors,
    write_causal_forcing_pt,
    write_config,
    write_taehv,
    write_wan_folder,
)
from tests.tiny import relative

SIDE, FRAMES = 32, 21  # pixels; 6 latent frames: two blocks of 3
PROMPTS = ("A surfer", "一只猫在冲浪")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`wan`, the bidirectional release with both decoders and its world, and `dmd`, a few-step student beside it."""
    root = tmp_path_factory.mktemp("wan")
    quiet = {"progress": False, "latents": "(6,4,4)"}
    release, taehv = write_wan_folder(root / "release", shards=1), write_taehv(root / "taew2_1.pth")
    assert cfjax("convert", "convert.py", root / "wan", source=release, **quiet) == 0
    assert cfjax("convert", "convert.py", root / "wan", source=taehv, **quiet) == 0
    student, world = write_causal_forcing_pt(root / "dmd.pt"), root / "wan" / "world"
    assert cfjax("convert", "convert.py:dmd", root / "dmd", source=student, world=world, **quiet) == 0
    return root


def generate(root: Path, workdir: Path, run: str = "dmd", **keys: object) -> int:
    sizes = {"height": SIDE, "width": SIDE, "frames": FRAMES}
    asked = {"run": root / run, "decoder": "tiny_vae", "precision": "float32", "progress": False, "save_latents": True}
    return cfjax("generate", "generate.py:wan", workdir, **{**sizes, **asked, **keys})


def written(workdir: Path, kind: str) -> list[Path]:
    return sorted(workdir.glob(f"*{kind}"))


def frames_of(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == 16
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def run(root) -> Run:
    return open_run(str(root / "dmd"), parts=WorldParts("tiny_vae"), precision="float32")


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """Three videos by two at a time: the second batch is filled up."""
    (root / "prompts.txt").write_text("\n".join((*PROMPTS, PROMPTS[0])), encoding="utf-8")
    workdir = root / "whole"
    assert generate(root, workdir, prompts=root / "prompts.txt", seed=5, batch=2, text_cache=root / "cache") == 0
    return workdir


def test_text_to_video_is_the_samplers_latents_decoded(whole, run):
    """Latents: the whole sampler on the rows that the world's encoder gives. Pixels: those latents decoded at once."""
    assert isinstance(run.world, WanWorld)
    noises = [seeded_noise(np.array([5, 5]))(i, (2, 3, 4, 4, 16), 4) for i in range(2)]
    noise = jnp.concatenate([start for start, _ in noises], axis=1)
    fresh = jnp.concatenate([jnp.moveaxis(between, 0, 2) for _, between in noises], axis=1)

    @jax.jit
    def sample(model, text, noise, fresh):
        key = jax.random.key(0)
        kv = embed_text(model, text)
        return generate_few_step(model, noise, kv, key, run.sampler, run.blocks, renoise_BFJHWC=fresh)

    latents = sample(run.model, run.world.encode_prompts(PROMPTS), noise, fresh)
    *got, again = (read_latents(file) for file in written(whole, ".safetensors"))
    error = relative(np.stack(got), latents)
    print(f"verb vs sampler, latents: {error:.1e}")
    assert error < 1e-5 and relative(again, got[0]) < 1e-5
    decoded = to_uint8(np.asarray(jax.jit(lambda codec, x: codec.decode(x))(run.world.codec, jnp.stack(got))))
    for file, pixels in zip(written(whole, ".mp4")[:2], decoded, strict=True):
        shown = frames_of(file)
        assert shown.shape == pixels.shape == (FRAMES, SIDE, SIDE, 3)
        # H.264 keeps colour at half the resolution: brightness is what can be compared.
        grey = [x.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32) for x in (shown, pixels)]
        assert np.abs(grey[0] - grey[1]).mean() < 6 < np.abs(grey[0] - grey[1][::-1]).mean()


def test_settings_show_everything_that_a_rate_depends_on(whole):
    names = [file.name for file in written(whole, ".mp4")]
    assert [name[:3] for name in names] == ["000", "001", "002"] and all(n.endswith("_seed5.mp4") for n in names)
    record = json.loads((whole / "settings.json").read_text())
    assert [video["prompt"] for video in record["videos"]] == [*PROMPTS, PROMPTS[0]]
    assert [video["file"] for video in record["videos"]] == names
    assert (record["network_calls"], record["batch"], record["decoder"]["name"]) == (9, 2, "tiny_vae")
    assert record["run"]["stage"] == "dmd" and record["network"]["dim"] == 48 and record["versions"]["jax"]
    assert record["latent_shape"] == [6, 4, 4, 16] and record["frames"] == FRAMES
    # Two layers, keys and values, two videos, 6 frames of 4 tokens, width 48, float32; and 6 frame numbers.
    assert record["kv_cache_bytes"] == 2 * 2 * 2 * 6 * 4 * 48 * 4 + 6 * 4
    times, seconds = record["timings"], record["seconds"]
    assert len(times["seconds_per_block"]) == 2 and len(times["first_frame_seconds"]) == 2
    assert 0 < times["block_seconds"]["p50"] <= times["block_seconds"]["p95"] <= times["network_seconds"]
    assert times["frames_per_second_with_decoder"] < times["frames_per_second_without_decoder"]
    assert times["frames_per_second_without_decoder"] == pytest.approx(4 * FRAMES / times["network_seconds"])
    assert seconds["compile"] + times["network_seconds"] + times["decode_seconds"] < seconds["total"]
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * SIDE + 7 * 2, 3 * SIDE + 2 * 2)


def test_an_extension_is_the_longer_video_and_the_text_encoder_stays_on_disk(root, whole, tmp_path):
    """From a video's own latents and seed the verb makes the rest of it; a cached prompt needs no encoder weights."""
    weights = root / "wan" / "world" / "text_encoder" / "checkpoints" / "0" / "state"
    latents, keys = written(whole, ".safetensors")[0], {"prompt": "|".join(PROMPTS), "seed": 5, "given_frames": 3}
    weights.rename(root / "away")
    try:
        assert generate(root, tmp_path, video=latents, text_cache=root / "cache", batch=2, **keys) == 0
    finally:
        (root / "away").rename(weights)
    same, other = (read_latents(file) for file in written(tmp_path, ".safetensors"))
    error = relative(same, read_latents(latents))
    print(f"extension vs longer video: {error:.1e}")
    assert error < 1e-5 < relative(other[3:], same[3:])  # another prompt goes on elsewhere
    record = json.loads((tmp_path / "settings.json").read_text())
    assert (record["given_frames"], record["network_calls"], len(frames_of(written(tmp_path, ".mp4")[0]))) == (9, 5, 21)


def test_prompts_over_time_and_a_memory_policy(root, run, tmp_path, capsys):
    """0.75 s are a block. The video is a session's, the first block the first prompt's own video's."""
    keys = {"seed": 5, "memory": "infinity_rope(window=5)"}
    timeline = f"{PROMPTS[0]}[0.75s] | {PROMPTS[1]}"
    assert generate(root, tmp_path / "timed", timeline=timeline, **keys) == 0
    found = read_latents(written(tmp_path / "timed", ".safetensors")[0])
    text = Text(run.world.encode_prompts)
    pipeline = Pipeline(run.model, run.world.codec, run.sampler, run.blocks)
    session = Session(pipeline, text, PROMPTS[0], latent_shape=(4, 4, 16), seed=5, memory=keys["memory"])
    first = session.next()
    session.set_prompt(PROMPTS[1], "keep")
    wanted = np.concatenate([first.latents_BFHWC, session.next().latents_BFHWC], axis=1)[0]
    print(f"verb vs session: {relative(found, wanted):.1e}")
    assert relative(found, wanted) < 1e-5
    assert len(frames_of(written(tmp_path / "timed", ".mp4")[0])) == FRAMES
    record = json.loads((tmp_path / "timed" / "settings.json").read_text())
    assert record["blocks"]["memory"] == "infinity_rope(window=5)" and record["videos"][0]["prompt"] == timeline
    capsys.readouterr()
    for wrong, message in (
        ({"memory": "infinty_rope"}, "did you mean infinity_rope"),
        ({"memory": "full", "window": 6}, "window: memory='full' holds all frames"),
        ({"timeline": "A surfer[9s] | A cat"}, "begins at block 12, the video has 2: ask for more frames"),
        ({"timeline": "A surfer | A cat"}, "has no duration: write A surfer[5s]"),
        ({"timeline": timeline, "run": root / "wan"}, "this run is bidirectional"),
    ):
        assert generate(root, tmp_path / "wrong", **wrong) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "wrong" / "settings.json").exists()


@pytest.mark.slow
def test_blocks_denoised_together_and_a_context_encoded_anew(root, run, tmp_path, capsys):
    """Rolling Forcing's video is the stream's; Krea's memory, which needs pixels, is a session's, prompt by prompt."""
    keys = {"seed": 5, "frames": 45, "prompt": " | ".join(PROMPTS), "videos": 1, "batch": 2}
    assert generate(root, tmp_path / "rolling", sampler__kind="rolling", window=15, **keys) == 0
    record = json.loads((tmp_path / "rolling" / "settings.json").read_text())
    assert record["sampler"]["rolling"] and record["blocks"]["memory"] == "rolling_forcing(window=15)"
    assert record["network_calls"] == 2 * 4 + 4 - 2
    pipeline = Pipeline(run.model, None, FewStep(rolling=True), Blocks(3, window=15))
    kv, noise = embed_text(run.model, run.world.encode_prompts(PROMPTS[:1])), seeded_noise(np.array([5], np.uint32))
    blocks = list(stream_latents(pipeline, kv, noise, num_frames=12, latent_shape=(4, 4, 16)))
    made = [read_latents(file) for file in written(tmp_path / "rolling", ".safetensors")]
    assert min(relative(x, np.concatenate(blocks, axis=1)[0]) for x in made) < 1e-5

    memory = "context_recompute(reencode=True)"
    assert generate(root, tmp_path / "krea", memory=memory, **keys) == 0
    files = written(tmp_path / "krea", ".safetensors")
    assert len(files) == 2
    session = run.session(PROMPTS[0], seed=5, memory=memory)
    wanted = np.concatenate([session.next().latents_BFHWC for _ in range(4)], axis=1)[0]
    assert min(relative(read_latents(file), wanted) for file in files) < 1e-5
    capsys.readouterr()
    for wrong, message in (
        ({"sampler__kind": "rolled"}, "sampler.kind='rolled': use few_step or rolling"),
        ({"sampler__kind": "rolling", "window": 12}, "window=12 must hold the first block and 4 blocks"),
        ({"sampler__kind": "rolling", "memory": "infinity_rope"}, "sampler.kind='rolling' has its own"),
        ({"memory": "rolling_forcing"}, "is for sampler.kind='rolling'"),
        ({"sampler__kind": "rolling", "run": root / "wan"}, "which has no such setting"),
        ({"sampler__kind": "rolling", "timeline": "A cat[0.75s] | A surfer[1s#]"}, "cannot cut the scene"),
    ):
        assert generate(root, tmp_path / "wrong", **wrong) == 2
        assert message in capsys.readouterr().err


def test_a_video_is_changed(root, whole, tmp_path, capsys):
    """Strength 0 gives the latents back, 1 is the video of the prompt alone; in between it is neither."""
    latents, keys = written(whole, ".safetensors")[0], {"prompt": PROMPTS[1], "seed": 5, "text_cache": root / "cache"}
    found = {}
    for strength in (0.0, 0.9, 1.0):
        assert generate(root, tmp_path / f"{strength}", video=latents, strength=strength, **keys) == 0
        found[strength] = read_latents(written(tmp_path / f"{strength}", ".safetensors")[0])
    given, prompt = (read_latents(file) for file in written(whole, ".safetensors")[:2])
    np.testing.assert_array_equal(found[0.0], given)
    assert relative(found[1.0], prompt) < 1e-5 and min(relative(found[0.9], x) for x in (given, prompt)) > 0.05
    assert json.loads((tmp_path / "0.9" / "settings.json").read_text())["sampler"]["strength"] == 0.9
    capsys.readouterr()
    for wrong, message in (
        ({"strength": 0.5}, "give the video that it is about"),
        ({"strength": 0.5, "video": written(whole, ".mp4")[0], "frames": 33}, "21 frames at 16 per second, fewer"),
        ({"strength": 0.5, "video": latents, "given_frames": 3}, "strength and given_frames: give one"),
    ):
        assert generate(root, tmp_path / "wrong", **wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_image_to_video_begins_with_the_encoded_picture(root, run, tmp_path):
    """Given frame 0 is the picture through the Wan VAE, whatever decodes; the rest are blocks of 3 after it."""
    y, x = np.mgrid[:60, :90]
    picture = np.stack([x * 255 / 90, y * 255 / 60, 128 + 0 * x], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    keys = {"image": tmp_path / "picture.png", "frames": 13, "independent_first_frame": True}
    assert generate(root, tmp_path / "out", **keys) == 0
    latents = read_latents(written(tmp_path / "out", ".safetensors")[0])
    world = WanWorld.load(root / "wan" / "world", with_text=False)
    assert latents.shape == (4, 4, 4, 16)
    encoded = world.encode(jnp.asarray(read_image(tmp_path / "picture.png", SIDE, SIDE)[None]))
    np.testing.assert_array_equal(latents[:1], encoded[0])
    # A video of which the last frame is that picture: the same, but for what H.264 loses.
    shown = np.repeat(to_uint8(read_image(tmp_path / "picture.png", SIDE, SIDE)), 3, axis=0)
    write_mp4(tmp_path / "clip.mp4", np.concatenate([255 - shown[:2], shown[:1]]), fps=16)
    keys = {"video": tmp_path / "clip.mp4", "given_frames": 1, "frames": 13, "independent_first_frame": True}
    assert generate(root, tmp_path / "video", **keys) == 0
    error = relative(read_latents(written(tmp_path / "video", ".safetensors")[0])[:1], latents[:1])
    print(f"given frame from a video vs from its picture: {error:.1e}")
    assert 0 < error < 0.1
    record = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (record["given_frames"], record["network_calls"]) == (1, 1 + 4)


def test_the_bidirectional_release_generates_with_its_own_decoder(root, tmp_path):
    """UniPC under guidance by the world's negative prompt, decoded by the Wan VAE; one frame is a picture."""
    assert generate(root, tmp_path, run="wan", decoder="vae", frames=1, sampler__solver_steps=2) == 0
    record = json.loads((tmp_path / "settings.json").read_text())
    assert (record["network_calls"], record["kv_cache_bytes"], record["blocks"]) == (4, 0, None)
    assert frames_of(written(tmp_path, ".mp4")[0]).shape == (1, SIDE, SIDE, 3)
    world = WanWorld.load(root / "wan" / "world", with_text=False)
    latents = jnp.asarray(read_latents(written(tmp_path, ".safetensors")[0]))[None]
    pixels = to_uint8(np.asarray(decode_step(world.codec, latents, world.codec.init_state(1))[0]))[0]
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), pixels[0])


def test_repackaged_weights_generate_the_same(root, whole, tmp_path):
    """As user interfaces have them: a float8 transformer, umT5 with its tokenizer inside, half a tiny decoder."""
    kept = dict(progress=False, latents="(6,4,4)")
    student = write_causal_forcing_pt(tmp_path / "x.pt")
    weights = {k: x.numpy() for k, x in torch.load(student, weights_only=True)["generator"].items()}
    write_config(tmp_path)
    files = {"": save_raw(tmp_path / "wan_fp8_scaled.safetensors", scaled(weights, "comfy")[0])}
    spiece = np.frombuffer((root / "release/google/umt5-xxl/spiece.model").read_bytes(), np.uint8)
    t5 = comfy_t5(torch.load(root / "release/models_t5_umt5-xxl-enc-bf16.pth", weights_only=True))
    rows = t5["shared.weight"]  # spiece.model's ids go on with 300 sentinels, which no prompt here has
    t5["shared.weight"] = torch.cat([rows, torch.zeros(300, rows.shape[1], dtype=rows.dtype)])
    files["t5"] = tmp_path / "umt5.safetensors"
    save_file({**t5, "spiece_model": torch.from_numpy(spiece.copy())}, files["t5"])
    files["tiny"] = tmp_path / "taew2_1.safetensors"
    save_file({k: x.half() for k, x in torch.load(root / "taew2_1.pth", weights_only=True).items()}, files["tiny"])
    for file in files.values():
        assert cfjax("convert", "convert.py:dmd", tmp_path / "run", source=file, **kept) == 0
    keys = {"prompts": root / "prompts.txt", "seed": 5, "batch": 2}
    assert generate(tmp_path, tmp_path / "out", run="run", **keys) == 0
    pairs = zip(written(tmp_path / "out", ".safetensors"), written(whole, ".safetensors"), strict=True)
    errors = [relative(read_latents(one), read_latents(other)) for one, other in pairs]
    print("latents of float8 weights against float32's:", *(f"{error:.1e}" for error in errors))
    assert all(1e-4 < error < 0.2 for error in errors)


def test_weights_may_rest_in_int8(root, whole, tmp_path, capsys):
    """A quarter of float32's bytes in the blocks' kernels; a set goes on as it was begun."""
    opened = open_run(str(root / "dmd"), storage="int8")
    kernels = {n: x for n, x in named_leaves(opened.model).items() if n.startswith("blocks/") and "kernel" in n}
    sizes = {str(x.dtype): sum(y.size for y in kernels.values() if y.dtype == x.dtype) for x in kernels.values()}
    assert sizes["int8"] > 0.9 * sum(sizes.values()) and sizes.keys() == {"int8", "float32"}  # its scales
    keys = {"prompts": root / "prompts.txt", "seed": 5, "batch": 2}
    assert generate(root, tmp_path / "out", storage="int8", **keys) == 0
    pairs = zip(written(tmp_path / "out", ".safetensors"), written(whole, ".safetensors"), strict=True)
    errors = [relative(read_latents(one), read_latents(other)) for one, other in pairs]
    assert all(1e-4 < error < 0.05 for error in errors)
    capsys.readouterr()
    assert generate(root, tmp_path / "out", resume=True, **keys) == 2
    assert "its videos were made with run.storage='int8', now it is None" in capsys.readouterr().err
    print("latents of int8 weights against the run's own:", *(f"{error:.1e}" for error in errors))


def test_a_lora_is_merged_as_the_run_is_opened(root, tmp_path, capsys):
    """The videos of the run that `convert` makes with the same LoRA; a set goes on with its own LoRA alone."""
    make = torch.Generator().manual_seed(2)
    pairs = {"lora_A.weight": (4, 48), "lora_B.weight": (48, 4)}
    file = tmp_path / "lora.safetensors"
    save_file(
        {f"blocks.{i}.self_attn.q.{k}": torch.randn(s, generator=make) for i in (0, 1) for k, s in pairs.items()}, file
    )
    keys, world = {"prompt": PROMPTS[0], "seed": 5}, root / "wan" / "world"
    made = dict(source=root / "dmd.pt", world=world, progress=False, latents="(6,4,4)", lora=f"{file}:0.5")
    assert cfjax("convert", "convert.py:dmd", tmp_path / "merged", **made) == 0
    assert generate(root, tmp_path / "one", lora=f"{file}:0.5", **keys) == 0
    assert generate(root, tmp_path / "other", run=str(tmp_path / "merged"), **keys) == 0
    (one,), (other,) = (written(tmp_path / name, ".safetensors") for name in ("one", "other"))
    np.testing.assert_array_equal(read_latents(one), read_latents(other))
    (said,) = json.loads((tmp_path / "one" / "settings.json").read_text())["run"]["lora"]
    assert (said["file"], said["weight"], len(said["sha256"])) == ("lora.safetensors", 0.5, 16)
    capsys.readouterr()
    assert generate(root, tmp_path / "one", lora=f"{file}:0.25", resume=True, **keys) == 2
    assert "its videos were made with run.lora=" in capsys.readouterr().err
    assert generate(root, tmp_path / "none", lora=tmp_path / "nothing.pt", **keys) == 2
    assert "nothing.pt: no such file or folder; --config.lora names a LoRA" in capsys.readouterr().err


def test_latents_of_another_codec_are_told_before_sampling(root, tmp_path, capsys):
    """Wan2.2's 48 channels in Wan2.1's world."""
    write_config(tmp_path, in_dim=48, out_dim=48)
    wide = save_safetensors(tmp_path, "ti2v", dit_weights(3, in_dim=48, out_dim=48))
    assert cfjax("convert", "convert.py:dmd", tmp_path / "run", source=wide, progress=False, latents="(6,4,4)") == 0
    world = root / "wan" / "world"
    assert generate(tmp_path, tmp_path / "out", run="run", world=world, prompt="A cat") == 2
    assert "takes latents of 48 channels and makes 48, the codec of" in capsys.readouterr().err


def test_tiles_overlap_by_a_quarter(root):
    run = open_run(str(root / "wan"), parts=WorldParts(with_text=False))
    decode = tiled_decoder(ConfigDict({"tile": 256}), run)
    assert decode.func is decode_tiled and decode.args == (run.world.codec,)
    assert decode.keywords == {"tile": (256, 256), "stride": (192, 192), "frames": 1}
    assert tiled_decoder(ConfigDict({"tile": 0}), run) is None


@pytest.mark.parametrize(("sampler", "encoded"), [(ManyStep(), ["four", "bad"]), (FewStep(), ["four"])])
def test_a_guided_sampler_gets_the_negative_prompt(sampler, encoded, monkeypatch, tmp_path):
    """Encoded together with the prompts, in one loading of the encoder; a few-step sampler has no use for it."""
    asked: list[list[str]] = []
    monkeypatch.setattr("cfjax.generate.fill", lambda load, texts, captions: asked.append(captions))
    job: Any = SimpleNamespace(
        run=SimpleNamespace(world=SimpleNamespace(load_text=None)), sampler=sampler, negative_prompt="bad"
    )
    encode_texts(job, TextCache(tmp_path, "", 8), ["four"])
    assert asked == [encoded]


# ---- opening a run


def test_weights_that_rest_in_bfloat16_are_the_same_network(root):
    """What enters a product in bfloat16 anyway is kept in it: not a bit of the flow changes."""
    parts = WorldParts("tiny_vae", with_text=False)
    loaded = open_run(str(root / "dmd"), precision="bfloat16", parts=parts).model
    wide = load_role(root / "dmd", "student", placed_template(lambda: Wan(loaded.config, jax.random.key(0))))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"bfloat16", "float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    latents, text = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 2, 4, 4, 16), (1, 8, 32)]))

    @jax.jit
    def flow(model, latents, text):
        return model(latents, jnp.full((1, 2), 0.7), embed_text(model, text))

    np.testing.assert_array_equal(flow(loaded, latents, text), flow(wide, latents, text))
    moved = [pattern for pattern, rest in STORAGE_DTYPES if rest == "compute"]
    assert len(moved) == 3


def test_a_run_shows_its_sizes_itself(run):
    assert (run.stage, run.step, run.latent_shape, run.averaged) == ("dmd", 0, (6, 4, 4, 16), False)
    assert (run.model.config.dim, run.model.config.text_dim, run.model.config.remat) == (48, 32, "none")
    assert run.world.text_width == 32 and run.world.fps == 16 and "过曝" in run.world.negative_prompt


def test_runs_trained_here_open_too(root, run, tmp_path):
    """With a world that the record names or the flag; the sizes are the record's, the weights averaged or not."""
    meta = read_meta(root / "dmd")
    meta["config"]["ema"] = {"student": {"decay": 0.99, "start": 0}}
    store = CheckpointStore(tmp_path / "run")
    state = {"params": {"student": run.model}, "ema": {"student": jax.tree.map(lambda x: 2 * x, run.model)}}
    store.save(7, state, None, {**meta, "world_path": "", "config": {**meta["config"]}})
    store.close()
    parts = WorldParts(with_text=False)
    where = {"world": str(root / "wan" / "world"), "parts": parts, "precision": "float32"}
    with pytest.raises(UserError, match=r"has no Wan world .* name one with --config\.world=FOLDER"):
        open_run(str(tmp_path / "run"))
    for ema, factor in ((True, 2), (False, 1)):
        opened = open_run(str(tmp_path / "run"), ema=ema, **where)
        assert (opened.step, opened.averaged) == (7, ema)
        jax.tree.map(lambda a, b, k=factor: np.testing.assert_array_equal(a, k * b), opened.model, run.model)


# ---- mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"height": 40}, "height=40: needs a multiple of 16 pixels; use 32 or 48"),
        ({"frames": 20}, "frames=20: blocks of 3 latent frames at 4 pixel frames each do not make it; use 9 or 21"),
        ({"expect__stage": "ar_diffusion"}, "holds stage 'dmd', not stage='ar_diffusion'"),
        ({"expect__block_frames": 1}, "generates blocks of 3, not block_frames=1"),
        ({"run": "wan", "expect__block_frames": 3}, "is bidirectional, not block_frames=3"),
        ({"run": "wan", "window": 9}, "window: this run is bidirectional"),
        ({"window": 2}, "blocks.window=2 must hold the sink and one block: at least 3"),
        ({"run": "wan", "image": "x.png"}, "is bidirectional: it makes all frames at once"),
        (
            {"image": "x.png"},
            "1 given latent frames end inside a block: give a multiple of 3, or --config.independent_first",
        ),
        ({"image": "x.png", "video": "x.mp4"}, "image and video are both given"),
        ({"image": "x.png", "independent_first_frame": True, "frames": 13}, "x.png': cannot read the picture"),
        ({"sampler__guidance": 3.0}, "has a few-step sampler, which has no such setting"),
        ({"decoder": "taehv"}, "decoder='taehv': use vae or tiny_vae"),
        ({"tile": 64}, "only decoder=vae of a Wan world decodes in tiles"),
        ({"world": "nowhere"}, "no Wan world here"),
        ({"seed": -1}, "seed=-1: use 0 to 4294967295"),
        ({"batch": 0}, "batch=0: use 1 or more"),
        ({"fps": 0.0}, "fps=0.0: use 0.001 to 1000"),
        ({"scale": 0}, "scale=0: use 1 to 16384"),
        ({"scale": 2000}, "scale=2000: H.264 takes no frames of 64000 x 64000 pixels"),
        ({"fit": "crop"}, "fit='crop': use cover or stretch"),
        ({"run": "wan", "sampler__solver_steps": -1}, "-1"),
    ],
)
def test_mistakes_are_reported_in_one_line(root, tmp_path, capsys, keys, message):
    assert generate(root, tmp_path / "out", **keys) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sized(tmp_path) -> Path:
    """A folder with a video of 9 frames and latents that do not fit."""
    write_mp4(tmp_path / "short.mp4", np.zeros((9, SIDE, SIDE, 3), np.uint8), fps=16)
    np.savez(tmp_path / "few.npz", latents_FHWC=np.zeros((2, 4, 4, 16), np.float32))
    np.savez(tmp_path / "wide.npz", latents_FHWC=np.zeros((3, 4, 6, 16), np.float32))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("short.mp4", "too short: 9 of 21 frames at 16 per second"),
        ("few.npz", "holds latents (2, 4, 4, 16); needs 6 or more of (4, 4, 16)"),
        ("wide.npz", "holds latents (3, 4, 6, 16); needs 6 or more of (4, 4, 16)"),
        ("nowhere.npz", "nowhere.npz"),
        ("nowhere.mp4", "nowhere.mp4"),
    ],
)
def test_what_videos_go_on_from_is_read_before_the_weights(root, sized, capsys, monkeypatch, file, message):
    monkeypatch.delattr("cfjax.generate.load_weights")
    assert generate(root, sized / "out", video=sized / file, given_frames=6, frames=33) == 2
    assert message in capsys.readouterr().err and not (sized / "out").exists()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of pictures: two whole ones, half of one, and a text that calls itself one."""
    for n, name in enumerate(("a.png", "b.png")):
        noise = np.random.default_rng(n).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:1500])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def requests(folder: Path, *rows: tuple[str, str]) -> dict[str, object]:
    """The keys that ask for prompts with their pictures of `folder`."""
    lines = [json.dumps({"prompt": prompt, "image": str(folder / image)}) + "\n" for prompt, image in rows]
    (folder / "requests.jsonl").write_text("".join(lines))
    return {"prompts": folder / "requests.jsonl", "frames": 13, "independent_first_frame": True}


def test_all_faults_of_a_file_are_reported_before_the_weights_are_read(root, pictures, capsys, monkeypatch):
    """Each by its row, in one line, the first ones of many; a picture that several rows name counts once."""
    monkeypatch.delattr("cfjax.generate.load_weights")
    rows = [("A cat", "a.png"), ("A cat", "half.png"), ("A dog", "nowhere.png"), ("A cow", "b.png")]
    keys = requests(pictures, *rows, ("A cat", "text.png"), ("A bird", "half.png"), ("A fish", "away.png"))
    assert generate(root, pictures / "out", **keys) == 2
    error = capsys.readouterr().err
    assert "requests.jsonl, 5 of 7 requests: line 2 and 1 more: " in error and error.count("\n") == 1
    assert (
        "half.png': " in error and "; line 3: " in error and "; line 5: " in error and error.endswith("; and 1 more\n")
    )
    assert not (pictures / "out").exists()
    assert generate(root, pictures / "out", videos=2, **requests(pictures, *rows[:2])) == 2
    assert "requests.jsonl, 2 of 4 requests: line 2: image=" in capsys.readouterr().err


def test_a_corrected_file_goes_on_and_a_picture_counts_by_its_content(root, pictures, capsys):
    """Videos of rows that stay are kept under their new numbers; another picture under the old name is told."""
    first, second, third = ("A cat", "a.png"), ("A cat", "b.png"), ("A cat", "c.png")
    out = pictures / "out"
    assert generate(root, out, **requests(pictures, first, second)) == 0
    made = {file.name: file.read_bytes() for file in written(out, ".mp4") + written(out, ".safetensors")}
    Image.open(pictures / "b.png").rotate(90).save(pictures / "c.png")
    capsys.readouterr()
    assert generate(root, out, resume=True, **requests(pictures, second, first, third)) == 0
    assert " has 2 of 3 videos; going on with" in capsys.readouterr().out
    # The prompt and the seed are the same: the names differ in their numbers alone.
    now = {file.name: file.read_bytes() for file in written(out, ".mp4") + written(out, ".safetensors")}
    for kind in ("mp4", "safetensors"):
        names = [f"00{n}_a_cat_seed0.{kind}" for n in range(3)]
        assert (now[names[0]], now[names[1]]) == (made[names[1]], made[names[0]]) != now[names[2]]
    assert len(now) == 6 and written(out, ".jsonl")[0].read_text().count("\n") == 3
    Image.open(pictures / "c.png").rotate(90).save(pictures / "a.png")
    keys = requests(pictures, second, first, third)
    assert generate(root, out, resume=True, **keys) == 2
    error = capsys.readouterr().err
    assert (
        "001_a_cat_seed0.mp4 and 1 more would be replaced: " in error and "made for another prompt or picture" in error
    )
    assert {file.name: file.read_bytes() for file in written(out, ".mp4") + written(out, ".safetensors")} == now
    assert generate(root, out, resume=True, overwrite=True, **keys) == 0
    assert (out / "001_a_cat_seed0.mp4").read_bytes() != now["001_a_cat_seed0.mp4"]
    assert (out / "000_a_cat_seed0.mp4").read_bytes() == now["000_a_cat_seed0.mp4"]
    assert generate(root, pictures / "again", **keys) == 0
    for file in written(out, ".mp4"):
        assert (pictures / "again" / file.name).read_bytes() == file.read_bytes()


def test_many_pictures_need_one_encoder(root, pictures, monkeypatch):
    """Beside another decoder the Wan VAE is read once for all of them."""
    loads = []
    load = importlib.import_module("cfjax.worlds.wan").load_codec
    monkeypatch.setattr("cfjax.worlds.wan.load_codec", lambda *args: loads.append(args) or load(*args))
    assert generate(root, pictures / "out", **requests(pictures, ("A cat", "a.png"), ("A dog", "b.png"))) == 0
    assert [args[1] for args in loads] == ["tiny_vae", "vae"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests(root, tmp_path, monkeypatch):
    """Each with a prompt and a picture of its own. All is real but the network and H.264."""
    verb, made, held = importlib.import_module("cfjax.generate"), itertools.count(), []
    rng = np.random.default_rng(0)
    for n in range(300):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(tmp_path / f"{n}.png")
    times = Times(0.1, [0.1] * 7, [0.1] * 7, 0.2)

    def clips(pipeline: Any, text_BSE: np.ndarray, *_: Any, given_BFHWC: np.ndarray, **__: Any) -> Clips:
        assert text_BSE.shape[0] == 1 and given_BFHWC.shape == (1, 1, 4, 4, 16)
        if next(made) in (10, 110, 210):
            gc.collect()
            held.append((tracemalloc.get_traced_memory()[0], sum(x.nbytes for x in jax.live_arrays())))
        return Clips(np.zeros((1, 13, SIDE, SIDE, 3), np.uint8), np.zeros((1, 4, 4, 4, 16), np.float32), times)

    monkeypatch.setattr("cfjax.experiment.batches.make_clips", clips)
    monkeypatch.setattr(verb, "write_mp4", lambda path, *args, **kwargs: path.write_bytes(b"mp4"))
    tracemalloc.start()
    keys = requests(tmp_path, *((f"A cat, number {n}", f"{n}.png") for n in range(300)))
    assert generate(root, tmp_path / "out", **keys) == 0
    tracemalloc.stop()
    host, device = zip(*held, strict=True)
    # A row of text is 8 kB, of pictures 24 kB, a clip 40 kB, its latents 4 kB, the given ones 1 kB.
    growth = (host[2] - host[1]) / 100
    print(f"held per request: {growth:.0f} bytes")
    assert growth < 500 and device[2] == device[1]
    assert len(list((tmp_path / "out").glob("contact_sheet_00?.png"))) == 3


def test_what_is_there_is_not_replaced(root, whole, capsys):
    assert generate(root, whole, prompt="|".join(PROMPTS), seed=5) == 2
    error = capsys.readouterr().err
    assert "and 6 more would be replaced; choose another --workdir or --config.overwrite=True" in error
    assert "; --config.resume=True goes on with what is there" in error


def test_a_run_belongs_to_its_world(root, tmp_path, capsys):
    """Another tokenizer is another world."""
    world = tmp_path / "world"
    shutil.copytree(root / "wan" / "world", world)
    file = world / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert generate(root, tmp_path / "out", world=world) == 2
    assert "was trained in another world than" in capsys.readouterr().err
    shutil.rmtree(world / "tiny_vae")
    assert generate(root, tmp_path / "out", world=world) == 2
    assert "has no tiny_vae; add one with cfjax convert" in capsys.readouterr().err
