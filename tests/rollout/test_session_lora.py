"""Adapters that a session puts beside its network and takes away: its blocks are the merged network's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.lora import LoraConfig, make_lora, merged, scaled
from cfjax.nn.visibility import Blocks
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline, next_block
from tests.models.test_lora import adapters
from tests.rollout.test_session import CODEC, FEW, FRAMES, SEED, encode, latents, made
from tests.tiny import CONFIG, SHAPE, relative, tiny

LORA = adapters(LoraConfig(4, 4.0, "blocks"))


def session(model, **given) -> Session:
    pipeline = Pipeline(model, CODEC, FEW, Blocks(2))
    return Session(pipeline, Text(encode), "a", latent_shape=SHAPE[2:], seed=SEED, max_frames=FRAMES, **given)


def test_blocks_are_those_of_the_merged_network():
    """Switched on after a block, which is committed again; half of it; and off, as if it had never been there."""
    stream, plain = session(tiny()), session(tiny())
    first = stream.next()
    stream.set_lora(LORA)
    with_lora = session(merged(tiny(), LORA), given_BFHWC=first.latents_BFHWC).next().latents_BFHWC
    second = stream.next().latents_BFHWC
    errors = [relative(second, with_lora)]
    programs = next_block._cache_size()
    stream.set_lora(LORA, 0.5)
    half = session(merged(tiny(), scaled(LORA, 0.5)), given_BFHWC=np.concatenate([first.latents_BFHWC, second], 1))
    errors.append(relative(stream.next().latents_BFHWC, half.next().latents_BFHWC))
    assert next_block._cache_size() == programs  # a weight is no other program
    print("a session's adapters vs a merged network:", *(f"{error:.1e}" for error in errors))
    assert max(errors) < 1e-5 < 0.01 < relative(second, made(plain, 2)[1].latents_BFHWC)
    other = session(tiny())
    before = other.snapshot()
    other.set_lora(LORA)
    with pytest.raises(UserError, match="another model"):
        other.restore(before)
    other.set_lora(None)
    other.restore(before)
    np.testing.assert_array_equal(latents(made(other, 3)), latents(made(session(tiny()), 3)))


def test_what_is_remembered_may_stay():
    """With "keep", the block before is the one that the network itself committed."""
    one, other = session(tiny()), session(tiny())
    one.next(), other.next()
    one.set_lora(LORA, mode="keep")
    other.set_lora(LORA)
    assert 1e-4 < relative(one.next().latents_BFHWC, other.next().latents_BFHWC) < 1.0


def test_adapters_of_another_network_change_nothing():
    stream = session(tiny())
    with pytest.raises(UserError, match="are of another network"):
        stream.set_lora(make_lora(replace(CONFIG, ffn_dim=40), LoraConfig(4, 4.0), jax.random.key(0)))
    with pytest.raises(UserError, match="mode='cut'"):
        stream.set_lora(LORA, mode="cut")
    np.testing.assert_array_equal(stream.next().latents_BFHWC, session(tiny()).next().latents_BFHWC)
    assert jnp.isfinite(stream.next().latents_BFHWC).all()
