"""Wan's world on disk: video autoencoders, umT5 and its tokenizer, as `cfjax convert` writes them.

    world/world.json                        kind, text length, negative prompt, frames per second
    world/{vae,tiny_vae,text_encoder,image_encoder}/   one-role run directories, their sizes in the checkpoint's record
    world/tokenizer/                        the tokenizer's own files

Only requested parts are read: the text encoder (11 GB in bfloat16) only when a caption is not in the embedding cache,
and it is freed again after that.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION, TEXT_ROWS
from cfjax.core.paths import is_folder, path_of
from cfjax.core.precision import Policy
from cfjax.core.progress import Progress
from cfjax.core.schema import checked, each_of, load_json, number, one_of, table, text, whole
from cfjax.models.clip import CLIPConfig, CLIPVision, encode_pictures, make_clip
from cfjax.models.codec import Codec
from cfjax.models.text import TextEncoder, text_fingerprint
from cfjax.models.text_cache import FILL_AT_ONCE, TextCache, encode_cached, fill
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig
from cfjax.models.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE, load_tokenizer
from cfjax.models.umt5 import UMT5, UMT5Config
from cfjax.models.vae import VAEConfig, WanVAE
from cfjax.models.vae_tiling import encode_in_steps
from cfjax.training.checkpoint import FOLDER, checkpoint_hash, load_role, read_meta
from cfjax.worlds.records import config_from_record, placed_template
from cfjax.worlds.world import RECORD

KIND, FORMAT = "wan", 1
DECODERS, IMAGE_ENCODER = ("vae", "tiny_vae"), "image_encoder"
WORLD_RULE = table(
    {
        "kind": one_of(KIND),
        "format": one_of(FORMAT),
        "text_length": whole(1, TEXT_ROWS),
        "negative_prompt": text(CAPTION),
        "fps": number(0, 1000, above=True),
    }
)
# Sizes that records of the first format have not, and what they are there; worlds of then are those of now.
LATER = {"decoder_base_dim": 0, "residual": False, "patch": 1}
# The record of a part of a world, a run directory of one role.
PART = table(
    {"model": table({}), "fingerprint": text(64)},
    {"source": table({}, {"dtype": each_of(text(64)), "layout": text(64)})},
)


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


def open_image_encoder(path: str | Path) -> CLIPVision:
    """CLIP of the world at `path`, float32.

    Raises:
      UserError: the world has none.
    """
    folder = path_of(path) / IMAGE_ENCODER
    check_image_encoder(path)
    config = config_from_record(CLIPConfig, _part_record(folder, IMAGE_ENCODER)["model"], folder)
    template = placed_template(lambda: make_clip(config, jax.random.key(0)))
    return load_role(folder, IMAGE_ENCODER, template)


def load_image_encoder(path: str | Path, width: int = 0) -> Callable[[jax.Array], jax.Array]:
    """picture_BHWC in [-1, 1] to features [B, T, D], float32, by CLIP of the world at `path`, read now.

    Raises:
      UserError: the world has none, or its features are not `width` wide.
    """
    check_image_encoder(path, width)
    return partial(encode_pictures, open_image_encoder(path))


def check_image_encoder(path: str | Path, width: int = 0) -> None:
    """Raises UserError unless the world at `path` has CLIP's image encoder, of features that are `width` wide."""
    if not is_folder(path_of(path) / IMAGE_ENCODER / FOLDER):
        raise UserError(
            f"{path} has no {IMAGE_ENCODER}, whose features of the picture this network takes; add CLIP to it: cfjax"
            " convert --config.source=models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, with the world's own"
            " workdir"
        )
    if width and (own := part_sizes(path, IMAGE_ENCODER).get("dim")) != width:
        raise UserError(f"{path}: its {IMAGE_ENCODER} makes features of {own} channels, the network takes {width}")


def image_encoder_hash(path: str | Path) -> str:
    """A hash of the files of CLIP's checkpoint of the world at `path`."""
    folder = path_of(path) / IMAGE_ENCODER
    return checkpoint_hash(folder, int(read_meta(folder)["step"]))


def _text_record(path: str | Path) -> dict[str, Any]:
    folder = path_of(path) / "text_encoder"
    if not is_folder(folder / FOLDER):
        raise UserError(f"{path} has no text_encoder; add one with cfjax convert")
    return _part_record(folder, "text_encoder")


def _part_record(folder: Path, kind: str) -> dict[str, Any]:
    return checked(PART, read_meta(folder, stages=(kind,)), folder)


def part_kinds(path: str | Path) -> list[str]:
    """The networks that the world at `path` has."""
    return [kind for kind in (*DECODERS, "text_encoder", IMAGE_ENCODER) if is_folder(path_of(path) / kind / FOLDER)]


