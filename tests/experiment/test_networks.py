"""A role's weights from any source, in the requested storage, and read without memory for float32."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from cfjax.conversion.rules import save_named
from cfjax.conversion.wan import ORIGINAL, config_json_wan, export_wan
from cfjax.core import offload
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.precision import to_record
from cfjax.core.quantize import packed
from cfjax.core.sharding import make_mesh
from cfjax.core.tree import named_leaves
from cfjax.experiment import presets
from cfjax.experiment.build import build
from cfjax.experiment.data import Shapes
from cfjax.experiment.networks import check_blocks, check_host_memory, network_role, roles_of
from cfjax.experiment.notes import other_sizes
from cfjax.experiment.stage import blocks_of
from cfjax.models.weight_storage import fill
from cfjax.training.streamed import write_streamed
from cfjax.worlds.assets import META_FILE
from configs import dmd
from tests.commands import cfjax
from tests.conversion.repacked import save_raw, scaled

SHAPES = Shapes((12, 4, 4, 16), (8, 64))


def network(name: str, **changes):
    """A toy role; `changes` are those of `presets.role`, and offload."""
    offload, branch = changes.pop("offload", False), changes.pop("branch", None)
    c = presets.role("toy", **changes)
    c.offload = offload
    if branch is not None:
        c.branch = branch
    return network_role(name, c)


def check(c):
    check_blocks(blocks_of(c), roles_of(c).values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that holds one toy network, random, written layer by layer."""
    folder = tmp_path_factory.mktemp("roles") / "run"
    model = network("real_score").initial(SHAPES, 3)
    rng = np.random.default_rng(0)
    named = {
        name: rng.standard_normal(leaf.shape).astype(np.float32) * (leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 1.0)
        for name, leaf in named_leaves(model).items()
    }
    lazy = {
        f"params/student/{name}": LazyArray(x.shape, x.dtype, tuple(lambda part=part: part for part in x), True)
        if x.ndim == 3
        else LazyArray.of(x)
        for name, x in named.items()
    }
    write_streamed(folder, lazy, {"stage": "bidirectional"})
    return str(folder), named


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("storage, away", [("float32", False), ("bfloat16", True), ("int8", False), ("int8", True)])
def test_a_run_is_loaded_as_it_is_to_rest(run, storage, away, mesh):
    folder, named = run
    on = make_mesh(**mesh) if mesh else None
    role = network("real_score", init=folder, stages=("bidirectional",), storage=storage, offload=away)
    model, template = role.initial(SHAPES, 0, on), role.template(SHAPES, on)
    whole = named_leaves(fill(network("real_score", storage=storage).template(SHAPES), as_lazy(named)))
    for (name, leaf), like in zip(named_leaves(model).items(), jax.tree.leaves(template), strict=True):
        if name.endswith("/int8") and away:
            whole[name] = packed(np.asarray(whole[name]))
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)
        assert leaf.dtype == like.dtype
        assert like.sharding is None or leaf.sharding == like.sharding, name


@pytest.mark.parametrize("form", ["float8", "float16"])
def test_converted_weights_are_a_stages_start(run, form, tmp_path):
    """Of any layout, here float8 with scales: in float32, as training needs them."""
    config = network("student").network(SHAPES)
    weights = save_named(ORIGINAL, run[1], config)
    stored, meant = scaled(weights, "comfy")
    if form == "float16":
        stored = {name: x.astype(np.float16) for name, x in weights.items()}
        meant = {name: x.astype(np.float32) for name, x in stored.items()}
    (tmp_path / "config.json").write_text(json.dumps(config_json_wan(config, "original")))
    keys = {"source": save_raw(tmp_path / "x.safetensors", stored), "latents": "(12,4,4)", "progress": False}
    assert cfjax("convert", "convert.py:ar_diffusion", tmp_path / "run", **keys) == 0
    start = network("student", init=str(tmp_path / "run"), stages=("ar_diffusion",)).initial(
        SHAPES, 0, make_mesh(fsdp=4, tensor=2)
    )
    for name, x in export_wan(start, ORIGINAL).items():
        np.testing.assert_array_equal(x, meant[name], err_msg=name, strict=True)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("branch", [False, True])
