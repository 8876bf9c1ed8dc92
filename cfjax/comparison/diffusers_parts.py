"""Checks of the autoencoder, the text encoder and its tokenizer against diffusers and transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualUpBlock
from diffusers.pipelines.wan.pipeline_wan import WanPipeline, prompt_clean
from einops import rearrange
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cfjax.comparison.case import Case, have
from cfjax.comparison.report import MissingPart, Row, compare_arrays
from cfjax.comparison.twins import clip_twin, from_torch, recorded, text_twin, to_torch, vae_twin
from cfjax.conversion import clip, umt5, vae
from cfjax.core.precision import F32
from cfjax.models.clip import CLIPVision
from cfjax.models.text import TextEncoder
from cfjax.models.tokenizer import TOKENIZER_FILE, load_tokenizer
from cfjax.models.umt5 import UMT5, encode_by_layer
from cfjax.models.vae import Decoder, Encoder, WanVAE

Pipeline: Any = WanPipeline  # it takes None for the parts it does without, whatever its signature says
FORWARD = 1e-4  # allowed of a forward pass
CAPTIONS = (
    "A red panda climbs a snowy pine, cinematic light.",
    "",
    "  one\n two\t  three   ",
    "Tom &amp;amp; Jerry &lt;3",
    "Crème brûlée in a naïve café; a dog\u2019s life \u2014 50 %",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001",
    "word " * 600,
)

_encode_step, _decode_step = jax.jit(WanVAE.encode_step), jax.jit(WanVAE.decode_step)


def _streamed(step: Callable[..., Any], model: WanVAE, x: np.ndarray, ends: tuple[int, ...] = ()) -> np.ndarray:
    """A clip coded in steps that end at these frames, and at its last."""
    state, parts = model.init_state(x.shape[0]), []
    for part in np.split(x, ends, axis=1):
        y, state = step(model, jnp.asarray(part), state)
        parts.append(np.asarray(y))
    return np.concatenate(parts, axis=1)


def _layers(half: Encoder | Decoder) -> dict[str, Any]:
    """The layers of half an autoencoder by name, in order."""
    row = lambda name, stages: {f"{name}.{i}": stage for i, stage in enumerate(stages)}
    if isinstance(half, Encoder):
        between = row("encoder.down", half.down) | row("encoder.middle", half.middle)
        return {"encoder.conv_in": half.conv_in, **between, "encoder.head": half.head}
    between = row("decoder.middle", half.middle) | row("decoder.up", half.up)
    return {"decoder.conv_in": half.conv_in, **between, "decoder.head": half.head}


@partial(jax.jit, static_argnames="way")
def _layer_outputs(model: WanVAE, x: jax.Array, way: str) -> dict[str, jax.Array]:
    """Every layer's output for a whole clip: "encode" takes video [..., 3], "decode" latents."""
    config, half = model.config, model.encoder if way == "encode" else model.decoder
    if isinstance(half, Encoder):
        x = model.in_patches(x)
    else:
        mean, std = (
            jnp.asarray(v, jnp.float32)[None, None, None, None] for v in (config.latents_mean, config.latents_std)
        )
        x = model.unmix(x * std + mean, config.precision.compute)
    out = {}
    for name, layer in _layers(half).items():
        x, _ = layer.step(x, None, config.precision)
        out[name] = x
    return out


def _their_layers(twin: Any, half: str) -> dict[str, torch.nn.Module]:
    """Their modules by our layers' names."""
    whole = twin.encoder if half == "encoder" else twin.decoder
    middle = (whole.mid_block.resnets[0], whole.mid_block.attentions[0], whole.mid_block.resnets[1])
    if half == "encoder":
        stages = {f"encoder.down.{i}": stage for i, stage in enumerate(whole.down_blocks)}
    elif isinstance(whole.up_blocks[0], WanResidualUpBlock):
        stages = {f"decoder.up.{i}": level for i, level in enumerate(whole.up_blocks)}
    else:
        flat = [stage for level in whole.up_blocks for stage in (*level.resnets, *(level.upsamplers or ()))]
        stages = {f"decoder.up.{i}": stage for i, stage in enumerate(flat)}
    stages |= {f"{half}.middle.{i}": stage for i, stage in enumerate(middle)}
    return {f"{half}.conv_in": whole.conv_in, **stages, f"{half}.head": whole.conv_out}


