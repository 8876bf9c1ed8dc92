"""One tiny network and its inputs, shared by all tests so that compiled programs are few."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.tree import map_named
from cfjax.models.wan import Wan, WanConfig, embed_text, make_wan

CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, freq_dim=16)
FRAMES, SIDE, BATCH, TEXT_LEN = 6, 4, 2, 3
SHAPE = (BATCH, FRAMES, SIDE, SIDE, CONFIG.in_dim)


def randomised(config: WanConfig, seed: int = 0) -> Wan:
    """A network with every parameter random, the zero-initialised head and biases too."""
    model = make_wan(config, jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    shaken = [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, shaken)


def random_weights(config: WanConfig, seed: int = 0) -> Wan:
    """The same in spirit, by numpy: nothing to compile, for sizes that one test alone has."""
    template, rng = jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0)), np.random.default_rng(seed)

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        spread = like.shape[-2] ** -0.5 if name.endswith("kernel") else 0.2
        return jnp.asarray(rng.normal(float(name.endswith("scale")), spread, like.shape).astype(np.float32))

    return map_named(leaf, template)


@cache
def tiny() -> Wan:
    with jax.ensure_compile_time_eval():  # the first call may be inside a trace
        return randomised(CONFIG)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@cache
def text() -> jax.Array:
    with jax.ensure_compile_time_eval():
        return normal(101, (BATCH, TEXT_LEN, CONFIG.text_dim))


@cache
def text_kv():
    with jax.ensure_compile_time_eval():
        return embed_text(tiny(), text())


def relative(a: jax.Array, b: jax.Array) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