def test_an_empty_network_has_the_weights_shardings(mesh, branch):
    on, role = make_mesh(**mesh) if mesh else None, network("critic", branch=presets.branch() if branch else None)
    empty, model = role.empty(SHAPES, on), role.initial(SHAPES, 0, on)
    assert jax.tree.structure(empty) == jax.tree.structure(model)
    for (name, leaf), other in zip(named_leaves(empty).items(), jax.tree.leaves(model), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (other.shape, other.dtype, other.sharding), name
        assert leaf.committed == other.committed and not leaf.any(), name


def test_a_role_is_as_large_as_what_it_starts_from(tmp_path):
    """Whatever its preset; where a run goes on, as that run's own networks."""
    config = replace(network("student").network(SHAPES), num_layers=3, ffn_dim=96)
    (tmp_path / META_FILE).write_text(json.dumps({"models": {"student": to_record(config)}}))
    role = network("student", init=str(tmp_path))
    assert role.network(SHAPES).num_layers == 4  # before anything is read
    assert role.sized().network(SHAPES) == replace(config, remat="full")
    own = {"student": to_record(replace(config, num_layers=2))}
    assert role.sized(own).network(SHAPES).num_layers == 2 and role.sized({}).network(SHAPES).num_layers == 3
    assert network("student").sized().sizes is None and network("student", init="nowhere").sized().sizes is None


def test_weights_for_other_data_are_refused_before_any_are_made(tmp_path):
    record = to_record(network("student").network(SHAPES))
    (tmp_path / META_FILE).write_text(json.dumps({"models": {"student": record}}))
    role = network("student", init=str(tmp_path)).sized()
    role.check_fit(SHAPES, "data/clips")
    with pytest.raises(UserError, match=r"latents of 16 channels and text rows of width 64; data/clips has 8 and 64"):
        role.check_fit(Shapes((12, 4, 4, 8), (8, 64)), "data/clips")


def test_a_network_of_other_sizes_than_its_preset_is_noted(tmp_path):
    c = dmd.get_config("toy")
    config = replace(network("student").network(SHAPES), num_layers=3)
    (tmp_path / META_FILE).write_text(json.dumps({"models": {"student": to_record(config)}}))
    c.roles.real_score.init = str(tmp_path)
    (line,) = other_sizes(build(c).with_sizes())
    assert line.endswith("has 3 layers of width 128, which holds: not roles.real_score.preset='toy'")


def test_another_stage_or_size_is_named(run):
    with pytest.raises(UserError, match="holds stage 'bidirectional', expected 'ar_diffusion'"):
        network("teacher", init=run[0], stages=("ar_diffusion",), storage="int8").initial(SHAPES, 0)
    with pytest.raises(UserError, match=r"roles.teacher.init=.*head/bias is \(64,\), expected \(32,\)"):
        network("teacher", init=run[0], storage="int8").initial(Shapes((12, 4, 4, 8), (8, 64)), 0)


@pytest.mark.parametrize("stage", ["ar_diffusion", "bidirectional"])
def test_an_exported_model_has_the_blocks_that_it_was_trained_with(tmp_path, stage):
    """As a run has; a bidirectional one, such as the shipped teacher, has none."""
    blocks = presets.blocks().to_dict()
    (tmp_path / META_FILE).write_text(json.dumps({"stage": stage, "blocks": blocks}))
    c = dmd.get_config("toy,framewise,from_ar")
    assert c.roles.critic.init == "toy_teacher"
    c.roles.student.init = str(tmp_path)
    if stage == "bidirectional":
        return check(c)
    with pytest.raises(UserError, match=r"roles\.student\.init=.* was trained with blocks\.frames=3, .*, not 1, False"):
        check(c)
    c.blocks.frames = 3
    check(c)


def test_a_device_without_host_memory_is_reported(monkeypatch):
    c = dmd.get_config("toy")
    c.roles.real_score.offload = True
    check_host_memory(roles_of(c))
    monkeypatch.setattr(offload, "HOST", "no such memory")
    with pytest.raises(UserError, match=r"roles.real_score.offload=True: programs on cpu cannot read host memory"):
        check_host_memory(roles_of(c))
