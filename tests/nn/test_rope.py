"""RoPE and the timestep sinusoid against float64, at any position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.nn.rope import axis_pairs, rope_table, rotate, rotate_time, sinusoid


def exact_angles(frames, height, width, head_dim):
    """The rotation tables in float64: [F * height * width, head_dim / 2]."""
    half = head_dim // 2
    spatial = half // 3
    grid = np.meshgrid(frames, np.arange(height), np.arange(width), indexing="ij")
    parts = [
        axis.reshape(-1, 1) * 10000.0 ** (-np.arange(n) / n)
        for axis, n in zip(grid, (half - 2 * spatial, spatial, spatial), strict=True)
    ]
    return np.concatenate(parts, axis=1)


def test_axes_of_the_published_heads():
    assert axis_pairs(128) == (22, 21, 21)
    assert [sum(axis_pairs(k)) for k in (12, 20, 64)] == [6, 10, 32]


@pytest.mark.parametrize("frames", [np.arange(21), np.arange(1020, 1100), np.array([5000]), np.array([10**6])])
def test_table_has_no_end(frames):
    """PyTorch's table stops at 1024 frames; ours is a function."""
    angle = exact_angles(frames, 2, 3, 128)
    cos, sin = jax.jit(rope_table, static_argnums=(1, 2, 3))(jnp.asarray(frames, jnp.int32), 2, 3, 128)
    worst = max(np.abs(cos - np.cos(angle)).max(), np.abs(sin - np.sin(angle)).max())
    print(f"frames up to {frames.max()}: largest error {worst:.1e}")
    assert worst < (1e-4 if frames.max() < 10**5 else 0.02)


def test_scores_depend_on_relative_position_only():
    q, k = (jax.random.normal(key, (1, 1, 2, 24)) for key in jax.random.split(jax.random.key(0)))

    def score(at_q, at_k):
        tables = (rope_table(jnp.array([at]), 1, 1, 24) for at in (at_q, at_k))
        turned = [rotate(x, table) for x, table in zip((q, k), tables, strict=True)]
        return jnp.sum(turned[0] * turned[1], axis=-1)

    near, far = score(7, 3), score(4099, 4095)
    np.testing.assert_allclose(near, far, atol=5e-4)
    assert float(jnp.max(jnp.abs(near - score(8, 3)))) > 0.1
    np.testing.assert_allclose(score(5000, 5000), jnp.sum(q * k, axis=-1), atol=1e-5)


def test_rotation_is_of_pairs():
    """Channel j and j + K / 2 turn together by angle j; bfloat16 comes back as bfloat16."""
    x = jax.random.normal(jax.random.key(1), (1, 4, 1, 12))
    angle = exact_angles(np.array([3]), 2, 2, 12)
    turned = (np.asarray(x[0, :, 0, :6]) + 1j * np.asarray(x[0, :, 0, 6:])) * np.exp(1j * angle)
    got = rotate(x, rope_table(jnp.array([3]), 2, 2, 12))
    np.testing.assert_allclose(got[0, :, 0], np.concatenate([turned.real, turned.imag], axis=1), atol=1e-6)
    assert rotate(x.astype(jnp.bfloat16), rope_table(jnp.array([3]), 2, 2, 12)).dtype == jnp.bfloat16


def test_sinusoid_golden_values():
    # computed in float64 by the reference (`wan/modules/model.py`, `rope_params`)
    got = np.asarray(sinusoid(jnp.array(937.5), 256))
    np.testing.assert_allclose(got[[0, 1, 2, 127]], [0.262302, 0.580487, 0.257223, 0.994930], atol=2e-5)
    np.testing.assert_allclose(got[[128, 129, 130, 255]], [0.964986, -0.814269, 0.966352, 0.100574], atol=2e-5)
    zero = np.asarray(sinusoid(jnp.zeros((2, 3)), 256))
    np.testing.assert_array_equal(zero[..., :128], 1.0)
    np.testing.assert_array_equal(zero[..., 128:], 0.0)


def test_sinusoid_over_the_clock():
    timesteps = np.linspace(0.0, 1000.0, 997)
    angle = timesteps.astype(np.float32).astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    got = np.asarray(sinusoid(jnp.asarray(timesteps, jnp.float32), 256))
    worst = np.abs(got - np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).max()
    print(f"sinusoid: largest error {worst:.1e}")
    assert worst < 2e-5


@pytest.mark.parametrize("position", [0, 5, 12_345])
def test_rotations_in_time_add_up(position):
    """Keys at time 0, turned, are keys at that position; turned back they are at time 0 again; space stays."""
    height, width, head_dim = 2, 3, 24
    x = jax.random.normal(jax.random.key(0), (1, 2, height * width, 2, head_dim))
    frames = jnp.array([position, position + 7])
    by_frame = lambda frame_F: tuple(
        t.reshape(2, -1, head_dim // 2) for t in rope_table(frame_F, height, width, head_dim)
    )
    wanted, raw = rotate(x, by_frame(frames)), rotate(x, by_frame(jnp.zeros(2, jnp.int32)))
    error = jnp.abs(rotate_time(raw, frames) - wanted).max()
    back = jnp.abs(rotate_time(wanted, -frames) - raw).max()
    print(f"position {position}: {error:.1e}, back {back:.1e}")
    assert error < 3e-6 and back < 3e-6
    assert rotate_time(raw.astype(jnp.bfloat16), frames).dtype == jnp.bfloat16
