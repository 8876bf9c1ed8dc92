"""A stage's roles, from config to weights: sizes, storage dtype, sharding and initialisation."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.offload import has_host_memory
from cfjax.core.paths import is_folder, path_of
from cfjax.core.precision import Policy
from cfjax.core.sharding import place, replicated, shard_model
from cfjax.core.tree import from_named, named_leaves
from cfjax.experiment.data import Data, Shapes
from cfjax.experiment.lora import open_network, records_of
from cfjax.experiment.record import MODELS, START, read_run
from cfjax.models.actions import ActionConfig
from cfjax.models.codec import Codec, abstract_patch_codec
from cfjax.models.discriminator import BranchConfig, Discriminator, with_branch
from cfjax.models.experts import MASK, takes_picture
from cfjax.models.fresh import with_actions
from cfjax.models.tiny_vae import abstract_tiny_vae, published_tiny_vae
from cfjax.models.vae import abstract_vae, published_vae
from cfjax.models.wan import Wan, WanConfig, make_wan, preset
from cfjax.models.weight_storage import STORAGES, fill, with_shardings, with_storage_dtypes
from cfjax.nn.visibility import Blocks
from cfjax.objectives.stage import Stage
from cfjax.training.checkpoint import FOLDER, load_role, read_meta
from cfjax.worlds.assets import META_FILE, MODEL_FILE, asset
from cfjax.worlds.records import config_from_record, placed_template
from cfjax.worlds.wan import load_codec


class Role(Protocol):
    """Weights that a stage uses, trained or frozen, before they are in memory."""

    def template(self, shapes: Shapes, mesh: Mesh | None = None) -> Any:
        """Its arrays as shapes, each with the dtype it is stored in and its sharding; allocates nothing."""

    def initial(self, shapes: Shapes, seed: int, mesh: Mesh | None = None) -> Any:
        """Its weights at the start of a run, placed."""


@dataclass(frozen=True)
class NetworkRole:
    """A Wan network: `c.roles.NAME` (see `presets.role`), sized to the data when that is known.

    Attributes:
      branch: of a GAN's critic, its classifier.
      actions: how it is told the keys that are held; None: it cannot be steered.
      sizes: of the weights that it starts from, once they are known (`sized`); None: the preset's.
    """

    name: str
    preset: str
    remat: str
    precision: str
    attention: str
    storage: str
    offload: bool
    init: str
    init_role: str
    init_ema: bool
    init_stages: tuple[str, ...]
    branch: BranchConfig | None
    actions: ActionConfig | None = field(default=None, kw_only=True)
    sizes: WanConfig | None = field(default=None, kw_only=True)

    def network(self, shapes: Shapes) -> WanConfig:
        """The network's config."""
        return replace(
            self.base,
            in_dim=2 * shapes.channels + MASK if takes_picture(self.base) else shapes.channels,
            out_dim=shapes.channels,
            text_dim=shapes.text_width,
            remat=self.remat,
            attention=self.attention,
            precision=Policy(compute=self.precision),
            actions=self.actions,
        )

    @property
    def base(self) -> WanConfig:
        """The network's sizes, before they are fitted to the data."""
        return preset(self.preset) if self.sizes is None else self.sizes

    def sized(self, models: Mapping[str, Any] | None = None) -> "NetworkRole":
        """The same role with the sizes of the weights that it starts from, where it starts from any.

        Args:
          models: what the record of a resumed run says of its networks, which then holds.

        Raises:
          UserError: a record that is broken.
        """
        if models is not None and self.name in models:
            return replace(self, sizes=config_from_record(WanConfig, models[self.name], f"roles.{self.name}"))
        there = self.init and (asset(self.init, META_FILE) or is_folder(path_of(self.init) / FOLDER))
        found = read_run(self.init, MODELS)["models"] if there else {}
        if self.init_role not in found:
            return self
        sizes = config_from_record(WanConfig, found[self.init_role], self.init)
        if sizes.actions not in (None, self.actions):
            raise UserError(
                f"roles.{self.name}.init={self.init!r} is told which keys are held, by {sizes.actions}, not by "
                f"{self.actions}: take a config's switch actions, or start from another run"
            )
        return replace(self, sizes=sizes)

    def check_fit(self, shapes: Shapes, where: object) -> None:
        """Compares the weights that it starts from with the data, before any are made or read.

        Args:
          where: the dataset's name, for the message.

        Raises:
          UserError: they are for latents of other channels, or text rows of another width; or take a picture, of
            which the data has none.
        """
        if takes_picture(self.base) and not shapes.pictures:
            raise UserError(
                f"roles.{self.name} is an image-to-video network; {where} has no pictures' latents: encode the clips"
                " with --config.pictures=True of configs/precompute.py, or name another --config.data.path"
            )
        if self.sizes is None:
            return
        own = (self.sizes.out_dim, self.sizes.text_dim)
        if own != (shapes.channels, shapes.text_width):
            raise UserError(
                f"roles.{self.name}.init={self.init!r} is a network for latents of {own[0]} channels and text rows of "
                f"width {own[1]}; {where} has {shapes.channels} and {shapes.text_width}: name another "
                "--config.data.path, or encode the clips with its world (--config.world of configs/precompute.py)"
            )

    def template(self, shapes: Shapes, mesh: Mesh | None = None) -> Wan:
        """The network as shapes, each with the dtype it is stored in and its sharding; allocates nothing."""
        config, branch = self.network(shapes), self.branch
        if branch is not None:
            critic = jax.eval_shape(lambda key: Discriminator(config, branch, key), jax.random.key(0))
            return with_shardings(critic, mesh, offload=False)
        return self._without_branch(config, mesh)

    def initial(self, shapes: Shapes, seed: int, mesh: Mesh | None = None) -> Wan:
        """The starting weights, placed: random, shipped, or another run's; a branch's are random.

        Weights that are stored in less than float32, or on the host, are read and converted array by array: neither the
        host nor a device ever holds the network in float32.

        Raises:
          UserError: nothing there, another stage, or weights that do not fit.
        """
        network = self._initial(self.network(shapes), seed, mesh)
        if self.branch is None:
            return network
        critic = with_branch(network, self.branch, jax.random.fold_in(self._key(seed), 1))
        return shard_model(critic, mesh) if mesh else critic

    def empty(self, shapes: Shapes, mesh: Mesh | None = None) -> Wan:
        """The network, all zeros, placed: for a run that resumes with a checkpoint's weights."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.template(shapes, mesh))

    def check_there(self) -> None:
        """Raises UserError where the role starts from a run that is not there."""
        if self.init and not asset(self.init, MODEL_FILE) and not is_folder(path_of(self.init)):
            raise UserError(
                f"roles.{self.name}.init={self.init!r}: no such run; train it first, or give "
                f"--config.roles.{self.name}.init"
            )

    def _without_branch(self, config: WanConfig, mesh: Mesh | None) -> Wan:
        return with_shardings(
            with_storage_dtypes(_abstract(config), self.storage, self.precision), mesh, offload=self.offload
        )

    def _key(self, seed: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.name.encode()))

    def _initial(self, config: WanConfig, seed: int, mesh: Mesh | None) -> Wan:
        if self.init and config.actions is not None and self.base.actions is None:
            network = self._initial(replace(config, actions=None), seed, None)
            network = with_actions(network, config, jax.random.fold_in(self._key(seed), 2))
            return shard_model(network, mesh) if mesh else network
        template = self._without_branch(config, mesh)
        plain = self.storage == "float32" and not self.offload
        if not self.init or asset(self.init, MODEL_FILE):
            if self.init:
                model = load_shipped(self.init, _abstract(config), stages=self.init_stages)
            else:
                model = make_wan(config, self._key(seed))
            if plain:
                return shard_model(model, mesh) if mesh else model
            return fill(template, as_lazy(named_leaves(model)))
        self.check_there()
        role, ema, stages = self.init_role, self.init_ema, self.init_stages
        adapted = role in records_of(read_meta(self.init), self.init)
        if plain and not adapted:
            where = template if mesh else placed_template(lambda: Wan(config, jax.random.key(0)))
            return load_role(self.init, role, where, ema=ema, stages=stages)
        together = mesh is not None and jax.process_count() > 1
        arrays = open_network(self.init, role, ema=ema, stages=stages, together=together)
        try:
            return fill(template, arrays)
        except UserError as error:
            raise UserError(f"roles.{self.name}.init={self.init!r}: {error}") from None


@dataclass(frozen=True)
class CodecRole:
    """The frozen role "codec": encodes the first latent of a long rollout's window again, or reverses a clip's pixels.

    Attributes:
      asked_by: the key of the config that needs it, with its value, such as "objective.max_frames=63".
      toy: whether it is the toy world's.
      world, decoder: the folder of a Wan world ("": the one that the dataset was made in), and which of its codecs.
      codec: its arrays, once the dataset is known; see `opened`.
    """

    asked_by: str
    toy: bool
    world: str
    decoder: str
    codec: Codec | None = None

    def opened(self, data: Data) -> "CodecRole":
        """The same role with the arrays of the dataset's world.

        Raises:
          UserError: no world to take it from, or latents of another one.
        """
        if data.world:
            return replace(self, codec=data.world.codec)
        made = data.dataset.manifest
        path = self.world or made.get("world_path", "")
        if not path:
            raise UserError(
                f"{data.dataset.path} does not say which world it was made in, whose codec {self.asked_by} needs; name "
                "it with --config.objective.codec_world"
            )
        codec = load_codec(path, self.decoder)
        known = made.get("codec", {}).get("fingerprint", "")
        if self.decoder == "vae" and known and codec.describe()["fingerprint"] != known:
            raise UserError(
                f"{data.dataset.path} was made with another VAE than {path}; set --config.objective.codec_world"
            )
        if codec.latent_channels != data.shapes.channels:
            raise UserError(
                f"{path} has latents of {codec.latent_channels} channels, {data.dataset.path} of {data.shapes.channels}"
            )
        return replace(self, codec=codec)

    def template(self, shapes: Shapes, mesh: Mesh | None = None) -> Codec:
        """The codec as shapes, whole on every device: the opened one, else the toy's or the published one."""
        codec: Codec
        if self.codec is not None:
            codec = self.codec
        elif self.toy:
            codec = abstract_patch_codec(channels=shapes.channels)
        elif self.decoder == "tiny_vae":
            codec = abstract_tiny_vae(published_tiny_vae(shapes.channels))
        else:
            codec = abstract_vae(published_vae(shapes.channels))
        where = replicated(mesh) if mesh else None
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), codec)

    def initial(self, shapes: Shapes, seed: int, mesh: Mesh | None = None) -> Codec:
        """The opened codec, whole on every device."""
        assert self.codec is not None, "opened() comes first"
        return jax.tree.map(partial(place, sharding=replicated(mesh)), self.codec) if mesh else self.codec


