"""A linear model, two roles and a counted data source: the smallest run that has everything a stage has.

As a script, one run in a process of its own:
    toy.py WORKDIR STEPS [die_in_save=STEP] [sleep=SECONDS] [hang_at=BATCH] [hang_in_restore=1] [stall=SECONDS]
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cfjax.core.tree import named_leaves
from cfjax.objectives.stage import Ema, Stage
from cfjax.training.checkpoint import CheckpointStore
from cfjax.training.loop import RunOutput, Schedule, fit
from cfjax.training.observe import Work
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import TrainState, init_state


class Linear(nnx.Module):
    """y = x W + b."""

    def __init__(self, key: jax.Array, width: int = 4) -> None:
        self.kernel = nnx.Param(0.1 * jax.random.normal(key, (width, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return x_BD @ self.kernel[...] + self.bias[...][None]


class Counted:
    """Batches that are a function of their number; `index_B` are its records."""

    def __init__(
        self, batch: int = 8, width: int = 4, pause: float = 0.0, bad: int | None = None, hang_at: int | None = None
    ) -> None:
        self.position, self._batch, self._width, self._pause, self._bad = 0, batch, width, pause, bad
        self._hang_at = hang_at

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(3600 if self.position == self._hang_at else self._pause)
        rng = np.random.default_rng(self.position)
        x = rng.standard_normal((self._batch, self._width)).astype(np.float32)
        index = self.position * self._batch + np.arange(self._batch)
        if self.position == self._bad:
            x[0, 0] = np.nan
        self.position += 1
        return {"x_BD": x, "y_BD": x[:, ::-1] + 1.0, "scale_D": np.ones(self._width, np.float32), "index_B": index}

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def regression(role: str, noise: float = 0.0):
    """Mean squared error of one role; `noise` on the input draws from the key."""

    def loss(models, batch, key):
        x = batch["x_BD"] + noise * jax.random.normal(key, batch["x_BD"].shape)
        error = (models[role](x) - batch["y_BD"]) * batch["scale_D"][None]
        return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}

    return loss


def two_roles() -> Stage:
    """A student updated every fifth iteration and averaged; a critic updated at every one."""
    losses = {"student": regression("student", 0.1), "critic": regression("critic", 0.1)}
    return Stage("toy", losses, cadence={"student": 5}, ema={"student": Ema(0.9, start=10)})


def setup(stage: Stage, seed: int = 0, width: int = 4, name: str = "adamw", lr: float = 0.02):
    """(fresh state, optimisers) for the roles of `stage`."""
    txs = {role: make_optimizer(OptimizerConfig(lr=lr, name=name), steps=1000) for role in stage.losses}
    models = {role: Linear(jax.random.key(seed + i), width) for i, role in enumerate(stage.losses)}
    return init_state(stage, models, txs, seed), txs


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Everything of a state, on the host."""
    return {name: np.array(leaf) for name, leaf in named_leaves(state).items() if name != "key"}


def run(workdir: Path, steps: int, *, width: int = 4, data: Counted | None = None, **kwargs) -> TrainState:
    """`fit` with the two roles and a checkpoint every ten iterations; `kwargs` are its own and those of `Schedule`."""
    stage = two_roles()
    state, txs = setup(stage, width=width)
    output = RunOutput(workdir, work=kwargs.pop("work", Work()))
    own = {name: kwargs.pop(name) for name in ("put_batch", "sample_fn", "going_on") if name in kwargs}
    schedule = Schedule(steps, **{"log_every": 7, "save_every": 10, "progress": False, **kwargs})
    data = Counted(width=width) if data is None else data
    return fit(stage, txs, state, {}, data, schedule, output, **own)


def main() -> None:
    options = dict(option.split("=") for option in sys.argv[3:])
    fatal = int(options.get("die_in_save", -1))
    save = CheckpointStore.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        if step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    CheckpointStore.save = save_and_die  # type: ignore[method-assign]
    if "hang_in_restore" in options:
        CheckpointStore.restore_latest = lambda *_, **__: time.sleep(3600)  # type: ignore[method-assign]
    width = int(options.get("width", 4))
    data = Counted(width=width, pause=float(options.get("sleep", 0)), hang_at=int(options.get("hang_at", -1)))
    run(Path(sys.argv[1]), int(sys.argv[2]), width=width, data=data, stall_seconds=float(options.get("stall", 0)))


if __name__ == "__main__":
    main()
