"""The study of the paper's claim: does a bidirectional teacher make the few-step initialisation ill-posed, and so what?

    cfjax study injectivity --workdir=runs/study
    cfjax study injectivity --config=configs/study.py:quick --workdir=runs/study_quick
    cfjax study injectivity --config=configs/study.py:full --workdir=runs/study_full
    cfjax study injectivity --config.seeds=0 --workdir=runs/study_exact
    cfjax study ablation --config=configs/study.py:ablation --workdir=runs/ablation
    cfjax study uncertain --config=configs/study.py:uncertain --workdir=runs/uncertain

`injectivity` works on toy video laws whose scores are closed form; half an hour of one core. `quick` trains less;
`full` measures more and continues with DMD, 36 minutes; `seeds=0` does only what needs no training, a minute.
`ablation` trains the toy world's real networks with `cfjax train`, changing only the teacher of the initialisation,
over seeds; hours on a CPU. Its parts are quickstarts: `cfjax quickstart --config=configs/quickstart.py:none
--config.budget=short --config.guard=False --config.seed=3 --workdir=runs/ablation/seed3` on another machine does one
recipe of one seed. `uncertain` does so in a world whose objects turn without notice, with each of the paper's Table 2's
cells, from the shipped `branching_teacher`: a minute or two a network.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`quick`, `full`, `ablation`, `uncertain`, or nothing."""
    kinds = ("quick", "full", "ablation", "uncertain")
    words = presets.switches(arg, *kinds)
    presets.one_of(words, *kinds)
    if "uncertain" in words:
        return uncertain()
    if "ablation" in words:
        return ConfigDict(
            {
                "seeds": 5,
                "budget": "short",  # of configs/quickstart.py, whose recipes these are
                "teacher": "toy_teacher",
                # the paper's method, then only the teacher of the initialisation changed, then none,
                # and Self Forcing's own stage 2, whose start, noise levels and past differ too
                "recipes": (
                    "causal_forcing", "bidirectional_pairs", "causal_forcing_pp", "asymmetric_cd", "none",
                    "self_forcing",
                ),
                "forcings": ("diffusion_forcing",),  # against the AR teacher of the first recipe
            }
        )  # fmt: skip
    c = ConfigDict(
        {
            "seeds": 5,
            "frames": 5,
            "pasts": 24,
            "futures": 1000,
            "futures_seed": 1,
            "levels": (1.0, 0.625),
            "collisions": 48,
            "videos": 3000,
            "inits": ("causal_ode", "bi_ode", "bi_ode_cp", "causal_cd", "asym_cd_cp", "asym_cd", "ar_diff"),
            "ahead": (1, 2, 3),
            "forcing": True,
            "dmd": (),
            "dmd_at": (250, 1000, 4000),
            "budget": {
                "ar_steps": 2500,
                "ode_steps": 2500,
                "cd_steps": 4000,
                "batch": 256,
                "pool": 65536,
                "lr": 5e-3,
                "dmd_lr": 2e-4,
                "solver_steps": 384,
                "cd_levels": 48,
                "width": 96,
            },
        }
    )
    if "quick" in words:
        c.update({"pasts": 12, "futures": 500, "collisions": 24, "videos": 1500, "ahead": (1,), "forcing": False})
        c.budget.update({"ar_steps": 600, "ode_steps": 600, "cd_steps": 600, "batch": 128, "pool": 16384})
        c.budget.update({"lr": 3e-3, "solver_steps": 192, "width": 64})
    if "full" in words:
        c.update({"futures": 1500, "dmd": ("causal_ode", "bi_ode"), "levels": (1.0, 0.9375, 0.625)})
    return c


def uncertain() -> ConfigDict:
    """Table 2 in a world with an uncertain future: which cells, and how much of each."""
    return ConfigDict(
        {
            "seeds": 5,
            "teacher": "branching_teacher",
            # causal ODE, bidirectional ODE, bidirectional pairs, causal CD, asymmetric CD, none
            "recipes": (
                "causal_forcing", "self_forcing", "bidirectional_pairs", "causal_forcing_pp", "asymmetric_cd", "none",
            ),
            "first": 3,
            "layouts": ("chunkwise", "framewise"),
            "dmd": True,
            "pasts": 128,
            "futures": 16,
            "budget": {
                "clips": 4096, "ar": 200, "pairs": 768, "solver_steps": 24, "ode": 150, "cd": 150, "dmd": 150,
            },
            "paths": {
                "turn": (0.5, 0.25, 1.0),
                "inits": ("causal_ode", "bi_ode", "bi_ode_cp", "causal_cd", "asym_cd", "ar_diff"),
                "videos": 2000, "steps": 1500, "batch": 256, "pool": 32768, "solver_steps": 192,
            },
            "exact": {
                "pasts": 8, "noises": 48, "again": 32, "turn": (0.25, 0.5, 1.0), "frames": (1, 2, 3, 5),
            },
        }
    )  # fmt: skip
