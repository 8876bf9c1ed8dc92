"""Policies that choose frames, runs, heads or tokens, with every codec: near, and quantised once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.memory.bank import MemoryBank
from cfjax.memory.codecs import Codec, cut_frames, over_heads
from cfjax.memory.compression import DeepForcing
from cfjax.memory.heads import ForcingKV
from cfjax.memory.pyramid import PyramidHeads
from tests.memory.test_heads import TABLE, attended, keys_and_values, rolled
from tests.memory.test_pyramid import SMALL as PYRAMID
from tests.tiny import normal, relative

POLICIES = {
    "memory_bank": MemoryBank(5, 1, bank=2, interval=1),
    "forcing_kv": ForcingKV(5, 1, profile=TABLE, runs=2),
    "deep_forcing": DeepForcing(8, 2, capacity=6, recent=3),
    "pyramid": replace(PYRAMID, patch=2),
}
# Random keys and values: three to four times the error of a level, in the output of attention.
BOUNDS = {"bf16": 4e-3, "int8": 1e-2, "fp8": 5e-2, "int4": 0.15}


def output(memory, states, block: int, k, v) -> np.ndarray:
    own = slice(2 * block, 2 * block + 2)
    return attended(memory, states[block], 2 * block, k[:, :, own] + 0.5, k[:, :, own], v[:, :, own])


@pytest.mark.parametrize("name", POLICIES)
def test_a_codec_changes_little(name):
    """Where what is seen does not hang on small differences; and a block that is committed twice is as once."""
    k, v = (x.copy() for x in keys_and_values())
    for frame in (8, 7):  # the first run of each is as unlike the next frame's as can be
        k[:, :, frame, :2] = -k[:, :, frame + 1, :2]
    block = 3 if name == "deep_forcing" else 5  # before it chooses tokens, which random ones decide by little
    plain = output(POLICIES[name], rolled(POLICIES[name], k, v), block, k, v)
    for codec, bound in BOUNDS.items():
        memory = replace(POLICIES[name], codec=Codec(codec))
        states = rolled(memory, k, v)
        error = relative(output(memory, states, block, k, v), plain)
        print(f"{name} {codec}: {error:.1e}")
        assert 0 < error < bound
    for a, b in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(rolled(memory, k, v, again=True)[-1]), strict=True):
        np.testing.assert_array_equal(a, b)  # the last codec's


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "int4"])
def test_pieces_and_heads_keep_their_codes(name):
    """130 tokens in two pieces: int4 has scales for 26 tokens, which lie in both. What is taken out is what was in."""
    x, codec = normal(0, (2, 1, 2, 130, 3, 16)), Codec(name)
    for encode in (codec.encode_keys, codec.encode_values):
        stored = encode(x)
        whole = np.asarray(codec.decode(stored, jnp.float32))
        pieces = codec.decode(cut_frames(stored, 2), jnp.float32)
        np.testing.assert_array_equal(pieces, whole.reshape(2, 1, 4, 65, 3, 16))
        two = over_heads(stored, lambda leaf, axis: jnp.take(leaf, jnp.array([2, 0]), axis=axis))
        np.testing.assert_array_equal(codec.decode(two, jnp.float32), whole[..., [2, 0], :])


def rows_of(x: np.ndarray) -> set[bytes]:
    """Every token's keys or values of all heads, of [..., T, N, K]."""
    return {row.tobytes() for row in np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-2] * x.shape[-1])}


@pytest.mark.parametrize("name", ["memory_bank", "deep_forcing", "pyramid"])
def test_what_is_chosen_is_quantised_once(name):
    """After six commits every token is one that was quantised when its block was committed, in int4."""
    memory, (k, v) = replace(POLICIES[name], codec=Codec("int4")), keys_and_values()
    state = rolled(memory, k, v)[-1]
    decode = lambda x: np.asarray(memory.codec.decode(x, jnp.float32))
    whole = decode(memory.codec.encode_values(jnp.asarray(v)))
    values = rows_of(whole)
    if name == "memory_bank":
        assert rows_of(decode(state.extra.v)) <= values and len(rows_of(decode(state.extra.v))) > 8
    elif name == "deep_forcing":
        held = decode(state.v)[:, :, : int(state.count)]
        assert int(state.count) == 4 and rows_of(held) <= values
    else:
        wave, heads = state.extra.kept[1], memory.groups.heads[1]
        assert isinstance(memory, PyramidHeads) and (np.asarray(wave.frame_F) >= 0).all()
        of_head = lambda layer: rows_of(whole[layer][..., heads[layer], :])
        for layer in range(len(k)):
            assert rows_of(decode(wave.v)[layer]) <= of_head(layer)
