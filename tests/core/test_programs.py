"""Ahead-of-time compilation: once per shape and static argument, timed separately."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.programs import Programs


@partial(jax.jit, static_argnames="power", donate_argnames="total")
def add_power(x, total, *, power):
    return total + x**power


def test_a_program_is_compiled_once_and_gives_what_the_function_gives():
    programs = Programs()
    x = jnp.arange(3.0)
    for _ in range(2):
        np.testing.assert_array_equal(programs(add_power, x, jnp.ones(3), power=2), [1.0, 2.0, 5.0])
    once = programs.seconds
    assert programs.count == 1 and once > 0
    programs(add_power, x, jnp.ones(3), power=2)
    assert programs.seconds == once


def test_other_shapes_dtypes_and_static_arguments_are_other_programs():
    programs = Programs()
    programs(add_power, jnp.ones(3), jnp.ones(3), power=2)
    programs(add_power, jnp.ones(4), jnp.ones(4), power=2)
    programs(add_power, jnp.ones(3, jnp.int32), jnp.ones(3), power=2)
    programs(add_power, jnp.ones(3), jnp.ones(3), power=3)
    assert programs.count == 4 and programs.temporary_bytes >= 0
