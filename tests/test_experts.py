"""Wan2.2-A14B, text and image to video: diffusers' pipelines of both experts, and the verb on two runs."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from cfjax.comparison.diffusers_sampling import Pipeline, wan_scheduler
from cfjax.comparison.twins import dit_twin, from_torch, to_torch, vae_twin
from cfjax.conversion.vae import DIFFUSERS, export_vae
from cfjax.conversion.wan import export_wan
from cfjax.core.errors import UserError
from cfjax.core.quantize import is_quantized
from cfjax.data.requests import read_image
from cfjax.experiment.experts import open_high_noise, with_high_noise
from cfjax.experiment.runs import open_run
from cfjax.models.experts import Experts, picture_condition, with_picture
from cfjax.models.vae import VAEConfig, make_vae
from cfjax.rollout.generate import ManyStep, generate
from cfjax.rollout.stream import seeded_noise
from tests.commands import cfjax
from tests.synthetic import (
    as_torch,
    dit_weights,
    save_pt,
    save_safetensors,
    write_causal_forcing_pt,
    write_config,
    write_wan_folder,
)
from tests.tiny import CONFIG, TEXT_LEN, normal, random_weights, relative, text, tiny

BOUNDARY = 0.875
HIGH = random_weights(CONFIG, 5)
NEGATIVE = normal(102, (TEXT_LEN, CONFIG.text_dim))
sample = jax.jit(generate, static_argnames=("sampler", "blocks"))


def pair(boundary: float = BOUNDARY, guidance: float = 4.0) -> Experts:
    return Experts(tiny(), HIGH, boundary, guidance)


def sampled(model, sampler: ManyStep) -> jax.Array:
    return sample(model, normal(1), text(), NEGATIVE, jax.random.key(0), sampler=sampler, blocks=None)


def test_the_pipeline_of_diffusers_makes_the_same_latents():
    """Three steps of six are above the boundary, guided by 4; the rest by 3."""
    sampler = ManyStep(steps=6)
    levels = sampler.grid()[1]
    assert 0 < sum(levels >= BOUNDARY) < len(levels)
    low, high = (dit_twin(CONFIG, export_wan(model)) for model in (tiny(), HIGH))
    pipe = Pipeline(None, None, None, wan_scheduler(sampler.shift), high, low, boundary_ratio=BOUNDARY)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipe(
            height=32,
            width=32,
            num_frames=21,
            latents=to_torch(normal(1)),
            prompt_embeds=torch.tensor(np.asarray(text())),
            negative_prompt_embeds=torch.tensor(np.asarray(jnp.broadcast_to(NEGATIVE[None], text().shape))),
            output_type="latent",
            return_dict=False,
            num_inference_steps=sampler.steps,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
        )[0]
    error = relative(sampled(pair(), sampler), jnp.asarray(from_torch(theirs)))
    print(f"largest difference {error:.1e} of the largest latent")
    assert error < 1e-4


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return file


def test_image_to_video_is_that_of_diffusers(picture):
    """36 channels in: the noisy latents, a mask of the first frame, and the latents of the picture before grey."""
    config, sampler = replace(CONFIG, in_dim=36, out_dim=16), ManyStep(steps=4)
    low, high = random_weights(config, 6), random_weights(config, 7)
    vae = make_vae(VAEConfig(base_dim=4), jax.random.key(0))
    noise = normal(3, (1, 2, 4, 4, 16))
    theirs_vae = vae_twin(vae.config, export_vae(vae, DIFFUSERS))
    twins = [dit_twin(config, export_wan(model)) for model in (high, low)]
    parts = {"vae": theirs_vae, "transformer": twins[0], "transformer_2": twins[1], "boundary_ratio": 0.9}
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "image_processor", "image_encoder"))
    pipe = WanImageToVideoPipeline(**nothing, scheduler=wan_scheduler(sampler.shift), **parts)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipe(
            image=Image.open(picture),
            height=32,
            width=32,
            num_frames=5,
            latents=to_torch(noise),
            prompt_embeds=torch.tensor(np.asarray(text()[:1])),
            negative_prompt_embeds=torch.tensor(np.asarray(NEGATIVE[None])),
            output_type="latent",
            return_dict=False,
            num_inference_steps=sampler.steps,
            guidance_scale=3.5,
        )[0]
    video = jnp.zeros((1, 5, 32, 32, 3)).at[0, 0].set(read_image(str(picture), 32, 32, "cover")[0])
    condition = picture_condition(jax.jit(lambda v, x: v.encode(x))(vae, video))
    model = with_picture(Experts(low, high, 0.9, 3.5), condition)
    guided = replace(sampler, guidance=3.5)
    made = sample(model, noise, text()[:1], NEGATIVE, jax.random.key(0), sampler=guided, blocks=None)
    error = relative(made, jnp.asarray(from_torch(theirs)))
    print(f"largest difference {error:.1e} of the largest latent")
    assert error < 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`low` with the world, `high` of other weights in it, and a causal run."""
    root = tmp_path_factory.mktemp("experts")
    quiet = {"progress": False, "latents": "(2,4,4)"}
    assert cfjax("convert", "convert.py", root / "low", source=write_wan_folder(root / "r", shards=1), **quiet) == 0
    world = root / "low" / "world"
    file = save_pt(root / "high.pt", as_torch(dit_weights(9)))
    assert cfjax("convert", "convert.py", root / "high", source=file, world=world, **quiet) == 0
    file = write_causal_forcing_pt(root / "dmd.pt")
    assert cfjax("convert", "convert.py:dmd", root / "dmd", source=file, world=world, **quiet) == 0
    return root


