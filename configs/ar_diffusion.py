"""Stage 1: AR diffusion with teacher forcing, from the bidirectional teacher (paper section 3.1).

    cfjax train --config=configs/ar_diffusion.py --workdir=runs/ar            chunk-wise, Wan 1.3B
    cfjax train --config=configs/ar_diffusion.py:framewise --workdir=runs/ar
    cfjax train --config=configs/ar_diffusion.py:toy --workdir=runs/toy/ar
    cfjax train --config=configs/ar_diffusion.py:diffusion_forcing --workdir=runs/df    the paper's baseline
    cfjax train --config=configs/ar_diffusion.py:direct_forcing --workdir=runs/pfvg        (arXiv 2510.01784)
    cfjax train --config=configs/ar_diffusion.py:resampling_forcing --workdir=runs/rf      (arXiv 2512.15702)

Numbers of the PyTorch reference: lr 2e-6, betas (0, 0.999), 2K steps or more at batch 64, no EMA. The reference drops
no captions (quirk Q19); the toy drops 10 %, because guidance is used at sampling. `objective.noise_augmentation` noises
the clean half, at table indices from that number up.
"""

from cfjax import presets


def get_config(arg: str = ""):
    """`toy`, `framewise`, `diffusion_forcing`, `direct_forcing`, `resampling_forcing`."""
    strategies = {"diffusion_forcing": "clean", "direct_forcing": "direct", "resampling_forcing": "resampled"}
    words = presets.switches(arg, "toy", "framewise", *strategies)
    strategy = next((word for word in reversed(words) if word in strategies), "")  # one at a time: the last
    toy = "toy" in words
    c = presets.experiment("ar_diffusion", steps=500 if toy else 5000)
    c.roles.student = presets.role(
        "toy" if toy else "wan_1_3b",
        init="toy_teacher" if toy else "checkpoints/wan_1_3b",
        stages=("bidirectional",),
    )
    c.data = presets.toy_data() if toy else presets.wan_data("data/wan")
    c.log_every = 10 if toy else 50
    c.blocks = presets.blocks("framewise" in words)
    weighting = "uniform" if toy else "bsmntw"
    c.objective = {
        "shift": 5.0,
        "weighting": weighting,
        "text_dropout": 0.1 if toy else 0.0,
        "bf16_timesteps": False,
        "forcing": "diffusion" if strategy == "diffusion_forcing" else "teacher",
        "noise_augmentation": 0,
        "history": strategies[strategy] if strategy else "clean",
        "history_shift": 0.6,
        "history_steps": 1,
    }
    c.optim.student = presets.toy_optimizer(0.005) if toy else presets.optimizer(2e-6)
    if toy:
        c.ema.student = presets.ema(0.99)
    c.sampler = presets.many_step(50, 3.0)
    return c
