"""Tables of attention heads: how much of every head's attention goes to recent frames, as `cfjax profile_heads` writes.

    share = attention to the last `recent` key frames / attention to all key frames behind the first `sink`

A head is static where its share is 0.8 or more, else dynamic. Source: `configs_head/head_profile.py` of Forcing-KV.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES, LAYERS, WIDTH
from cfjax.core.schema import checked, flag, load_json, number, one_of, several, table, text, whole

KIND = "cfjax heads"
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


def head_shares(mass_LNF: np.ndarray, sink: int, recent: int) -> np.ndarray:
    """The share of the last `recent` key frames in the attention behind the first `sink`, [L, N]; see the module.

    Args:
      mass_LNF: mean attention to every key frame, oldest first, the queries' own block at the end.
    """
    behind_LN = mass_LNF[..., sink:].sum(-1)
    return mass_LNF[..., -recent:].sum(-1) / np.maximum(behind_LN, np.finfo(np.float32).tiny)


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
