"""Checkpoints: what is saved comes back bit for bit; what is broken, foreign or unfit is an error of one line."""

import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

from cfjax.core.errors import Temporary, UserError
from cfjax.training import checkpoint
from cfjax.training.checkpoint import CheckpointStore, load_role, read_meta
from cfjax.training.state import TrainState, advance
from tests.golden.record_checkpoint import DATA, FOLDER, META, known
from tests.training.toy import Linear, arrays, setup, two_roles


def fresh(seed: int = 0, width: int = 4) -> TrainState:
    return setup(two_roles(), seed, width)[0]


def fill(workdir: Path, steps: int = 3) -> dict[int, dict[str, np.ndarray]]:
    """Saves steps 1..n of a state that changes; returns what was saved."""
    store, state, saved = CheckpointStore(workdir, keep=3), fresh(), {}
    for step in range(1, steps + 1):
        state = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + 1, state)
        saved[step] = arrays(state)
        store.save(step, state, {"position": step, "raw": b"\x00\xff"}, {"stage": "toy", "model": {"width": 4}})
    store.close()
    return saved


def truncate(folder: Path) -> None:
    """Cuts the largest file below `folder` in half."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)


def cut_data(folder: Path) -> None:
    """Cuts every array file below `folder`."""
    for path in folder.rglob("d/*"):
        os.truncate(path, os.path.getsize(path) // 2)


def test_round_trip_is_exact(tmp_path):
    saved = fill(tmp_path)
    store = CheckpointStore(tmp_path)
    state, data_state, meta = store.restore_latest(fresh(seed=0), stage="toy")
    for name, value in arrays(state).items():
        np.testing.assert_array_equal(value, saved[3][name], err_msg=name)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(fresh().key).tolist()
    assert data_state == {"position": 3, "raw": b"\x00\xff"}
    assert meta == {"stage": "toy", "model": {"width": 4}, "step": 3}
    assert store.steps() == [1, 2, 3]
    store.close()


@pytest.mark.parametrize("recorded", sorted(FOLDER.glob("jax_*")), ids=lambda folder: folder.name)
def test_checkpoints_of_other_jax_versions_are_read(tmp_path, recorded):
    workdir = tmp_path / "run"
    shutil.copytree(recorded, workdir)
    store = CheckpointStore(workdir)
    state, data_state, meta = store.restore_latest(fresh(), stage="toy")
    store.close()
    assert (data_state, meta) == (DATA, {**META, "step": 3})
    expected = arrays(known())
    for name, value in arrays(state).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(known().key).tolist()


def test_there_are_two_jax_versions_to_read():
    assert len({folder.name.split(".")[1] for folder in FOLDER.glob("jax_*")}) > 1


def test_an_empty_folder_holds_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.restore_latest(fresh()) is None
    store.close()


def test_the_oldest_go(tmp_path):
    store, state = CheckpointStore(tmp_path, keep=2), fresh()
    for step in range(1, 5):
        store.save(step, state, {}, {"stage": "toy"})
    store.wait()
    assert store.steps() == [3, 4]
    store.close()


def test_the_saved_state_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    store, weights = CheckpointStore(tmp_path), {"kernel": jnp.ones((512, 512))}
    for step in range(1, 4):
        store.save(step, weights, {}, {"stage": "toy"})
        overwrite(weights)
        store.wait()
        restored, _, _ = store.restore_latest({"kernel": jnp.zeros((512, 512))})
        assert float(restored["kernel"].min()) == 1.0
        weights = {"kernel": jnp.ones((512, 512))}
    store.close()


def test_a_folder_is_opened_while_its_run_removes_an_old_checkpoint(tmp_path, monkeypatch):
    """Orbax lists the folder, then looks at each: one that has gone in between is no longer there the next time."""
    fill(tmp_path)
    manager, races = ocp.CheckpointManager, []

    def racing(*args, **kwargs):
        races.append(1)
        if len(races) % 3:
            raise FileNotFoundError("checkpoints/1")
        return manager(*args, **kwargs)

    monkeypatch.setattr(ocp, "CheckpointManager", racing)
    assert read_meta(tmp_path)["step"] == 3 and len(races) == 3
    monkeypatch.setattr(ocp, "CheckpointManager", lambda *_, **__: Path("nowhere").stat())
    with pytest.raises(UserError, match=r"checkpoints cannot be opened \(FileNotFoundError"):
        read_meta(tmp_path)


@pytest.mark.parametrize("damage", [truncate, cut_data, lambda folder: (folder / "record/metadata").write_text("{")])
def test_a_broken_newest_is_passed_over_and_its_step_can_be_saved_again(tmp_path, damage, monkeypatch):
    saved, lines = fill(tmp_path), []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    damage(tmp_path / "checkpoints" / "3")
    weights = load_role(tmp_path, "critic", Linear(jax.random.key(9)), stages=("toy",))
    np.testing.assert_array_equal(weights.kernel[...], saved[2]["params/critic/kernel"])
    lines.clear()
    store = CheckpointStore(tmp_path, keep=3)
    state, data_state, _ = store.restore_latest(fresh())
    assert int(state.step) == 2 and data_state["position"] == 2
    assert len(lines) == 1 and f"{tmp_path}/checkpoints/3 is broken" in lines[0] and "\n" not in lines[0]
    store.save(3, advance(state), {}, {"stage": "toy"})
    store.wait()
    assert store.steps() == [1, 2, 3] and (tmp_path / "checkpoints_broken" / "3").is_dir()
    assert int(store.restore_latest(fresh())[0].step) == 3
    store.close()


def test_when_all_are_broken_the_run_does_not_start_again(tmp_path):
    fill(tmp_path, steps=2)
    for step in (1, 2):
        truncate(tmp_path / "checkpoints" / str(step))
    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match="all checkpoints are broken"):
        store.restore_latest(fresh())
    store.close()
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_role(tmp_path, "critic", Linear(jax.random.key(0)))


def test_another_stage_or_shape_is_refused(tmp_path):
    fill(tmp_path, steps=1)
    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match="holds stage 'toy', expected 'dmd'"):
        store.restore_latest(fresh(), stage="dmd")
    with pytest.raises(UserError, match=r"bias has shape \(4,\), this config needs \(5,\)"):
        store.restore_latest(fresh(width=5))
    assert store.steps() == [1]
    store.close()


def test_a_state_of_an_older_version_comes_back_exactly(tmp_path, monkeypatch):
    """cfjax 0.1.0 numbered the parts of an optimiser that has no decay without it."""
    flatten = checkpoint.flatten
    older = {"opt/student/3/count": "opt/student/2/count", "opt/critic/3/count": "opt/critic/2/count"}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flatten", lambda tree: {older.get(k, k): x for k, x in flatten(tree).items()})
        saved = fill(tmp_path, steps=1)[1]
    leaves = next(checkpoint._good_records(tmp_path))[1]["leaves"]
    assert {"opt/student/2/count", "opt/critic/2/count"} <= leaves.keys() and "opt/student/3/count" not in leaves
    store = CheckpointStore(tmp_path)
    state, _, _ = store.restore_latest(fresh(seed=1))
    store.close()
    for name, value in arrays(state).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)


def test_load_role_reads_one_model_or_its_shadow(tmp_path):
    saved = fill(tmp_path)
    for ema, prefix in ((False, "params"), (True, "ema")):
        model = load_role(tmp_path, "student", Linear(jax.random.key(5)), ema=ema, stages=("ar", "toy"))
        assert isinstance(model, Linear)
        np.testing.assert_array_equal(model.kernel[...], saved[3][f"{prefix}/student/kernel"])
    assert read_meta(tmp_path, stages=("toy",))["model"] == {"width": 4}


@pytest.mark.parametrize(
    ("role", "width", "kwargs", "message"),
    [
        ("student", 4, {"stages": ("ode", "dmd")}, "holds stage 'toy', expected 'ode' or 'dmd'"),
        ("student", 5, {}, r"this config needs \(5,\)"),
        ("teacher", 4, {}, "holds no 'params/teacher'; it holds ema/student, params/critic, params/student"),
        ("critic", 4, {"ema": True}, "holds no 'ema/critic'"),
    ],
)
def test_load_role_refuses_what_does_not_fit(tmp_path, role, width, kwargs, message):
    fill(tmp_path, steps=1)
    with pytest.raises(UserError, match=message) as caught:
        load_role(tmp_path, role, Linear(jax.random.key(0), width), **kwargs)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no run here"):
        load_role(tmp_path / "elsewhere", role, Linear(jax.random.key(0)))


def test_arrays_are_restored_with_the_templates_sharding(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    fill_value = jnp.arange(64.0).reshape(8, 8)
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": jax.device_put(fill_value, rows), "n": jnp.int32(3)}, {}, {"stage": "toy"})
    store.wait()
    for sharding in (rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())):
        template = {"w": jax.device_put(jnp.zeros((8, 8)), sharding), "n": jnp.int32(0)}
        restored, _, _ = store.restore_latest(template)
        assert restored["w"].sharding == sharding
        np.testing.assert_array_equal(restored["w"], fill_value)
        jax.jit(lambda tree: tree["w"] * tree["n"])(restored)
    store.close()


def test_a_full_disk_during_a_save_leaves_the_checkpoint_before(tmp_path):
    """The kernel refuses bytes beyond a limit, as a full disk does; with room again, saving goes on."""
    store, weights = CheckpointStore(tmp_path), {"kernel": jnp.ones((256, 256))}
    store.save(1, weights, {}, {"stage": "toy"})
    store.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}  # 1 MB that no compression shrinks
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        with pytest.raises(Temporary, match=r"could not be written .*; that of step 1 is good; see to the space"):
            store.save(2, noise, {}, {"stage": "toy"})
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    store.close()
    store = CheckpointStore(tmp_path)
    assert store.steps() == [1]
    restored, _, meta = store.restore_latest({"kernel": jnp.zeros((256, 256))})
    assert meta["step"] == 1 and float(restored["kernel"].min()) == 1.0
    store.save(3, noise, {}, {"stage": "toy"})
    store.wait()
    np.testing.assert_array_equal(store.restore_latest(noise)[0]["kernel"], noise["kernel"])
    store.close()
