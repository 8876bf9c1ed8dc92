"""Image-to-video networks (36 channels in) block by block: laws, training, generating, a session, plans."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from cfjax import plan
from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.core.errors import UserError
from cfjax.data.requests import read_image
from cfjax.data.sets import open_dataset
from cfjax.experiment.build import build
from cfjax.experiment.pictures import conditioned
from cfjax.experiment.runs import open_run
from cfjax.experiment.stream_plan import record_network, stream_shapes
from cfjax.experiment.streams import with_blank
from cfjax.flow.schedule import sigma_table
from cfjax.models.context import clean_context
from cfjax.models.experts import picture_condition, with_picture
from cfjax.models.wan import embed_text, replay, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.objectives.pictures import with_pictures
from cfjax.rollout.blocks import commit_block, denoise_block, empty_cache
from cfjax.rollout.generate import FewStep, generate_few_step
from cfjax.rollout.stream import Pipeline
from cfjax.training.checkpoint import open_role, read_meta
from tests.commands import ROOT, cfjax
from tests.data.videos import write_video
from tests.synthetic import (
    as_torch,
    dit_weights,
    prefixed,
    save_pt,
    save_safetensors,
    write_config,
    write_wan_folder,
)
from tests.tiny import CONFIG, normal, random_weights, relative, text

CHANNELS, FRAMES, SIDE = 4, 6, 4
TAKES = replace(CONFIG, in_dim=2 * CHANNELS + 4)
BLOCKS = Blocks(2)
SHAPE = (2, FRAMES, SIDE, SIDE, CHANNELS)
PIXELS = 32
QUIET = {"progress": False}


def network():
    return random_weights(TAKES, 3)


def condition() -> jax.Array:
    return picture_condition(normal(7, SHAPE))


def test_a_teacher_forced_pass_is_the_rollout_with_a_cache():
    """And the replay of all blocks, and a condition beside the clean frames as beside the noisy ones."""
    clean, noisy, sigma_BF = normal(1, SHAPE), normal(2, SHAPE), jnp.full((2, FRAMES), 0.5)

    @jax.jit
    def both(network, condition, clean, noisy, text):
        model = with_picture(network, condition)
        kv, cache, parts = embed_text(model, text), empty_cache(model.config, SHAPE, BLOCKS), []
        for start in range(0, FRAMES, 2):
            at, own = jnp.int32(start), slice(start, start + 2)
            parts.append(denoise_block(model, noisy[:, own], jnp.float32(0.5), kv, cache, at, BLOCKS))
            cache = commit_block(model, clean[:, own], kv, cache, at, BLOCKS)
        context = clean_context(model, clean, kv, BLOCKS)
        replayed = replay(model, noisy, sigma_BF, kv, context, BLOCKS)
        whole = teacher_forced(model, noisy, sigma_BF, clean, kv, BLOCKS)
        beside = [jnp.concatenate([x, condition], -1) for x in (noisy, clean)]
        by_hand = teacher_forced(network, beside[0], sigma_BF, beside[1], kv, BLOCKS)
        return whole, jnp.concatenate(parts, axis=1), replayed, by_hand

    whole, *others = both(network(), condition(), clean, noisy, text())
    errors = [relative(other, whole) for other in others]
    print(f"rollout, replay, by hand: {errors}")
    assert max(errors) < 1e-5


def test_a_fused_commit_makes_the_same_video_and_the_condition_counts():
    made = jax.jit(
        lambda network, condition, fused: generate_few_step(
            model := with_picture(network, condition),
            normal(2, SHAPE),
            embed_text(model, text()),
            jax.random.key(0),
            FewStep((1000, 500)),
            BLOCKS,
            fused_commit=fused,
        ),
        static_argnames="fused",
    )
    off, on = (made(network(), condition(), fused=how) for how in ("off", "on"))
    assert relative(on, off) < 1e-5
    assert relative(made(network(), condition().at[:, -1].add(1.0), fused="off")[:, -2:], off[:, -2:]) > 1e-3


def test_the_loss_is_that_of_the_network_with_the_condition_beside_both_halves():
    """By hand, on 12 channels; the mask's and the picture's part of the first kernel have a gradient."""
    config, batch = DiffusionConfig(weighting="uniform"), {"latents_BFHWC": normal(1, SHAPE), "text_BSE": text()}
    batch |= {"negative_text_SE": text()[0], "picture_BFHWC": normal(7, SHAPE)}
    eps, index = normal(9, SHAPE), jnp.repeat(jnp.arange(100, 700, 100).reshape(2, 3), 2, axis=1)
    draws = {"eps_BFHWC": eps, "index_BF": index, "drop_B": jnp.zeros(2, bool)}
    loss = with_pictures(ar_diffusion(config, BLOCKS))
    value = lambda model: loss({"student": model}, batch, jax.random.key(0), draws)[0]

    def by_hand(model):
        sigma_BF = jnp.asarray(sigma_table(1000, 5.0))[index]
        s = sigma_BF[:, :, None, None, None]
        noisy, clean = (1 - s) * batch["latents_BFHWC"] + s * eps, batch["latents_BFHWC"]
        noisy, clean = (jnp.concatenate([x, condition()], axis=-1) for x in (noisy, clean))
        v = teacher_forced(model, noisy, sigma_BF, clean, embed_text(model, text()), BLOCKS)
        return jnp.mean(jnp.square(v - (eps - batch["latents_BFHWC"])))

    (ours, gradient), (theirs, other) = jax.jit(lambda m: [jax.value_and_grad(f)(m) for f in (value, by_hand)])(
        network()
    )
    assert abs(float(ours - theirs)) < 1e-6 * float(theirs)
    rows = gradient.patch_embedding.kernel[...].reshape(TAKES.in_dim, -1)
    assert relative(rows, other.patch_embedding.kernel[...].reshape(TAKES.in_dim, -1)) < 1e-5
    assert bool(jnp.all(jnp.abs(rows[CHANNELS + 4 :]).max(axis=1) > 0)) and bool(jnp.any(rows[CHANNELS : CHANNELS + 4]))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`wan`, a bidirectional 36-channel run in Wan2.1's world, and `set`, two clips with their pictures' latents."""
    root = tmp_path_factory.mktemp("i2v")
    release = write_wan_folder(root / "release", shards=1)
    write_config(release, model_type="i2v", in_dim=36)
    save_safetensors(release, "diffusion_pytorch_model", dit_weights(11, in_dim=36))
    assert cfjax("convert", "convert.py", root / "wan", source=release, latents="(3,4,4)", **QUIET) == 0
    for i in range(2):
        clip = write_video(root / "clips" / f"{i}.mp4", 12, size=(PIXELS, PIXELS))
        clip.with_suffix(".txt").write_text("a cat\n")
    assert precompute(root, "set", pictures=True) == 0
    return root


