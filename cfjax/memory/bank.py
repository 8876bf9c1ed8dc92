"""A memory bank: besides sink and recent frames, the recorded frames that fit the prompt best.

Source: MemFlow, arXiv 2512.14699, `compress_kv_bank` in `wan/modules/causal_model.py`. Every `interval` blocks the
first frame of the block is recorded. While the bank has room it is added; then the worst of those in the bank
makes room for it, layer by layer:

    score of a frame = < mean of the text's keys, mean of the frame's keys > / sqrt(K), mean over heads

which is the mean over all pairs of text row and token. MemFlow's code records once more before every block of the
interval, so that one frame can come to fill the bank; here a frame is recorded once. Its routing among sink and bank,
SMA, is not here.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.slots import (
    EMPTY,
    Attend,
    Incoming,
    Memory,
    Network,
    Seen,
    State,
    labels,
    layer_slots,
    placed,
    rotate_rows,
)
from cfjax.nn.frames import attend_biased
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks

CHOSEN = -3  # in a plan: one of the frames recorded before, whichever fits


class Bank(NamedTuple):
    """Keys and values as in the slots, [L, B, frames, ...]; the frames, and the time positions at which they were
    committed; their number; the newest.
    """

    k: Any
    v: Any
    frame_LBF: jax.Array
    position_LBF: jax.Array
    filled: jax.Array
    newest: jax.Array


@dataclass(frozen=True)
class MemoryBank(Memory):
    """See the module.

    Attributes:
      bank: frames of the bank.  interval: a frame is recorded every so many blocks.
    """

    window: int = 12
    sink: int = 3
    bank: int = 3
    interval: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bank", "interval"):
            if getattr(self, name) < 1:
                raise UserError(f"memory: {name}={getattr(self, name)}: use 1 or more")

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Bank:
        if layout.independent_first_frame:
            raise UserError("memory: memory_bank needs blocks of one size; it takes no independent first frame")
        k, v = self.empty_frames(network, batch, self.bank, tokens)
        empty, none = jnp.full((network.num_layers, batch, self.bank), EMPTY, jnp.int32), jnp.int32(EMPTY)
        return Bank(k, v, empty, empty, jnp.int32(0), none)

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """As `Memory.attention`, over the slots and the bank."""
        slots, bank = len(state.frame_F), state.extra
        key_F, _ = self.positions(labels(state), start, frames)
        seen = jnp.concatenate([jnp.arange(slots) < state.count, jnp.arange(self.bank) < bank.filled])
        bias_F = jnp.pad(jnp.where(seen, 0.0, -jnp.inf), (0, frames))
        rows = to_bits((state.k, state.v, bank.k, bank.v))

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            counts = (slots, slots, self.bank, self.bank)
            past_k, past_v, bank_k, bank_v = (
                self.codec.decode(from_bits(layer_slots(x, layer, count)), k.dtype)
                for x, count in zip(rows, counts, strict=True)
            )
            own = rotate_rows(bank_k, layer_slots(bank.position_LBF, layer, self.bank))
            keys = jnp.concatenate([rotate_time(past_k, key_F), own, k], axis=1)
            values = jnp.concatenate([past_v, bank_v, v], axis=1)
            return attend_biased(q, keys, values, bias_F, backend=network.attention)

        return self_attend

    def before_commit(self, state: State, new: Incoming) -> State:
        """Records the first frame of every `interval`-th block, but not again when blocks are committed again."""
        bank, own_F = state.extra, self.own_positions(state, new.start, 1)
        records = new.is_new & (new.start > bank.newest) & (new.start // new.frames % self.interval == 0)
        room = bank.filled < self.bank
        # Which of [bank, own] are in the bank: behind the others that stay, the new one.
        place = jnp.arange(self.bank)
        added = jnp.where(place == bank.filled, self.bank, place)
        worst_LB = jnp.argmin(self.scores(bank, new.text_LBNK), axis=2)[..., None]
        kept = jnp.where(place[None, None] < worst_LB, place[None, None], place[None, None] + 1)
        order_LBF = jnp.where(records, jnp.where(room, added[None, None], kept), place[None, None])

        def put(old: jax.Array, own: jax.Array) -> jax.Array:
            both = jnp.concatenate([old, own[:, :, :1].astype(old.dtype)], axis=2)
            order = order_LBF.reshape(*order_LBF.shape, *(1,) * (old.ndim - 3))
            return placed(jnp.take_along_axis(both, order, axis=2))

        said = lambda x: jnp.broadcast_to(x, (*bank.frame_LBF.shape[:2], 1))
        after = Bank(
            jax.tree.map(put, bank.k, new.k),
            jax.tree.map(put, bank.v, new.v),
            put(bank.frame_LBF, said(new.start)),
            put(bank.position_LBF, said(own_F)),
            jnp.where(records & room, bank.filled + 1, bank.filled),
            jnp.where(records, new.start, bank.newest).astype(jnp.int32),
        )
        return replace(state, extra=after)

    def scores(self, bank: Bank, text_LBNK: jax.Array) -> jax.Array:
        """How well each frame fits the prompt, [L, B, frames], from the mean of the text's keys."""
        mean = jnp.mean(self.codec.decode(bank.k, jnp.float32), axis=3, keepdims=True)
        mean_LBFNK = jax.vmap(rotate_rows)(mean, bank.position_LBF)[:, :, :, 0]
        scaled = text_LBNK.astype(jnp.float32)[:, :, None] * mean_LBFNK / text_LBNK.shape[-1] ** 0.5
        return jnp.mean(jnp.sum(scaled, axis=-1), axis=-1)

    def plan(self, num_frames: int, layout: Blocks) -> list[Seen]:
        """As `Memory.plan`, with the bank behind the slots; CHOSEN where the prompt decides."""
        found, recorded = [], list[int]()
        for seen in super().plan(num_frames, layout):
            known = recorded[-1:] if len(recorded) > self.bank else recorded
            bank = [CHOSEN] * (min(len(recorded), self.bank) - len(known)) + known
            found.append(seen._replace(frames=(*seen.frames, *bank), positions=(*seen.positions, *bank)))
            if seen.span[0] // layout.frames % self.interval == 0:
                recorded.append(seen.span[0])
        return found
