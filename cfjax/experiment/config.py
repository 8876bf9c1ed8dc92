"""Where a ConfigDict ends and plain values begin: the verbs' shared door from configs to the library."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.once import make_once
from cfjax.core.paths import local_path
from cfjax.core.precision import Policy, to_record
from cfjax.core.tree import from_named, named_leaves
from cfjax.data.latents import ClipDataset
from cfjax.data.precompute import precompute
from cfjax.data.reversed import encoded, joined
from cfjax.data.sets import open_dataset, without_ground_truth
from cfjax.data.shapes import ShapesConfig
from cfjax.data.tolerant import TolerantDataset
from cfjax.flow.schedule import warp_steps
from cfjax.models.codec import Codec
from cfjax.models.discriminator import BranchConfig
from cfjax.models.wan import Wan, WanConfig, preset
from cfjax.nn.visibility import Blocks
from cfjax.objectives import gan, sid
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, flow_matching
from cfjax.objectives.dmd import DMDConfig, critic_loss
from cfjax.objectives.dmd import generator_loss as dmd
from cfjax.objectives.ode_regression import METHODS, METHODS_FOR, PairsConfig, Regression, ode_regression
from cfjax.objectives.stage import Ema, Loss, Stage
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.training.optim import make_optimizer
from cfjax.worlds.toy import SplitSource, World, asset, open_world
from cfjax.worlds.wan import load_codec

MODEL_FILE = "model.safetensors"
META_FILE = "model.json"
# What cfjax train trains.
STAGES = ("bidirectional", "ar_diffusion", "ode_regression", "consistency", "dmd")


@dataclass(frozen=True)
class Data:
    """What a stage trains on: the dataset, and the world it was made in (None for precomputed Wan latents)."""

    dataset: ClipDataset
    world: World | None

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.dataset.latent_shape[-1]

    @property
    def text_width(self) -> int:
        """Width of the text rows."""
        return self.dataset.text_shape[-1]


def blocks_of(c: ConfigDict) -> Blocks:
    """The block layout."""
    return Blocks(**c.blocks.to_dict())


def shapes_of(c: ConfigDict) -> ShapesConfig:
    """The toy's factors."""
    return ShapesConfig.from_json(c.data.shapes.to_dict())


def sampler_of(c: ConfigDict) -> FewStep | ManyStep:
    """The sampler of `c.sampler`; whether it is causal is its `kind`."""
    values = c.sampler.to_dict()
    kind = values.pop("kind")
    kinds = {"few_step": FewStep, "many_step": ManyStep, "bidirectional": ManyStep}
    if kind not in kinds:
        raise UserError(f"sampler.kind={kind!r}: use one of {', '.join(kinds)}")
    return kinds[kind](**values)


def data_root(c: ConfigDict) -> Path:
    """The folder of `c.data`.

    Raises:
      UserError: it is in a bucket.
    """
    return local_path(c.data.path, "--config.data.path", "datasets are mapped into memory")


def open_data(c: ConfigDict) -> Data:
    """The dataset `data.path`/`data.name`; the toy's clips and world are made on first use.

    Raises:
      UserError: nothing there and no source to make it from, or it was made in another world.
    """
    root, name = data_root(c), c.data.name
    if not c.data.source:
        dataset = _suitable(c, open_dataset(root / name, lmdb=c.data.lmdb))
        if c.data.reversed_name:
            dataset = joined(dataset, open_dataset(root / c.data.reversed_name))
        return Data(dataset, None)
    if c.data.source != "shapes":
        raise UserError(f"data.source={c.data.source!r}: use 'shapes', or '' for a dataset made by cfjax precompute")
    world = toy_world(c)
    if name == "clips":
        source = SplitSource(world.shapes, 0, c.data.clips)
        encoders = (world.codec, world.text.encode)
        make_once(root / name, lambda: precompute(source, *encoders, root / name, text_encoder=text_record(world)))
    dataset = _suitable(c, open_dataset(root / name, lmdb=c.data.lmdb))
    made_in = dataset.manifest.get("text_encoder", {}).get("world")
    if made_in != world.fingerprint():
        raise UserError(f"{root / name} was made in another world than {root / 'world'}; remove it and run again")
    if name == "clips" and len(dataset) != c.data.clips:
        raise UserError(
            f"{root / name} holds {len(dataset)} clips, not data.clips={c.data.clips}; remove it to make it anew"
        )
    if c.stage == "ar_diffusion" and c.objective.bagger:
        dataset = encoded(dataset, world.text.encode)
    return Data(dataset, world)


