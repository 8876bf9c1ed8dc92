"""Tables of attention heads: how much of every head's attention goes to recent frames, as `cfjax profile_heads` writes.

    share = attention to the last `recent` key frames / attention to all key frames behind the first `sink`

A head is static where its share is 0.8 or more, else dynamic. Source: `configs_head/head_profile.py` of Forcing-KV.

For Pyramid Forcing every head has one of three labels. Its paper (arXiv 2605.13111) says what they mean: waves attend
periodically, veils to the first and the nearest frames, anchors to all. How they are measured is published in outline
only (signs and a Fourier transform of logits), without thresholds; `head_labels` is a rule of this package. With x_f
the logarithm of the attention to a key frame f behind the first `sink` and before the last `recent`, less its linear
trend:

    wave    one period of at most half these frames has `periodicity` or more of the power of x, and x is not flat
    veil    else, where these frames have less than `between` times what uniform attention would give them
    anchor  else
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES, JSON_BYTES, LAYERS, WIDTH
from cfjax.core.schema import (
    checked,
    flag,
    load_bytes,
    load_json,
    number,
    one_of,
    several,
    shown,
    table,
    text,
    whole,
)

KIND = "cfjax heads"
CHUNK = 128  # queries
LABELS = {"anchor": 1, "wave": -1, "veil": 2}
FLAT = 0.1  # standard deviation of the logarithm of attention from frame to frame, below which it is not periodic
_row = lambda rule: several(several(rule, least=1), least=1, most=LAYERS)
_TABLE = table(
    {
        "kind": one_of(KIND),
        "run": text(),
        "network": table({"num_layers": whole(1, LAYERS), "num_heads": whole(1, WIDTH), "head_dim": whole(1, WIDTH)}),
        "static": _row(flag),
        "share": _row(number(0, 1)),
        "mass": _row(several(number(0, 1), least=1, most=FRAMES)),
    }
)


@dataclass(frozen=True)
class HeadTable:
    """Which heads of a network are static.

    Attributes:
      path: the file; "" is no table.
      static_LN: of every layer and head.
      head_dim: channels of a head.
      run: whose network was measured.
    """

    path: str = ""
    static_LN: tuple[tuple[bool, ...], ...] = ()
    head_dim: int = 0
    run: str = ""

    @property
    def table_LN(self) -> tuple[tuple[bool, ...], ...]:
        """What decides who sees what."""
        return self.static_LN

    def check(self, network: Any) -> None:
        """Raises UserError unless the table is of a network of these sizes."""
        ours = (len(self.static_LN), len(self.static_LN[0]), self.head_dim)
        theirs = (network.num_layers, network.num_heads, network.head_dim)
        if ours != theirs:
            layers, heads, channels = ours
            raise UserError(
                f"{self.path}: it is of {layers} layers of {heads} heads of {channels} channels ({self.run}), and the "
                f"network has {theirs[0]} of {theirs[1]} of {theirs[2]}: make one of it with cfjax profile_heads"
            )


def read_heads(path: str) -> HeadTable:
    """The table in a file.

    Raises:
      UserError: it cannot be read, or is no such table.
    """
    file = Path(path)
    try:
        record = checked(_TABLE, load_json(file), file)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"profile={path}: cannot be read ({error}); cfjax profile_heads writes one") from error
    network = record["network"]
    shape = (network["num_layers"], network["num_heads"])
    for name in ("static", "share", "mass"):
        if {len(record[name])} != {shape[0]} or {len(row) for row in record[name]} != {shape[1]}:
            raise UserError(f"{path}: {name} must have a row for each of {shape[0]} layers and {shape[1]} heads")
    static_LN = tuple(tuple(row) for row in record["static"])
    return HeadTable(path, static_LN, network["head_dim"], record["run"])


@dataclass(frozen=True)
class HeadLabels:
    """The labels of a network's heads: 1 anchor, -1 wave, 2 veil, as Pyramid Forcing publishes them.

    Attributes:
      path: the file; "" is none.
      label_LN: of every layer and head.
    """

    path: str = ""
    label_LN: tuple[tuple[int, ...], ...] = ()

    @property
    def table_LN(self) -> tuple[tuple[int, ...], ...]:
        """What decides who sees what."""
        return self.label_LN

    def check(self, network: Any) -> None:
        """Raises UserError unless there is a label for each of the network's heads."""
        layers, heads = len(self.label_LN), len(self.label_LN[0])
        if (layers, heads) != (network.num_layers, network.num_heads):
            raise UserError(
                f"{self.path}: it has labels for {layers} layers of {heads} heads, and the network has "
                f"{network.num_layers} of {network.num_heads}: name another table"
            )


def read_labels(path: str) -> HeadLabels:
    """The labels in a file: a line per layer, a label per head, between commas.

    Raises:
      UserError: it cannot be read, or says something else.
    """
    try:
        lines = load_bytes(Path(path), JSON_BYTES).decode().split()
    except (OSError, ValueError) as error:
        raise UserError(f"profile={path}: cannot be read ({error}); give a line of labels per layer") from error
    rows = [line.split(",") for line in lines]
    if not rows or len({len(row) for row in rows}) > 1 or len(rows) > LAYERS:
        raise UserError(f"{path}: give a line for every layer, with as many labels as it has heads")
    if wrong := next((label for row in rows for label in row if label not in ("1", "-1", "2")), ""):
        raise UserError(f"{path}: {shown(wrong)} is no label; use 1 (anchor), -1 (wave) or 2 (veil)")
    return HeadLabels(path, tuple(tuple(map(int, row)) for row in rows))


