"""The second run of a pair: Wan2.2-A14B's expert for high noise levels, beside the run that has the low ones."""

from dataclasses import dataclass, replace
from typing import Any, cast

from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.experiment.runs import Run, load_weights, open_run
from cfjax.models.experts import Experts
from cfjax.models.wan import Wan
from cfjax.rollout.generate import ManyStep
from cfjax.worlds.world import WorldParts


@dataclass(frozen=True)
class HighNoise:
    """A run for noise levels from `boundary` on, and its scale of guidance."""

    run: Run
    boundary: float
    guidance: float

    def record(self, weights: str) -> dict[str, Any]:
        """What settings.json says of it, with a hash of its weights."""
        own = {"name": self.run.name, "step": self.run.step, "weights": weights}
        return {**own, "boundary": self.boundary, "guidance": self.guidance}


def open_high_noise(c: ConfigDict, run: Run, sampler: Any) -> HighNoise | None:
    """The run of `c.high_noise`, in shapes; None where none is named.

    Args:
      run: the one for the levels below.  sampler: as the command changes it.

    Raises:
      UserError: either is causal, or they differ in sizes or world; or LoRAs are to be merged.
    """
    asked = c.high_noise
    if not asked.run:
        return None
    if run.blocks is not None or not isinstance(sampler, ManyStep):
        raise UserError(
            f"high_noise.run: run={run.name!r} generates block by block; two experts make all frames at once"
        )
    if c.lora:
        raise UserError("lora and high_noise.run: convert each expert with its own LoRAs (cfjax convert)")
    try:
        other = open_run(
            asked.run,
            ema=c.ema,
            world=c.world or run.world.folder,
            parts=WorldParts(c.decoder, with_text=False),
            with_model=False,
            precision=c.precision,
            attention=c.attention,
            storage=c.storage,
        )
    except UserError as error:
        raise UserError(f"high_noise.{error}") from None
    if other.blocks is not None or other.model.config != run.model.config:
        raise UserError(f"high_noise.run={asked.run!r} is not of the kind and sizes of run={run.name!r}; name its pair")
    return HighNoise(other, float(asked.boundary), float(asked.guidance if asked.guidance >= 0 else sampler.guidance))


def with_high_noise(run: Run, high: HighNoise | None) -> Run:
    """The run, its weights loaded, whose network is the pair."""
    if high is None:
        return run
    pair = Experts(run.model, load_weights(high.run).model, high.boundary, high.guidance)
    return replace(run, model=cast(Wan, pair))
