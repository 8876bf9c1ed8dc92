"""Long and large clips through the Wan VAE in bounded memory: a few frames at a time, a tile at a time, or both.

Steps in time are exact. Tiles are not (a tile does not see its neighbours, nor does the attention of each frame), so
they overlap and are blended linearly; with equal settings the result is that of diffusers' `AutoencoderKLWan`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.models.vae import StreamState, WanVAE

Step = Callable[[jax.Array, StreamState], tuple[jax.Array, StreamState]]
TILE, STRIDE = (256, 256), (192, 192)  # pixels; diffusers' defaults


def decode_in_steps(vae: WanVAE, latents_BFHWC: jax.Array, frames: int) -> jax.Array:
    """`vae.decode`, `frames` latent frames at a time: memory for so many frames, whatever the length; jit-able.

    Raises:
      UserError: frames < 1, or what `decode_step` raises.
    """
    return jnp.clip(_decode_raw(vae, latents_BFHWC, frames), -1.0, 1.0)


def encode_in_steps(vae: WanVAE, video_BPHWC: jax.Array, frames: int) -> jax.Array:
    """`vae.encode`, `frames` latent frames at a time; jit-able.

    Raises:
      UserError: frames < 1, or what `encode_step` raises.
    """
    time = vae.stride[0]
    if (video_BPHWC.shape[1] - 1) % time:
        raise UserError(f"vae: {video_BPHWC.shape[1]} frames do not encode; use 1 + {time} k")
    first = 1 + time * (_first((video_BPHWC.shape[1] - 1) // time + 1, frames) - 1)
    return _scan(vae.encode_step, video_BPHWC, vae.init_encode_state(video_BPHWC.shape[0]), first, time * frames)


def decode_tiled(
    vae: WanVAE,
    latents_BFHWC: jax.Array,
    *,
    tile: tuple[int, int] = TILE,
    stride: tuple[int, int] = STRIDE,
    frames: int | None = None,
) -> jax.Array:
    """Decodes overlapping tiles one after another and blends them; clips no larger than a tile are decoded whole.

    Args:
      tile: height and width of a tile in pixels.
      stride: from one tile to the next in pixels; neighbours overlap by `tile - stride`.
      frames: latent frames at a time within a tile; None for all.

    Returns:
      video_BPHWC float32 in [-1, 1].

    Raises:
      UserError: sizes that are not multiples of the VAE's stride, or a stride above the tile.
    """
    sides = vae.stride[1:]
    _check_tiles(tile, stride, sides)
    frames = frames or latents_BFHWC.shape[1]
    in_latents = lambda pixels: (pixels[0] // sides[0], pixels[1] // sides[1])
    raw = _mosaic(
        lambda piece: _decode_raw_jit(vae, piece, frames),
        latents_BFHWC,
        (in_latents(tile), in_latents(stride)),
        tile,
        stride,
    )
    return jnp.clip(raw, -1.0, 1.0)


def encode_tiled(
    vae: WanVAE,
    video_BPHWC: jax.Array,
    *,
    tile: tuple[int, int] = TILE,
    stride: tuple[int, int] = STRIDE,
    frames: int | None = None,
) -> jax.Array:
    """Encodes overlapping tiles one after another and blends their latents; arguments and errors as `decode_tiled`.

    Returns:
      latents_BFHWC, normalised, float32.
    """
    sides = vae.stride[1:]
    _check_tiles(tile, stride, sides)
    if any(size % side for size, side in zip(video_BPHWC.shape[2:4], sides, strict=True)):
        raise UserError(f"vae: video {video_BPHWC.shape} needs H a multiple of {sides[0]} and W of {sides[1]}")
    frames = frames or video_BPHWC.shape[1]
    in_latents = lambda pixels: (pixels[0] // sides[0], pixels[1] // sides[1])
    return _mosaic(
        lambda piece: _encode_jit(vae, piece, frames), video_BPHWC, (tile, stride), in_latents(tile), in_latents(stride)
    )


def _first(total: int, frames: int) -> int:
    """Length of the first step, so that all others have `frames`."""
    if frames < 1:
        raise UserError(f"vae: frames={frames} at a time; use 1 or more")
    return total - (total - 1) // frames * frames


def _scan(step: Step, x: jax.Array, state: StreamState, first: int, size: int) -> jax.Array:
    """Runs a stream over x: a first step of `first` frames, then steps of `size` in one loop."""
    head, state = step(x[:, :first], state)
    if first == x.shape[1]:
        return head
    rest = rearrange(x[:, first:], "b (n s) h w c -> n b s h w c", s=size)

    def body(state: StreamState, piece: jax.Array) -> tuple[StreamState, jax.Array]:
        y, state = step(piece, state)
        return state, y

    tail = jax.lax.scan(body, state, rest)[1]
    return jnp.concatenate([head, rearrange(tail, "n b s h w c -> b (n s) h w c")], axis=1)


def _decode_raw(vae: WanVAE, latents_BFHWC: jax.Array, frames: int) -> jax.Array:
    first = _first(latents_BFHWC.shape[1], frames)
    return _scan(vae.decode_step_raw, latents_BFHWC, vae.init_state(latents_BFHWC.shape[0]), first, frames)


_decode_raw_jit = jax.jit(_decode_raw, static_argnames="frames")
_encode_jit = jax.jit(encode_in_steps, static_argnames="frames")


def _check_tiles(tile: tuple[int, int], stride: tuple[int, int], sides: tuple[int, ...]) -> None:
    for name, sizes in (("tile", tile), ("stride", stride)):
        if any(size < 1 or size % side for size, side in zip(sizes, sides, strict=True)):
            raise UserError(f"vae: {name}={sizes} must be multiples of {sides} pixels")
    if any(step > size for step, size in zip(stride, tile, strict=True)):
        raise UserError(f"vae: stride={stride} leaves gaps between tiles of {tile}; use no more than the tile")


@partial(jax.jit, static_argnames=("extent", "axis"))
def _blend(before: jax.Array, piece: jax.Array, extent: int, axis: int) -> jax.Array:
    """Fades from the end of `before` into the start of `piece` over `extent` pixels along `axis`."""
    extent = min(extent, before.shape[axis], piece.shape[axis])
    if extent == 0:
        return piece
    ramp = (jnp.arange(extent, dtype=piece.dtype) / extent).reshape([-1 if i == axis else 1 for i in range(piece.ndim)])
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    new, rest = jnp.split(piece, [extent], axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)


def _mosaic(
    code: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    cut: tuple[tuple[int, int], tuple[int, int]],
    tile: tuple[int, int],
    stride: tuple[int, int],
) -> jax.Array:
    """Codes the tiles of x and joins the results; `cut` is (tile, stride) in x, the others in the result.

    Each tile is blended with the finished tile above it, then with the finished one on its left, as diffusers does.
    """
    (height, width), (down, right) = cut
    if x.shape[2] <= height and x.shape[3] <= width:
        return code(x)
    overlap = (tile[0] - stride[0], tile[1] - stride[1])
    above: list[jax.Array] = []
    bands: list[Any] = []
    for top in range(0, x.shape[2], down):
        row: list[jax.Array] = []
        for left in range(0, x.shape[3], right):
            piece = code(x[:, :, top : top + height, left : left + width])
            if above:
                piece = _blend(above[len(row)], piece, overlap[0], 2)
            if row:
                piece = _blend(row[-1], piece, overlap[1], 3)
            row.append(piece)
        bands.append(jnp.concatenate([piece[:, :, : stride[0], : stride[1]] for piece in row], axis=3))
        above = row
    return jnp.concatenate(bands, axis=2)
