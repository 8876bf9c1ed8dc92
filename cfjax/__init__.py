"""cfjax: Causal Forcing in JAX (arXiv 2602.02214).

Shape legend. Array names end in one letter per axis, and a digit stands for itself:

    B batch            F latent frames     P pixel frames      H, W height, width      C channels
    T tokens           S text rows         E text width        D model width           L layers
    N attention heads  K head dim          G blocks            J few-step levels       I past frames
    Y classes          R repeats           M mixture components

`latents_BFHWC` is a batch of latent videos, `k_LBFTNK` the keys of every layer and frame. Videos are channels last,
float32, in [-1, 1]. Noise levels are sigmas: float32 in [0, 1], 1 is pure noise (timestep t = 1000 sigma).

"Reference" is the PyTorch implementation, github.com/thu-ml/Causal-Forcing at commit 1fc7bbc; "reference: FILE, SYMBOL"
cites it. Its quirks, Q1, Q2, ..., are listed in docs/compare.md.
"""

__version__ = "0.1.0"
