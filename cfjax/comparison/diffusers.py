"""The same weights through diffusers' and transformers' Wan classes: independent code, in float32 on the CPU.

Weights are converted by the conversion tables, strictly; inputs, noise and timesteps are the same arrays. Each check
makes or reads one part, computes ours, converts the weights, and computes theirs: memory never holds more than a few
copies of one part.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange

from cfjax.comparison.case import Case, have
from cfjax.comparison.diffusers_parts import check_image_encoder, check_text, check_tokenizer, check_vae
from cfjax.comparison.diffusers_sampling import check_sampling, check_unipc
from cfjax.comparison.layers import layer_outputs
from cfjax.comparison.report import Check, Row, compare_arrays, compare_named
from cfjax.comparison.twins import dit_twin, from_torch, recorded, to_torch
from cfjax.conversion.wan import TEXT_LENGTH, export_wan
from cfjax.models.wan import Wan, WanConfig, embed_text

SIGMAS = (1.0, 0.8333333, 0.5, 0.0625)  # where the network is tried
IMAGE_TOKENS = 5  # of the picture that networks which take one are tried on
FLOW, GRADIENT = 1e-4, 1e-3  # allowed of a forward pass, of a gradient


def call_twin(twin: torch.nn.Module, latents: Any, timestep: Any, text_BSE: Any, image_BSE: Any = None) -> torch.Tensor:
    """Their flow, [B, C, F, H, W]; `timestep` [B], or [B, tokens]."""
    rows = torch.tensor(np.asarray(text_BSE))
    image = None if image_BSE is None else torch.tensor(np.asarray(image_BSE))
    times = torch.tensor(np.asarray(timestep, np.float32))
    return twin(to_torch(latents), times, rows, image, return_dict=False)[0]


def dit_modules(twin: Any) -> dict[str, torch.nn.Module]:
    """Their modules by our layers' names, in order."""
    embedder = twin.condition_embedder
    return {
        "patch_embedding": twin.patch_embedding,
        "time_embedding": embedder.time_embedder,
        "time_projection": embedder.time_proj,
        "text_embedding": embedder.text_embedder,
        **{f"blocks.{index}": block for index, block in enumerate(twin.blocks)},
    }


def paired(ours: dict[str, np.ndarray], theirs: dict[str, list[np.ndarray]]) -> dict[str, tuple[Any, Any]]:
    """Layer outputs side by side, in our shapes; for one timestep per sample, which they do not repeat over frames."""
    pairs = {}
    for name, mine in ours.items():
        (other,) = theirs[name]
        if name == "patch_embedding":
            other = rearrange(other, "b d f h w -> b f (h w) d")
        elif name in ("time_embedding", "time_projection"):
            mine = mine[:, 0]
        pairs[name] = (mine, other.reshape(mine.shape) if other.size == mine.size else other)
    return pairs


@jax.jit
def flow_of(
    model: Wan, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_BSE: jax.Array, image_BSE: jax.Array | None = None
) -> jax.Array:
    """The bidirectional network's flow."""
    return model(latents_BFHWC, sigma_BF, embed_text(model, text_BSE, image_BSE))


def _inputs(case: Case, config: WanConfig, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Latents, text rows, and a picture's features for networks that take some.

    With these there are as many text rows as diffusers' class takes for granted (`WanAttnProcessor`).
    """
    latents = case.normal("latents", batch, case.frames, case.height, case.width, config.in_dim)
    if not config.image_dim:
        return latents, case.normal("text", batch, case.text_length, config.text_dim), None
    image = case.normal("image", batch, IMAGE_TOKENS, config.image_dim)
    return latents, case.normal("text", batch, TEXT_LENGTH, config.text_dim), image


def check_dit(case: Case) -> list[Row]:
    """The flow at several noise levels with every layer's output, and with a noise level per frame."""
    model = have("dit", case.dit)
    config = model.config
    latents, text, image = _inputs(case, config, 1)
    per_frame = case.uniform("sigma", 1, case.frames)
    ours, layers = [], []
    for sigma in SIGMAS:
        sigma_BF = np.full((1, case.frames), sigma, np.float32)
        ours.append(np.asarray(flow_of(model, latents, sigma_BF, text, image)))
        layers.append(layer_outputs(model, latents, sigma_BF, text, image_BSE=image))
    ours_per_frame = np.asarray(flow_of(model, latents, per_frame, text, image))

    twin, rows = dit_twin(config, export_wan(model)), []
    del model
    with torch.no_grad():
        for sigma, mine, outputs in zip(SIGMAS, ours, layers, strict=True):
            with recorded(dit_modules(twin)) as kept:
                theirs = from_torch(call_twin(twin, latents, [np.float32(1000) * np.float32(sigma)], text, image))
            pairs = {**paired(outputs, kept), "head": (mine, theirs)}
            what = f"flow at t={1000 * sigma:g}"
            rows.append(compare_arrays("dit", what, mine, theirs, tolerance=case.bound(FLOW), layers=pairs))
        tokens = config.tokens_per_frame(case.height, case.width)
        times = np.repeat(np.float32(1000) * per_frame, tokens, axis=1)
        theirs = from_torch(call_twin(twin, latents, times, text, image))
    note = "theirs: one timestep per token"
    what = "flow, a timestep per frame"
    rows.append(compare_arrays("dit", what, ours_per_frame, theirs, tolerance=case.bound(FLOW), note=note))
    return rows


def check_gradients(case: Case) -> list[Row]:
    """The gradient of a random linear function of the flow, for all parameters and for the inputs."""
    model = have("dit", case.dit)
    config = model.config
    latents, text, image = _inputs(case, config, 2)
    features_BSE = None if image is None else jnp.asarray(image)
    weight, sigma_B = case.normal("weight", *latents.shape[:-1], config.out_dim), np.array([0.9375, 0.25], np.float32)

    @jax.jit
    def gradients(model: Wan, latents: jax.Array, text: jax.Array) -> Any:
        def value(model: Wan, latents: jax.Array, text: jax.Array) -> jax.Array:
            sigma_BF = jnp.broadcast_to(sigma_B[:, None], latents.shape[:2])
            return jnp.sum(model(latents, sigma_BF, embed_text(model, text, features_BSE)) * weight)

        return jax.grad(value, argnums=(0, 1, 2))(model, latents, text)

    ours, ours_latents, ours_text = gradients(model, latents, text)
    twin, ours = dit_twin(config, export_wan(model)), export_wan(ours)
    del model
    video, rows = to_torch(latents).requires_grad_(), torch.tensor(text).requires_grad_()
    features = None if image is None else torch.tensor(image)
    flow = twin(video, torch.tensor(np.float32(1000) * sigma_B), rows, features, return_dict=False)[0]
    (flow * to_torch(weight)).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None}
    assert video.grad is not None and rows.grad is not None
    compare = partial(compare_arrays, "gradients", tolerance=case.bound(GRADIENT))
    return [
        compare_named("gradients", "of all parameters", ours, theirs, tolerance=case.bound(GRADIENT)),
        compare("of the latents", ours_latents, from_torch(video.grad)),
        compare("of the text rows", ours_text, rows.grad.numpy()),
    ]


CHECKS: dict[str, Check[Case]] = {
    "dit": check_dit,
    "gradients": check_gradients,
    "vae": check_vae,
    "text": check_text,
    "tokenizer": check_tokenizer,
    "unipc": check_unipc,
    "sampling": check_sampling,
    "image_encoder": check_image_encoder,
}