def _suitable(c: ConfigDict, dataset: ClipDataset) -> ClipDataset:
    """The dataset, if the stage can train on it; up to `data.max_corrupt` of its records may be broken.

    Raises:
      UserError: prompts alone where clips are needed; for ODE regression, no trajectories, or pairs of other settings.
    """
    prompts_do = c.stage == "dmd" and c.objective.student_input == "self_rollout" and c.objective.matching != "gan"
    if not dataset.has_latents and not prompts_do:
        raise UserError(f"{dataset.path} holds prompts alone; stage {c.stage} needs clips: choose another data.name")
    if c.stage == "ode_regression" and not c.data.ground_truth:
        dataset = without_ground_truth(dataset)
    if c.stage == "ode_regression" and (wrong := _wrong_points(c, dataset)):
        raise UserError(wrong)
    if c.stage == "ode_regression":
        _check_pairs(c, dataset)
    return TolerantDataset(dataset, c.data.max_corrupt, say) if c.data.max_corrupt else dataset


def _wrong_points(c: ConfigDict, dataset: ClipDataset) -> str:
    """Why the trajectories are not what the objective regresses on, with the mend; "" if they are."""
    points, wanted = dataset.trajectory_points, len(c.objective.steps) + 1
    if points == wanted:
        return ""
    fix = "make pairs with configs/ode_pairs.py"
    if points and points + 1 == wanted and c.data.ground_truth:
        fix = (
            "if these are pairs without clean clips (Self Forcing's, CausVid's), --config.data.ground_truth=False takes"
            f" what stands for the clip as the ODE's end; otherwise {fix}"
        )
    if points == wanted + 1 and not c.data.ground_truth:
        fix = "they hold clean clips: leave out --config.data.ground_truth=False"
    return (
        f"{dataset.path} has {points} states per clip; ODE regression needs the {wanted - 1} levels of objective.steps "
        f"and the end: {fix}"
    )


def _check_pairs(c: ConfigDict, dataset: ClipDataset) -> None:
    made = dataset.manifest.get("source", {}).get("pairs")  # other people's pairs do not say
    if not made:
        return
    method, past = made["objective"]["method"], c.objective.past
    keys = ["objective.steps", "objective.shift", *pairs_layout(c, method)]
    if mismatch := difference(made, c, keys):
        raise UserError(
            f"{dataset.path} was made with {mismatch}; choose another data.name, or make pairs anew with "
            "configs/ode_pairs.py"
        )
    wanted = METHODS_FOR.get(past, METHODS)
    if method not in wanted:
        raise UserError(
            f"{dataset.path} was made with objective.method={method!r}, but objective.past={past!r} is for pairs by "
            f"{' or '.join(map(repr, wanted))}; choose another data.name, or change objective.past"
        )


def pairs_layout(c: ConfigDict, method: str) -> list[str]:
    """The keys of the block layout, for ODE pairs that depend on it: a bidirectional teacher's have no blocks."""
    return [] if method == "bidirectional" else [f"blocks.{name}" for name in c.blocks]


def difference(made: Mapping[str, Any], c: ConfigDict, keys: Sequence[str]) -> str:
    """The first of these dotted keys at which `c` differs from a recorded config: "KEY=theirs, not own", or "".

    A key that the record does not have yet is no difference.
    """
    theirs, own = (thawed(values).to_dict() for values in (made, c.to_dict()))
    for key in keys:
        *path, name = key.split(".")
        one, other = (reduce(lambda group, step: group.get(step, {}), path, values) for values in (theirs, own))
        if name in one and one[name] != other[name]:
            return f"{key}={one[name]!r}, not {other[name]!r}"
    return ""


