"""Wan2.1 I2V 14B, whose cross-attention takes CLIP's features of the picture: against diffusers and transformers, and
by the verbs from a miniature release and from a diffusers folder."""

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
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPVisionModel

from cfjax.comparison.diffusers_sampling import wan_scheduler
from cfjax.comparison.twins import clip_twin, dit_twin, from_torch, to_torch, vae_twin
from cfjax.conversion.clip import export_clip
from cfjax.conversion.vae import DIFFUSERS, export_vae
from cfjax.conversion.wan import export_wan
from cfjax.core.errors import UserError
from cfjax.data.requests import read_image
from cfjax.experiment.runs import open_run
from cfjax.models.clip import MEAN, STD, CLIPConfig, clip_pixels, make_clip
from cfjax.models.experts import picture_condition, with_picture
from cfjax.models.vae import VAEConfig, make_vae
from cfjax.models.wan import embed_text
from cfjax.rollout.generate import ManyStep, generate
from cfjax.rollout.stream import seeded_noise
from cfjax.training.checkpoint import open_role
from cfjax.worlds.wan import check_image_encoder, load_image_encoder
from tests.commands import cfjax
from tests.synthetic import (
    IMAGE,
    as_torch,
    clip_weights,
    dit_weights,
    save_pt,
    save_safetensors,
    write_config,
    write_i2v_folder,
)
from tests.tiny import CONFIG, normal, random_weights, relative

ROWS = 512  # of text: diffusers' class knows the picture's features by what is before so many
TAKES = replace(CONFIG, in_dim=36, out_dim=16, image_dim=10)
CLIP = CLIPConfig(dim=24, ffn_dim=32, heads=2, layers=3, image_size=28, patch=14)
MODEL = random_weights(TAKES, 8)
QUIET = {"progress": False}
FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
sample = jax.jit(generate, static_argnames=("sampler", "blocks"))


@jax.jit
def flow(model, latents, sigma_BF, text, image):
    return model(latents, sigma_BF, embed_text(model, text, image))


def test_flow_and_gradients_are_those_of_diffusers():
    latents, rows, image = normal(1, (2, 2, 4, 4, 36)), normal(2, (2, ROWS, 8)), normal(3, (2, 5, 10))
    sigma_B, weight = jnp.array([0.9375, 0.25]), normal(4, (2, 2, 4, 4, 16))
    twin = dit_twin(TAKES, export_wan(MODEL))
    video, text, features = (torch.tensor(np.asarray(x)).requires_grad_() for x in (to_torch(latents), rows, image))
    theirs = twin(video, torch.tensor(1000 * np.asarray(sigma_B)), text, features, return_dict=False)[0]
    (theirs * to_torch(weight)).sum().backward()

    @partial(jax.value_and_grad, argnums=(0, 4), has_aux=True)
    def value(model, latents, sigma_BF, text, image):
        made = flow(model, latents, sigma_BF, text, image)
        return jnp.sum(made * weight), made

    sigma_BF = jnp.broadcast_to(sigma_B[:, None], (2, 2))
    (_, ours), (model_grad, image_grad) = jax.jit(value)(MODEL, latents, sigma_BF, rows, image)
    error = relative(ours, jnp.asarray(from_torch(theirs)))
    mine, other = export_wan(model_grad), {name: p.grad.numpy() for name, p in twin.named_parameters()}
    assert mine.keys() == other.keys()
    far = {name: float(np.linalg.norm(mine[name] - x) / np.linalg.norm(x)) for name, x in other.items()}
    zero = {name for name in far if name.endswith(("to_k.bias", "add_k_proj.bias")) and far[name] > 1e-4}
    assert features.grad is not None
    image_error = relative(image_grad, jnp.asarray(features.grad.numpy()))
    worst = max(x for name, x in far.items() if name not in zero)
    print(f"flow {error:.1e}, largest gradient {worst:.1e}, the features' {image_error:.1e}, left {zero}")
    assert error < 1e-5 and worst < 1e-4 and image_error < 1e-4


def test_a_network_that_takes_features_needs_them_and_no_other_does():
    with pytest.raises(UserError, match="go with networks that take some"):
        embed_text(MODEL, normal(2, (1, 3, 8)))


