"""Probes of the clone's copies of Wan's autoencoder, text encoder and tokenizer, through its own wrappers."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cfjax.comparison.case import have
from cfjax.comparison.probe import Arrays, NotInReference, Probe, Subject, from_torch, to_torch
from cfjax.comparison.reference import Reference, load_strictly, uninitialised
from cfjax.comparison.report import MissingPart
from cfjax.conversion.umt5 import export_umt5
from cfjax.conversion.vae import export_vae
from cfjax.core.precision import F32
from cfjax.models.text import TextEncoder
from cfjax.models.tokenizer import TOKENIZER_FILE, load_tokenizer
from cfjax.models.umt5 import encode_by_layer
from cfjax.models.vae import WanVAE

CAPTIONS = (
    "A red panda climbs a snowy pine, cinematic light.",
    "  one\n two\t  three   ",
    "Tom &amp;amp; Jerry &lt;3",
    "Cr\u00e8me br\u00fbl\u00e9e; a dog\u2019s life \u2014 50 %",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001",
    "",
)
WRAPPERS = "utils.wan_wrapper"
_encode, _decode = jax.jit(WanVAE.encode), jax.jit(WanVAE.decode)
_decode_step = jax.jit(WanVAE.decode_step)


def _video(subject: Subject) -> np.ndarray:
    case, config = subject.case, have("vae", subject.case.vae).config
    time, *sides = config.stride
    size = (1 + time * (case.frames - 1), sides[0] * case.height, sides[1] * case.width)
    return np.tanh(case.normal("video", 1, *size, 3))


def _latents(subject: Subject) -> np.ndarray:
    case = subject.case
    return case.normal("vae latents", 1, case.frames, case.height, case.width, have("vae", case.vae).config.z_dim)


def _ours_vae(subject: Subject) -> Arrays:
    vae = have("vae", subject.case.vae)
    latents, state, parts = jnp.asarray(_latents(subject)), vae.init_state(1), []
    for i in range(latents.shape[1]):
        part, state = _decode_step(vae, latents[:, i : i + 1], state)
        parts.append(np.asarray(part))
    return {
        "encode": np.asarray(_encode(vae, _video(subject))),
        "decode": np.asarray(_decode(vae, latents)),
        "decode, streamed": np.concatenate(parts, axis=1),
    }


def _theirs_vae(reference: Reference, subject: Subject) -> Arrays:
    vae = have("vae", subject.case.vae)
    config = vae.config
    if config.z_dim != 16:
        raise NotInReference("the reference normalises 16 latent channels")
    with uninitialised():
        network = reference.module("wan.modules.vae").WanVAE_(
            dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.multipliers),
            num_res_blocks=config.res_blocks, temperal_downsample=list(config.temporal_downsample),
        )  # fmt: skip
    load_strictly(network, export_vae(vae))
    wrappers = reference.module(WRAPPERS)
    wrappers._video_vae = lambda **_: network  # in place of reading wan_models/
    wrapper = wrappers.WanVAEWrapper()
    latents = to_torch(_latents(subject))
    with torch.no_grad():
        encoded = wrapper.encode_to_latent(to_torch(_video(subject)).transpose(1, 2))
        whole = wrapper.decode_to_pixel(latents)
        parts = [wrapper.decode_to_pixel(latents[:, i : i + 1], use_cache=True) for i in range(latents.shape[1])]
    streamed = np.concatenate([from_torch(part) for part in parts], axis=1)
    return {"encode": from_torch(encoded), "decode": from_torch(whole), "decode, streamed": streamed}


def _ids(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [3, S] and their masks: a full row, half a row, EOS alone."""
    case = subject.case
    length, vocabulary = case.text_length, have("text encoder", case.text_encoder).config.vocab_size
    mask = np.arange(length)[None] < np.array([length, max(length // 2, 1), 1])[:, None]
    ids = (case.uniform("ids", 3, length) * (vocabulary - 2)).astype(np.int32) + 2
    return np.where(mask, ids, 0), mask


def _ours_text(subject: Subject) -> Arrays:
    model = have("text encoder", subject.case.text_encoder)
    ids, mask = _ids(subject)
    out = {"rows of random tokens": np.asarray(encode_by_layer(model, jnp.asarray(ids), jnp.asarray(mask), F32))}
    if subject.case.tokenizer:
        encoder = TextEncoder(load_tokenizer(subject.case.tokenizer), model, subject.case.text_length)
        out["rows of captions"] = encoder.encode(CAPTIONS)
    return out


def _theirs_text(reference: Reference, subject: Subject) -> Arrays:
    model = have("text encoder", subject.case.text_encoder)
    config = model.config
    with uninitialised():
        network = reference.module("wan.modules.t5").umt5_xxl(
            encoder_only=True, vocab_size=config.vocab_size, dim=config.dim, dim_attn=config.heads * config.head_dim,
            dim_ffn=config.ffn_dim, num_heads=config.heads, encoder_layers=config.layers, num_buckets=config.buckets,
        )  # fmt: skip
    load_strictly(network, export_umt5(model))
    wrapper_class = reference.module(WRAPPERS).WanTextEncoder
    wrapper = wrapper_class.__new__(wrapper_class)  # its constructor reads wan_models/
    torch.nn.Module.__init__(wrapper)
    wrapper.text_encoder = network.eval()
    ids, mask = (torch.tensor(x).long() for x in _ids(subject))
    wrapper.tokenizer = lambda *_, **__: (ids, mask)
    with torch.no_grad():
        out = {"rows of random tokens": wrapper([""] * 3)["prompt_embeds"].numpy()}
        if subject.case.tokenizer:
            wrapper.tokenizer = _tokenizer(reference, subject)
            out["rows of captions"] = wrapper(list(CAPTIONS))["prompt_embeds"].numpy()
    return out


def _tokenizer(reference: Reference, subject: Subject) -> Any:
    """The clone's tokenizer. It asks for `AutoTokenizer`, which in transformers 5 gives unknown pieces another id."""
    module, folder = reference.module("wan.modules.tokenizers"), subject.case.tokenizer
    if (Path(folder) / TOKENIZER_FILE).is_file():
        module.AutoTokenizer = SimpleNamespace(from_pretrained=PreTrainedTokenizerFast.from_pretrained)
    else:
        module.AutoTokenizer = AutoTokenizer
    return module.HuggingfaceTokenizer(name=folder, seq_len=subject.case.text_length, clean="whitespace")


def _ours_ids(subject: Subject) -> Arrays:
    ids, mask = load_tokenizer(subject.case.tokenizer).encode(CAPTIONS, subject.case.text_length)
    return {"ids": ids, "mask": mask}


def _theirs_ids(reference: Reference, subject: Subject) -> Arrays:
    call = partial(_tokenizer(reference, subject), return_mask=True, add_special_tokens=True)
    ids, mask = call(list(CAPTIONS))
    return {"ids": ids.numpy(), "mask": mask.numpy()}


def vae_probes(subject: Subject) -> list[Probe]:
    """Whole clips both ways, and decoding frame by frame."""
    return [Probe("vae", "", _ours_vae, _theirs_vae)]


def text_probes(subject: Subject) -> list[Probe]:
    """Rows under padding masks; with a tokenizer, captions to rows."""
    return [Probe("text", "", _ours_text, _theirs_text)]


def tokenizer_probes(subject: Subject) -> list[Probe]:
    """Token ids and masks of captions, equal.

    Raises:
      Absent: the case has no tokenizer.
    """
    if not subject.case.tokenizer:
        raise MissingPart("there is no tokenizer to compare")
    return [Probe("tokenizer", "", _ours_ids, _theirs_ids, tolerance=0.0)]