def test_generate_takes_the_second_run(root, tmp_path):
    sizes = {"height": 32, "width": 32, "frames": 5, "sampler__solver_steps": 4, "precision": "float32"}
    asked = {"run": root / "low", "high_noise__run": root / "high", "high_noise__guidance": 4.0, "seed": 2}
    keys = {**sizes, **asked, "save_latents": True, "progress": False, "prompt": "A cat"}
    assert cfjax("generate", "generate.py:wan", tmp_path / "out", **keys) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    low, high = (open_run(str(root / name), precision="float32") for name in ("low", "high"))
    noise, _ = seeded_noise(np.array([2], np.uint32))(0, (1, 2, 4, 4, 16), 1)
    rows, negative = low.world.encode_prompts(["A cat"]), low.world.negative_text_SE()
    model = Experts(low.model, high.model, BOUNDARY, 4.0)
    expected = sample(model, noise, rows, negative, jax.random.key(0), sampler=ManyStep(steps=4), blocks=None)
    assert relative(load_file(file)["latents_FHWC"], expected[0]) < 1e-4
    record = json.loads((tmp_path / "out" / "settings.json").read_text())["run"]["high_noise"]
    assert (record["boundary"], record["guidance"]) == (BOUNDARY, 4.0) and record["weights"]


def test_both_rest_in_eight_bits(root):
    run, own = open_run(str(root / "low"), storage="int8"), {"lora": "", "ema": True, "world": "", "decoder": "vae"}
    asked = {"run": str(root / "high"), "boundary": BOUNDARY, "guidance": -1.0}
    c = ConfigDict({**own, "high_noise": asked, "precision": "", "attention": "", "storage": "int8"})
    model = with_high_noise(run, open_high_noise(c, run, run.sampler)).model
    kernels = [sum(map(is_quantized, jax.tree.leaves(one, is_leaf=is_quantized))) for one in (model.low, model.high)]
    assert kernels[0] == kernels[1] > 0
    rows, negative = run.world.encode_prompts(["A cat"]), run.world.negative_text_SE()
    made = partial(generate, sampler=run.sampler, blocks=None)
    assert jax.eval_shape(made, model, normal(1, (1, 2, 4, 4, 16)), rows, negative, jax.random.key(0)).shape[1] == 2


def test_what_is_no_pair_is_refused(root, tmp_path, capsys):
    keys = {"height": 32, "width": 32, "frames": 9, "progress": False, "prompt": "A cat"}
    for run, other, words in (
        ("dmd", "high", "generates block by block; two experts make all frames at once"),
        ("low", "dmd", "is not of the kind and sizes of run="),
        ("low", "none", "high_noise.run='"),
    ):
        capsys.readouterr()
        asked = {"run": root / run, "high_noise__run": root / other}
        assert cfjax("generate", "generate.py:wan", tmp_path / run, **asked, **keys) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_image_to_video_by_the_verb(root, tmp_path, picture, capsys):
    """Converted, back out as it was, generated from with a picture, and refused without one."""
    taken = {"in_dim": 36, "out_dim": 16}
    folder, quiet = tmp_path / "i2v", {"progress": False, "latents": "(2,4,4)"}
    folder.mkdir()
    write_config(folder, model_type="i2v", **taken)
    save_safetensors(folder, "diffusion_pytorch_model", weights := dit_weights(11, **taken))
    world = {"world": root / "low" / "world"}
    assert cfjax("convert", "convert.py", tmp_path / "run", source=folder, **world, **quiet) == 0
    assert (
        cfjax(
            "convert", "convert.py", tmp_path / "back", source=tmp_path / "run", parts="dit", to="safetensors", **quiet
        )
        == 0
    )
    again = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "i2v"
    assert all(np.array_equal(again[name], x) for name, x in weights.items())
    keys = {"height": 32, "width": 32, "frames": 5, "sampler__solver_steps": 2, "precision": "float32"}
    asked = {"run": tmp_path / "run", "save_latents": True, "progress": False, "prompt": "A cat"}
    assert cfjax("generate", "generate.py:wan", tmp_path / "no", **keys, **asked) == 2
    assert "is image to video: give each of its prompts a picture" in capsys.readouterr().err
    assert cfjax("generate", "generate.py:wan", tmp_path / "out", image=picture, **keys, **asked) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    run = open_run(str(tmp_path / "run"), precision="float32")
    video = np.zeros((1, 5, 32, 32, 3), np.float32)
    video[0, 0] = read_image(str(picture), 32, 32, "cover")[0]
    noise, _ = seeded_noise(np.zeros(1, np.uint32))(0, (1, 2, 4, 4, 16), 1)
    with pytest.raises(UserError, match="is image to video: it needs a picture; give image="):
        run.generate(["A cat"])
    rows, negative = run.world.encode_prompts(["A cat"]), run.world.negative_text_SE()
    model = with_picture(run.model, picture_condition(run.world.encode(jnp.asarray(video))))
    expected = sample(model, noise, rows, negative, jax.random.key(0), sampler=ManyStep(steps=2), blocks=None)
    assert relative(load_file(file)["latents_FHWC"], expected[0]) < 1e-4


def test_a_diffusers_folder_of_two_is_converted_in_parts(root, tmp_path, capsys):
    folder, quiet = tmp_path / "pipeline", {"progress": False}
    assert cfjax("convert", "convert.py", folder, source=root / "low", to="diffusers", **quiet) == 0
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    capsys.readouterr()
    assert cfjax("convert", "convert.py", tmp_path / "run", source=folder, **quiet) == 2
    assert "convert its folders transformer (high noise) and transformer_2 one by one" in capsys.readouterr().err
    for source, parts in ((folder, "vae,text_encoder"), (folder / "transformer_2", "")):
        assert cfjax("convert", "convert.py", tmp_path / "run", source=source, parts=parts, **quiet) == 0
    assert open_run(str(tmp_path / "run"), with_model=False).world.fingerprint()
