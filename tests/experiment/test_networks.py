"""A role's weights from any source, in the requested storage, and read without memory for float32."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from cfjax.core import offload
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.quantize import packed
from cfjax.core.sharding import make_mesh
from cfjax.core.tree import named_leaves
from cfjax.experiment import presets
from cfjax.experiment.config import META_FILE, stage_of
from cfjax.experiment.networks import check_blocks, check_roles, empty_model, initial_model, role_template
from cfjax.models.weight_storage import fill
from cfjax.training.streamed import write_streamed
from configs import dmd


@dataclass(frozen=True)
class Sizes:
    """What `initial_model` asks of the data."""

    channels: int = 16
    text_width: int = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that holds one toy network, random, written layer by layer."""
    folder = tmp_path_factory.mktemp("roles") / "run"
    model = initial_model("real_score", presets.role("toy"), Sizes(), 3)
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
    role = presets.role("toy", init=folder, stages=("bidirectional",), storage=storage)
    role.offload = away
    model = initial_model("real_score", role, Sizes(), 0, on)
    template = role_template(role, Sizes.channels, Sizes.text_width, on)
    whole = named_leaves(fill(role_template(presets.role("toy", storage=storage), 16, 64), as_lazy(named)))
    for (name, leaf), like in zip(named_leaves(model).items(), jax.tree.leaves(template), strict=True):
        if name.endswith("/int8") and away:
            whole[name] = packed(np.asarray(whole[name]))
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)
        assert leaf.dtype == like.dtype
        assert like.sharding is None or leaf.sharding == like.sharding, name


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("branch", [False, True])
def test_an_empty_network_has_the_weights_shardings(mesh, branch):
    on, role = make_mesh(**mesh) if mesh else None, presets.role("toy")
    if branch:
        role.branch = presets.branch()
    empty, model = empty_model(role, Sizes(), on), initial_model("critic", role, Sizes(), 0, on)
    assert jax.tree.structure(empty) == jax.tree.structure(model)
    for (name, leaf), other in zip(named_leaves(empty).items(), jax.tree.leaves(model), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (other.shape, other.dtype, other.sharding), name
        assert leaf.committed == other.committed and not leaf.any(), name


def test_another_stage_or_size_is_named(run):
    role = presets.role("toy", init=run[0], stages=("ar_diffusion",), storage="int8")
    with pytest.raises(UserError, match="holds stage 'bidirectional', expected 'ar_diffusion'"):
        initial_model("teacher", role, Sizes(), 0)
    role.init_stages = ()
    with pytest.raises(UserError, match=r"roles.teacher.init=.*head/bias is \(64,\), expected \(32,\)"):
        initial_model("teacher", role, Sizes(channels=8), 0)


@pytest.mark.parametrize("stage", ["ar_diffusion", "bidirectional"])
def test_an_exported_model_has_the_blocks_that_it_was_trained_with(tmp_path, stage):
    """As a run has; a bidirectional one, such as the shipped teacher, has none."""
    blocks = presets.blocks().to_dict()
    (tmp_path / META_FILE).write_text(json.dumps({"stage": stage, "blocks": blocks}))
    c = dmd.get_config("toy,framewise,from_ar")
    assert c.roles.critic.init == "toy_teacher"
    c.roles.student.init = str(tmp_path)
    if stage == "bidirectional":
        return check_blocks(c)
    with pytest.raises(UserError, match=r"roles\.student\.init=.* was trained with blocks\.frames=3, .*, not 1, False"):
        check_blocks(c)
    c.blocks.frames = 3
    check_blocks(c)


def test_a_device_without_host_memory_is_reported(monkeypatch):
    c = dmd.get_config("toy")
    c.roles.real_score.offload = True
    check_roles(c, stage_of(c))
    monkeypatch.setattr(offload, "HOST", "no such memory")
    with pytest.raises(UserError, match=r"roles.real_score.offload=True: programs on cpu cannot read host memory"):
        check_roles(c, stage_of(c))
