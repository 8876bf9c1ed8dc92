"""From a config to the mathematics of a stage: blocks, sampler, objective, losses, optimisers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import optax
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.flow.schedule import warp_steps
from cfjax.memory.names import with_memory
from cfjax.nn.visibility import Blocks
from cfjax.objectives import gan, sid, streaming
from cfjax.objectives.actions import with_actions
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, flow_matching
from cfjax.objectives.dmd import DMDConfig, critic_loss
from cfjax.objectives.dmd import generator_loss as dmd
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_regression
from cfjax.objectives.pictures import with_pictures
from cfjax.objectives.stage import Ema, Loss, RolloutLoss, Stage
from cfjax.rollout.generate import FewStep, ManyStep, layout_of
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.remembered import check_trains
from cfjax.rollout.rolling import rolling_layout
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.rollout.streaming import Streaming
from cfjax.training.optim import OptimizerConfig, make_optimizer

# What cfjax train trains.
STAGES = ("bidirectional", "ar_diffusion", "ode_regression", "consistency", "dmd")
OF_CODEC = ("bagger_pixels", "codec_world", "codec_decoder")  # keys of stage 1's objective that are the codec role's

Objective = DiffusionConfig | PairsConfig | ConsistencyConfig | DMDConfig


def blocks_of(c: ConfigDict) -> Blocks:
    """The block layout, with the memory policy that `c.blocks.memory` names ("" or no such key: none).

    Raises:
      UserError: no such policy, or one beside a window; they do not fit.
    """
    values = c.blocks.to_dict()
    memory = values.pop("memory", "")
    layout = Blocks(**values)
    if not memory:
        return layout
    if layout.window or layout.sink:
        raise UserError(
            f"blocks.memory={memory!r} has a window of its own: set blocks.window=0 and blocks.sink=0, and change the "
            "policy's by NAME(window=..., sink=...)"
        )
    return with_memory(layout, memory)


def sampler_of(c: ConfigDict) -> FewStep | ManyStep:
    """The sampler of `c.sampler`; whether it is causal is its `kind`."""
    values = c.sampler.to_dict()
    kind = values.pop("kind")
    kinds: dict[str, Callable[..., FewStep | ManyStep]] = {
        "few_step": FewStep,
        "rolling": partial(FewStep, rolling=True),
        "many_step": ManyStep,
        "bidirectional": ManyStep,
    }
    if kind not in kinds:
        raise UserError(f"sampler.kind={kind!r}: use one of {', '.join(kinds)}")
    return kinds[kind](**values)


def sampling_blocks(c: ConfigDict) -> Blocks | None:
    """The block layout of the sampler; None for a bidirectional one.

    Raises:
      UserError: a rolling sampler, whose window does not fit into the layout's.
    """
    blocks = None if c.sampler.kind == "bidirectional" else blocks_of(c)
    layout_of(sampler_of(c), blocks)
    return blocks


def objective_of(c: ConfigDict) -> Objective:
    """The choices of `c.objective`.

    Raises:
      UserError: an unknown stage, or choices that the stage cannot have.
    """
    values = c.objective.to_dict()
    if c.stage == "bidirectional":
        return DiffusionConfig(**values)
    if c.stage == "ar_diffusion":
        return DiffusionConfig(**{name: value for name, value in values.items() if name not in OF_CODEC})
    if c.stage == "ode_regression":
        return PairsConfig(steps=tuple(c.objective.steps), shift=c.objective.shift)
    if c.stage == "consistency":
        return ConsistencyConfig(**values)
    if c.stage == "dmd":
        return dmd_config(c)
    raise UserError(f"stage={c.stage!r}: cfjax train knows {', '.join(STAGES)}")


def dmd_config(c: ConfigDict) -> DMDConfig:
    """Stage 3's choices from `c.objective`.

    Raises:
      UserError: values that do not go together, or windows of blocks that the layout does not hold.
    """
    o, new = c.objective, c.objective.get("new_frames", 0)  # no such key in a config of one's own: no streaming
    lists = {"steps": o.steps, "first_steps": o.first_steps}
    levels = {name: tuple(map(float, warp_steps(steps, o.shift))) if steps else () for name, steps in lists.items()}
    rollout = SelfForcing(
        sigmas=levels["steps"],
        first_sigmas=levels["first_steps"],
        context_noise=o.context_noise,
        kv_gradient=o.kv_gradient,
        same_exit=o.same_exit,
        save_activations=o.save_activations,
        rolling=o.rolling,
    )
    if o.rolling:
        rolling_layout(blocks_of(c), len(o.steps))
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
        long=LongVideo(o.window_frames, o.max_frames) if (o.window_frames or o.max_frames) and not new else None,
        streaming=Streaming(o.window_frames, o.max_frames, new, o.get("switch_prompts", False)) if new else None,
    )


def losses_of(c: ConfigDict, objective: Objective) -> Mapping[str, Loss | RolloutLoss]:
    """Role -> loss of `c.stage`.

    Raises:
      UserError: a role or an average that the stage needs is missing.
    """
    blocks, o = blocks_of(c), c.objective
    check_memory(c, objective, blocks)
    if isinstance(objective, DiffusionConfig):
        causal = c.stage == "ar_diffusion"
        return {"student": with_pictures(ar_diffusion(objective, blocks) if causal else flow_matching(objective))}
    if isinstance(objective, PairsConfig):
        return {"student": ode_regression(objective, blocks, how=Regression(o.levels_per, o.past))}
    if isinstance(objective, ConsistencyConfig):
        for group, role in (("roles", "teacher"), ("ema", "student")):
            if role not in c[group]:
                raise UserError(f"{group}.{role} is missing: consistency distillation needs a teacher and an average")
        return {"student": consistency(objective, blocks)}
    if objective.streaming and o.matching != "dmd":
        raise UserError(f"objective.new_frames={o.new_frames}: a rollout goes on with objective.matching=dmd alone")
    if o.matching == "gan":
        return gan_losses(c, objective)
    if o.matching not in ("dmd", "sid"):
        raise UserError(f"objective.matching={o.matching!r}: use dmd, sid or gan")
    if "real_score" not in c.roles:
        raise UserError(f"roles.real_score is missing: objective.matching={o.matching!r} compares two scores")
    if objective.streaming:
        return {
            "student": streaming.generator_loss(objective, blocks),
            "critic": streaming.critic_loss(objective, blocks),
        }
    critic = critic_loss(objective, blocks)
    if o.matching == "sid":
        return {"student": sid.generator_loss(objective, blocks, alpha=o.sid_alpha), "critic": critic}
    return {"student": dmd(objective, blocks), "critic": critic}


def check_memory(c: ConfigDict, objective: Objective, blocks: Blocks) -> None:
    """A memory policy trains where the student rolls out, and not with every setting.

    Raises:
      UserError: another stage, noised clips, or see `rollout.remembered.check_trains`.
    """
    streams = isinstance(objective, DMDConfig) and objective.streaming
    if blocks.memory is None and not streams:
        return
    if not isinstance(objective, DMDConfig) or objective.student_input != "self_rollout":
        what = f"stage={c.stage!r}" if c.stage != "dmd" else "objective.student_input='noised_data'"
        raise UserError(
            f"blocks.memory={c.blocks.memory!r}: {what} trains on whole clips at once, a policy takes block after "
            "block; leave it out, or train with configs/dmd.py and self_rollout"
        )
    how = objective.self_forcing
    blocks = objective.streaming.check(blocks) if objective.streaming else blocks
    check_trains(blocks, kv_gradient=how.kv_gradient, save_activations=how.save_activations)


def gan_losses(c: ConfigDict, config: DMDConfig) -> dict[str, Loss]:
    """Losses of generator and critic.

    Raises:
      UserError: no classifier branch or no weights of the GAN in the config.
    """
    if "critic" not in c.roles or "branch" not in c.roles.critic or "gan" not in c.objective:
        raise UserError("objective.matching='gan' needs roles.critic.branch and objective.gan: use configs/dmd.py:gan")
    blocks, game = blocks_of(c), gan.GanConfig(**c.objective.gan.to_dict())
    return {"student": gan.generator_loss(config, game, blocks), "critic": gan.critic_loss(config, game, blocks)}


def stage_of(c: ConfigDict) -> Stage:
    """Roles, losses, cadence and averages.

    Raises:
      UserError: an unknown stage, or a role or an average that it needs is missing.
    """
    ema = {role: Ema(**values.to_dict()) for role, values in c.ema.items()}
    objective = objective_of(c)
    losses = losses_of(c, objective)
    if any("actions" in role for role in c.roles.values()):
        check_actions(c, objective)
        losses = {role: with_actions(loss) for role, loss in losses.items()}  # type: ignore[arg-type]
    goes_on = isinstance(objective, DMDConfig) and objective.streaming is not None
    return Stage(c.stage, losses, cadence=c.cadence.to_dict(), ema=ema, goes_on=goes_on)


def check_actions(c: ConfigDict, objective: Objective) -> None:
    """Refuses what networks that are told the keys of a clip's frames cannot do.

    Raises:
      UserError: rollouts longer than the clips or by windows, corrective clips, a GAN.
    """
    o, asked = c.objective, "roles.*.actions"
    if isinstance(objective, DMDConfig) and (objective.long or objective.streaming or objective.self_forcing.rolling):
        raise UserError(f"{asked}: not with objective.max_frames, new_frames or rolling, whose frames have no keys")
    if isinstance(objective, DMDConfig) and o.matching == "gan":
        raise UserError(f"{asked}: not with objective.matching='gan'; use dmd or sid")
    if isinstance(objective, DiffusionConfig) and objective.bagger:
        raise UserError(f"{asked}: not with objective.bagger, whose clips are played backwards")


def optimizers_of(c: ConfigDict, stage: Stage) -> dict[str, optax.GradientTransformation]:
    """One optimiser per trained role; schedules count that role's own updates.

    Raises:
      UserError: a trained role has none, or a value that it cannot have.
    """
    out = {}
    for role in stage.losses:
        if role not in c.optim:
            raise UserError(f"optim.{role} is missing: stage {c.stage} trains {', '.join(stage.losses)}")
        values: dict[str, Any] = c.optim[role].to_dict()
        values.pop("accumulate")
        values["adam_lr"] = values["adam_lr"] or None
        updates = -(-c.steps // stage.cadence.get(role, 1))
        out[role] = make_optimizer(OptimizerConfig(**values), steps=max(updates, 1), key=f"optim.{role}")
    return out