def part_sizes(path: str | Path, kind: str) -> dict[str, Any]:
    """The recorded sizes of a network of the world at `path`.

    Raises:
      UserError: it cannot be read.
    """
    sizes: dict[str, Any] = _part_record(path_of(path) / kind, kind)["model"]
    return sizes


@dataclass(frozen=True)
class WanWorld:
    """Codec, text encoder (None: read when a caption needs it) and the negative prompt; see `worlds.world.World`.

    Attributes:
      fps: frames per second of the videos that the model was trained on.
      decoder: which of `DECODERS` the codec is.
      text_cache: folder of text rows that are computed already, "" for none.
    """

    path: Path
    codec: Codec
    text: TextEncoder | None
    text_length: int
    text_width: int
    negative_prompt: str
    fps: float
    decoder: str = "vae"
    text_cache: str = ""
    text_name = "umt5"

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
        """Reads what `cfjax convert` wrote; the arguments are those of `WorldParts`.

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
            text_width=int(_text_record(folder)["model"]["dim"]),
            negative_prompt=record["negative_prompt"],
            fps=float(record["fps"]),
            decoder=decoder,
            text_cache=str(text_cache),
        )

    @property
    def folder(self) -> str:
        """The folder it was read from."""
        return str(self.path)

    def encode_prompts(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E]; from the cache where they are there, else by the text encoder."""
        if not self.text_cache:
            return self.load_text().encode(captions)
        return encode_cached(self.load_text, self._cache, captions)

    @cached_property
    def _cache(self) -> TextCache:
        """Opened once: that reads the tokenizer, a second for umT5's."""
        return self.open_text_cache(self.text_cache)

    def negative_text_SE(self) -> np.ndarray:
        """Text rows of the negative prompt."""
        return self.encode_prompts([self.negative_prompt])[0]

    def prompt_fault(self, prompt: str) -> str:
        """Always "": umT5 takes any prompt, and the tokenizer truncates a long one."""
        return ""

    def load_text(self) -> TextEncoder:
        """The text encoder, read now unless it is in memory."""
        return self.text or load_text(self.path, self.text_length)

    def open_text_cache(self, folder: str | Path) -> TextCache:
        """Text rows of this text encoder in `folder`; its weights are not read."""
        return open_cache(self.path, folder, self.text_length)

    def cache_text(self, captions: Iterable[str], *, progress: bool) -> None:
        """Encodes captions and the negative prompt into `text_cache`; then the encoder's memory is free for the VAE."""
        every = list(dict.fromkeys((self.negative_prompt, *captions)))
        load = cache(self.load_text)
        with Progress(len(every), "caption", "text encoder", shown=progress) as bar:
            for start in range(0, len(every), FILL_AT_ONCE):
                some = every[start : start + FILL_AT_ONCE]
                fill(load, self._cache, some)
                bar.update(len(some))

    def open_encoder(self) -> Callable[[jax.Array], jax.Array]:
        """video_BPHWC in [-1, 1] to latents_BFHWC by the VAE, a latent frame at a time; read if it is not in use."""
        vae = self.codec if isinstance(self.codec, WanVAE) else load_codec(self.path, "vae")
        return partial(jax.jit(encode_in_steps, static_argnames="frames"), vae, frames=1)

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """Normalised latents_BFHWC of clips; `open_encoder` for many of them."""
        return self.open_encoder()(video_BPHWC)

    def decoder_record(self) -> dict[str, Any]:
        """The decoder's name, precision, and a hash of its checkpoint's files."""
        assert isinstance(self.codec, WanVAE | TinyVAE)
        folder = self.path / self.decoder
        weights = checkpoint_hash(folder, int(read_meta(folder)["step"]))
        return {"name": self.decoder, "precision": self.codec.config.precision.to_record(), "weights": weights}

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
        raise UserError(
            f"{file}: kind {kind!r} format {version}, this version reads {KIND!r} format {FORMAT}; convert it again"
        )
    return checked(WORLD_RULE, record, file)


def fingerprint(path: str | Path) -> str:
    """The world's fingerprint, from its parts' records and its tokenizer: 16 hex digits."""
    parts: dict[str, Any] = {"text_length": read_record(path)["text_length"]}
    for part in ("vae", "text_encoder"):
        if is_folder(path_of(path) / part / FOLDER):
            meta = _part_record(path_of(path) / part, part)
            told = {name: value for name, value in meta["model"].items() if name != "precision"}
            sizes = {name: value for name, value in told.items() if LATER.get(name, ...) != value}
            parts[part] = [sizes, meta["fingerprint"]]
    files = (path_of(path) / "tokenizer" / name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE))
    parts["tokenizer"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