def test_the_encoder_is_that_of_transformers():
    model, pixels = random_clip(), normal(5, (2, 28, 28, 3))
    twin = clip_twin(CLIP, export_clip(model))
    with torch.no_grad():
        theirs = twin(torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
    error = relative(jax.jit(lambda m, x: m(x))(model, pixels), jnp.asarray(theirs.numpy()))
    print(f"largest difference {error:.1e} of the largest feature")
    assert error < 1e-5


def random_clip():
    model = make_clip(CLIP, jax.random.key(1))
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(2)
    return jax.tree.unflatten(tree, [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves])


@pytest.mark.parametrize("size", [(40, 72), (20, 17)])
def test_pictures_are_resized_as_the_release_does(size):
    """`CLIPModel.visual`: bicubic, the whole picture made square, without smoothing."""
    picture = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(picture).permute(0, 3, 1, 2), size=(28, 28), mode="bicubic", align_corners=False
    )
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    theirs = ((theirs * 0.5 + 0.5 - mean) / std).permute(0, 2, 3, 1)
    assert relative(clip_pixels(jnp.asarray(picture), 28), jnp.asarray(theirs.numpy())) < 1e-5


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return file


def test_image_to_video_is_that_of_diffusers(picture):
    """The whole pipeline from the features on: condition, guidance, solver."""
    sampler, noise = ManyStep(steps=2, guidance=3.5), normal(3, (1, 2, 4, 4, 16))
    vae, rows, negative = (
        make_vae(VAEConfig(base_dim=4), jax.random.key(0)),
        normal(6, (1, ROWS, 8)),
        normal(7, (ROWS, 8)),
    )
    image = normal(8, (1, 5, 10))
    parts = {"vae": vae_twin(vae.config, export_vae(vae, DIFFUSERS)), "transformer": dit_twin(TAKES, export_wan(MODEL))}
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "image_processor", "image_encoder"))
    pipe = WanImageToVideoPipeline(**nothing, scheduler=wan_scheduler(sampler.shift), **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_image = lambda *_: torch.tensor(np.asarray(image))
    with torch.no_grad():
        theirs = pipe(
            image=Image.open(picture),
            height=32,
            width=32,
            num_frames=5,
            latents=to_torch(noise),
            prompt_embeds=torch.tensor(np.asarray(rows)),
            negative_prompt_embeds=torch.tensor(np.asarray(negative[None])),
            output_type="latent",
            return_dict=False,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
        )[0]
    video = jnp.zeros((1, 5, 32, 32, 3)).at[0, 0].set(read_image(str(picture), 32, 32, "cover")[0])
    model = with_picture(MODEL, picture_condition(jax.jit(lambda v, x: v.encode(x))(vae, video)), image)
    made = sample(model, noise, rows, negative, jax.random.key(0), sampler=sampler, blocks=None)
    error = relative(made, jnp.asarray(from_torch(theirs)))
    print(f"largest difference {error:.1e} of the largest latent")
    assert error < 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`release`, and `wan`, the run and the world that convert makes of it."""
    root = tmp_path_factory.mktemp("clip")
    torch.set_num_threads(1)
    write_i2v_folder(root / "release")
    sizes = {"latents": "(2,4,4)"}
    assert cfjax("convert", "convert.py", root / "wan", source=root / "release", **sizes, **QUIET) == 0
    return root


def test_back_out_to_the_release_and_by_way_of_diffusers(root, tmp_path):
    release, pipeline, again = tmp_path / "release", tmp_path / "pipeline", tmp_path / "again"
    assert cfjax("convert", "convert.py", release, source=root / "wan", to="safetensors", **QUIET) == 0
    assert json.loads((release / "config.json").read_text())["model_type"] == "i2v"
    wanted = {name: x for name, x in clip_weights().items() if name.startswith("visual.") and name != "visual.head"}
    for stem, weights in (("diffusion_pytorch_model", dit_weights(**IMAGE)), (FILE, wanted)):
        found = load_file(release / f"{stem}.safetensors")
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[name], x) for name, x in weights.items())
    assert cfjax("convert", "convert.py", pipeline, source=root / "wan", to="diffusers", **QUIET) == 0
    index = json.loads((pipeline / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    theirs = CLIPVisionModel.from_pretrained(pipeline / "image_encoder", output_loading_info=True)
    assert not theirs[1]["missing_keys"] and not theirs[1]["unexpected_keys"]
    WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    assert cfjax("convert", "convert.py", again, source=pipeline, **QUIET) == 0
    for folder, role in (("", "student"), ("world/image_encoder", "image_encoder")):
        one, other = open_role(root / "wan" / folder, role), open_role(again / folder, role)
        assert one.keys() == other.keys()
        assert all(np.array_equal(x.read(), other[name].read()) for name, x in one.items())


def generated(run: Path, workdir: Path, **keys: object) -> int:
    sizes = {"height": 32, "width": 32, "frames": 5, "sampler__solver_steps": 2, "precision": "float32"}
    asked = {"run": run, "save_latents": True, "prompt": "A cat"}
    return cfjax("generate", "generate.py:wan", workdir, **{**sizes, **asked, **QUIET, **keys})


def test_image_to_video_by_the_verb(root, tmp_path, picture):
    assert generated(root / "wan", tmp_path / "out", image=picture) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    run = open_run(str(root / "wan"), precision="float32")
    video = np.zeros((1, 5, 32, 32, 3), np.float32)
    video[0, 0] = read_image(str(picture), 32, 32, "cover")[0]
    features = load_image_encoder(run.world.folder)(jnp.asarray(video[:, 0]))
    assert features.shape == (1, 5, IMAGE["image_dim"])
    noise, _ = seeded_noise(np.zeros(1, np.uint32))(0, (1, 2, 4, 4, 16), 1)
    model = with_picture(run.model, picture_condition(run.world.encode(jnp.asarray(video))), features)
    rows, negative = run.world.encode_prompts(["A cat"]), run.world.negative_text_SE()
    expected = sample(model, noise, rows, negative, jax.random.key(0), sampler=ManyStep(steps=2), blocks=None)
    assert relative(load_file(file)["latents_FHWC"], expected[0]) < 1e-4


def test_without_clip_one_line_says_how_to_add_it(root, tmp_path, picture, capsys):
    shutil.copytree(root / "release", tmp_path / "half", ignore=shutil.ignore_patterns("models_clip*"))
    run, sizes = tmp_path / "run", {"latents": "(2,4,4)"}
    assert cfjax("convert", "convert.py", run, source=tmp_path / "half", **sizes, **QUIET) == 0
    capsys.readouterr()
    assert generated(run, tmp_path / "out", image=picture) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "has no image_encoder" in line and f"{FILE}.pth" in line
    assert not list((tmp_path / "out").glob("*"))
    assert cfjax("convert", "convert.py", run, source=root / "release" / f"{FILE}.pth", **QUIET) == 0
    check_image_encoder(run / "world", IMAGE["image_dim"])  # what generate asks


def test_what_does_not_go_together_is_refused(root, tmp_path, capsys):
    """Features of another width, and the networks of a first and a last picture."""
    other = {**IMAGE, "image_dim": 12}
    for name, weights, words in (
        ("narrow", dit_weights(**other), "made for a picture's features of 12 channels"),
        (
            "two",
            dit_weights(**IMAGE) | {"img_emb.emb_pos": np.zeros((1, 10, IMAGE["image_dim"]), np.float32)},
            "a first-and-last-frame-to-video model (img_emb.emb_pos)",
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, model_type="i2v", in_dim=36)
        save_safetensors(folder, "diffusion_pytorch_model", weights)
        capsys.readouterr()
        asked = {"source": folder, "world": root / "wan" / "world"}
        assert cfjax("convert", "convert.py", tmp_path / "run", **asked, **QUIET) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_one_encoder_by_its_older_names_and_heads_that_its_config_says(root, tmp_path):
    """transformers' files before its fifth version, with a projection and a buffer of positions beside the weights."""
    pipeline = tmp_path / "pipeline"
    asked = {"source": root / "wan", "to": "diffusers", "parts": "image_encoder"}
    assert cfjax("convert", "convert.py", pipeline, **asked, **QUIET) == 0
    folder = pipeline / "image_encoder"
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in weights)
    more = {"visual_projection.weight": np.zeros((4, 160), np.float32)}
    more["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    (folder / "model.safetensors").unlink()
    save_pt(folder / "pytorch_model.bin", as_torch(weights | more))
    assert cfjax("convert", "convert.py", tmp_path / "run", source=folder, **QUIET) == 0
    one, other = (open_role(run / "world/image_encoder", "image_encoder") for run in (root / "wan", tmp_path / "run"))
    assert all(np.array_equal(x.read(), other[name].read()) for name, x in one.items())