def roles_of(c: ConfigDict) -> dict[str, Role]:
    """The roles of a config by name: its networks, and the frozen codec where the objective needs one.

    Raises:
      UserError: a network has the codec's name.
    """
    roles: dict[str, Role] = {name: network_role(name, values) for name, values in c.roles.items()}
    codec = codec_role(c)
    if codec is not None and "codec" in roles:
        raise UserError(
            f"roles.codec: {codec.asked_by} has a frozen role of this name; call the network something else"
        )
    return roles if codec is None else {**roles, "codec": codec}


def network_role(name: str, c: ConfigDict) -> NetworkRole:
    """`c.roles.NAME`."""
    return NetworkRole(
        name=name,
        preset=c.preset,
        remat=c.remat,
        precision=c.precision,
        attention=c.attention,
        storage=c.storage,
        offload=c.offload,
        init=c.init,
        init_role=c.init_role,
        init_ema=c.init_ema,
        init_stages=tuple(c.init_stages),
        branch=BranchConfig(**c.branch.to_dict()) if "branch" in c else None,
        actions=ActionConfig(**c.actions.to_dict()) if "actions" in c else None,
    )


def codec_role(c: ConfigDict) -> CodecRole | None:
    """The frozen codec of long rollouts and of BAgger's reversed pixels; None where neither is asked for."""
    key = {"dmd": "max_frames", "ar_diffusion": "bagger_pixels"}.get(c.stage, "")
    if not key or not c.objective[key]:
        return None
    asked = f"objective.{key}={c.objective[key]}"
    return CodecRole(asked, c.data.source == "shapes", c.objective.codec_world, c.objective.codec_decoder)


