"""Stage 2b: causal consistency distillation from the AR teacher, no ODE pairs (Causal Forcing++, arXiv 2605.15141).

    cfjax train --config=configs/consistency.py --workdir=runs/cd                  chunk-wise, Wan 1.3B
    cfjax train --config=configs/consistency.py:framewise --workdir=runs/cd
    cfjax train --config=configs/consistency.py:toy --workdir=runs/toy/cd
    cfjax train --config=configs/consistency.py:asymmetric --workdir=runs/acd      a bidirectional teacher (Figure 10)
    cfjax train --config=configs/consistency.py:toy,actions --workdir=runs/toy_steered/cd   steered by arrow keys
    cfjax plan --config=configs/consistency.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --config.mesh.context=4

Student, its average and the teacher all start from stage 1. Numbers of the PyTorch reference: 48 levels, guidance 3,
lr 2e-6, betas (0, 0.999), EMA 0.99 from the start, 3K steps or more; stage 3 starts from the average
(configs/dmd.py:from_cd). The reference's rounded timesteps (Q2) are `objective.bf16_timesteps`; `objective.boundary`
trains the last interval, which it skips (Q23).
`--config.reference=True` sets both as the reference has them, guidance 3 and EMA 0.99 from the start, in the toy too.
"""

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`toy`, `mini`, `framewise`, `asymmetric`; `actions`, `action_attention`: the toy steered by keys."""
    words = presets.switches(arg, "toy", "mini", "framewise", "asymmetric", *presets.STEERED)
    presets.one_of(words, "toy", "mini")
    toy = "toy" in words
    c = presets.experiment("consistency", steps=400 if toy else 5000)
    init, preset = ("runs/toy/ar", "toy") if toy else ("runs/ar", "wan_1_3b")
    for role in ("student", "teacher"):
        c.roles[role] = presets.role(preset, init=init, init_ema=toy, stages=("ar_diffusion",))
    c.data = presets.toy_data() if toy else presets.wan_data("data/wan")
    c.log_every = 10 if toy else 50
    c.blocks = presets.blocks("framewise" in words)
    c.objective = {
        "solver_steps": 48,
        "shift": 5.0,
        "guidance": 3.0,
        "teacher": "causal",
        "boundary": toy,
        "bf16_timesteps": False,
    }
    if "asymmetric" in words:
        c.objective.teacher = "bidirectional"
        c.roles.teacher = presets.role(
            preset, init="toy_teacher" if toy else "checkpoints/wan_1_3b", stages=("bidirectional",)
        )
    c.roles.teacher.storage = "float32" if toy else "bfloat16"  # which it computes in: the same numbers
    c.optim.student = presets.toy_optimizer(0.002) if toy else presets.optimizer(2e-6)
    c.ema.student = presets.ema(0.9 if toy else 0.99)
    c.sampler = presets.few_step()
    return presets.steered(presets.mini(c) if "mini" in words else c, words)
