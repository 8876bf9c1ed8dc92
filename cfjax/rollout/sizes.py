"""From requested pixels to latents that codec, patches and blocks divide; errors name the nearest valid sizes."""

from dataclasses import dataclass

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import layout_from

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """One video: latent frames in all and given ones among them, and the latent frame's height and width."""

    frames: int
    given: int
    height: int
    width: int
    stride: Strides

    @property
    def generated(self) -> int:
        """Latent frames to generate."""
        return self.frames - self.given

    def pixels(self) -> tuple[int, int, int]:
        """Pixel frames, height and width."""
        time, down, right = self.stride
        return pixel_frames(self.frames, time), self.height * down, self.width * right


def pixel_frames(latent_frames: int, time: int) -> int:
    """P = 1 + time (F - 1): the first latent frame is one picture."""
    return 1 + time * (latent_frames - 1)


def _near(wanted: int, step: int, first: int) -> str:
    """The members of first, first + step, ... next to `wanted`."""
    below = first + max(0, (wanted - first) // step) * step
    return f"{below} or {below + step}" if wanted > first else f"{first}"


def latent_sizes(
    frames: int,
    height: int,
    width: int,
    *,
    stride: Strides,
    patch: tuple[int, int],
    blocks: Blocks | None,
    given: int = 0,
) -> Sizes:
    """The latents of a video of so many pixel frames, pixels high and wide, that begins with `given` latent frames.

    Args:
      stride: the codec's, pixels per latent.
      patch: the network's, latents per token.
      blocks: None for a bidirectional network.

    Raises:
      UserError: a size that does not divide; it names the nearest that do.
    """
    for name, size, step in (("height", height, stride[1] * patch[0]), ("width", width, stride[2] * patch[1])):
        if size < 1 or size % step:
            raise UserError(f"{name}={size}: needs a multiple of {step} pixels; use {_near(size, step, step)}")
    time = stride[0]
    layout = layout_from(blocks, given) if blocks else Blocks(1)
    least = given + (1 if layout.independent_first_frame else layout.frames)
    total = (frames - 1) // time + 1
    if frames < 1 or (frames - 1) % time or total < least or (total - least) % layout.frames:
        near = _near(frames, time * layout.frames, pixel_frames(least, time))
        what = f"{given} given latent frames and " if given else ""
        rule = f"blocks of {layout.frames} latent frames" if blocks else "1 + a multiple of the codec's stride"
        raise UserError(f"frames={frames}: {what}{rule} at {time} pixel frames each do not make it; use {near}")
    return Sizes(total, given, height // stride[1], width // stride[2], stride)


def default_given(available: int, total: int, blocks: Blocks) -> int:
    """How many of `available` latent frames a video of `total` continues: whole blocks, at most half of it.

    Raises:
      UserError: not one block is available.
    """
    first, limit = (1 if blocks.independent_first_frame else 0), min(available, total // 2)
    count = first + (limit - first) // blocks.frames * blocks.frames if limit >= first else 0
    if count < 1:
        least = first or blocks.frames
        raise UserError(
            f"{counted(available, 'latent frame')} to go on from, with {total} in all: needs {least} or more, at "
            "most half"
        )
    return count
