"""Losses of networks that are told the keys held in the batch's clips."""

from typing import Any

import jax

from cfjax.models.steered import steered
from cfjax.objectives.stage import Batch, Loss, Models


def with_actions(loss: Loss) -> Loss:
    """The loss, in which every network that can be steered is told `batch["actions_BFA"]`; see `models.steered`."""

    def told(models: Models, batch: Batch, key: jax.Array, *draws: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        held = {name: steered(model, batch["actions_BFA"]) for name, model in models.items()}
        return loss(held, batch, key, *draws)

    return told
