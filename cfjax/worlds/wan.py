"""A Wan system's parts on disk: video autoencoders, umT5 and its tokenizer, as `cfjax convert` writes them.

    world/world.json                        kind, text length, negative prompt, frames per second
    world/{vae,tiny_vae,text_encoder}/      one-role run directories, their sizes in the checkpoint's record
    world/tokenizer/                        the tokenizer's own files

The counterpart of `cfjax.world.World` for real weights. Only what is asked for is read: the text encoder (11 GB in
bfloat16) only when a caption is not in the embedding cache, and it is freed again after that.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION, LAYERS, TEXT_ROWS
from cfjax.core.paths import is_folder, path_of
from cfjax.core.precision import Policy
from cfjax.core.schema import (
    EPS,
    SIZE,
    Rule,
    checked,
    each_of,
    flag,
    load_json,
    number,
    one_of,
    row,
    several,
    table,
    text,
    whole,
)
from cfjax.models.codec import Codec
from cfjax.models.text import TextEncoder, text_fingerprint
from cfjax.models.text_cache import TextCache, encode_cached
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig
from cfjax.models.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE, load_tokenizer
from cfjax.models.umt5 import UMT5, UMT5_RULE, UMT5Config
from cfjax.models.vae import VAEConfig, WanVAE
from cfjax.models.vae_tiling import encode_in_steps
from cfjax.models.wan import WanConfig
from cfjax.training.checkpoint import FOLDER, load_role, read_meta

RECORD, KIND, FORMAT = "world.json", "wan", 1
DECODERS = ("vae", "tiny_vae")
WORLD_RULE = table(
    {
        "kind": one_of(KIND),
        "format": one_of(FORMAT),
        "text_length": whole(1, TEXT_ROWS),
        "negative_prompt": text(CAPTION),
        "fps": number(0, 1000, above=True),
    }
)
# The record of a part of a world, a run directory of one role.
PART = table(
    {"model": table({}), "fingerprint": text(64)},
    {"source": table({}, {"dtype": each_of(text(64)), "layout": text(64)})},
)
_DTYPE = one_of("float32", "bfloat16")
_PRECISION = {"precision": table({"compute": _DTYPE, "island": _DTYPE}, closed=True)}
# What a run's record says of each network: its config's fields, and no others.
SIZES: dict[type, Rule] = {
    WanConfig: table(
        dict.fromkeys(("dim", "ffn_dim", "num_heads", "in_dim", "out_dim", "text_dim", "freq_dim"), SIZE)
        | {"num_layers": whole(1, LAYERS), "patch": row(SIZE, SIZE), "eps": EPS},
        {"remat": one_of("none", "full", "dots"), "attention": text(), **_PRECISION},
        closed=True,
    ),
    VAEConfig: table(
        {"base_dim": SIZE, "z_dim": SIZE},
        {
            "multipliers": several(SIZE, 2, 8),
            "res_blocks": whole(1, LAYERS),
            "temporal_downsample": several(flag, 1, 7),
            "latents_mean": several(number(-1000, 1000), 1),
            "latents_std": several(number(0, 1000, above=True), 1),
            **_PRECISION,
        },
        closed=True,
    ),
    TinyVAEConfig: table(
        {"latent_channels": SIZE, "encoder_width": SIZE, "decoder_widths": row(SIZE, SIZE, SIZE, SIZE)},
        {"time_pool": row(SIZE, SIZE, SIZE), "time_grow": row(SIZE, SIZE, SIZE), **_PRECISION},
        closed=True,
    ),
    UMT5Config: UMT5_RULE,
}
C = TypeVar("C")
M = TypeVar("M")


def config_from_record(cls: type[C], values: dict[str, Any], where: object = "the run's record") -> C:
    """A frozen config from `dataclasses.asdict` as JSON left it: lists are tuples, `precision` is a policy.

    Args:
      where: whose record it is, for the message.

    Raises:
      UserError: a key is missing, unknown or has a value that it cannot have (`SIZES`).
    """
    checked(SIZES[cls], values, f"{where}: {cls.__name__}")

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value

    values = {key: tuples(value) for key, value in values.items()}
    if isinstance(values.get("precision"), dict):
        values["precision"] = Policy.from_record(values["precision"])
    return cls(**values)


def placed_template(make: Callable[[], M], dtype: str = "") -> M:
    """The structure that `make` builds with shapes in place of arrays, on the first device: what `load_role` takes.

    Args:
      dtype: of every leaf ("" keeps each one's own).
    """
    place = SingleDeviceSharding(jax.devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype) if dtype else x.dtype, sharding=place)

    return jax.tree.map(leaf, jax.eval_shape(make))


def load_codec(path: str | Path, decoder: str, precision: str = "") -> Codec:
    """The Wan VAE ("vae") or the tiny one ("tiny_vae") of the world at `path`; `precision` in place of its own.

    Raises:
      UserError: an unknown name, or the world has none.
    """
    if decoder not in DECODERS:
        raise UserError(f"decoder={decoder!r}: use {' or '.join(DECODERS)}")
    folder = path_of(path) / decoder
    if not is_folder(folder / FOLDER):
        raise UserError(f"{path} has no {decoder}; add one with cfjax convert, or choose another decoder")
    values = _part_record(folder, decoder)["model"]
    key = jax.random.key(0)
    if decoder == "vae":
        config = config_from_record(VAEConfig, values, folder)
        config = replace(config, precision=_policy(config.precision, precision))
        return load_role(folder, decoder, placed_template(lambda: WanVAE(config, key)))
    tiny_config = config_from_record(TinyVAEConfig, values, folder)
    tiny_config = replace(tiny_config, precision=_policy(tiny_config.precision, precision))
    return load_role(folder, decoder, placed_template(lambda: TinyVAE(tiny_config, key)))


def _policy(own: Policy, precision: str) -> Policy:
    return replace(own, compute=precision) if precision else own


def load_text(path: str | Path, length: int) -> TextEncoder:
    """The text encoder of the world at `path`, its weights in the dtype they were released in.

    Raises:
      UserError: the world has none, or its tokenizer is missing.
    """
    meta = _text_record(path)
    config = config_from_record(UMT5Config, meta["model"], path)
    dtypes = set(meta.get("source", {}).get("dtype", {}).values())
    template = placed_template(lambda: UMT5(config, jax.random.key(0)), "bfloat16" if dtypes == {"bfloat16"} else "")
    model = load_role(path_of(path) / "text_encoder", "text_encoder", template)
    return TextEncoder(load_tokenizer(path_of(path) / "tokenizer"), model, length, weights=meta.get("fingerprint", ""))


def open_cache(path: str | Path, folder: str | Path, length: int) -> TextCache:
    """The embeddings in `folder` that the text encoder of the world at `path` made; its weights are not read.

    Raises:
      UserError: the world has no text encoder, or its tokenizer is missing.
    """
    meta = _text_record(path)
    config = config_from_record(UMT5Config, meta["model"], path)
    tokenizer = load_tokenizer(path_of(path) / "tokenizer")
    return TextCache(folder, text_fingerprint(meta["fingerprint"], config, tokenizer), length)


def _text_record(path: str | Path) -> dict[str, Any]:
    folder = path_of(path) / "text_encoder"
    if not is_folder(folder / FOLDER):
        raise UserError(f"{path} has no text_encoder; add one with cfjax convert")
    return _part_record(folder, "text_encoder")


def _part_record(folder: Path, kind: str) -> dict[str, Any]:
    return checked(PART, read_meta(folder, stages=(kind,)), folder)


@dataclass(frozen=True)
class WanWorld:
    """Codec, text encoder (None: read when a caption needs it) and what the pipeline says with them.

    Attributes:
      text_length: S, the text rows of every caption.
      width: E, the width of the text rows.
      fps: frames per second of the videos that the model was trained on.
      text_cache: folder of embeddings already computed, "" for none.
    """

    path: Path
    codec: Codec
    text: TextEncoder | None
    text_length: int
    width: int
    negative_prompt: str
    fps: float
    text_cache: str = ""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        decoder: str = "vae",
        decoder_precision: str = "",
        with_text: bool = True,
        text_cache: str | Path = "",
    ) -> "WanWorld":
        """Reads what `cfjax convert` wrote.

        Args:
          decoder: "vae" or "tiny_vae".  decoder_precision: of its products, "" as recorded.
          with_text: keep the text encoder in memory.  text_cache: folder of embeddings, "" for none.

        Raises:
          UserError: no world there, or a part is missing.
        """
        folder, record = path_of(path), read_record(path)
        length = int(record["text_length"])
        return cls(
            path=folder,
            codec=load_codec(folder, decoder, decoder_precision),
            text=load_text(folder, length) if with_text else None,
            text_length=length,
            width=int(_text_record(folder)["model"]["dim"]),
            negative_prompt=record["negative_prompt"],
            fps=float(record["fps"]),
            text_cache=str(text_cache),
        )

    def encode_prompts(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E]; from the cache where they are there, else by the text encoder."""

        def load() -> TextEncoder:
            return self.text or load_text(self.path, self.text_length)

        if not self.text_cache:
            return load().encode(captions)
        return encode_cached(load, self._cache, captions)

    @cached_property
    def _cache(self) -> TextCache:
        """Opened once: that reads the tokenizer, a second for umT5's."""
        return open_cache(self.path, self.text_cache, self.text_length)

    def negative_text_SE(self) -> np.ndarray:
        """Text rows of the negative prompt."""
        return self.encode_prompts([self.negative_prompt])[0]

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """Normalised latents_BFHWC by the Wan VAE (also when another decoder is in use), a latent frame at a time."""
        vae = self.codec if isinstance(self.codec, WanVAE) else load_codec(self.path, "vae")
        return jax.jit(encode_in_steps, static_argnames="frames")(vae, video_BPHWC, frames=1)

    def fingerprint(self) -> str:
        """Equal for two worlds iff models can move between them; reads no large file."""
        return fingerprint(self.path)


def read_record(path: str | Path) -> dict[str, Any]:
    """world.json of the world at `path`.

    Raises:
      UserError: it is missing, broken, of another kind or format.
    """
    file = path_of(path) / RECORD
    try:
        record = load_json(file)
        kind, version = record["kind"], record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no Wan world here ({error}); make one with cfjax convert") from None
    if (kind, version) != (KIND, FORMAT):
        raise UserError(f"{file}: kind {kind!r} format {version}, this version reads {KIND!r} format {FORMAT}")
    return checked(WORLD_RULE, record, file)


def world_places(run: str | Path, recorded: str) -> list[Path]:
    """Where a run's world may be: where its record points (beside the run, or a path of its own), or beside it."""
    places = [path_of(run) / recorded, path_of(recorded)] if recorded else []
    return [*places, path_of(run) / "world"]


def find_world(run: str | Path, recorded: str) -> Path | None:
    """The folder of a run's world, of either kind; None if there is none, as of a run whose config makes its own."""
    return next((place for place in world_places(run, recorded) if (place / RECORD).is_file()), None)


def is_wan_world(path: str | Path) -> bool:
    """Whether the world there is Wan's; the toy's record names no kind. Raises UserError when it cannot be read."""
    file = path_of(path) / RECORD
    try:
        return "kind" in checked(table({}), load_json(file), file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no world here ({error})") from None


def fingerprint(path: str | Path) -> str:
    """The world's fingerprint, from its parts' records and its tokenizer: 16 hex digits."""
    parts: dict[str, Any] = {"text_length": read_record(path)["text_length"]}
    for part in ("vae", "text_encoder"):
        if is_folder(path_of(path) / part / FOLDER):
            meta = _part_record(path_of(path) / part, part)
            sizes = {name: value for name, value in meta["model"].items() if name != "precision"}
            parts[part] = [sizes, meta["fingerprint"]]
    files = (path_of(path) / "tokenizer" / name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE))
    parts["tokenizer"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