def sized(roles: Mapping[str, Role], models: Mapping[str, Any] | None = None) -> dict[str, Role]:
    """The roles, networks with the sizes of what they start from (`NetworkRole.sized`)."""
    return {name: role.sized(models) if isinstance(role, NetworkRole) else role for name, role in roles.items()}


def networks_in(roles: Mapping[str, Role]) -> dict[str, NetworkRole]:
    """Those roles that are networks."""
    return {name: role for name, role in roles.items() if isinstance(role, NetworkRole)}


PICTURE_STAGES = ("bidirectional", "ar_diffusion")  # whose losses give networks the clips' pictures


def check_pictures(stage: str, roles: Mapping[str, Role]) -> None:
    """Refuses networks that take a picture in stages whose losses have none for them.

    Raises:
      UserError: there is one; or one that takes CLIP's features, or LoRAs on one.
    """
    for name, role in networks_in(roles).items():
        if not takes_picture(role.base):
            continue
        if stage not in PICTURE_STAGES:
            raise UserError(
                f"roles.{name} is an image-to-video network: these train in stages {' and '.join(PICTURE_STAGES)}, not"
                f" in {stage}; start from a text-to-video network"
            )
        if role.base.image_dim:
            raise UserError(
                f"roles.{name} takes CLIP's features of a picture (Wan2.1's image to video), which training has not;"
                " train Wan2.2's image-to-video networks, which take none"
            )