def _compare_pass(
    case: Case, model: WanVAE, twin: Any, way: str, x: np.ndarray, run: Callable[[torch.Tensor], torch.Tensor]
) -> list[Row]:
    """One way through the autoencoder: a whole clip; decoding, the same clip as a stream too.

    Layers are compared only if a whole clip differs, as they take memory. Theirs runs a latent frame at a time.
    """
    step = _encode_step if way == "encode" else _decode_step
    ours, theirs = _streamed(step, model, x), from_torch(run(to_torch(x)))
    compare = partial(compare_arrays, "vae", tolerance=case.bound(FORWARD))
    row = compare(way, ours, theirs)
    if not row.ok:
        with recorded(_their_layers(twin, f"{way}r")) as kept:
            run(to_torch(x))
        joined = {name: np.concatenate(parts, axis=2) for name, parts in kept.items()}
        outputs = _layer_outputs(model, jnp.asarray(x), way)
        order = _layers(model.encoder if way == "encode" else model.decoder)  # jit sorts what it returns
        layers = {name: (outputs[name], rearrange(joined[name], "b c f h w -> b f h w c")) for name in order}
        row = compare(way, ours, theirs, layers=layers)
    if way == "encode" or x.shape[1] < 3:
        return [row]
    streamed = _streamed(step, model, x, (2,))
    return [row, compare("decode, streamed", streamed, theirs, note="ours in two steps, two frames first")]


def check_vae(case: Case) -> list[Row]:
    """Encoding and decoding; the latents' mean and deviation are diffusers' own constants on their side."""
    model = have("VAE", case.vae)
    config = model.config
    time, *sides = config.stride
    size = (1 + time * (case.frames - 1), sides[0] * case.height, sides[1] * case.width)
    video = np.tanh(case.normal("video", 1, *size, 3))
    latents = case.normal("latents", 1, case.frames, case.height, case.width, config.z_dim)
    twin = vae_twin(config, vae.export_vae(model, vae.layouts_vae(config)["diffusers"]))
    names = ("latents_mean", "latents_std")
    mean, std = (torch.tensor(twin.config[name]).view(1, -1, 1, 1, 1) for name in names)
    with torch.no_grad():
        encode = lambda x: (twin.encode(x).latent_dist.mode() - mean) / std
        decode = lambda x: twin.decode(x * std + mean).sample
        return [
            *_compare_pass(case, model, twin, "encode", video, encode),
            *_compare_pass(case, model, twin, "decode", latents, decode),
        ]


@partial(jax.jit, static_argnames=("policy",))
def _text_layer(model: UMT5, index: jax.Array, x_BSE: jax.Array, mask_BS: jax.Array, policy: Any) -> jax.Array:
    return model.layer(index, x_BSE, mask_BS, policy)


def _text_layers(model: UMT5, ids_BS: np.ndarray, mask_BS: np.ndarray) -> dict[str, np.ndarray]:
    """The token embedding and every layer's output at real tokens, [n, E]."""
    stream = model.embed(jnp.asarray(ids_BS), F32)
    out = {"token_embedding": np.asarray(stream)[mask_BS]}
    for index in range(model.config.layers):
        stream = _text_layer(model, jnp.int32(index), stream, jnp.asarray(mask_BS), F32)
        out[f"layers.{index}"] = np.asarray(stream)[mask_BS]
    return out


