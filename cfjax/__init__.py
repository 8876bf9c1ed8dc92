"""cfjax: Causal Forcing in JAX (arXiv 2602.02214).

Shape legend. Array names end in one letter per axis:

    B batch            F latent frames     P pixel frames      H, W height, width      C channels
    T tokens           S text rows         E text width        D model width           L layers
    N attention heads  K head dim          J stored trajectory points

`latents_BFHWC` is a batch of latent videos, `k_LBFTNK` the keys of every layer and frame. Videos are channels last,
float32, in [-1, 1]; sigma is the clock: float32 in [0, 1], 1 is pure noise (timestep t = 1000 sigma).
"""

__version__ = "0.1.0"
