"""A stage's networks, from config to weights: their sizes, how they rest, what they start from, what they cost."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.offload import has_host_memory
from cfjax.core.paths import is_folder, path_of
from cfjax.core.sharding import replicated, shard_model
from cfjax.core.tree import named_leaves
from cfjax.experiment.config import META_FILE, MODEL_FILE, Data, branch_config, codec_key, load_shipped, wan_config
from cfjax.experiment.record import START, read_run
from cfjax.models.codec import Codec, abstract_patch_codec
from cfjax.models.discriminator import Discriminator, with_branch
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig
from cfjax.models.vae import PRESETS as VAES
from cfjax.models.vae import abstract_vae
from cfjax.models.wan import Wan, WanConfig, make_wan
from cfjax.models.weight_storage import STORAGES, fill, with_shardings, with_storage_dtypes
from cfjax.objectives.stage import Stage
from cfjax.training.checkpoint import load_role, open_role
from cfjax.training.memory import RoleMemory, role_memory
from cfjax.worlds.toy import asset


def check_roles(c: ConfigDict, stage: Stage) -> None:
    """What a role is asked to be, it can be.

    Raises:
      UserError: a trained role is missing or does not rest in float32 on the device, an unknown storage, or a device
        whose programs cannot read host memory.
    """
    missing = sorted(set(stage.losses) - set(c.roles))
    if missing:
        raise UserError(f"roles.{missing[0]} is missing: stage {c.stage} trains {', '.join(stage.losses)}")
    for name, role in c.roles.items():
        if "branch" in role and name not in stage.losses:
            raise UserError(f"roles.{name}.branch: {name} is frozen; a classifier branch is for the trained critic")
        if role.storage not in STORAGES:
            raise UserError(f"roles.{name}.storage={role.storage!r}: use one of {', '.join(STORAGES)}")
        asked = f"storage={role.storage!r}" if role.storage != "float32" else "offload=True"
        if name in stage.losses and (role.storage != "float32" or role.offload):
            raise UserError(
                f"roles.{name}.{asked}: {name} is trained: float32, on the device; this is for frozen roles"
            )
        if role.offload and not has_host_memory(jax.local_devices()[0]):
            raise UserError(
                f"roles.{name}.offload=True: programs on {jax.local_devices()[0].platform} cannot read host memory; "
                f"set it to False, and roles.{name}.storage='int8' to save memory"
            )


def check_blocks(c: ConfigDict, roles: Iterable[str] | None = None) -> None:
    """A causal network goes on with the blocks that it was trained with: chunk-wise weights are no frame-wise ones.

    Args:
      roles: whose start is looked at; None is all.

    Raises:
      UserError: a role starts from a causal run, or an exported model, of another layout.
    """
    for name in c.roles if roles is None else roles:
        role = c.roles[name]
        exported = asset(role.init, META_FILE) if role.init else None
        if exported or (role.init and is_folder(path_of(role.init))):
            same_blocks(
                c, read_run(role.init, START), f"roles.{name}.init={role.init!r}", "name a run of the same layout"
            )


def same_blocks(c: ConfigDict, meta: Mapping[str, Any], what: str, fix: str) -> None:
    """Refuses the weights of another layout than `c`'s.

    Args:
      meta: the record beside the weights.  what: names them.  mend: what else could be done.

    Raises:
      UserError: they are a causal network's, of blocks of another size.
    """
    own = (c.blocks.frames, c.blocks.independent_first_frame)
    theirs = (meta["blocks"]["frames"], meta["blocks"]["independent_first_frame"])
    if meta["stage"] != "bidirectional" and theirs != own:
        raise UserError(
            f"{what} was trained with blocks.frames={theirs[0]}, blocks.independent_first_frame={theirs[1]}, "
            f"not {own[0]}, {own[1]}; {fix}, or set these keys to its own"
        )


def role_template(role: ConfigDict, channels: int, text_width: int, mesh: Mesh | None = None) -> Wan:
    """One role's network as shapes, each with the dtype that it rests in and its place; allocates nothing."""
    config, branch = wan_config(role, channels, text_width), branch_config(role)
    if branch is not None:
        judge = jax.eval_shape(lambda key: Discriminator(config, branch, key), jax.random.key(0))
        return with_shardings(judge, mesh, offload=False)
    return _network_template(role, config, mesh)


