"""Compare with PyTorch: the same weights, inputs, noise and timesteps on both sides, one table of errors.

cfjax compare --against=diffusers --config.run=checkpoints/wan_1_3b --workdir=runs/compare
cfjax compare --against=reference --reference_dir=Causal-Forcing --config.run=checkpoints/causal_forcing

Without a run, random weights are compared, and nothing needs to be on disk:

cfjax compare --against=diffusers
cfjax compare --against=peft
"""

from ml_collections import ConfigDict


def get_config():
    """The weights, and the sizes of the test inputs (small ones show as much as large ones).

    `run`: a run directory, converted or trained, or a shipped teacher; `world`: its Wan world ("": where the run says).
    Without a run, the world's own parts are compared; without either, random weights.
    `role`, `ema`: which of the run's networks, and whether its average where there is one; `random`: sizes of random
    weights, "toy" or "full" (Wan 1.3B, its VAE and text encoder; the latter needs 50 GB of memory), "ti2v_toy" and
    "ti2v" (Wan2.2-TI2V-5B's network and VAE), or "i2v_toy" and "i2v" (Wan2.1-I2V-14B's network and CLIP); `frames`:
    latent frames; `height`, `width`: pixels; `text_length`: text rows; `steps`: of the many-step sampler.
    """
    return ConfigDict(
        {
            "run": "",
            "world": "",
            "role": "student",
            "ema": True,
            "random": "toy",
            "frames": 6,
            "height": 64,
            "width": 96,
            "text_length": 32,
            "steps": 50,
        }
    )
