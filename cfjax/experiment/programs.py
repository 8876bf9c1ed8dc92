"""An experiment's updates from shapes alone: their arguments, memory, FLOPs, and the lowered programs."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cfjax.core.sharding import batch_sharding, on_mesh, replicated
from cfjax.data.steered import KEYS
from cfjax.experiment.build import Experiment
from cfjax.experiment.data import Shapes
from cfjax.experiment.networks import NetworkRole
from cfjax.models.cache import longest_share
from cfjax.models.discriminator import TAP, tapped_layers
from cfjax.models.experts import takes_picture
from cfjax.nn.attention import pick_backend
from cfjax.nn.frames import VISIBLE_PREFIX
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import CORRECTIVE, DiffusionConfig
from cfjax.objectives.dmd import DMDConfig
from cfjax.planning.flops import count_flops
from cfjax.rollout.blocks import COMMIT, COUNTED_BLOCKS
from cfjax.rollout.long_video import FIRST_REENCODED, LAST_PICTURE
from cfjax.rollout.remembered import REBUILT, REPLAYED
from cfjax.rollout.rolling_training import COMMIT_DONE, COUNTED_WINDOWS, ROLLS
from cfjax.rollout.self_forcing import BEFORE_EXIT
from cfjax.rollout.streaming import RECOMMITTED, Streaming, empty_rollout
from cfjax.training.memory import RoleMemory, abstract_state, device_bytes, role_memory
from cfjax.training.placement import rollout_shardings, state_shardings
from cfjax.training.state import TrainState
from cfjax.training.step import has_batch_axis, make_update


def abstract_batch(e: Experiment, shapes: Shapes, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the data iterator makes it, as shapes."""
    size, text = e.data.batch_size, shapes.text
    arrays: dict[str, Any] = {
        "latents_BFHWC": ((size, *shapes.latents), jnp.float32),
        "text_BSE": ((size, *text), jnp.float32),
        "negative_text_SE": (text, jnp.float32),
        "index_B": ((size,), jnp.int32),
    }
    if e.data.trajectory_points:
        arrays["trajectory_BJFHWC"] = ((size, e.data.trajectory_points, *shapes.latents), jnp.float32)

    if e.data.steering or e.data.action_keys:
        keys = e.data.action_keys or len(KEYS)
        arrays["actions_BFA"] = ((size, shapes.latents[0], keys), jnp.float32)
    if any(takes_picture(network.base) for network in e.networks.values()):
        arrays["picture_BFHWC"] = arrays["latents_BFHWC"]

    def where(name: str) -> Any:
        if mesh is None:
            return None
        return batch_sharding(mesh) if has_batch_axis(name) else replicated(mesh)

    return {name: jax.ShapeDtypeStruct(*of, sharding=where(name)) for name, of in arrays.items()}


def rollout_before(e: Experiment, shapes: Shapes, mesh: Mesh | None = None, *, abstract: bool = False) -> Any:
    """What the losses of a stage that `goes_on` carry, before the first update, placed; of others None.

    Args:
      abstract: shapes instead of arrays.
    """
    streaming = e.objective.streaming if isinstance(e.objective, DMDConfig) else None
    if streaming is None:
        return None
    size, network = e.data.batch_size, e.networks["student"].network(shapes)
    make = partial(
        empty_rollout, network, (size, *shapes.latents), (size, *shapes.text), streaming=streaming, blocks=e.blocks
    )
    found = jax.eval_shape(make)
    if mesh is None:
        return found if abstract else jax.jit(make)()  # donated: compiled, no two of its arrays are one buffer
    where = rollout_shardings(found, mesh)
    if abstract:
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), found, where)
    return jax.jit(make, out_shardings=where)()


def templates(e: Experiment, shapes: Shapes, mesh: Mesh | None = None) -> dict[str, Any]:
    """Every role's arrays as shapes, placed."""
    return {name: role.template(shapes, mesh) for name, role in e.roles.items()}


def stage_memory(e: Experiment, shapes: Shapes, mesh: Mesh | None = None) -> list[RoleMemory]:
    """What every role will hold on each device of `mesh`; from shapes, before anything is allocated."""
    accumulate = {name: e.accumulate(name) for name in e.stage.losses}
    return role_memory(e.stage, templates(e, shapes, mesh), e.optimizers, mesh, accumulate=accumulate)


