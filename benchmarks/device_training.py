"""Training cases of benchmarks/device.py: a step of stage 1, and DMD's two updates with an int8 real score."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from device_cases import CHANNELS, Case, Context, Skipped
from device_parts import hashed_uniform, random_like, shapes_of, traced

from cfjax.flow.schedule import warp_steps
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.objectives.dmd import DMDConfig, critic_loss, draw, generator_loss
from cfjax.objectives.stage import Ema, Stage
from cfjax.planning.flops import count_flops
from cfjax.rollout.self_forcing import BEFORE_EXIT, SelfForcing
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import init_state
from cfjax.training.step import make_update, role_key

BLOCKS = Blocks(3)


@dataclass(frozen=True)
class Training:
    """One stage as its config in configs/ has it, with one clip a batch.

    Attributes:
      dmd: None, or DMD's choices; the student then reads a cache.
      frozen: name -> storage of networks of the real score's size.
    """

    label: str
    stage: Stage
    rates: dict[str, float]
    dmd: DMDConfig | None = None
    frozen: tuple[tuple[str, str], ...] = ()

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """AdamW as the configs have it."""
        settings = {
            role: OptimizerConfig(lr=lr, b1=0.0, b2=0.999, weight_decay=0.01, clip=10.0)
            for role, lr in self.rates.items()
        }
        return {role: make_optimizer(values, steps=1000) for role, values in settings.items()}

    def configs(self, context: Context, *, plain: bool) -> dict[str, WanConfig]:
        """Role -> network; `plain`: with dense attention and without recomputation, for counting."""
        cached = {"student"} if self.dmd else set()
        out = {role: context.student() if role in cached else context.sizes.student for role in self.stage.losses}
        out |= {name: replace(context.sizes.score, text_dim=context.sizes.student.text_dim) for name, _ in self.frozen}
        return {role: replace(c, attention="xla", remat="none") for role, c in out.items()} if plain else out

    def make_state(self, configs: dict[str, WanConfig]) -> Any:
        """Random trained roles in float32, with optimiser states and averages."""
        shapes = {role: jax.eval_shape(partial(Wan, configs[role]), jax.random.key(0)) for role in self.stage.losses}
        models = {role: random_like(shape) for role, shape in shapes.items()}
        return init_state(self.stage, models, self.optimizers(), 0)

    def make_batch(self, context: Context) -> dict[str, jax.Array]:
        """One clip of noise and its text rows."""
        sizes = context.sizes
        text = hashed_uniform((1, sizes.text_rows, sizes.student.text_dim), 0)
        latents = hashed_uniform((1, sizes.frames, *sizes.latent, CHANNELS), 1)
        index = jnp.zeros((1,), jnp.int32)
        return {"latents_BFHWC": latents, "text_BSE": text, "negative_text_SE": -text[0], "index_B": index}

    def arguments(self, context: Context, *, arrays: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """(state, frozen roles, batch), or their shapes while what makes them is compiled."""
        configs, call = self.configs(context, plain=False), context.ahead if arrays else context.ahead.prepare
        make = context.jitted(f"make_state_{self.label}", lambda: self.make_state(configs))
        batch = context.jitted("make_batch", lambda: self.make_batch(context))
        frozen = {name: context.network(name, configs[name], storage, arrays=arrays) for name, storage in self.frozen}
        return call(make), frozen, call(batch)

    def update(self, context: Context, role: str) -> Any:
        """The role's update, jitted once."""
        name = f"update_{self.label}_{role}"
        if name not in context.makers:
            context.makers[name] = make_update(self.stage, role, self.optimizers()[role])
        return context.makers[name]

    def prepare(self, context: Context) -> None:
        """Names the programs."""
        given = self.arguments(context, arrays=False)
        for role in self.stage.losses:
            context.ahead.prepare(self.update(context, role), *given)

    def run(self, context: Context) -> dict[str, Any]:
        """Every role's update: once with the profiler, once for its time."""
        context.free("make_real_score")
        state, frozen, batch = self.arguments(context, arrays=True)
        out: dict[str, Any] = {"clips": 1, "included": "forward, backward, clipping, AdamW, average; not: loading data"}
        for role in self.stage.losses:
            update, kernels = self.update(context, role), {}
            check_memory(context.ahead.compiled(update, state, frozen, batch))
            with traced(kernels):
                state, metrics = jax.block_until_ready(context.ahead(update, state, frozen, batch))
            begun = time.perf_counter()
            state, metrics = jax.block_until_ready(context.ahead(update, state, frozen, batch))
            seconds = time.perf_counter() - begun
            row = {"ms": 1e3 * seconds, "loss": float(metrics["loss"]), "finite": bool(metrics["finite"])}
            exit_step = self.exit_step(state, role, batch["latents_BFHWC"].shape)
            flops = self.needed(context, role, exit_step)
            out[role] = {**row, "exit_step": exit_step, **context.share(flops, seconds), "kernels": kernels}
        return out

    def exit_step(self, state: Any, role: str, shape: tuple[int, ...]) -> int | None:
        """The step at which the rollout ended: it decides how many passes the update has."""
        if self.dmd is None:
            return None
        dmd = self.dmd
        return int(jax.jit(lambda key: draw(key, shape, dmd, BLOCKS)["exit_G"])(role_key(state, role))[-1])

    def needed(self, context: Context, role: str, exit_step: int | None) -> float:
        """FLOPs of the update's mathematics, recomputation left out, counted on its program."""
        configs = self.configs(context, plain=True)
        state = jax.eval_shape(partial(self.make_state, configs))
        frozen = {name: jax.eval_shape(partial(Wan, configs[name]), jax.random.key(0)) for name, _ in self.frozen}
        batch = jax.eval_shape(partial(self.make_batch, context))
        times = {BEFORE_EXIT: float(exit_step or 0)}
        update = make_update(self.stage, role, self.optimizers()[role])
        return count_flops(update, state, shapes_of(frozen), batch, trip_counts=times)


def check_memory(compiled: Any) -> None:
    """Raises Skipped where the device has less memory than a program says that it needs."""
    limit, memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0), compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    needed = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds) - memory.alias_size_in_bytes
    if limit and needed > limit:
        raise Skipped(f"needs {needed / 2**30:.1f} GiB, JAX has {limit / 2**30:.1f}")


def stage_1() -> Training:
    """configs/ar_diffusion.py: teacher forcing, chunk-wise."""
    stage = Stage("ar_diffusion", {"student": ar_diffusion(DiffusionConfig(weighting="bsmntw"), BLOCKS)})
    return Training("stage_1", stage, {"student": 2e-6})


def dmd(score_storage: str = "int8") -> Training:
    """configs/dmd.py with the real score's weights in int8."""
    levels = tuple(map(float, warp_steps((1000, 750, 500, 250), 5.0)))
    config = DMDConfig(SelfForcing(levels))
    losses = {"student": generator_loss(config, BLOCKS), "critic": critic_loss(config, BLOCKS)}
    stage = Stage("dmd", losses, ema={"student": Ema(0.99, 200)})
    return Training("dmd", stage, {"student": 2e-6, "critic": 4e-7}, config, (("real_score", score_storage),))


def training_cases() -> list[Case]:
    """Both stages."""
    first, third = stage_1(), dmd()
    return [
        Case("stage 1", "stage 1 step, teacher forcing, 1 clip", 20, first.prepare, first.run),
        Case("dmd", "DMD step, real score in int8, 1 clip", 45, third.prepare, third.run),
    ]