def _their_tokenizer(folder: str) -> tuple[Any, str]:
    """(tokenizer, note). tokenizer.json as it is: transformers 5's `T5Tokenizer` has unknown pieces at id 2, not 3."""
    if (Path(folder) / TOKENIZER_FILE).is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder), ""
    return AutoTokenizer.from_pretrained(folder), "from spiece.model, where transformers 5 has unknown pieces at id 2"


def check_text(case: Case) -> list[Row]:
    """Rows of random tokens under padding masks, layer by layer; with a tokenizer, captions to rows as well."""
    model = have("text encoder", case.text_encoder)
    config, length = model.config, case.text_length
    mask = np.arange(length)[None] < np.array([length, max(length // 2, 1), 1])[:, None]
    ids = np.where(mask, (case.uniform("ids", 3, length) * (config.vocab_size - 2)).astype(np.int32) + 2, 0)
    ours = np.asarray(encode_by_layer(model, jnp.asarray(ids), jnp.asarray(mask), F32))
    outputs = _text_layers(model, ids, mask)
    captions = list(CAPTIONS)
    if case.tokenizer:
        rows_of_captions = TextEncoder(load_tokenizer(case.tokenizer), model, length).encode(captions)
    twin: Any = text_twin(config, umt5.export_umt5(model, umt5.DIFFUSERS))
    del model

    blocks = twin.encoder.block
    modules = {"token_embedding": twin.encoder.embed_tokens, **{f"layers.{i}": b for i, b in enumerate(blocks)}}
    tolerance = case.bound(FORWARD)
    with torch.no_grad(), recorded(modules) as kept:
        theirs = twin(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state.numpy()
    layers = {name: (mine, kept[name][0][mask]) for name, mine in outputs.items()}
    layers["final_norm"] = (ours[mask], theirs[mask])
    what = "rows of random tokens"
    zeroed = theirs * mask[..., None]
    note = "rows of padding are zeroed"
    rows = [compare_arrays("text", what, ours, zeroed, tolerance=tolerance, layers=layers, note=note)]
    if case.tokenizer:
        pipe = Pipeline(tokenizer=_their_tokenizer(case.tokenizer)[0], text_encoder=twin, vae=None, scheduler=None)
        with torch.no_grad():
            theirs = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)[
                0
            ].numpy()
        rows.append(compare_arrays("text", "rows of captions", rows_of_captions, theirs, tolerance=tolerance))
    return rows


def check_tokenizer(case: Case) -> list[Row]:
    """Token ids and masks of cleaned captions, equal."""
    if not case.tokenizer:
        raise MissingPart("there is no tokenizer to compare")
    ids, mask = load_tokenizer(case.tokenizer).encode(CAPTIONS, case.text_length)
    tokenizer, note = _their_tokenizer(case.tokenizer)
    theirs = tokenizer(
        [prompt_clean(caption) for caption in CAPTIONS],
        padding="max_length",
        max_length=case.text_length,
        truncation=True,
        return_tensors="np",
    )
    compare = partial(compare_arrays, "tokenizer", tolerance=0.0, note=note)
    return [compare("ids", ids, theirs["input_ids"]), compare("mask", mask, theirs["attention_mask"])]


def check_image_encoder(case: Case) -> list[Row]:
    """CLIP's features of random pixels, which transformers has among its hidden states."""
    model = have("image encoder", case.image_encoder)
    config = model.config
    pixels = case.normal("pixels", 2, config.image_size, config.image_size, 3)
    ours = np.asarray(jax.jit(CLIPVision.__call__, static_argnames="policy")(model, jnp.asarray(pixels)))
    twin: Any = clip_twin(config, clip.export_clip(model))
    del model
    with torch.no_grad():
        states = twin(torch.tensor(rearrange(pixels, "b h w c -> b c h w")), output_hidden_states=True).hidden_states
    what = "features before the last block"
    return [compare_arrays("image_encoder", what, ours, states[-2].numpy(), tolerance=case.bound(FORWARD))]
