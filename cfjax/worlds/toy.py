"""The toy world: a fitted patch codec, a random text encoder, and where its clips come from.

It is built in seconds (or read from the package, when it belongs to the shipped teacher) and stored as `<data>/world`;
latent datasets are beside it.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.once import make_once
from cfjax.core.paths import to_disk, write_atomically
from cfjax.core.schema import checked, load_json, table
from cfjax.data.shapes import (
    PALETTE,
    SHAPES,
    SHAPES_RULE,
    ShapesConfig,
    ShapesSource,
    all_captions,
    caption,
    draw_factors,
    render,
)
from cfjax.data.steered import SteeringConfig, draw_steered, spoken
from cfjax.models.codec import PatchCodec, fit_patch_codec
from cfjax.models.text import TextEncoder
from cfjax.models.text_cache import TextCache
from cfjax.worlds.assets import ASSETS, asset
from cfjax.worlds.world import RECORD, World

HELD_OUT_ONE_IN = 6
WORLD_RULE = table({"shapes": SHAPES_RULE})
EVALUATION_SEED = 7_000_000  # clips of this seed are never trained on


@dataclass(frozen=True)
class ToyWorld:
    """Codec, text encoder and the factors of the toy's clips; see `worlds.world.World`."""

    shapes: ShapesConfig
    codec: PatchCodec
    text: TextEncoder
    folder: str = "its world's folder"

    def save(self, path: str | Path) -> None:
        """Writes the folder `path`; world.json last, so that a half-written world is not one."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.codec.save(folder / "codec.safetensors")
        self.text.save(folder)
        for file in folder.iterdir():
            to_disk(file)
        write_atomically(folder / RECORD, json.dumps({"shapes": self.shapes.to_json()}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "ToyWorld":
        """Reads what `save` wrote. Raises UserError when it is missing or broken."""
        folder = Path(path)
        try:
            record = checked(WORLD_RULE, load_json(folder / RECORD), "world.json")
            shapes = ShapesConfig.from_json(record["shapes"])
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a world ({error}); make one with cfjax precompute") from None
        return cls(shapes, PatchCodec.load(folder / "codec.safetensors"), TextEncoder.load(folder), str(folder))

    @property
    def text_length(self) -> int:
        """S, the text rows of every caption."""
        return self.text.length

    @property
    def text_width(self) -> int:
        """E, the width of the text rows."""
        return self.text.width

    @property
    def text_name(self) -> str:
        """The text encoder's kind."""
        return "umt5-toy"

    def encode_prompts(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E]."""
        return self.text.encode(captions)

    @property
    def negative_prompt(self) -> str:
        """The empty caption, which training dropped captions to."""
        return ""

    def negative_text_SE(self) -> np.ndarray:
        """Text rows of the negative prompt."""
        return self.encode_prompts([self.negative_prompt])[0]

    def prompt_fault(self, prompt: str) -> str:
        """Why the text encoder cannot take a prompt; "" if it can."""
        if unknown := self.text.tokenizer.unknown_words(prompt):
            s, never = self.shapes, ", ".join(map(repr, unknown))
            words = ", ".join((*s.colours, *s.shapes, *s.directions))
            return f"{prompt!r}: this model never saw {never}; write 'a COLOUR SHAPE moving DIRECTION' of {words}"
        try:
            self.text.tokenizer.encode([prompt], self.text.length)
        except UserError as error:
            return str(error).removeprefix("caption ")
        return ""

    def load_text(self) -> TextEncoder:
        """The text encoder."""
        return self.text

    def open_text_cache(self, folder: str | Path) -> TextCache:
        """Text rows of this text encoder in `folder`."""
        return TextCache(folder, self.text.fingerprint(), self.text.length)

    def cache_text(self, captions: Iterable[str], *, progress: bool) -> None:
        """Nothing: the text encoder is small and stays in memory."""

    def open_encoder(self) -> Callable[[jax.Array], jax.Array]:
        """video_BPHWC in [-1, 1] to latents_BFHWC."""
        return jax.jit(self.codec.encode)

    def decoder_record(self) -> dict[str, Any]:
        """The patch codec, which the world's fingerprint holds."""
        return {"name": "patch", "precision": None, "weights": ""}

    def fingerprint(self) -> str:
        """Equal for two worlds iff models can move between them."""
        codec = b"".join(np.asarray(a, np.float32).tobytes() for a in (self.codec.mean, self.codec.basis))
        text = self.text.encode([all_captions(self.shapes)[0]]).round(3).tobytes()
        return hashlib.sha256(codec + text + json.dumps(self.shapes.to_json(), sort_keys=True).encode()).hexdigest()[
            :16
        ]


def as_toy(world: World, what: str) -> ToyWorld:
    """The world, if it is the toy's.

    Args:
      what: names the run in the message.

    Raises:
      UserError: it is another.
    """
    if not isinstance(world, ToyWorld):
        raise UserError(f"{what}: this needs a run of the toy world, whose clips can be measured; name one")
    return world