def labels_text(label_LN: np.ndarray) -> str:
    """What such a file says."""
    return "".join(",".join(map(str, row)) + "\n" for row in np.asarray(label_LN).tolist())


def attention_mass(q_BFTNK: jax.Array, k_BFTNK: jax.Array, seen_F: jax.Array | None = None) -> jax.Array:
    """`frame_masses`, averaged over all queries, [B, N, F]."""
    return jnp.mean(frame_masses(q_BFTNK, k_BFTNK, seen_F), axis=2)


def frame_masses(q_BFTNK: jax.Array, k_BFTNK: jax.Array, seen_F: jax.Array | None = None) -> jax.Array:
    """Each head's softmax weights, summed over every key frame's tokens, [B, N, F of the queries, F of the keys].

    Averaged over the queries of a frame.

    Args:
      q_BFTNK: scores of `CHUNK` queries exist at a time.
      seen_F: which key frames are seen; None: all.
    """
    frames, tokens = q_BFTNK.shape[1], k_BFTNK.shape[2]
    q, k = (rearrange(x, "b f t n k -> b n (f t) k") for x in (q_BFTNK, k_BFTNK))
    queries, size = q.shape[2], min(CHUNK, q.shape[2])
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, -queries % size), (0, 0)))

    def some(q: jax.Array) -> jax.Array:
        scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if seen_F is not None:
            scores = jnp.where(jnp.repeat(seen_F, tokens), scores, jnp.finfo(jnp.float32).min)
        return rearrange(jax.nn.softmax(scores, axis=-1), "b n q (f t) -> b n q f t", t=tokens).sum(-1)

    masses = jax.lax.map(some, rearrange(padded, "b n (c q) k -> c b n q k", q=size))
    of_queries = rearrange(masses, "c b n q f -> b n (c q) f")[:, :, :queries]
    return rearrange(of_queries, "b n (i t) f -> b n i t f", i=frames).mean(3)


def head_shares(mass_LNF: np.ndarray, sink: int, recent: int) -> np.ndarray:
    """The share of the last `recent` key frames in the attention behind the first `sink`, [L, N]; see the module.

    Args:
      mass_LNF: mean attention to every key frame, oldest first, the queries' own block at the end.
    """
    behind_LN = mass_LNF[..., sink:].sum(-1)
    return mass_LNF[..., -recent:].sum(-1) / np.maximum(behind_LN, np.finfo(np.float32).tiny)


class Labelled(NamedTuple):
    """Every head's label, and what it follows from, [L, N]; see the module.

    power: the largest share of a period in the power of x.  period: it, in frames.  between: the attention between sink
    and recent frames, in multiples of what uniform attention gives.
    """

    label: np.ndarray
    power: np.ndarray
    period: np.ndarray
    between: np.ndarray


def head_labels(mass_LNFF: np.ndarray, sink: int, recent: int, periodicity: float, between: float) -> Labelled:
    """Anchor, wave and veil heads; see the module.

    Where fewer than four frames are between, no period fits twice and no head is a wave. Shorter periods than the
    longest come as close to a whole number of times as the frames allow.

    Args:
      mass_LNFF: mean attention of each of the last block's frames to every key frame, oldest first.
    """
    mass = np.asarray(mass_LNFF, np.float64)
    inside = mass[..., sink : mass.shape[-1] - recent]
    frames = inside.shape[-1]
    share = inside.sum(-1).mean(-1) / (frames / mass.shape[-1])
    power, period, uneven = (np.zeros(share.shape) for _ in range(3))
    if frames >= 4:
        x = np.log(np.maximum(inside, np.finfo(np.float32).tiny))
        trend = np.stack([np.ones(frames), np.arange(frames)], axis=1)
        x = x - x @ (trend @ np.linalg.pinv(trend)).T
        # |x|^2 by frequency, a negative one with its positive one, which the highest of an even number does not have.
        pairs = np.where(2 * np.arange(frames // 2 + 1) % frames == 0, 1, 2)
        spectrum = (pairs * np.abs(np.fft.rfft(x)) ** 2).mean(2)
        strongest = 2 + spectrum[..., 2:].argmax(-1)
        whole = np.maximum(spectrum[..., 1:].sum(-1), np.finfo(np.float64).tiny)
        power, period = spectrum[..., 2:].max(-1) / whole, frames / strongest
        uneven = np.sqrt((x**2).mean((2, 3)))
    kinds = [(power >= periodicity) & (uneven >= FLAT), share < between]
    label = np.select(kinds, [LABELS["wave"], LABELS["veil"]], LABELS["anchor"])
    return Labelled(label, power, period, share)


def heads_record(run: str, network: Any, mass_LNF: np.ndarray, about: Mapping[str, Any]) -> dict[str, Any]:
    """What such a file says.

    Args:
      mass_LNF: see `head_shares`.
      about: `sink`, `recent` and `threshold`, and how the attention was measured.
    """
    mass = np.asarray(mass_LNF, np.float64)
    share_LN = np.minimum(head_shares(mass, about["sink"], about["recent"]), 1.0)
    static_LN = share_LN >= about["threshold"]
    return {
        "kind": KIND,
        "run": run,
        "network": {name: getattr(network, name) for name in ("num_layers", "num_heads", "head_dim")},
        **about,
        "static": static_LN.tolist(),
        "share": np.round(share_LN, 6).tolist(),
        "mass": np.round(mass, 6).tolist(),
    }