def toy_world(c: ConfigDict, *, keep: bool = True) -> World:
    """The world of `c.data`, made on first use; `keep`: and written to `data.path`.

    Raises:
      UserError: the one that is there, or the one of `data.assets`, is not what the config describes.
    """
    path, shapes = data_root(c) / "world", shapes_of(c)
    asked = {"channels": c.data.channels, "text_length": c.data.text_length}
    world = open_world(path, assets=c.data.assets, shapes=shapes, keep=keep, **asked)
    if (world.shapes, world.codec.latent_channels, world.text.length) != (shapes, *asked.values()):
        raise UserError(
            f"{path} has other data.shapes, data.channels or data.text_length than the config; choose another data.path"
            " (and data.assets='' for a world of your own)"
        )
    return world


def text_record(world: World) -> dict[str, Any]:
    """What a dataset's manifest says about its captions' encoder."""
    return {"name": "umt5-toy", "length": world.text.length, "width": world.text.width, "world": world.fingerprint()}


def wan_config(role: ConfigDict, channels: int, text_width: int) -> WanConfig:
    """The network of one role, sized to the data."""
    return preset(
        role.preset,
        in_dim=channels,
        out_dim=channels,
        text_dim=text_width,
        remat=role.remat,
        attention=role.attention,
        precision=Policy(compute=role.precision),
    )


def branch_config(role: ConfigDict) -> BranchConfig | None:
    """The classifier branch of a role that has one."""
    return BranchConfig(**role.branch.to_dict()) if "branch" in role else None


def load_shipped(name: str, template: Wan, *, stages: Sequence[str] = ()) -> Wan:
    """An exported model (see `world.asset`), in the template's form. `stages`: accepted ones, empty for any.

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


def dmd_config(c: ConfigDict) -> DMDConfig:
    """Stage 3's choices from `c.objective`."""
    o = c.objective
    lists = {"steps": o.steps, "first_steps": o.first_steps}
    levels = {name: tuple(map(float, warp_steps(steps, o.shift))) if steps else () for name, steps in lists.items()}
    rollout = SelfForcing(
        sigmas=levels["steps"],
        first_sigmas=levels["first_steps"],
        context_noise=o.context_noise,
        kv_gradient=o.kv_gradient,
        same_exit=o.same_exit,
    )
    return DMDConfig(
        self_forcing=rollout,
        student_input=o.student_input,
        forcing=o.forcing,
        real_guidance=o.real_guidance,
        fake_guidance=o.fake_guidance,
        score_shift=o.score_shift,
        score_min=o.score_min,
        score_max=o.score_max,
        score_table_shift=o.score_table_shift or None,
        long=LongVideo(o.window_frames, o.max_frames) if o.window_frames or o.max_frames else None,
    )


def codec_key(c: ConfigDict) -> str:
    """The key of `objective` that asks for the frozen role "codec", or ""."""
    key = {"dmd": "max_frames", "ar_diffusion": "bagger_pixels"}.get(c.stage, "")
    return key if key and c.objective[key] else ""


def codec_of(c: ConfigDict, data: Data) -> Codec | None:
    """The frozen role "codec": re-makes the first latent of a long rollout's window, or plays a rollout backwards.

    None where neither long rollouts nor BAgger's pixels are asked for.

    Raises:
      UserError: no world to take it from, or latents of another one.
    """
    wants = codec_key(c)
    if not wants:
        return None
    if data.world:
        return data.world.codec
    made, o = data.dataset.manifest, c.objective
    path = o.codec_world or made.get("world_path", "")
    if not path:
        raise UserError(
            f"{data.dataset.path} does not say which world it was made in, whose codec objective.{wants}="
            f"{o[wants]} needs; name it with --config.objective.codec_world"
        )
    codec = load_codec(path, o.codec_decoder)
    known = made.get("codec", {}).get("fingerprint", "")
    if o.codec_decoder == "vae" and known and codec.describe()["fingerprint"] != known:
        raise UserError(
            f"{data.dataset.path} was made with another VAE than {path}; set --config.objective.codec_world"
        )
    if codec.latent_channels != data.channels:
        raise UserError(
            f"{path} has latents of {codec.latent_channels} channels, {data.dataset.path} of {data.channels}"
        )
    return codec


