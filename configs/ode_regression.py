"""Stage 2a: causal ODE initialisation, the student regresses the AR teacher's end points (paper section 3.2).

    cfjax train --config=configs/ode_regression.py --workdir=runs/ode
    cfjax train --config=configs/ode_regression.py:toy --workdir=runs/toy/ode
    cfjax train --config=configs/ode_regression.py:bidirectional --workdir=runs/sf_ode     Self Forcing's and CausVid's
    cfjax train --config=configs/ode_regression.py:bidirectional_pairs --workdir=runs/bi_ode    only the teacher changed
    cfjax plan --config=configs/ode_regression.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --config.mesh.context=4

Needs the pairs of configs/ode_pairs.py, or an LMDB of other people's. If those hold no clean clips (Self Forcing's and
CausVid's end in the ODE's end), `--config.data.ground_truth=False` reads them so.

Numbers of the PyTorch reference: lr 2e-6, betas (0.9, 0.999), 1K steps or more, no EMA; `--config.reference=True` sets
the last (the toy's average then stays a copy of the weights).
"""

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`toy`, `mini`, `framewise`, `bidirectional` or `bidirectional_pairs`."""
    words = presets.switches(arg, "toy", "mini", "framewise", "bidirectional", "bidirectional_pairs")
    presets.one_of(words, "toy", "mini")
    presets.one_of(words, "bidirectional", "bidirectional_pairs")
    toy = "toy" in words
    c = presets.experiment("ode_regression", steps=400 if toy else 5000)
    init = "runs/toy/ar" if toy else "runs/ar"
    c.roles.student = presets.role("toy" if toy else "wan_1_3b", init=init, init_ema=toy, stages=("ar_diffusion",))
    c.data = presets.toy_data(name="pairs") if toy else presets.wan_data("data/wan")
    c.data.name = "pairs"
    c.log_every = 10 if toy else 50
    c.blocks = presets.blocks("framewise" in words)
    c.objective = {"steps": (1000, 750, 500, 250), "shift": 5.0, "levels_per": "clip", "past": "clip"}
    if "bidirectional" in words or "bidirectional_pairs" in words:
        c.data.name = "bidirectional_pairs"
        c.objective.past = "endpoint"  # the only clean past that such pairs have
    if "bidirectional" in words:  # the student, too, starts from the bidirectional network
        c.roles.student.update({"init": "toy_teacher" if toy else "checkpoints/wan_1_3b", "init_ema": False})
        c.roles.student.init_stages = ("bidirectional",)
        c.objective.update({"levels_per": "block", "past": "noisy"})
    c.optim.student = presets.toy_optimizer(0.005) if toy else presets.optimizer(2e-6, 0.9)
    if toy:
        c.ema.student = presets.ema(0.99)
    c.sampler = presets.few_step()
    return presets.mini(c) if "mini" in words else c
