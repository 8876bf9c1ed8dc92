"""Named leaves and strict tables."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.tree import from_named, map_named, match, named_leaves
from tests.tiny import tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    left: jax.Array
    right: list[jax.Array]


def test_names_of_modules_dicts_dataclasses_and_lists():
    names = list(named_leaves({"student": tiny()}))
    assert "student/blocks/self_attn/q/kernel" in names and "student/head_modulation" in names
    assert not [name for name in names if name.endswith("value")]
    assert list(named_leaves(Pair(jnp.zeros(1), [jnp.zeros(2), jnp.zeros(3)]))) == ["left", "right/0", "right/1"]
    assert named_leaves(()) == {}


def test_names_are_unique_and_in_flattening_order():
    named = named_leaves(tiny())
    leaves = jax.tree.leaves(tiny())
    assert len(named) == len(leaves)
    assert all(a is b for a, b in zip(named.values(), leaves, strict=True))


def test_there_and_back():
    doubled = map_named(lambda name, leaf: leaf * (2 if name.endswith("bias") else 1), tiny())
    again = from_named(tiny(), named_leaves(doubled))
    assert jax.tree.structure(again) == jax.tree.structure(tiny())
    np.testing.assert_array_equal(again.head.bias[...], 2 * tiny().head.bias[...])
    np.testing.assert_array_equal(again.head.kernel[...], tiny().head.kernel[...])


def test_filling_is_strict_both_ways():
    template = {"a": jnp.zeros(2), "b": jnp.zeros((3, 4))}
    with pytest.raises(UserError, match=r"missing \['b'\]"):
        from_named(template, {"a": jnp.zeros(2)})
    with pytest.raises(UserError, match=r"left over \['c'\]"):
        from_named(template, {**template, "c": jnp.zeros(1)})
    with pytest.raises(UserError, match=r"b is \(4, 3\), expected \(3, 4\)"):
        from_named(template, {**template, "b": jnp.zeros((4, 3))})


def test_first_match_wins_on_the_whole_name():
    rules = [(r"blocks/.*bias", 1), (r".*bias", 2), (r".*", 3)]
    names = ["blocks/q/bias", "head/bias", "head/bias_like"]
    assert match(rules, names) == dict(zip(names, (1, 2, 3), strict=True))


def test_tables_are_strict_both_ways():
    with pytest.raises(UserError, match="no rule matches 'kernel'"):
        match([("bias", 0)], ["bias", "kernel"])
    with pytest.raises(UserError, match="rule 'lora' matches nothing"):
        match([("bias", 0), ("lora", 1)], ["bias"])
    with pytest.raises(UserError, match=r"rule 'b\.\*' matches nothing"):  # shadowed by an earlier rule
        match([("bias", 0), ("b.*", 1)], ["bias"])
