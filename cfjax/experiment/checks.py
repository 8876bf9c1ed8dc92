"""What is checked of a call from Python before anything is computed, in the words of the command line."""

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.settings import FRAMES, SIDE
from cfjax.memory.names import memory_name, with_memory
from cfjax.memory.slots import Memory
from cfjax.models.codec import Codec
from cfjax.models.wan import WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import given_blocks
from cfjax.rollout.generate import FewStep, ManyStep, layout_of
from cfjax.rollout.sizes import Sizes, latent_sizes, pixel_frames

SEEDS = 2**32
Fault = Callable[[str], str]  # why the text encoder cannot take a prompt; "" if it can


class Asked(TypedDict, total=False):
    """Keyword arguments of `Run.generate` and `Run.stream`, which documents them."""

    seed: int | Sequence[int]
    frames: int
    height: int
    width: int
    memory: Memory | str | None
    negative_prompt: str
    given_BFHWC: np.ndarray | None
    independent_first_frame: bool
    actions: np.ndarray | None
    image: Any


@dataclass(frozen=True)
class Ask:
    """`Asked` with its defaults."""

    seed: int | Sequence[int] = 0
    frames: int = 0
    height: int = 0
    width: int = 0
    memory: Memory | str | None = None
    negative_prompt: str = ""
    given_BFHWC: np.ndarray | None = None
    independent_first_frame: bool = False
    actions: np.ndarray | None = None
    image: Any = None

    def given(self) -> int:
        """How many latent frames are given."""
        return np.shape(self.given_BFHWC)[1] if np.ndim(self.given_BFHWC) == 5 else 0  # type: ignore[arg-type]


def actions_of(actions: Any, config: WanConfig, batch: int, frames: int) -> np.ndarray | None:
    """Keys of every frame, [B, F, A], float32; None where none was given.

    Raises:
      UserError: a network that cannot be steered, or another shape.
    """
    if actions is None:
        return None
    if config.actions is None:
        raise UserError("actions: this run cannot be steered (docs/actions.md); leave them out")
    keys, wanted = np.asarray(actions, np.float32), (batch, frames, config.actions.keys)
    keys = np.broadcast_to(keys[None], (batch, *keys.shape)) if keys.ndim == 2 else keys
    if keys.shape != wanted or not np.isfinite(keys).all():
        raise UserError(
            f"actions: {np.shape(actions)} are no numbers of {frames} latent frames and {wanted[2]} keys; give "
            f"{wanted[1:]}, or {wanted}"
        )
    return keys


