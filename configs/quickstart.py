"""The whole recipe on a laptop: AR teacher, causal ODE pairs, ODE initialisation, DMD, evaluation, one report page.

    bash launch/quickstart.sh
    cfjax quickstart --config.budget=long

Every stage is an ordinary `cfjax train` command, printed before it runs. Starts from the toy teacher that ships with
the package. Budgets are numbers of steps; "default" trains for at most 20 minutes on two cores, "long" for an hour or
more, "tiny" only proves that everything is wired.
"""

from ml_collections import ConfigDict


def get_config():
    """`budget`: default, long or tiny."""
    return ConfigDict(
        {
            "budget": "default",
            "teacher": "toy_teacher",
            "seed": 0,
            "budgets": {
                "tiny": {"clips": 256, "ar": 4, "pairs": 64, "ode": 4, "dmd": 6, "evaluation": 24},
                "default": {"clips": 16384, "ar": 500, "pairs": 1024, "ode": 400, "dmd": 600, "evaluation": 240},
                "long": {"clips": 16384, "ar": 4000, "pairs": 8192, "ode": 3000, "dmd": 6000, "evaluation": 480},
            },
        }
    )