def precompute(root: Path, name: str, **keys: object) -> int:
    sizes = {"frames": 9, "height": PIXELS, "width": PIXELS, "dtype": "float32"}
    asked = {"source": root / "clips", "world": root / "wan" / "world", "output": root / name}
    flags = [f"--config.{key}={value}" for key, value in {**sizes, **asked, **QUIET, **keys}.items()]
    return main(["precompute", f"--config={ROOT}/configs/precompute.py", *flags])


def training(root: Path) -> dict[str, object]:
    data = {"data__path": root, "data__name": "set", "data__batch_size": 2, "blocks__frames": 1}
    few = {"steps": 1, "sample_every": 0, "sampler__steps": 2}
    own = {"roles__student__init": root / "wan", "roles__student__precision": "float32"}
    return {**data, **few, **own, **QUIET}


@pytest.fixture(scope="module")
def run(root) -> Path:
    """A step of stage 1 from the bidirectional network."""
    assert cfjax("train", "ar_diffusion.py", root / "ar", **training(root)) == 0
    return root / "ar"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)).save(file)
    return file


def pixels(picture: Path) -> np.ndarray:
    return read_image(str(picture), PIXELS, PIXELS, "cover")[0]


def test_records_hold_the_latents_of_each_clips_first_frame_before_grey(root):
    dataset = open_dataset(root / "set")
    record = dataset[0]
    assert record["picture_FHWC"].shape == dataset.latent_shape == (3, 4, 4, 16)
    np.testing.assert_allclose(record["picture_FHWC"][0], record["latents_FHWC"][0], atol=1e-5)
    assert not np.allclose(record["picture_FHWC"][1], record["latents_FHWC"][1], atol=1e-2)
    assert main(["precompute", f"--check={root / 'set'}"]) == 0


def test_stage_1_trains_it_and_its_weights_change(root, run):
    meta = read_meta(run)
    assert meta["models"]["student"]["in_dim"] == 36 and meta["latent_shape"] == [3, 4, 4, 16]
    before, after = (open_role(folder, "student") for folder in (root / "wan", run))
    assert not np.array_equal(before["patch_embedding/kernel"].read(), after["patch_embedding/kernel"].read())


def test_generate_and_a_session_with_a_picture(run, tmp_path, picture):
    keys = {"height": PIXELS, "width": PIXELS, "frames": 9, "precision": "float32", "prompt": "A cat"}
    asked = {"run": run, "save_latents": True, "image": picture, "seed": 3, **QUIET}
    assert cfjax("generate", "generate.py:wan", tmp_path / "out", **keys, **asked) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    made = load_file(file)["latents_FHWC"]
    opened = open_run(str(run), precision="float32")
    session = opened.session("A cat", seed=3, image=pixels(picture))
    blocks = [session.next() for _ in range(3)]
    assert relative(np.concatenate([block.latents_BFHWC for block in blocks], axis=1)[0], made) < 1e-4
    streamed = np.concatenate([block.video_BPHWC for block in blocks], axis=1)
    assert relative(opened.generate(["A cat"], seed=3, image=pixels(picture)), streamed) < 1e-4
    assert relative(opened.generate(["A cat"], seed=3, image=-pixels(picture)), streamed) > 1e-3
    with pytest.raises(UserError, match="it needs a picture; give image="):
        opened.session("A cat")


