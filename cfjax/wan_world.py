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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from cfjax.core.errors import UserError
from cfjax.core.precision import Policy
from cfjax.models.codec import Codec
from cfjax.models.text import TextEncoder
from cfjax.training.checkpoint import FOLDER, load_role, read_meta

RECORD, KIND, FORMAT = "world.json", "wan", 1
DECODERS = ("vae", "tiny_vae")
C = TypeVar("C")
M = TypeVar("M")


def config_from_record(cls: type[C], values: dict[str, Any]) -> C:
    """A frozen config from `dataclasses.asdict` as JSON left it: lists are tuples, `precision` is a policy."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value

    values = {key: tuples(value) for key, value in values.items()}
    if isinstance(values.get("precision"), dict):
        values["precision"] = Policy(**values["precision"])
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


def load_codec(path: str | Path, decoder: str) -> Codec:
    """The Wan VAE ("vae") or the tiny one ("tiny_vae") of the world at `path`.

    Raises:
      UserError: an unknown name, or the world has none.
    """
    if decoder not in DECODERS:
        raise UserError(f"decoder={decoder!r}: use {' or '.join(DECODERS)}")
    folder = Path(path) / decoder
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{path} has no {decoder}; add one with cfjax convert, or choose another decoder")
    values = read_meta(folder, stages=(decoder,))["model"]
    key = jax.random.key(0)
    if decoder == "vae":
        from cfjax.models.vae import VAEConfig, WanVAE

        config = config_from_record(VAEConfig, values)
        return load_role(folder, decoder, placed_template(lambda: WanVAE(config, key)))
    from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig

    tiny_config = config_from_record(TinyVAEConfig, values)
    return load_role(folder, decoder, placed_template(lambda: TinyVAE(tiny_config, key)))


def load_text(path: str | Path, length: int) -> TextEncoder:
    """The text encoder of the world at `path`, in the dtype it was released in.

    Raises:
      UserError: the world has none, or its tokenizer is missing.
    """
    from cfjax.models.tokenizer import load_tokenizer
    from cfjax.models.umt5 import UMT5, UMT5Config

    folder, tokenizer = Path(path) / "text_encoder", Path(path) / "tokenizer"
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{path} has no text_encoder; convert one with cfjax convert, or give a filled text cache")
    meta = read_meta(folder, stages=("text_encoder",))
    config = config_from_record(UMT5Config, meta["model"])
    dtypes = set(meta.get("source", {}).get("dtype", {}).values())
    dtype = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    template = placed_template(lambda: UMT5(config, jax.random.key(0)), dtype)
    return TextEncoder(load_tokenizer(tokenizer), load_role(folder, "text_encoder", template), length)


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
        cls, path: str | Path, *, decoder: str = "vae", with_text: bool = True, text_cache: str | Path = ""
    ) -> "WanWorld":
        """Reads what `cfjax convert` wrote.

        Raises:
          UserError: no world there, or a part is missing.
        """
        folder, record = Path(path), read_record(path)
        length = int(record["text_length"])
        return cls(
            path=folder,
            codec=load_codec(folder, decoder),
            text=load_text(folder, length) if with_text else None,
            text_length=length,
            width=int(read_meta(folder / "text_encoder", stages=("text_encoder",))["model"]["dim"]),
            negative_prompt=record["negative_prompt"],
            fps=float(record["fps"]),
            text_cache=str(text_cache),
        )

    def encode_prompts(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E]; from the cache where they are there, else by the text encoder."""
        text = self.text or load_text(self.path, self.text_length)
        return text.encode(captions)

    def negative_text_SE(self) -> np.ndarray:
        """Text rows of the negative prompt."""
        return self.encode_prompts([self.negative_prompt])[0]

    def fingerprint(self) -> str:
        """Equal for two worlds iff models can move between them; reads no large file."""
        return fingerprint(self.path)


def read_record(path: str | Path) -> dict[str, Any]:
    """world.json of the world at `path`.

    Raises:
      UserError: it is missing, broken, of another kind or format.
    """
    file = Path(path) / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        kind, version = record["kind"], record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no Wan world here ({error}); make one with cfjax convert") from None
    if (kind, version) != (KIND, FORMAT):
        raise UserError(f"{file}: kind {kind!r} format {version}, this version reads {KIND!r} format {FORMAT}")
    return record


def fingerprint(path: str | Path) -> str:
    """The world's fingerprint, from its parts' records and its tokenizer: 16 hex digits."""
    parts: dict[str, Any] = {"text_length": read_record(path)["text_length"]}
    for part in ("vae", "text_encoder"):
        folder = Path(path) / part
        if (folder / FOLDER).is_dir():
            meta = read_meta(folder)
            parts[part] = {"model": meta["model"], "fingerprint": meta.get("fingerprint", "")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
