"""What a streamed video needs: FLOPs and bytes of its network passes by arithmetic, whatever a program does.

A pass over t tokens that see k keys takes, in every layer, 8 t d^2 (q, k, v, o) + 4 t k d (attention) + 4 t d^2 (the
text's q and o) + 4 t S d + 4 t d f FLOPs. A commit is a pass for its keys and values: of the last layer it needs these
alone, and no head. Weights are read once a pass, and so are the keys and values that are seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkSize:
    """Sizes of a diffusion transformer.

    Attributes:
      inputs, outputs: features of a token before the first and after the last layer.
      weight_bytes: as stored.
      cache_bytes: of one number in the KV cache.
    """

    dim: int
    ffn_dim: int
    layers: int
    inputs: int
    outputs: int
    text_dim: int
    freq_dim: int
    weight_bytes: int
    cache_bytes: int = 4


@dataclass(frozen=True)
class Pass:
    """One call of the network, per video.

    Attributes:
      frames, tokens: of the call.
      keys: that each token sees, its own block's among them.
      commits: whether only keys and values are wanted.
    """

    frames: int
    tokens: int
    keys: int
    commits: bool = False


@dataclass(frozen=True)
class Need:
    """FLOPs, and bytes between memory and the chip."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Need") -> "Need":
        return Need(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The least time on a chip, the slower of computing and reading; an unknown (0) figure does not count."""
        computing = self.flops / peak_flops if peak_flops else 0.0
        return max(computing, self.bytes / bandwidth if bandwidth else 0.0)


def pass_flops(size: NetworkSize, work: Pass, text_rows: int) -> float:
    """FLOPs of matrix products of one call for one video."""
    d, t = size.dim, work.tokens
    own = 2 * t * d * 2 * d  # k, v
    rest = 2 * t * d * 2 * d + 4 * t * work.keys * d + 4 * t * d * d + 4 * t * text_rows * d + 4 * t * d * size.ffn_dim
    layers = size.layers * own + (size.layers - work.commits) * rest
    ends = 2 * t * d * (size.inputs + (0 if work.commits else size.outputs))
    return float(layers + ends + 2 * work.frames * (size.freq_dim * d + 7 * d * d))


def text_flops(size: NetworkSize, text_rows: int) -> float:
    """FLOPs of a prompt's embedding, and of its keys and values in all layers."""
    return 2.0 * text_rows * size.dim * (size.text_dim + size.dim + 2 * size.layers * size.dim)


def stream_need(size: NetworkSize, passes: Sequence[Pass], text_rows: int, batch: int = 1) -> Need:
    """What all calls for a batch of videos need; every call reads the weights once."""
    flops = sum(pass_flops(size, work, text_rows) for work in passes)
    seen = sum(2 * size.layers * size.dim * (work.keys + text_rows) * size.cache_bytes for work in passes)
    return Need(batch * flops, len(passes) * size.weight_bytes + batch * float(seen))
