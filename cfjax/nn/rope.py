"""Three-axis rotary position embedding and the timestep sinusoid, as functions: there is no table to run out of.

Channel layout: a head's channels are stored as [real parts, imaginary parts] ("half-split"), so that the rotation is
two multiply-adds on contiguous halves. Wan2.1 stores (real, imaginary) pairs; conversion permutes q and k accordingly.
"""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np

_DIGIT = 64  # positions are split as 64 * high + low, so that angles stay accurate in float32 at any length


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs of the time, height and width axes: (c - 2 (c // 3), c // 3, c // 3) with c = head_dim / 2."""
    half = head_dim // 2
    return half - 2 * (half // 3), half // 3, half // 3


def _angles(position: jax.Array, pairs: int) -> jax.Array:
    """position * 10000^(-j / pairs), j < pairs, modulo full turns; integer or real positions, [...] -> [..., pairs]."""
    omega = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    high, low = position // _DIGIT, position % _DIGIT
    per_high = jnp.asarray(np.mod(_DIGIT * omega, 2 * np.pi), jnp.float32)
    per_low = jnp.asarray(omega, jnp.float32)
    outer = lambda digit, per: digit.astype(jnp.float32)[..., None] * per.reshape((1,) * digit.ndim + (-1,))
    return outer(high, per_high) + outer(low, per_low)


def rope_table(frame_F: jax.Array, height: int, width: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the patches of some frames, each [F * height * width, head_dim / 2], float32.

    Args:
      frame_F: absolute frame indices, int32; may be traced, may repeat (teacher forcing uses every index twice).
      height, width: patches per frame.
      head_dim: channels per head, even.
    """
    grid = jnp.meshgrid(frame_F, jnp.arange(height), jnp.arange(width), indexing="ij")
    angle = jnp.concatenate(
        [_angles(axis.reshape(-1), n) for axis, n in zip(grid, axis_pairs(head_dim), strict=True)], axis=-1
    )
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, ...]) -> jax.Array:
    """Rotates every (real, imaginary) pair by its angle, in float32; returns x's dtype.

    Args:
      x: [B, ..., N, K] with the table's token axes in the middle: [T, K / 2] or, by frame, [F, T, K / 2].
    """
    cos, sin = (t[None, ..., None, :] for t in table)
    real, imag = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos], axis=-1).astype(x.dtype)


def rotate_time(x_BFTNK: jax.Array, position_F: jax.Array) -> jax.Array:
    """Rotates every frame's time axis by its position, in float32; rotations add up, so 0 leaves a frame as it is.

    Only the time pairs change: keys that were rotated at time 0 (`rope_table`) come out as at `position_F`.

    Args:
      position_F: integer positions, perhaps negative; may be traced.
    """
    pairs = axis_pairs(x_BFTNK.shape[-1])[0]
    angle = _angles(jnp.abs(position_F), pairs)[None, :, None, None]  # so that there and back is the same rotation
    cos, sin = jnp.cos(angle), jnp.sin(angle) * jnp.sign(position_F).reshape(1, -1, 1, 1, 1)
    real, imag = jnp.split(x_BFTNK, 2, axis=-1)
    wide_real, wide_imag = (part[..., :pairs].astype(jnp.float32) for part in (real, imag))
    turned = (wide_real * cos - wide_imag * sin, wide_real * sin + wide_imag * cos)
    parts = [(t.astype(x_BFTNK.dtype), part[..., pairs:]) for t, part in zip(turned, (real, imag), strict=True)]
    return jnp.concatenate([x for pair in parts for x in pair], axis=-1)


def rotate_space(x: jax.Array, row_T: np.ndarray, column_T: np.ndarray) -> jax.Array:
    """Rotates every token's height and width axes by so many patches, in float32; rotations add up.

    Args:
      x: [..., T, N, K].  row_T, column_T: integers, perhaps negative.
    """
    pairs = axis_pairs(x.shape[-1])
    angle = jnp.concatenate(
        [
            jnp.sign(at)[:, None] * _angles(jnp.abs(at), n)
            for at, n in zip(
                (jnp.zeros(len(row_T), jnp.int32), jnp.asarray(row_T), jnp.asarray(column_T)), pairs, strict=True
            )
        ],
        axis=-1,
    )
    flat = x.reshape(prod(x.shape[:-3]), *x.shape[-3:])  # there may be no heads
    return rotate(flat, (jnp.cos(angle), jnp.sin(angle))).reshape(x.shape)


def sinusoid(timestep: jax.Array, dim: int) -> jax.Array:
    """[cos(t w_0..), sin(t w_0..)] with w_k = 10000^(-k / (dim / 2)); cosines first. [...] -> [..., dim] float32."""
    angle = _angles(timestep.astype(jnp.float32), dim // 2)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