def _network_template(role: ConfigDict, config: WanConfig, mesh: Mesh | None) -> Wan:
    return with_shardings(
        with_storage_dtypes(_shapes(config), role.storage, role.precision), mesh, offload=role.offload
    )


def _shapes(config: WanConfig) -> Wan:
    return jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))


def codec_template(c: ConfigDict, channels: int, mesh: Mesh | None = None) -> Codec | None:
    """The frozen role "codec" as shapes, where `c` needs one: the toy's or a published one, whole on every device."""
    if not codec_key(c):
        return None
    codec: Codec
    if c.data.source == "shapes":
        codec = abstract_patch_codec(channels=channels)
    elif c.objective.codec_decoder == "tiny_vae":
        codec = jax.eval_shape(lambda key: TinyVAE(TinyVAEConfig(), key), jax.random.key(0))
    else:
        codec = abstract_vae(VAES["wan"])
    return as_shapes(codec, mesh)


def as_shapes(codec: Codec | None, mesh: Mesh | None = None) -> Codec | None:
    """A codec's shapes and where it will rest, from its arrays or shapes; None stays."""
    where = replicated(mesh) if mesh else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), codec)


def stage_memory(
    c: ConfigDict,
    stage: Stage,
    txs: Mapping[str, Any],
    channels: int,
    text_width: int,
    mesh: Mesh | None = None,
    *,
    codec: Codec | None = None,
) -> list[RoleMemory]:
    """What every role of `c` will hold on each device of `mesh`; from shapes, before anything is allocated.

    Args:
      codec: shapes of the frozen one, where the stage needs it; see `codec_template`.
    """
    models: dict[str, Any] = {
        name: role_template(role, channels, text_width, mesh) for name, role in c.roles.items()
    } | with_codec(codec)
    return role_memory(stage, models, txs, mesh, accumulate={name: c.optim[name].accumulate for name in stage.losses})


def with_codec(codec: Codec | None) -> dict[str, Any]:
    """The codec by its role's name, if there is one."""
    return {} if codec is None else {"codec": codec}


def initial_model(name: str, role: ConfigDict, data: Data, seed: int, mesh: Mesh | None = None) -> Wan:
    """One role's starting weights where they will rest: random, shipped, or another run's; a branch's are random.

    A role that rests in less than float32, or on the host, is read and converted array by array: neither the host nor
    a device ever holds it in float32.

    Raises:
      UserError: nothing there, another stage, or weights that do not fit.
    """
    config, branch = wan_config(role, data.channels, data.text_width), branch_config(role)
    network = _initial_network(name, role, config, seed, mesh)
    if branch is None:
        return network
    judge = with_branch(network, branch, jax.random.fold_in(_role_key(name, seed), 1))
    return shard_model(judge, mesh) if mesh else judge


def empty_model(role: ConfigDict, data: Data, mesh: Mesh | None = None) -> Wan:
    """One role's network, all zeros, where its weights will rest: for a run that goes on with a checkpoint's."""
    template = role_template(role, data.channels, data.text_width, mesh)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), template)


def _role_key(name: str, seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def _initial_network(name: str, role: ConfigDict, config: WanConfig, seed: int, mesh: Mesh | None) -> Wan:
    template = _network_template(role, config, mesh)
    plain, stages = role.storage == "float32" and not role.offload, tuple(role.init_stages)
    if not role.init or asset(role.init, MODEL_FILE):
        made = lambda: make_wan(config, _role_key(name, seed))
        model = load_shipped(role.init, _shapes(config), stages=stages) if role.init else made()
        if plain:
            return shard_model(model, mesh) if mesh else model
        return fill(template, as_lazy(named_leaves(model)))
    if not is_folder(path_of(role.init)):
        raise UserError(
            f"roles.{name}.init={role.init!r}: no such run; train it first, or give --config.roles.{name}.init"
        )
    if plain:
        where = template if mesh else make_wan(config, jax.random.key(0))
        return load_role(role.init, role.init_role, where, ema=role.init_ema, stages=stages)
    together = mesh is not None and jax.process_count() > 1
    arrays = open_role(role.init, role.init_role, ema=role.init_ema, stages=stages, together=together)
    return _filled(name, role, template, arrays)


def _filled(name: str, role: ConfigDict, template: Wan, arrays: Mapping[str, LazyArray]) -> Wan:
    try:
        return fill(template, arrays)
    except UserError as error:
        raise UserError(f"roles.{name}.init={role.init!r}: {error}") from None
