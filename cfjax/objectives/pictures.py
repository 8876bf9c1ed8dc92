"""Losses of networks that take a picture beside the latents (`models.experts.Conditioned`)."""

from typing import Any

import jax
import jax.numpy as jnp

from cfjax.models.experts import picture_condition, takes_picture, with_picture
from cfjax.objectives.stage import Batch, Loss, Models


def with_pictures(loss: Loss) -> Loss:
    """The loss with the batch's pictures beside the latents of every network that takes one.

    A batch then holds `picture_BFHWC`: the latents of each clip's first pixel frame and grey frames after it. As the
    condition belongs to a frame, not to a pass, the clean and the noisy half of teacher forcing have it alike.
    """

    def conditioned(
        models: Models, batch: Batch, key: jax.Array, *rest: Any, **named: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if "picture_BFHWC" in batch:
            condition = picture_condition(batch["picture_BFHWC"].astype(jnp.float32))
            models = {
                name: with_picture(model, condition) if takes_picture(getattr(model, "config", None)) else model
                for name, model in models.items()
            }
        return loss(models, batch, key, *rest, **named)

    return conditioned
