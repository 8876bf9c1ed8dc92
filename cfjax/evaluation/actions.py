"""Whether a clip's camera does what its recorded actions ask.

Beside NAME.mp4 lies NAME.actions.json: an object with any of `pan`, `tilt`, `zoom` and `roll`, each a list with one
number per frame, what is asked of the picture until the next one, in any unit: right, down, growing, clockwise.
"""

import math
from pathlib import Path

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES
from cfjax.core.schema import checked, load_json, number, several, table
from cfjax.evaluation.motion_metrics import MOVES

SUFFIX = ".actions.json"
_ACTIONS = table({}, dict.fromkeys(MOVES, several(number(-1e9, 1e9), most=FRAMES)), closed=True)


def read_actions(file: Path) -> dict[str, np.ndarray] | None:
    """The numbers of each axis; None where there is no such file.

    Raises:
      UserError: it is not of that form, or its lists differ in length.
    """
    try:
        found = checked(_ACTIONS, load_json(file), file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
    lengths = {len(values) for values in found.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(f"{file}: give lists of one length, one number per frame, for any of {', '.join(MOVES)}")
    return {name: np.array(values, float) for name, values in found.items()}


def action_fidelity(actions: dict[str, np.ndarray], camera: np.ndarray, interval: int) -> dict[str, float]:
    """Compares what is asked with the measured motion.

    Args:
      camera: [pairs, 4] of `FlowMeter.camera`.  interval: frames from one sampled frame to the next.

    Returns:
      action_fidelity, Pearson's correlation over the sampled pairs, the mean over the axes of which both vary;
      action_sign, the share of pairs and axes with an action whose motion has its sign. NaN where nothing is asked.
    """
    correlations, right = [], []
    for axis, name in enumerate(MOVES):
        if name not in actions:
            continue
        pairs = min(len(camera), len(actions[name]) // interval)
        asked = actions[name][: pairs * interval].reshape(pairs, interval).mean(1)
        done = camera[:pairs, axis]
        if pairs > 2 and np.ptp(asked) > 0 and np.ptp(done) > 0:
            correlations.append(float(np.corrcoef(asked, done)[0, 1]))
        right += [bool(np.sign(a) == np.sign(d)) for a, d in zip(asked, done, strict=True) if a]
    return {
        "action_fidelity": float(np.mean(correlations)) if correlations else math.nan,
        "action_sign": float(np.mean(right)) if right else math.nan,
    }
