"""Stage 2a, data: the AR teacher's PF-ODE trajectories given the clean past (paper section 3.2).

    cfjax precompute --config=configs/ode_pairs.py --workdir=runs/pairs
    cfjax precompute --config=configs/ode_pairs.py:toy --workdir=runs/toy/pairs
    cfjax precompute --config=configs/ode_pairs.py:bidirectional --workdir=runs/pairs     the baseline's

48 Euler steps, guidance 6 (reference: `get_causal_ode_data_chunkwise.py`); stored at the student's four levels and at
the end. `objective.method` "full" solves all blocks at once against the clean context, "cached" block by block; they
agree to 1e-4. The toy's guidance is 3; `--config.reference=True` sets 6 (Q8).
"""

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`toy`, `mini`, `framewise`, `bidirectional`."""
    words = presets.switches(arg, "toy", "mini", "framewise", "bidirectional")
    presets.one_of(words, "toy", "mini")
    toy = "toy" in words
    c = presets.experiment("ode_pairs", steps=0)
    init = "runs/toy/ar" if toy else "runs/ar"
    c.roles.teacher = presets.role("toy" if toy else "wan_1_3b", init=init, init_ema=toy, stages=("ar_diffusion",))
    c.data = presets.toy_data() if toy else presets.wan_data("data/wan")
    c.data.batch_size = 64 if toy else 1
    c.blocks = presets.blocks("framewise" in words)
    c.objective = {
        "steps": (1000, 750, 500, 250),
        "solver_steps": 48,
        "shift": 5.0,
        "guidance": 3.0 if toy else 6.0,
        "method": "full",
    }
    c.pairs = 1024 if toy else 6000
    c.output = "pairs"
    c.part_items = 256 if toy else 0  # what a killed job may lose; 0 is 16, and more for over 16,384 pairs
    c.text_dtype = "float32" if toy else "bfloat16"
    c.shard = -1  # several processes share the job: this one's number, by default JAX's
    c.shards = 0
    if "bidirectional" in words:
        c.objective.method = "bidirectional"
        c.roles.teacher.update({"init": "toy_teacher" if toy else "checkpoints/wan_1_3b", "init_ema": False})
        c.roles.teacher.init_stages = ("bidirectional",)
        c.output = "bidirectional_pairs"
    if "mini" in words:
        c.pairs = 4
        return presets.mini(c)
    return c
