"""Conversion: both directions are exact, the tables fit the published files, and nothing passes unnoticed."""

import jax
import numpy as np
import pytest

from cfjax.conversion.rules import SAME, Rule, load_named
from cfjax.conversion.wan import DIFFUSERS, ORIGINAL, abstract_wan, export_wan, import_wan
from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.models.wan import preset
from tests.tiny import CONFIG, tiny


@pytest.mark.parametrize("table", [DIFFUSERS, ORIGINAL], ids=["diffusers", "original"])
def test_there_and_back_is_exact(table):
    exported = export_wan(tiny(), table)
    imported = import_wan(exported, CONFIG, table)
    assert jax.tree.structure(imported) == jax.tree.structure(tiny())
    for name, leaf in named_leaves(tiny()).items():
        np.testing.assert_array_equal(named_leaves(imported)[name], leaf)
    again = export_wan(imported, table)
    assert again.keys() == exported.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("name, tensors", [("wan_1_3b", 825), ("wan_14b", 1095)])
def test_the_original_release_has_these_arrays(name, tensors):
    """Names and shapes of the original release, without allocating them."""
    config = preset(name)
    wanted = named_leaves(abstract_wan(config))
    dim, ffn = config.dim, config.ffn_dim
    per_block = {
        "modulation": (1, 6, dim),
        **{f"{a}.{p}.weight": (dim, dim) for a in ("self_attn", "cross_attn") for p in "qkvo"},
        **{f"{a}.{p}.bias": (dim,) for a in ("self_attn", "cross_attn") for p in "qkvo"},
        **{f"{a}.norm_{p}.weight": (dim,) for a in ("self_attn", "cross_attn") for p in "qk"},
        **{"norm3.weight": (dim,), "norm3.bias": (dim,)},
        **{"ffn.0.weight": (ffn, dim), "ffn.0.bias": (ffn,), "ffn.2.weight": (dim, ffn), "ffn.2.bias": (dim,)},
    }
    shapes = {f"blocks.{i}.{key}": shape for i in range(config.num_layers) for key, shape in per_block.items()}
    shapes |= {"patch_embedding.weight": (dim, 16, 1, 2, 2), "patch_embedding.bias": (dim,)}
    for room, width in (("text_embedding", 4096), ("time_embedding", 256)):
        shapes |= {f"{room}.0.weight": (dim, width), f"{room}.0.bias": (dim,)}
        shapes |= {f"{room}.2.weight": (dim, dim), f"{room}.2.bias": (dim,)}
    shapes |= {"time_projection.1.weight": (6 * dim, dim), "time_projection.1.bias": (6 * dim,)}
    shapes |= {"head.modulation": (1, 2, dim), "head.head.weight": (64, dim), "head.head.bias": (64,)}
    assert len(shapes) == tensors
    # A view of one zero stands for every array; only the layouts run, on one layer of each.
    one_layer = {k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items() if not k.startswith("blocks.")}
    one_layer |= {f"blocks.0.{k}": np.broadcast_to(np.float32(0), v) for k, v in per_block.items()}
    thin = {
        k: jax.ShapeDtypeStruct((1, *v.shape[1:]) if k.startswith("blocks/") else v.shape, v.dtype)
        for k, v in wanted.items()
    }
    if name == "wan_1_3b":
        loaded = load_named(ORIGINAL, one_layer, thin, config)
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in thin.items()}


def test_half_split_layout():
    """Pair j of head n, stored at 2 j and 2 j + 1, goes to j and j + K / 2 of that head."""
    exported = export_wan(tiny())
    theirs = exported["blocks.1.attn1.to_q.bias"].reshape(CONFIG.num_heads, -1)
    ours = np.asarray(tiny().blocks.self_attn.q.bias[...])[1].reshape(CONFIG.num_heads, -1)
    np.testing.assert_array_equal(ours, np.concatenate([theirs[:, ::2], theirs[:, 1::2]], axis=1))


def test_nothing_passes_unnoticed():
    weights = export_wan(tiny())
    with pytest.raises(UserError, match=r"missing \['proj_out.bias'\]"):
        import_wan({k: v for k, v in weights.items() if k != "proj_out.bias"}, CONFIG)
    with pytest.raises(UserError, match=r"left over \['blocks.2.norm2.bias'\]"):
        import_wan({**weights, "blocks.2.norm2.bias": weights["blocks.1.norm2.bias"]}, CONFIG)
    with pytest.raises(UserError, match=r"proj_out.weight has shape \(3, 3\)"):
        import_wan({**weights, "proj_out.weight": np.zeros((3, 3), np.float32)}, CONFIG)
    with pytest.raises(UserError, match=r"patch_embedding.weight has shape \(3, 3\)"):
        import_wan({**weights, "patch_embedding.weight": np.zeros((3, 3), np.float32)}, CONFIG)
    with pytest.raises(UserError, match="no rule matches"):
        import_wan(weights, CONFIG, DIFFUSERS[1:])
    with pytest.raises(UserError, match="matches nothing"):
        import_wan(weights, CONFIG, (*DIFFUSERS, Rule("image/kernel", "image", SAME)))
