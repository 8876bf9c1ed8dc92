"""Keys and values in fewer bits: bytes, bounds of the error, and that quantising is done once."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.codecs import Codec, CodecName, Quantized, group_size
from cfjax.memory.slots import Memory
from cfjax.nn.visibility import Blocks
from tests.memory.states import committed
from tests.tiny import CONFIG

FRAMES, TOKENS, HEADS, DIM = 2, 24, 3, 16


@pytest.fixture(scope="module")
def x() -> jax.Array:
    """With an outlier channel and an outlier token."""
    values = np.random.default_rng(0).normal(size=(1, 1, FRAMES, TOKENS, HEADS, DIM)).astype(np.float32)
    values[..., 3] *= 30.0
    values[:, :, :, 5] *= 10.0
    return jnp.asarray(values)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_an_element_is_off_by_half_a_level_at_most(name, kind, x):
    codec = Codec(name)
    stored = codec.encode_keys(x) if kind == "keys" else codec.encode_values(x)
    error = np.abs(codec.decode(stored, jnp.float32) - x)
    axis = -3 if kind == "keys" else -1
    group = group_size(x.shape[axis], name)
    scale = np.repeat(np.asarray(stored.scale), group, axis).reshape(x.shape)
    print(f"{name} {kind}: {float((error / scale).max()):.3f} of a level")
    assert (error <= 0.5 * scale * (1 + 1e-4) + 1e-6).all() and error.max() > 0


def test_fp8_and_bf16_are_relative(x):
    for name, bound in (("fp8", 2**-4), ("bf16", 2**-8)):
        found = Codec(name).decode(Codec(name).encode_keys(x), jnp.float32)
        largest = np.max(np.abs(x), axis=-3, keepdims=True)
        assert (np.abs(found - x) <= bound * np.abs(x) + 2**-9 * largest * (name == "fp8")).all()


def test_outlier_channels_cost_the_others_nothing(x):
    """Keys have a scale per channel: a channel of 30 times the size leaves its neighbours as exact as before."""
    plain = x.at[..., 3].multiply(1 / 30)
    apart = [np.asarray(Codec("int8").decode(Codec("int8").encode_keys(y), jnp.float32))[..., 4:] for y in (x, plain)]
    np.testing.assert_array_equal(*apart)


@pytest.mark.parametrize(
    ("name", "elements", "keys", "values"),
    [
        ("none", 4.0, 0, 0),
        ("bf16", 2.0, 0, 0),
        ("fp8", 1.0, 4 * HEADS * DIM, 4 * TOKENS * HEADS),
        ("int8", 1.0, 8 * HEADS * DIM, 8 * TOKENS * HEADS),
        ("int4", 0.5, 8 * HEADS * DIM, 8 * TOKENS * HEADS),
    ],
)
def test_bytes_are_as_computed(name, elements, keys, values):
    number = TOKENS * HEADS * DIM
    found = Codec(name).bytes_per_frame(TOKENS, HEADS, DIM, jnp.float32)
    assert found == 2 * elements * number + keys + values


def test_groups_lie_inside_a_frame():
    """1560 tokens of Wan's 480 x 832 frames: 60 share a scale in int4, all of them in int8."""
    assert group_size(1560, "int4") == 60 and group_size(1560, "int8") == 1560 and group_size(128, "int4") == 64


def test_what_is_moved_is_not_quantised_again():
    """A frame's codes after four more commits are its codes after its own."""
    memory, numbers = Memory(6, 2, Codec("int8")), np.random.default_rng(0).normal(size=12)
    one, five = committed(memory, numbers, 1), committed(memory, numbers, 5)
    assert isinstance(five.k, Quantized) and five.k.codes.dtype == jnp.uint8
    for part in ("k", "v"):
        for a, b in zip(jax.tree.leaves(getattr(one, part)), jax.tree.leaves(getattr(five, part)), strict=True):
            np.testing.assert_array_equal(a[:, :, :2], b[:, :, :2])


def test_a_state_has_the_bytes_of_its_slots():
    for name in ("none", "bf16", "fp8", "int8", "int4"):
        memory = Memory(8, 2, Codec(name))
        state = jax.eval_shape(lambda m=memory: m.init(CONFIG, 1, 4, Blocks(2)))
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.k, state.v)))
        per_frame = Codec(name).bytes_per_frame(4, CONFIG.num_heads, CONFIG.head_dim, jnp.float32)
        assert found == 6 * CONFIG.num_layers * per_frame


@pytest.mark.parametrize("name", get_args(CodecName))
def test_an_empty_state_is_zeros_encoded_and_never_whole_in_float32(name):
    rows, memory = (CONFIG.num_layers, 2, 5), Memory(codec=Codec(name))
    zeros = jnp.zeros((*rows, TOKENS, CONFIG.num_heads, CONFIG.head_dim))
    make = jax.jit(lambda: memory.empty_frames(CONFIG, *rows[1:], TOKENS)).lower().compile()
    found, expected = make(), memory.encoded(zeros, zeros)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))
    assert make.memory_analysis().temp_size_in_bytes < zeros.nbytes / 5


def test_attention_over_quantised_keys_is_close():
    """Output against float32 keys and values, random ones: the error is what the step of a level says."""
    errors = {}
    k, v, q = (jax.random.normal(jax.random.key(i), (1, 2, 64, CONFIG.num_heads, CONFIG.head_dim)) for i in range(3))
    config = replace(CONFIG, num_layers=1)
    for name in ("none", "bf16", "fp8", "int8", "int4"):
        memory = Memory(4, 0, Codec(name))

        @jax.jit
        def attended(q, k, v, memory=memory):
            state = memory.commit(memory.init(config, 1, 64, Blocks(2)), k[None], v[None], jnp.int32(0))
            return memory.attention(config, state, jnp.int32(2), 2, Blocks(2))(q, k, v, 0)

        errors[name] = attended(q, k, v)
    apart = {name: float(jnp.abs(x - errors["none"]).max()) for name, x in errors.items()}
    print(apart)
    assert apart["none"] == 0 and apart["bf16"] < 4e-3 and apart["int8"] < 6e-3
    assert apart["fp8"] < 4e-2 and apart["int4"] < 9e-2 and apart["int8"] < apart["fp8"] < apart["int4"] * 2


def test_an_unknown_codec_is_named():
    with pytest.raises(UserError, match="codec='int3': use one of none, bf16, fp8, int8, int4"):
        Codec("int3")
