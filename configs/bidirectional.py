"""Stage 0: the bidirectional teacher, by flow matching.

Real users start from Wan2.1 and skip this. The toy teachers that ship with the package were made by

    cfjax train --config=configs/bidirectional.py:toy --workdir=runs/teacher
    cfjax train --config=configs/bidirectional.py:toy,branching --workdir=runs/branching/teacher

The second is `cfjax study uncertain`'s: its clips turn where nothing announces it. The teacher of the world where arrow
keys steer (docs/actions.md) starts from the first:

    cfjax train --config=configs/bidirectional.py:toy,actions --workdir=runs/toy_steered/teacher

At Wan's size, what a slice of TPUs needs for it (compiled, on any machine):

    cfjax plan --config=configs/bidirectional.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --config.mesh.context=4

Toy recipe (it differs from the paper's): Muon, uniform weight over noise levels (the high ones decide the motion, and
the bell-shaped weight of stage 1 all but ignores them), 10 % of captions dropped for guidance.

The PyTorch reference has no such stage: `--config.reference=True` sets objective.bf16_timesteps (Q1) and nothing else.
"""

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`toy`: the moving-shapes world on a laptop; with `branching`, that of unannounced turns. `mini`: a dozen steps of
    a miniature Wan. Without: Wan 1.3B.

    `actions`, `action_attention`: the toy, steered by keys, from the teacher that ships.
    """
    words = presets.switches(arg, "toy", "mini", "branching", *presets.STEERED)
    presets.one_of(words, "toy", "mini")
    presets.one_of(words, "branching", "mini", *presets.STEERED)
    toy, branching = "toy" in words, "branching" in words
    c = presets.experiment("bidirectional", steps=6000 if toy else 100_000)
    c.roles.student = presets.role("toy" if toy else "wan_1_3b")
    c.data = presets.toy_data("runs/teacher/data", assets="") if toy else presets.wan_data("data/wan")
    if branching:
        presets.with_toy(words, "branching")
        c.steps, c.roles.student = 4000, presets.role("toy_small")
        c.data = presets.branching_data(assets="")
    c.blocks = presets.blocks()
    c.objective = {
        "shift": 5.0,
        "weighting": "uniform",
        "text_dropout": 0.1,
        "bf16_timesteps": False,
        "image_start": 0.0,  # Wan2.2-TI2V-5B: chance that a clip's first latent frame is given, clean
    }
    c.optim.student = presets.toy_optimizer() if toy else presets.optimizer(1e-5, 0.9)
    c.ema.student = presets.ema(0.998 if toy else 0.9999)
    c.sampler = presets.many_step(50, 1.0 if branching else 3.0, causal=False)
    if any(word in presets.STEERED for word in words):
        c.steps, c.optim.student, c.ema.student = 400, presets.toy_optimizer(0.005), presets.ema(0.99)
        c.roles.student.update({"init": "toy_teacher", "init_stages": ("bidirectional",)})
        c.data = presets.toy_data()
    return presets.steered(presets.mini(c) if "mini" in words else c, words)
