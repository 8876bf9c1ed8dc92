"""Stage 1: AR diffusion with teacher forcing, from the bidirectional teacher (paper section 3.1).

    cfjax train --config=configs/ar_diffusion.py --workdir=runs/ar            chunk-wise, Wan 1.3B
    cfjax train --config=configs/ar_diffusion.py:framewise --workdir=runs/ar
    cfjax train --config=configs/ar_diffusion.py:toy --workdir=runs/toy/ar
    cfjax train --config=configs/ar_diffusion.py:mini --workdir=runs/ar       a rehearsal of Wan on a laptop, minutes
    cfjax train --config=configs/ar_diffusion.py:diffusion_forcing --workdir=runs/df    the paper's baseline
    cfjax train --config=configs/ar_diffusion.py:noise_augmentation --workdir=runs/na   a little noise on the clean past
    cfjax train --config=configs/ar_diffusion.py:direct_forcing --workdir=runs/pfvg        (arXiv 2510.01784)
    cfjax train --config=configs/ar_diffusion.py:resampling_forcing --workdir=runs/rf      (arXiv 2512.15702)
    cfjax train --config=configs/ar_diffusion.py:bagger --workdir=runs/bagger              (arXiv 2512.12080)
    cfjax train --config=configs/ar_diffusion.py:toy,actions --workdir=runs/toy_steered/ar       steered by arrow keys
    cfjax plan --config=configs/ar_diffusion.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --config.mesh.context=4

Each strategy also takes `toy` and `framewise`, as in `:toy,bagger`. The last two are for a network that can generate:
they start from runs/ar (runs/toy/ar), and `--config.roles.student.init` names another run or the bidirectional weights.

Frames that pass the network forwards, per clip of F frames: diffusion forcing F; teacher forcing and noise augmentation
2 F; Direct and Resampling Forcing 4 F, half of it without gradient and block after block; BAgger F, and in
`objective.bagger` of the updates also a rollout: 2 (20 + 1) per frame after the first block, 2 per frame of that.

Numbers of the PyTorch reference: lr 2e-6, betas (0, 0.999), 2K steps or more at batch 64, no EMA. The reference drops
no captions (quirk Q19); the toy drops 10 %, because guidance is used at sampling. `objective.noise_augmentation` noises
the clean half, at table indices from that number up; 900 leaves sigma at 0.36 or less. BAgger's rollouts are made by
the average of the weights, which its config therefore keeps. They are played backwards as pixels, through the codec of
the data's world (`objective.codec_world`, where the dataset does not name it; the toy's latents are reversed as they
are). Their captions are of the clip played backwards: a dataset of prompts alone, `data.reversed_name`, one caption per
clip in the clips' order ("a reversed video of ..." in the paper); the toy turns its directions round.

`--config.reference=True` sets, in the toy too: rounded timesteps (Q1), no captions dropped (Q19), the bell-shaped
weight, and no average (one that is there stays a copy of the weights).
"""

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`toy`, `mini`, `framewise`; `diffusion_forcing`, `noise_augmentation`, `direct_forcing`, `resampling_forcing`,
    `bagger`, `actions`, `action_attention`.

    The five before the last two exclude each other; these two are the toy steered by keys (docs/actions.md).
    """
    histories = {"direct_forcing": "direct", "resampling_forcing": "resampled"}
    strategies = ("diffusion_forcing", "noise_augmentation", *histories, "bagger")
    words = presets.switches(arg, "toy", "mini", "framewise", *strategies, *presets.STEERED)
    presets.one_of(words, "toy", "mini")
    presets.one_of(words, *strategies)
    presets.one_of(words, "bagger", *presets.STEERED)  # its clips are played backwards, their keys are not
    toy, strategy = "toy" in words, next((word for word in words if word in strategies), "")
    c = presets.experiment("ar_diffusion", steps=500 if toy else 5000)
    c.roles.student = presets.role(
        "toy" if toy else "wan_1_3b",
        init="toy_teacher" if toy else "checkpoints/wan_1_3b",
        stages=("bidirectional",),
    )
    if strategy in ("resampling_forcing", "bagger"):
        c.roles.student.update({"init": "runs/toy/ar" if toy else "runs/ar", "init_ema": toy})
        c.roles.student.init_stages = ("ar_diffusion", "bidirectional")
    c.data = presets.toy_data() if toy else presets.wan_data("data/wan")
    c.log_every = 10 if toy else 50
    c.blocks = presets.blocks("framewise" in words)
    weighting = "uniform" if toy else "bsmntw"
    c.objective = {
        "shift": 5.0,
        "weighting": weighting,
        "text_dropout": 0.1 if toy else 0.0,
        "bf16_timesteps": False,
        "forcing": "diffusion" if strategy in ("diffusion_forcing", "bagger") else "teacher",
        "noise_augmentation": 900 if strategy == "noise_augmentation" else 0,
        "history": histories.get(strategy, "clean"),
        "history_shift": 0.6,
        "history_steps": 1,
        "image_start": 0.0,
        "bagger": 0.6 if strategy == "bagger" else 0.0,
        "bagger_prefix": 4 / 7,
        "bagger_steps": 20,
        "bagger_guidance": 3.0,
        "bagger_pixels": strategy == "bagger" and not toy,
        "codec_world": "",
        "codec_decoder": "vae",
    }
    c.optim.student = presets.toy_optimizer(0.005) if toy else presets.optimizer(2e-6)
    if toy or strategy == "bagger":
        c.ema.student = presets.ema(0.99)
    c.sampler = presets.many_step(50, 3.0)
    return presets.steered(presets.mini(c) if "mini" in words else c, words)