def check_roles(stage: Stage, roles: Mapping[str, Role]) -> None:
    """Refuses roles that the stage cannot have.

    Raises:
      UserError: a trained role is missing or not stored in float32 on the device, or an unknown storage.
    """
    missing = sorted(set(stage.losses) - set(roles))
    if missing:
        raise UserError(f"roles.{missing[0]} is missing: stage {stage.name} trains {', '.join(stage.losses)}")
    for name, role in networks_in(roles).items():
        if role.branch is not None and name not in stage.losses:
            raise UserError(f"roles.{name}.branch: {name} is frozen; a classifier branch is for the trained critic")
        if role.storage not in STORAGES:
            raise UserError(f"roles.{name}.storage={role.storage!r}: use one of {', '.join(STORAGES)}")
        asked = f"storage={role.storage!r}" if role.storage != "float32" else "offload=True"
        if name in stage.losses and (role.storage != "float32" or role.offload):
            raise UserError(
                f"roles.{name}.{asked}: {name} is trained: float32, on the device; this is for frozen roles"
            )


def check_host_memory(roles: Mapping[str, Role]) -> None:
    """Refuses offloaded roles on a device whose programs cannot read host memory.

    Raises:
      UserError: there is one.
    """
    for name, role in networks_in(roles).items():
        if role.offload and not has_host_memory(jax.local_devices()[0]):
            raise UserError(
                f"roles.{name}.offload=True: programs on {jax.local_devices()[0].platform} cannot read host memory; "
                f"set it to False, and roles.{name}.storage='int8' to save memory"
            )


def check_blocks(blocks: Blocks, roles: Iterable[Role]) -> None:
    """A causal network keeps the block layout that it was trained with: chunk-wise weights are not frame-wise ones.

    Raises:
      UserError: a role starts from a causal run, or an exported model, of another layout, or from nothing.
    """
    for role in roles:
        if isinstance(role, NetworkRole) and role.init:
            role.check_there()
            what = f"roles.{role.name}.init={role.init!r}"
            same_blocks(blocks, read_run(role.init, START), what, "name a run of the same layout")


def same_blocks(blocks: Blocks, meta: Mapping[str, Any], what: str, fix: str) -> None:
    """Refuses the weights of another layout.

    Args:
      meta: the record beside the weights.  what: their name.  fix: another way out, for the message.

    Raises:
      UserError: they are a causal network's, of blocks of another size.
    """
    own = (blocks.frames, blocks.independent_first_frame)
    theirs = (meta["blocks"]["frames"], meta["blocks"]["independent_first_frame"])
    if meta["stage"] != "bidirectional" and theirs != own:
        raise UserError(
            f"{what} was trained with blocks.frames={theirs[0]}, blocks.independent_first_frame={theirs[1]}, "
            f"not {own[0]}, {own[1]}; {fix}, or set these keys to its own"
        )


def load_shipped(name: str, template: Wan, *, stages: Sequence[str] = ()) -> Wan:
    """An exported model (see `worlds.assets.asset`), in the template's form. `stages`: accepted ones, empty for any.

    Raises:
      UserError: no such model, it is cut short, of another stage, or does not fit the template.
    """
    file, meta = asset(name, MODEL_FILE), asset(name, META_FILE)
    if file is None or meta is None:
        raise UserError(f"init={name!r} is neither a run directory nor an exported model")
    stage = json.loads(meta.read_text())["stage"]
    if stages and stage not in stages:
        raise UserError(f"{file.parent} holds stage {stage!r}, expected {' or '.join(map(repr, stages))}")
    try:
        arrays = {key: np.asarray(value).astype(np.float32) for key, value in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: broken or cut short ({error}); copy it again") from None
    return jax.tree.map(jax.numpy.asarray, from_named(template, arrays))


def _abstract(config: WanConfig) -> Wan:
    return jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))
