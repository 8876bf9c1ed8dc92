"""A network together with the keys that are held while it runs: `Steered` takes the network's place in every pass.

    model = steered(network, keys_BFA)                    # of a whole video: losses, rollouts, generation
    model = steered(network, rows_BFA, start, padded=True)  # of one block of an endless stream

Each pass picks the rows of its own frames by their numbers, and hands them to the network with the text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.models.actions import SteeredKV
from cfjax.models.cache import write
from cfjax.models.context import Observe, clean_context, forward_fused, forward_kv, forward_observed
from cfjax.models.saved import Saved, forward_saving, replay_saved
from cfjax.models.wan import KV, FrameKV, KvGradient, Wan, WanConfig, embed_text, forward_block, replay, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility


class Steered(nnx.Module):
    """A network with the keys of some frames.

    Attributes:
      network: it.
      keys: rows [B, context + F, A] of the frames from `first` - context on; a guided batch has them once per prompt.
      first: float32, so that gradients may be taken with respect to everything.
    """

    def __init__(self, network: Wan, keys_BFA: jax.Array, first: jax.Array):
        self.network, self.keys, self.first = network, nnx.Variable(keys_BFA), nnx.Variable(first)

    @property
    def config(self) -> WanConfig:
        """The network's."""
        return self.network.config

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """The flow of frames 0 to F, see `Wan`."""
        return self.network(latents_BFHWC, sigma_BF, self.told(text_kv, 0, *latents_BFHWC.shape[:2]), visibility)

    def told(self, text_kv: KV, start: jax.Array | int, batch: int, frames: int, *, twice: bool = False) -> Any:
        """The text with the rows of the frames from `start` on.

        Args:
          twice: the pass has the frames twice, as those of teacher forcing have.
        """
        actions, keys = self.config.actions, self.keys[...]
        assert actions is not None
        at = jnp.asarray(start, jnp.int32) - self.first[...].astype(jnp.int32)
        own = jax.lax.dynamic_slice_in_dim(keys, at, actions.context + frames, axis=1)
        rows = jnp.stack([own[:, i : i + frames] for i in range(actions.context + 1)], axis=2)
        rows = jnp.tile(rows, (batch // rows.shape[0], 2 if twice else 1, 1, 1))
        return SteeredKV(*text_kv, jnp.broadcast_to(rows[None], (self.config.num_layers, *rows.shape)))


def steered(network: Any, keys_BFA: Any, start: Any = 0, *, padded: bool = False) -> Any:
    """The network with the keys of the frames from `start` on; one that cannot be steered, and `None`, as they are.

    Args:
      network: or anything else that a stage has among its roles.
      keys_BFA: float32, 1 where a key is held; None leaves the network as it is, told of none.
      padded: the rows of the `context` frames before `start` come first; else the first row is repeated.

    Raises:
      UserError: another number of keys.
    """
    actions = network.config.actions if isinstance(network, Wan) else None
    if actions is None or keys_BFA is None:
        return network
    keys = jnp.asarray(keys_BFA, jnp.float32)
    if keys.shape[-1] != actions.keys:
        raise UserError(f"{keys.shape[-1]} keys for a network of {actions.keys}: give one column for each")
    if not padded:
        keys = jnp.concatenate([jnp.repeat(keys[:, :1], actions.context, axis=1), keys], axis=1)
    return Steered(network, keys, jnp.asarray(start, jnp.float32))


# Every pass of a network, with the rows of its frames beside the text.


@embed_text.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Steered, text_BSE: jax.Array, image_BSE: jax.Array | None = None
) -> KV:
    return embed_text(model.network, text_BSE, image_BSE)


@teacher_forced.register
def _(  # type: ignore[misc]
    model: Steered,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    blocks: Blocks,
    *,
    clean_sigma_BF: jax.Array | None = None,
) -> jax.Array:
    told = model.told(text_kv, 0, *noisy_BFHWC.shape[:2], twice=True)
    work = (noisy_BFHWC, sigma_BF, clean_BFHWC, told, blocks)
    return teacher_forced(model.network, *work, clean_sigma_BF=clean_sigma_BF)


@forward_block.register
def _(  # type: ignore[misc]
    model: Steered,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    told = model.told(text_kv, start, *latents_BFHWC.shape[:2])
    return forward_block(model.network, latents_BFHWC, sigma_BF, told, cache, start, blocks)


@forward_kv.register
def _(  # type: ignore[misc]
    model: Steered,
    clean_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
) -> FrameKV:
    told = model.told(text_kv, start, *clean_BFHWC.shape[:2])
    return forward_kv(model.network, clean_BFHWC, sigma_BF, told, cache, start, blocks)


@forward_observed.register
def _(  # type: ignore[misc]
    model: Steered,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
    observe: Observe,
) -> tuple[FrameKV, Any]:
    told = model.told(text_kv, start, *latents_BFHWC.shape[:2])
    return forward_observed(model.network, latents_BFHWC, sigma_BF, told, cache, start, blocks, observe)


@forward_fused.register
def _(  # type: ignore[misc]
    model: Steered,
    clean_BFHWC: jax.Array,
    clean_sigma_BF: jax.Array,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    """As two passes: the fused one takes frames apart within a layer."""
    frames = clean_BFHWC.shape[1]
    kv = forward_kv(model, clean_BFHWC, clean_sigma_BF, text_kv, cache, start, blocks)  # type: ignore[arg-type]
    after = write(cache, kv, start, frames, blocks)
    flow = forward_block(model, noisy_BFHWC, sigma_BF, text_kv, after, start + frames, blocks)[0]  # type: ignore[arg-type]
    return flow, kv


@clean_context.register
def _(  # type: ignore[misc]
    model: Steered, clean_BFHWC: jax.Array, text_kv: KV, blocks: Blocks, *, sigma_BF: jax.Array | None = None
) -> FrameKV:
    told = model.told(text_kv, 0, *clean_BFHWC.shape[:2])
    return clean_context(model.network, clean_BFHWC, told, blocks, sigma_BF=sigma_BF)


@replay.register
def _(  # type: ignore[misc]
    model: Steered,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    blocks: Blocks,
    *,
    kv_gradient: KvGradient = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    told = model.told(text_kv, 0 if start is None else start, *noisy_BFHWC.shape[:2])
    work = (noisy_BFHWC, sigma_BF, told, context, blocks)
    return replay(model.network, *work, kv_gradient=kv_gradient, start=start)


@forward_saving.register
def _(  # type: ignore[misc]
    model: Steered,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
) -> Saved:
    told = model.told(text_kv, start, *latents_BFHWC.shape[:2])
    return forward_saving(model.network, latents_BFHWC, sigma_BF, told, cache, start, blocks)


@replay_saved.register
def _(  # type: ignore[misc]
    model: Steered,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    saved: Saved,
    blocks: Blocks,
    *,
    kv_gradient: KvGradient = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    told = model.told(text_kv, 0 if start is None else start, *noisy_BFHWC.shape[:2])
    work = (noisy_BFHWC, sigma_BF, told, context, saved, blocks)
    return replay_saved(model.network, *work, kv_gradient=kv_gradient, start=start)