def test_a_causal_student_from_a_bare_checkpoint(root, tmp_path, picture):
    """A trainer's .pt of 36 channels, said to be a few-step student; and back out as it was."""
    weights = dit_weights(12, in_dim=36)
    source, world = save_pt(tmp_path / "x.pt", {"generator": prefixed(as_torch(weights))}), root / "wan" / "world"
    asked = {"source": source, "world": world, "latents": "(3,4,4)", "experiment__blocks__frames": 1}
    assert cfjax("convert", "convert.py:dmd", tmp_path / "run", **asked, **QUIET) == 0
    keys = {"height": PIXELS, "width": PIXELS, "frames": 9, "precision": "float32", "prompt": "A cat"}
    own = {"run": tmp_path / "run", "image": picture, "fused_commit": "on", **QUIET}
    assert cfjax("generate", "generate.py:wan", tmp_path / "out", **keys, **own) == 0
    back = {"source": tmp_path / "run", "to": "safetensors", "parts": "dit"}
    assert cfjax("convert", "convert.py", tmp_path / "back", **back, **QUIET) == 0
    again = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(again[name], x) for name, x in weights.items())


def test_beyond_the_pictures_frames_its_last_one_stays(run, picture):
    opened = open_run(str(run), with_model=True, precision="float32")
    model = conditioned(opened.model, opened.world, pixels(picture)[None], 3)
    beside = model.beside(jnp.zeros((1, 2, 4, 4, 16)), jnp.int32(2))[..., 16:]
    np.testing.assert_array_equal(beside[:, 0], model.condition[:, 2])
    np.testing.assert_array_equal(beside[:, 1], model.condition[:, 2])


def test_what_it_cannot_is_one_line(root, run, tmp_path, picture, capsys):
    keys = training(root)
    assert precompute(root, "plain") == 0
    capsys.readouterr()
    for config, changes, words in (
        ("ar_diffusion.py", {"data__name": "plain"}, "has no pictures' latents: encode the clips with"),
        (
            "consistency.py",
            {"roles__teacher__init": run, "sampler__steps": "(1000,)"},
            "image-to-video network: these train in stages",
        ),
    ):
        asked = {**keys, **changes}
        assert cfjax("train", config, tmp_path / "x", **asked) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1
    assert precompute(root, "prompts", source=root / "clips" / "0.txt", pictures=True) == 2
    assert "has no pixels to take pictures of" in capsys.readouterr().err


def test_a_plan_counts_the_wider_first_kernel_of_both_halves():
    """Forward, its weights' gradient, and at the most its input's, of 20 more channels of both halves' tokens."""
    flags, flops = {"frames": 9, "height": 64, "width": 64, "text": 8}, {}
    for preset in ("wan_14b", "wan_2_2_i2v_14b"):
        own = {"roles.student.preset": preset, "roles.student.init": "", "blocks.frames": 1, "data.batch_size": 1}
        argv = [f"--config={ROOT}/configs/ar_diffusion.py", *(f"--config.{key}={x}" for key, x in own.items())]
        e = build(parse("plan", argv, description="", extra_flags=plan.FLAGS[1:], default_workdir="w")[0]).with_sizes()
        shapes = plan.shapes_of(e, flags)
        assert shapes.latents == (3, 8, 8, 16)
        flops[preset] = plan.whole_flops(e, shapes, "student", remat=False)
    wider = 2 * (2 * 3 * 16) * (20 * 4) * 5120
    assert 2 * wider <= flops["wan_2_2_i2v_14b"] - flops["wan_14b"] <= 3 * wider


def test_a_stream_of_it_is_planned():
    keys = {"preset": "wan_2_2_i2v_14b", "frames": 9, "height": 64, "width": 64}
    argv = [f"--config={ROOT}/configs/bench.py:wan", *(f"--config.{key}={value}" for key, value in keys.items())]
    c = parse("plan", argv, description="", extra_flags=plan.FLAGS[1:], default_workdir="w")[0]
    run, sizes, _ = stream_shapes(c, 8)
    pipeline = Pipeline(with_blank(run.model, sizes), run.world.codec, run.sampler, run.blocks)
    log, latents = record_network(pipeline, sizes, (1, 8, 4096))
    assert [x.shape for x in latents] == [(1, 3, 8, 8, 16)] and log.calls


@pytest.mark.slow
def test_the_verb_plans_it(root, tmp_path):
    argv = ["plan", f"--config={ROOT}/configs/ar_diffusion.py:mini", "--topology=cpu:1", f"--workdir={tmp_path}"]
    argv += [f"--config.roles.student.init={root / 'wan'}", "--frames=9", "--height=32", "--width=32", "--text=8"]
    assert main([*argv, "--config.blocks.frames=1"]) == 0
    (found,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert found["costs"][0]["flops"] > 0