def abstract_arguments(
    e: Experiment, shapes: Shapes, mesh: Mesh | None
) -> tuple[TrainState, dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """The arguments of every update as shapes: (state, frozen roles, batch)."""
    models = templates(e, shapes, mesh)
    rollout = rollout_before(e, shapes, mesh, abstract=True)
    state = replace(abstract_state(e.stage, models, e.optimizers, mesh), rollout=rollout)
    return state, {name: models[name] for name in e.frozen}, abstract_batch(e, shapes, mesh)


def expected_trip_counts(e: Experiment, frames: int) -> dict[str, float]:
    """Mean trip counts of loops and branches that depend on random draws, by scope (`planning.trip_counts`).

    Loops: steps before the exit; a long rollout's blocks, and the latents before its window. Conditionals: all blocks
    but the last are committed; windows after the start, of all; a branch's layers, of all; corrective clips, of all;
    blocks that see the longest prefix of the cache, of all; rollouts by windows of blocks, and their commits.

    Args:
      frames: latent frames of the clips.
    """
    runs: dict[str, float] = {}
    critic = e.networks.get("critic")
    if critic is not None and critic.branch is not None:
        depth = critic.base.num_layers
        runs[TAP] = len(tapped_layers(critic.branch, depth)) / depth
    if e.stage.name == "ar_diffusion" and isinstance(e.objective, DiffusionConfig):
        runs[CORRECTIVE] = e.objective.bagger
    if not isinstance(e.objective, DMDConfig):
        return runs
    runs[BEFORE_EXIT] = (len(e.objective.self_forcing.sigmas) - 1) / 2
    long, blocks = e.objective.long, e.blocks
    if e.objective.streaming:
        return runs | _streaming_trip_counts(e.objective.streaming, blocks)
    if long:
        least, most = long.counts(blocks)
        runs[COUNTED_BLOCKS] = (least + most) / 2 - blocks.independent_first_frame
        runs[FIRST_REENCODED] = (most - least) / (most - least + 1)
        runs[LAST_PICTURE] = (most - least + 1) / 2 * blocks.frames  # of windows after the start
    number = (least + most) / 2 if long else len(blocks.spans(frames))
    runs[COMMIT] = (number - 1) / number
    if rolling := e.objective.self_forcing.rolling:
        windows = number + len(e.objective.self_forcing.sigmas) - 1
        runs |= {ROLLS: rolling, COUNTED_WINDOWS: windows, COMMIT_DONE: (number - 1) / windows}
    runs[VISIBLE_PREFIX] = longest_share(long.max_frames if long else frames, blocks)
    if blocks.memory is not None and long:
        runs[REBUILT] = (most - least) / 2
    return runs


def _streaming_trip_counts(streaming: Streaming, blocks: Blocks) -> dict[str, float]:
    """Of a rollout that goes on, for one of its chunks on average."""
    chunks, new = streaming.expected(blocks)
    number = (streaming.window_frames + (chunks - 1) * new) / chunks / blocks.frames
    return {
        COUNTED_BLOCKS: number,
        REPLAYED: number,
        FIRST_REENCODED: (chunks - 1) / chunks,
        LAST_PICTURE: new,
        RECOMMITTED: 1 / chunks if streaming.switch_prompts else 0.0,
        VISIBLE_PREFIX: longest_share(streaming.max_frames, streaming.check(blocks)),
    }


def with_attention(e: Experiment, platform: str) -> tuple[Experiment, str]:
    """The experiment with every role's "auto" resolved for `platform`, and the names of the backends.

    cuDNN does not lower without a GPU, and dense scores on a simulated device do not represent a flash kernel: both are
    replaced by "chunked", which keeps the scores of a few queries at a time.
    """

    def backend(role: NetworkRole) -> str:
        if role.attention != "auto":
            return role.attention
        picked = pick_backend("auto", jnp.dtype(role.precision), platform)
        return picked if platform == "tpu" else "chunked"

    used = {name: replace(role, attention=backend(role)) for name, role in e.networks.items()}
    return replace(e, roles={**e.roles, **used}), ", ".join(sorted({role.attention for role in used.values()}))


def whole_flops(e: Experiment, shapes: Shapes, role: str, *, remat: bool) -> float:
    """FLOPs of one update on all devices together, recomputation included or not."""
    plain = {
        name: replace(network, attention="xla", offload=False, remat=network.remat if remat else "none")
        for name, network in e.networks.items()
    }
    e = replace(e, roles={**e.roles, **plain})
    state, frozen, batch = abstract_arguments(e, shapes, None)
    update = make_update(e.stage, role, e.optimizers[role], accumulate=e.accumulate(role))
    return count_flops(update, state, frozen, batch, trip_counts=expected_trip_counts(e, shapes.latents[0]))


def lower_update(e: Experiment, shapes: Shapes, mesh: Mesh, role: str) -> tuple[Any, int]:
    """The real update of one role on `mesh`, lowered from shapes, and the bytes of its arguments per device."""
    state, frozen, batch = abstract_arguments(e, shapes, mesh)
    placement, accumulate = state_shardings(state, mesh), e.accumulate(role)
    update: Any = make_update(e.stage, role, e.optimizers[role], accumulate=accumulate, placement=placement)
    with on_mesh(mesh):
        return update.lower(state, frozen, batch), device_bytes((state, frozen, batch))