def name_of(name: Any) -> str:
    """A run's name or folder as text; `~` is the home folder.

    Raises:
      UserError: it is neither.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise UserError(f"run={name!r}: give a run directory, or the name of a shipped model such as 'toy_teacher'")
    return os.path.expanduser(os.fspath(name))


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number.

    Raises:
      UserError: it is none, or out of the range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r}: use a whole number") from None
    if not low <= number <= high:
        raise UserError(f"{name}={number}: use {low} to {'2**32 - 1' if high == SEEDS - 1 else high}")
    return number


def captions_of(captions: Any, fault: Fault) -> list[str]:
    """The captions of a batch.

    Raises:
      UserError: a string in place of a list, none, or one that the text encoder cannot take.
    """
    if isinstance(captions, str):
        raise UserError(f"captions={captions!r}: give a list of captions, such as [{captions!r}]")
    listed = list(captions) if isinstance(captions, Sequence | np.ndarray) else []
    if not listed:
        raise UserError(f"captions={captions!r}: give a list of captions, one for each video")
    for caption in listed:
        check_text("caption", caption, fault)
    return list(map(str, listed))


def check_text(what: str, text: Any, fault: Fault) -> None:
    """Raises UserError unless the text encoder can take it."""
    if not isinstance(text, str):
        raise UserError(f"{what} {text!r}: give a text")
    if wrong := fault(text):
        raise UserError(f"{what} {wrong}")


def check_prompt(prompt: Any, fault: Fault) -> None:
    """Raises UserError unless it is a `Prompt` that the text encoder can take."""
    if isinstance(prompt, str):
        return check_text("prompt", prompt, fault)
    form = "give a text, or a list of (text, weight)"
    if not isinstance(prompt, Sequence) or not prompt:
        raise UserError(f"prompt {prompt!r}: {form}")
    for part in prompt:
        if not isinstance(part, Sequence) or len(part) != 2 or not isinstance(part[1], (int, float)):
            raise UserError(f"prompt {prompt!r}: {form}")
        check_text("prompt", part[0], fault)


def encoder_of(encode: Callable[[Sequence[str]], np.ndarray], fault: Fault) -> Callable[[Sequence[str]], np.ndarray]:
    """`encode`, which first refuses what it cannot take."""

    def checked(prompts: Sequence[str]) -> np.ndarray:
        for prompt in prompts:
            check_text("prompt", prompt, fault)
        return encode(prompts)

    return checked


def seeds_of(seed: Any, count: int) -> np.ndarray:
    """uint32 [count]: one seed for all videos, or one for each.

    Raises:
      UserError: another number of them, or one beyond 32 bits.
    """
    several = isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str) and np.ndim(seed) == 1
    seeds = list(seed) if several else [seed] * count
    if len(seeds) != count:
        raise UserError(f"seed={seed!r}: {len(seeds)} seeds for {count} captions; give one, or one for each")
    return np.array([whole("seed", each, 0, SEEDS - 1) for each in seeds], np.uint32)


def with_first_alone(blocks: Blocks | None, alone: bool) -> Blocks | None:
    """The layout, with the first latent frame a block of its own if `alone`.

    Raises:
      UserError: the network is bidirectional.
    """
    if not alone:
        return blocks
    if blocks is None:
        raise UserError("independent_first_frame: this run is bidirectional, it has no blocks; leave it out")
    return replace(blocks, independent_first_frame=True)


def layout_with(
    own: Blocks | None, sampler: FewStep | ManyStep, ask: Ask, config: WanConfig, stride: int
) -> Blocks | None:
    """A run's block layout with what is asked of it.

    Raises:
      UserError: no such memory, it does not fit or needs decoded pixels, or the network is bidirectional.
    """
    memory, layout = ask.memory, with_first_alone(own, ask.independent_first_frame)
    if memory is not None and layout is None:
        raise UserError(f"memory={memory!r}: this run is bidirectional, it has no blocks; leave it out")
    if isinstance(memory, str) and layout is not None:
        layout = with_memory(layout, memory)
    elif isinstance(memory, Memory) and layout is not None:
        layout = replace(layout, window=0, sink=0, memory=memory)
        memory.slots(layout)
    elif memory is not None:
        raise UserError(f"memory={memory!r}: give a policy or its name (docs/memory.md)")
    layout = layout_of(sampler, layout)
    if layout is not None and isinstance(layout.memory, Memory):
        layout.memory.check(config)
        if layout.memory.pictures(layout, stride):  # which sessions alone keep
            raise UserError(f"memory={memory_name(layout.memory)}: it needs the decoded pixels; use session")
    return layout


def sizes_of(
    ask: Ask,
    own: tuple[int, int, int, int],
    *,
    stride: tuple[int, int, int],
    patch: tuple[int, int],
    blocks: Blocks | None,
) -> Sizes:
    """Latents of a video of the pixel frames, height and width asked for; 0 is the run's `own` (latent) size.

    Raises:
      UserError: they do not divide; it names the nearest that do.
    """
    if blocks is not None:
        given_blocks(blocks, ask.given())
    frames = whole("frames", ask.frames, 0, FRAMES)
    height, width = whole("height", ask.height, 0, SIDE), whole("width", ask.width, 0, SIDE)
    return latent_sizes(
        frames or pixel_frames(own[0], stride[0]),
        height or own[1] * stride[1],
        width or own[2] * stride[2],
        stride=stride,
        patch=patch,
        blocks=blocks,
        given=ask.given(),
    )


def given_of(
    given: Any, shape: tuple[int, int, int], batch: int, blocks: Blocks | None, *, image_start: bool = False
) -> np.ndarray | None:
    """Latents to go on from, float32 [B, F, H, W, C]; a single video's are everybody's.

    Args:
      image_start: whether a bidirectional run goes on from a clean first latent frame, as Wan2.2-TI2V-5B does.

    Raises:
      UserError: another shape, frames that end inside a block, or a bidirectional run that cannot.
    """
    if given is None:
        return None
    if blocks is None and not image_start:
        raise UserError("given_BFHWC: this run is bidirectional and cannot go on from given frames; leave them out")
    latents = numbers("given_BFHWC", given)
    need = f"[{batch}, F, {', '.join(map(str, shape))}]"
    if latents.ndim != 5 or latents.shape[2:] != shape or latents.shape[0] not in (1, batch) or not latents.shape[1]:
        raise UserError(f"given_BFHWC: latents {list(latents.shape)}; needs {need}, as run.encode makes them")
    if blocks is not None:
        given_blocks(blocks, latents.shape[1])
    elif latents.shape[1] != 1:
        raise UserError(f"given_BFHWC: {latents.shape[1]} frames; this run goes on from one, a picture's")
    return np.broadcast_to(latents, (batch, *latents.shape[1:]))


def numbers(name: str, array: Any) -> np.ndarray:
    """An array of finite numbers, float32.

    Raises:
      UserError: it is none.
    """
    try:
        found = np.asarray(array, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"{name}: give an array of numbers, not {type(array).__name__}") from None
    if not np.isfinite(found).all():
        raise UserError(f"{name}: NaN or infinity in it")
    return found


def video_of(video: Any, codec: Codec) -> np.ndarray:
    """video_BPHWC float32 in [-1, 1] of one clip or several, uint8 or float.

    Raises:
      UserError: another shape or range, or sizes that the codec does not take.
    """
    array = np.asarray(video)
    pixels = numbers("video", array) / 127.5 - 1.0 if array.dtype == np.uint8 else numbers("video", array)
    pixels = pixels[None] if pixels.ndim == 4 else pixels
    time, down, right = codec.stride
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(f"video: {list(array.shape)}; needs [P, H, W, 3], or [B, P, H, W, 3] of several clips")
    if np.abs(pixels).max() > 1.01:
        raise UserError("video: numbers beyond [-1, 1]; give uint8 from 0 to 255, or float from -1 to 1")
    _, frames, height, width, _ = pixels.shape
    if (frames - 1) % time or height % down or width % right:
        rule = f"1 + a multiple of {time} frames, " if time > 1 else ""
        raise UserError(f"video: {frames} frames of {height} x {width}; needs {rule}sides that {down} x {right} divide")
    return pixels


def latents_of(latents: Any, codec: Codec) -> np.ndarray:
    """latents_BFHWC float32 of one clip or several.

    Raises:
      UserError: another shape.
    """
    array = numbers("latents", latents)
    array = array[None] if array.ndim == 4 else array
    channels = codec.latent_channels
    if array.ndim != 5 or array.shape[-1] != channels or not array.size:
        raise UserError(f"latents: {list(np.shape(latents))}; needs [B, F, H, W, {channels}], or one clip's")
    return array


def check_loaded(name: str, model: Any) -> None:
    """Raises UserError where shapes stand in place of weights."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        raise UserError(f"run={name!r} was opened with with_model=False: read its weights with load_weights(run)")