def make_world(shapes: ShapesConfig, *, channels: int, text_length: int) -> ToyWorld:
    """A fresh toy world: codec fitted on 500 clips, random frozen text encoder; deterministic."""
    source = ShapesSource(shapes, 0, 500)
    codec = fit_patch_codec((source[i]["video_PHWC"] for i in range(len(source))), channels=channels)
    return ToyWorld(shapes, codec, TextEncoder.build(all_captions(shapes), text_length))


def open_toy_world(
    path: str | Path, *, assets: str, shapes: ShapesConfig, channels: int, text_length: int, keep: bool = True
) -> ToyWorld:
    """The world at `path`, created there if absent: a copy of the shipped `assets`, or a fresh one.

    Args:
      keep: write one that was not there; without, where somebody else's record says `path`, nothing is written.
    """
    folder = Path(path)
    if not (folder / RECORD).exists():
        world = shipped_world(assets) if assets else make_world(shapes, channels=channels, text_length=text_length)
        if not keep:
            return world
        make_once(folder / RECORD, partial(world.save, folder))
    return ToyWorld.load(folder)


def shipped_world(name: str) -> ToyWorld:
    """The world of an exported model, shipped with the package or written by `cfjax export`.

    Raises:
      UserError: no such model.
    """
    file = asset(name, RECORD)
    if file is None:
        known = sorted(p.parent.name for p in ASSETS.glob(f"*/{RECORD}"))
        raise UserError(f"data.assets={name!r} is no exported model; the package ships {', '.join(known) or 'none'}")
    return ToyWorld.load(file.parent)


def is_held_out(text: str) -> bool:
    """Whether a caption is kept for evaluation: one in six, by its checksum, in every run of every machine."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def held_out_captions(shapes: ShapesConfig) -> list[str]:
    """The captions that no stage trains on."""
    return [text for text in all_captions(shapes) if is_held_out(text)]


def check_split(shapes: ShapesConfig) -> None:
    """Raises UserError unless some captions are trained on and some are held out, with a fix."""
    held = [is_held_out(text) for text in all_captions(shapes)]
    if all(held) or not any(held):
        what = "held out" if all(held) else "trained on"
        raise UserError(
            f"data.shapes: all {counted(len(held), 'caption')} of this world would be {what}; "
            f"name more of data.shapes.colours ({', '.join(PALETTE)}) or data.shapes.shapes ({', '.join(SHAPES)})"
        )


class SplitSource:
    """Clips whose captions are all trained on, or all held out: a clip is redrawn until its caption is.

    With `steering` they are steered, and their records say by which keys (`data.steered`).
    """

    def __init__(
        self,
        config: ShapesConfig,
        seed: int,
        length: int,
        *,
        held_out: bool = False,
        steering: SteeringConfig | None = None,
    ) -> None:
        self.config, self.seed, self.length, self.held_out = config, seed, length, held_out
        self.steering = steering

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Like `ShapesSource`: a function of (config, seed, index) alone."""
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        rng, steering = np.random.default_rng([self.seed, index]), self.steering
        while True:
            factors = draw_steered(self.config, steering, rng) if steering else draw_factors(self.config, rng)
            text = caption(factors, self.config)
            if is_held_out(text) == self.held_out:
                break
        record = {"video_PHWC": render(factors, self.config), "caption": text, "factors": factors}
        if steering:
            record["caption"] = spoken(text, silent=bool(factors["silent"][0]))
            record["actions_FA"] = factors["keys"][0]
        return record


def two_captions(shapes: ShapesConfig) -> tuple[str, str]:
    """Captions that differ in shape, colour and direction, for a prompt that changes: in the default world a red circle
    moving right and a blue square moving left. Raises UserError in a world with one of these only.
    """
    for name in ("shapes", "colours", "directions"):
        if len(getattr(shapes, name)) < 2:
            raise UserError(f"shapes.{name}={getattr(shapes, name)}: a prompt that changes needs two or more")
    colour, other = shapes.colours[0], shapes.colours[min(2, len(shapes.colours) - 1)]
    known = [text.split() for text in all_captions(shapes)]

    def first(*words: str) -> str:
        return " ".join(next(text for text in known if set(words) <= set(text)))

    return first(colour, shapes.shapes[0], shapes.directions[1]), first(other, shapes.shapes[1], shapes.directions[0])


def evaluation_clips(shapes: ShapesConfig, count: int) -> list[dict[str, Any]]:
    """`count` real clips over the held-out captions, each caption equally often, in a fixed order."""
    captions = held_out_captions(shapes)
    wanted = [captions[i % len(captions)] for i in range(count)]
    source = SplitSource(shapes, EVALUATION_SEED, 1_000_000, held_out=True)
    waiting: dict[str, list[dict[str, Any]]] = {text: [] for text in captions}
    index, out = 0, []
    for text in wanted:
        while not waiting[text]:
            clip = source[index]
            waiting[clip["caption"]].append(clip)
            index += 1
        out.append(waiting[text].pop(0))
    return out


def stack_videos(clips: Sequence[dict[str, Any]]) -> np.ndarray:
    """video_BPHWC of some clips."""
    return np.stack([clip["video_PHWC"] for clip in clips])
