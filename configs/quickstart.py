"""A whole recipe on a laptop: every stage, evaluation, one report page.

    bash launch/quickstart.sh
    cfjax quickstart --config.budget=long
    cfjax quickstart --config=configs/quickstart.py:causal_forcing_pp --workdir=runs/quickstart
    cfjax quickstart --config=configs/quickstart.py:self_forcing --workdir=runs/quickstart
    cfjax quickstart --config=configs/quickstart.py:causvid --workdir=runs/quickstart
    cfjax evaluate --config=configs/evaluate.py:table --config.evaluations="runs/quickstart/evaluation/*"
        --workdir=runs/quickstart/table

Every stage is an ordinary `cfjax` command, printed before it runs. Starts from the toy teacher that ships with the
package. Recipes in one workdir share the stages that they have in common. Budgets are numbers of steps; "default"
trains for at most 20 minutes on two cores, "short" for less than 10, "long" for an hour or more, "tiny" only proves
that everything is wired. `framewise` joins any recipe but `bidirectional`, `2step` and `1step` any that ends with stage
3; in a workdir of their own.

Recipes are names of stages, and a stage is one config with what it starts from. Causal Forcing (arXiv 2602.02214),
Causal Forcing++ (arXiv 2605.15141), Self Forcing (arXiv 2506.08009), CausVid (arXiv 2412.07772); the others change one
thing in them: `bidirectional_pairs` is Causal Forcing with the other teacher in stage 2, `none` without stage 2.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets

TEACHER = "teacher"  # the shipped bidirectional network, in place of an earlier stage

SCORES = {"critic": TEACHER, "real_score": TEACHER}
# What a stage is: verb, config and its switches, which budget, {role: what it starts from}; and of a network its title,
# short title and a sentence.
STAGES = {
    "ar": (
        "train", "ar_diffusion", (), "ar", {"student": TEACHER},
        "AR teacher (stage 1)", "AR teacher",
        "Teacher forcing: a noisy block sees the clean blocks before it.",
    ),
    "diffusion_forcing": (
        "train", "ar_diffusion", ("diffusion_forcing",), "ar", {"student": TEACHER},
        "AR teacher by diffusion forcing", "Diffusion forcing",
        "A noisy block sees noisy blocks.",
    ),
    "noise_augmentation": (
        "train", "ar_diffusion", ("noise_augmentation",), "ar", {"student": TEACHER},
        "AR teacher, noised past", "Noised past",
        "Teacher forcing with noise added to the past.",
    ),
    "direct_forcing": (
        "train", "ar_diffusion", ("direct_forcing",), "ar", {"student": TEACHER},
        "AR teacher by Direct Forcing", "Direct Forcing",
        "The past is the network's own prediction.",
    ),
    "resampling_forcing": (
        "train", "ar_diffusion", ("resampling_forcing",), "ar", {"student": "ar"},
        "AR teacher by Resampling Forcing", "Resampling",
        "The network re-makes the past from noise.",
    ),
    "bagger": (
        "train", "ar_diffusion", ("bagger",), "ar", {"student": "ar"},
        "AR teacher by BAgger", "BAgger",
        "Also learns to lead its own drifted rollouts back to the data.",
    ),
    "pairs": ("precompute", "ode_pairs", (), "pairs", {"teacher": "ar"}),
    "bi_pairs": ("precompute", "ode_pairs", ("bidirectional",), "pairs", {"teacher": TEACHER}),
    "ode": (
        "train", "ode_regression", (), "ode", {"student": "ar"},
        "Causal ODE student (stage 2)", "ODE init",
        "Regresses the AR teacher's end points given the clean past.",
    ),
    "bi_pairs_ode": (
        "train", "ode_regression", ("bidirectional_pairs",), "ode", {"student": "ar"},
        "ODE student, bidirectional pairs", "ODE init, bi",
        "Only the teacher of the pairs is changed.",
    ),
    "bi_ode": (
        "train", "ode_regression", ("bidirectional",), "ode", {"student": TEACHER},
        "ODE student as in Self Forcing", "ODE init, bi",
        "Regresses that teacher's end points.",
    ),
    "cd": (
        "train", "consistency", (), "cd", {"student": "ar", "teacher": "ar"},
        "Causal CD student (stage 2)", "CD init",
        "Consistency distillation of the AR teacher, without pairs.",
    ),
    "asymmetric_cd": (
        "train", "consistency", ("asymmetric",), "cd", {"student": "ar", "teacher": TEACHER},
        "Asymmetric CD student", "CD init, bi",
        "Consistency distillation of the bidirectional teacher.",
    ),
    "dmd": (
        "train", "dmd", (), "dmd", {"student": "ode", **SCORES},
        "DMD student (stage 3)", "Student",
        "Generates with its own cache; real and fake scores correct it.",
    ),
    "cd_dmd": (
        "train", "dmd", ("from_cd",), "dmd", {"student": "cd", **SCORES},
        "DMD student, from causal CD", "Student",
        "Stage 3 on top of consistency distillation.",
    ),
    "asymmetric_cd_dmd": (
        "train", "dmd", ("from_cd",), "dmd", {"student": "asymmetric_cd", **SCORES},
        "DMD student, from asymmetric CD", "Student",
        "Stage 3 on top of asymmetric CD.",
    ),
    "bi_pairs_ode_dmd": (
        "train", "dmd", (), "dmd", {"student": "bi_pairs_ode", **SCORES},
        "DMD student, from bidirectional pairs", "Student",
        "Stage 3 on top of those pairs.",
    ),
    "bi_ode_dmd": (
        "train", "dmd", (), "dmd", {"student": "bi_ode", **SCORES},
        "Self Forcing student", "Student",
        "Stage 3 on top of the bidirectional teacher's pairs.",
    ),
    "ar_dmd": (
        "train", "dmd", ("from_ar",), "dmd", {"student": "ar", **SCORES},
        "DMD student, from the AR teacher", "Student",
        "Stage 3 without a few-step initialisation.",
    ),
    "bi_ode_causvid": (
        "train", "dmd", ("causvid",), "dmd", {"student": "bi_ode", **SCORES},
        "CausVid student", "Student",
        "DMD of one-pass predictions from noised real clips, no rollout.",
    ),
    "sid": (
        "train", "dmd", ("sid",), "dmd", {"student": "ode", **SCORES},
        "SiD student", "Student",
        "Score identity distillation in place of DMD.",
    ),
    "gan": (
        "train", "dmd", ("gan",), "dmd", {"student": "ode", "critic": TEACHER},
        "GAN student", "Student",
        "A classifier on the critic's features separates real from generated clips.",
    ),
    "long_dmd": (
        "train", "dmd", ("long",), "dmd", {"student": "ode", **SCORES},
        "DMD student of long rollouts", "Student",
        "Rolls out past the window; scores see the last frames.",
    ),
    "bidirectional_dmd": (
        "train", "dmd", ("bidirectional",), "dmd", {"student": TEACHER, **SCORES},
        "Few-step bidirectional student", "Student",
        "DMD of a student that sees all frames at once.",
    ),
}  # fmt: skip
# Network -> title, short title, a sentence.
TITLES = {
    TEACHER: ("Bidirectional teacher", "Teacher", "Ships with the package. Sees all frames at once; 50 UniPC steps."),
    **{key: tuple(title) for key, (_, _, _, _, _, *title) in STAGES.items() if title},
}

RECIPES = {
    "causal_forcing": ("ar", "pairs", "ode", "dmd"),
    "causal_forcing_pp": ("ar", "cd", "cd_dmd"),
    "self_forcing": ("bi_pairs", "bi_ode", "bi_ode_dmd"),
    "causvid": ("bi_pairs", "bi_ode", "bi_ode_causvid"),
    "bidirectional_pairs": ("ar", "bi_pairs", "bi_pairs_ode", "bi_pairs_ode_dmd"),
    "none": ("ar", "ar_dmd"),
    "asymmetric_cd": ("ar", "asymmetric_cd", "asymmetric_cd_dmd"),
    "sid": ("ar", "pairs", "ode", "sid"),
    "gan": ("ar", "pairs", "ode", "gan"),
    "long": ("ar", "pairs", "ode", "long_dmd"),
    "bidirectional": ("bidirectional_dmd",),
    "diffusion_forcing": ("diffusion_forcing",),
    "noise_augmentation": ("noise_augmentation",),
    "direct_forcing": ("direct_forcing",),
    "resampling_forcing": ("ar", "resampling_forcing"),
    "bagger": ("ar", "bagger"),
}


def get_config(arg: str = ""):
    """A recipe: `causal_forcing`, `causal_forcing_pp`, `self_forcing`, `causvid`, or another of RECIPES; `framewise`;
    `2step` or `1step`. The key budget is default, short, long or tiny.
    """
    words = presets.switches(arg, *RECIPES, "framewise", "2step", "1step")
    presets.one_of(words, *RECIPES)
    presets.one_of(words, "2step", "1step")
    presets.one_of(words, "bidirectional", "framewise")  # it has one block of all frames
    recipe = next((word for word in words if word in RECIPES), "causal_forcing")
    if not any(STAGES[key][1] == "dmd" for key in RECIPES[recipe]):  # no few-step student
        presets.one_of(words, recipe, "2step", "1step")
    joined = tuple(word for word in words if word not in RECIPES)
    stages = []
    for key in RECIPES[recipe]:
        verb, config, own, amount, init, *_ = STAGES[key]
        extra = tuple(word for word in joined if word == "framewise" or config == "dmd")
        name = f"configs/{config}.py:" + ",".join(("toy", *own, *extra))
        stages.append(ConfigDict({"key": key, "verb": verb, "config": name, "budget": amount, "init": init}))
    return ConfigDict(
        {
            "recipe": recipe,
            "layout": ",".join(joined),
            "stages": tuple(stages),
            "titles": {
                key: dict(zip(("title", "brief", "text"), TITLES[key], strict=True))
                for key in (TEACHER, *RECIPES[recipe]) if key in TITLES
            },
            # long videos and prompt switches of the student, where it streams in a few steps
            "streams": recipe != "bidirectional" and any(stage.config.startswith("configs/dmd") for stage in stages),
            "budget": "default",
            "teacher": "toy_teacher",
            "seed": 0,
            "guard": True,  # sample while training and warn of a collapse
            "budgets": {
                "tiny": {
                    "clips": 64, "ar": 4, "pairs": 8, "ode": 4, "cd": 4, "dmd": 6, "evaluation": 16, "streams": 2,
                    "batch": 8,
                },
                "short": {
                    "clips": 16384, "ar": 250, "pairs": 512, "ode": 200, "cd": 200, "dmd": 200, "evaluation": 240,
                    "streams": 60,
                },
                "default": {
                    "clips": 16384, "ar": 500, "pairs": 1024, "ode": 400, "cd": 400, "dmd": 600, "evaluation": 240,
                    "streams": 60,
                },
                "long": {
                    "clips": 16384, "ar": 4000, "pairs": 8192, "ode": 3000, "cd": 3000, "dmd": 6000, "evaluation": 480,
                    "streams": 120,
                },
            },
        }
    )  # fmt: skip
