"""cfjax: Causal Forcing in JAX (arXiv 2602.02214).

Shape legend. Array names end in one letter per axis, and a digit stands for itself:

    B batch            F latent frames     P pixel frames      H, W height, width      C channels
    T tokens           S text rows         E text width        D model width           L layers
    N attention heads  K head dim          G blocks            J few-step levels       I past frames
    Y classes          R repeats           M mixture components  A action keys

`latents_BFHWC` is a batch of latent videos, `k_LBFTNK` the keys of every layer and frame. Videos are channels last,
float32, in [-1, 1]. Noise levels are sigmas: float32 in [0, 1], 1 is pure noise (timestep t = 1000 sigma).

"Reference" is the PyTorch implementation, github.com/thu-ml/Causal-Forcing at commit 1fc7bbc; "reference: FILE, SYMBOL"
cites it. Its quirks, Q1, Q2, ..., are listed in docs/compare.md.

    run = cfjax.open_run("runs/quickstart/dmd")          docs/python.md

What `__all__` names is imported when it is first asked for: `import cfjax` alone does not import JAX, and sets nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfjax.core.errors import UserError
    from cfjax.evaluation.video import to_uint8, write_mp4
    from cfjax.experiment.runs import Run, load_weights, open_run
    from cfjax.rollout.session import Session

__all__ = ["Run", "Session", "UserError", "load_weights", "open_run", "to_uint8", "write_mp4"]
_LIES_IN = {
    "Run": "cfjax.experiment.runs",
    "Session": "cfjax.rollout.session",
    "UserError": "cfjax.core.errors",
    "load_weights": "cfjax.experiment.runs",
    "open_run": "cfjax.experiment.runs",
    "to_uint8": "cfjax.evaluation.video",
    "write_mp4": "cfjax.evaluation.video",
}

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> Any:
        """What `__all__` names, from where it lies."""
        if name not in _LIES_IN:
            raise AttributeError(f"module 'cfjax' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(_LIES_IN[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