def losses_of(c: ConfigDict) -> dict[str, Loss]:
    """Role -> loss of `c.stage`.

    Raises:
      UserError: an unknown stage, or a role or an average that it needs is missing.
    """
    if c.stage not in STAGES:
        raise UserError(f"stage={c.stage!r}: cfjax train knows {', '.join(STAGES)}")
    blocks, o = blocks_of(c), c.objective
    if c.stage == "bidirectional":
        return {"student": flow_matching(DiffusionConfig(**o.to_dict()))}
    if c.stage == "ar_diffusion":
        values = o.to_dict()
        for name in ("bagger_pixels", "codec_world", "codec_decoder"):  # of `codec_of`
            del values[name]
        return {"student": ar_diffusion(DiffusionConfig(**values), blocks)}
    if c.stage == "ode_regression":
        pairs = PairsConfig(steps=tuple(o.steps), shift=o.shift)
        return {"student": ode_regression(pairs, blocks, how=Regression(o.levels_per, o.past))}
    if c.stage == "consistency":
        for group, role in (("roles", "teacher"), ("ema", "student")):
            if role not in c[group]:
                raise UserError(f"{group}.{role} is missing: consistency distillation needs a teacher and an average")
        return {"student": consistency(ConsistencyConfig(**o.to_dict()), blocks)}
    config = dmd_config(c)
    if o.matching == "gan":
        return gan_losses(c, config)
    if o.matching not in ("dmd", "sid"):
        raise UserError(f"objective.matching={o.matching!r}: use dmd, sid or gan")
    if "real_score" not in c.roles:
        raise UserError(f"roles.real_score is missing: objective.matching={o.matching!r} compares two scores")
    student = sid.generator_loss(config, blocks, alpha=o.sid_alpha) if o.matching == "sid" else dmd(config, blocks)
    return {"student": student, "critic": critic_loss(config, blocks)}


def gan_losses(c: ConfigDict, config: DMDConfig) -> dict[str, Loss]:
    """Both sides of the game.

    Raises:
      UserError: no branch or no game in the config.
    """
    if "critic" not in c.roles or "branch" not in c.roles.critic or "gan" not in c.objective:
        raise UserError("objective.matching='gan' needs roles.critic.branch and objective.gan: use configs/dmd.py:gan")
    blocks, game = blocks_of(c), gan.GanConfig(**c.objective.gan.to_dict())
    return {"student": gan.generator_loss(config, game, blocks), "critic": gan.critic_loss(config, game, blocks)}


def stage_of(c: ConfigDict) -> Stage:
    """Roles, losses, cadence and averages."""
    ema = {role: Ema(**values.to_dict()) for role, values in c.ema.items()}
    return Stage(c.stage, losses_of(c), cadence=c.cadence.to_dict(), ema=ema)


def optimizers_of(c: ConfigDict, stage: Stage) -> dict[str, Any]:
    """One optimiser per trained role; schedules count that role's own updates."""
    out = {}
    for role in stage.losses:
        if role not in c.optim:
            raise UserError(f"optim.{role} is missing: stage {c.stage} trains {', '.join(stage.losses)}")
        values = c.optim[role].to_dict()
        values.pop("accumulate")
        values["adam_lr"] = values["adam_lr"] or None
        updates = -(-c.steps // stage.cadence.get(role, 1))
        out[role] = make_optimizer(values.pop("name"), key=f"optim.{role}", steps=max(updates, 1), **values)
    return out


def run_meta(c: ConfigDict, data: Data, models: Mapping[str, Wan]) -> dict[str, Any]:
    """What a checkpoint remembers, so that other verbs need no config."""
    made = data.dataset.manifest
    return {
        "stage": c.stage,
        "config": c.to_dict(),
        "models": {role: to_record(model.config) for role, model in models.items()},
        "blocks": c.blocks.to_dict(),
        "latent_shape": list(data.dataset.latent_shape),
        "records": len(data.dataset),
        "world": made.get("text_encoder", {}).get("world", ""),
        "world_path": made.get("world_path", ""),
    }


def config_from_meta(meta: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was trained with."""
    return thawed(meta["config"])


def thawed(value: Any) -> Any:
    """What JSON kept of a ConfigDict, as it was: its lists are tuples."""
    if isinstance(value, Mapping):
        return ConfigDict({key: thawed(item) for key, item in value.items()})
    return tuple(thawed(item) for item in value) if isinstance(value, list | tuple) else value


def count_parameters(model: Wan) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in named_leaves(model).values())
