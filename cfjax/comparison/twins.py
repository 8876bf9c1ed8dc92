"""diffusers' and transformers' modules with our weights: built without memory, filled by name, strictly."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from einops import rearrange
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel
from transformers import UMT5Config as TransformersConfig

from cfjax.models.clip import CLIPConfig
from cfjax.models.umt5 import UMT5Config
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import WanConfig

Twin = TypeVar("Twin", bound=torch.nn.Module)
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one table under two names


def filled(twin: Twin, named: dict[str, np.ndarray]) -> Twin:
    """`twin` with the named weights in float32, all of them and no others; empties `named` on the way."""
    state = {}
    for name in list(named):
        state[name] = torch.tensor(np.asarray(named.pop(name)).astype(np.float32))
        if name == EMBEDDING:
            state[TIED] = state[name]
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.eval()


def dit_twin(config: WanConfig, named: dict[str, np.ndarray]) -> WanTransformer3DModel:
    """diffusers' network with weights in its own names (`export_wan`)."""
    with torch.device("meta"):
        twin = WanTransformer3DModel(
            patch_size=(1, *config.patch),
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
            image_dim=config.image_dim or None,
            added_kv_proj_dim=config.dim if config.image_dim else None,
        )
    # Its angles are no weights: no state dict holds them.
    twin.rope = WanRotaryPosEmbed(config.head_dim, twin.config.patch_size, twin.config.rope_max_seq_len)
    return filled(twin, named)


def vae_twin(config: VAEConfig, named: dict[str, np.ndarray]) -> AutoencoderKLWan:
    """diffusers' autoencoder with weights in its own names (`export_vae`), and with its own mean and deviation."""
    with torch.device("meta"):
        twin = AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.multipliers),
            num_res_blocks=config.res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            **(_of_wan_2_2(config) if config.residual else {}),
        )
    return filled(twin, named)


def _of_wan_2_2(config: VAEConfig) -> dict[str, Any]:
    """What diffusers' class has no default of for this codec; its latents' mean and deviation are the config's."""
    pixels = 3 * config.patch**2
    return {
        "decoder_base_dim": config.decoder_base_dim or None,
        "is_residual": True,
        "patch_size": config.patch if config.patch > 1 else None,
        "in_channels": pixels,
        "out_channels": pixels,
        "scale_factor_spatial": config.stride[1],
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
    }


def text_twin(config: UMT5Config, named: dict[str, np.ndarray]) -> UMT5EncoderModel:
    """transformers' encoder with weights in its own names (`export_umt5`)."""
    theirs = TransformersConfig(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        twin = UMT5EncoderModel(theirs)
    return filled(twin, named)


def clip_twin(config: CLIPConfig, named: dict[str, np.ndarray]) -> CLIPVisionModel:
    """transformers' encoder with weights in its own names (`export_clip`)."""
    theirs = CLIPVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        layer_norm_eps=config.eps,
        hidden_act="gelu",
    )
    return filled(CLIPVisionModel(theirs), named)


def to_torch(video_BFHWC: Any) -> torch.Tensor:
    """[B, C, F, H, W], as PyTorch's networks take it."""
    return torch.tensor(rearrange(np.asarray(video_BFHWC), "b f h w c -> b c f h w"))


def from_torch(video: torch.Tensor) -> np.ndarray:
    """Channels last again."""
    return rearrange(video.detach().numpy(), "b c f h w -> b f h w c")


@contextlib.contextmanager
def recorded(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, list[np.ndarray]]]:
    """Fills a dict with the outputs of named modules, one per call made inside."""
    kept: dict[str, list[np.ndarray]] = {name: [] for name in modules}

    def keep(_: Any, __: Any, output: Any, *, name: str) -> None:
        output = output[0] if isinstance(output, tuple) else output
        kept[name].append(output.detach().numpy().copy())

    hooks = [module.register_forward_hook(partial(keep, name=name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
