"""The CPU's forms of convolutions equal `lax.conv_general_dilated`, in values and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.nn.cpu_conv import causal_conv, conv_pictures, filter_matrices, for_cpu, traced_for


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(ours, theirs, tolerance=2e-5):
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()
    print(f"greatest relative error {error:.1e}")
    assert ours.shape == theirs.shape
    assert error < tolerance


def plain(seen_BFHWC, kernel, before):
    pads = [(before, 0), *[((n - 1) // 2,) * 2 for n in kernel.shape[1:3]]]
    names = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(seen_BFHWC, kernel, (1, 1, 1), pads, dimension_numbers=names)


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_filtering_is_exact_in_real_numbers(frames):
    after, kernels, inputs = filter_matrices(frames)
    product = np.einsum("mp,pk,px->mkx", after, kernels, inputs)
    np.testing.assert_allclose(
        product, [[np.eye(frames + 2)[m + k] for k in range(3)] for m in range(frames)], atol=2e-6
    )


@pytest.mark.parametrize(
    ("window", "pads"), [((3, 3), ((1, 1), (1, 1))), ((2, 2), ((1, 1), (1, 1))), ((3, 3), ((0, 1), (0, 1)))]
)
def test_pictures(window, pads):
    x, kernel = draw(0, 2, 18, 11, 5), draw(1, *window, 5, 7)
    names = ("NHWC", "HWIO", "NHWC")
    theirs = jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=names)
    close(conv_pictures(x, kernel, pads), theirs, 2e-6)


@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("channels", [(32, 32), (3, 32), (32, 3)])
def test_causal_convolution_and_its_gradient(frames, channels):
    x, past, kernel = (
        draw(0, 1, frames, 24, 24, channels[0]),
        draw(1, 1, 2, 24, 24, channels[0]),
        draw(2, 3, 3, 3, *channels),
    )
    close(causal_conv(x, past, kernel), plain(jnp.concatenate([past, x], axis=1), kernel, 0))
    close(causal_conv(x, None, kernel), plain(x, kernel, 2))
    weight = draw(3, 1, frames, 24, 24, channels[1])
    ours = jax.grad(lambda *a: jnp.sum(causal_conv(a[0], None, a[1]) * weight), (0, 1))(x, kernel)
    theirs = jax.grad(lambda *a: jnp.sum(plain(a[0], a[1], 2) * weight), (0, 1))(x, kernel)
    jax.tree.map(close, ours, theirs)


def test_only_a_cpu_in_float32():
    assert for_cpu("float32") and not for_cpu("bfloat16")
    with traced_for("tpu"):
        assert not for_cpu("float32")
