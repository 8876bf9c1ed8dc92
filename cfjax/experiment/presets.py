"""Plain building blocks for configs; knows numbers, not models. Everything under configs/ imports this alone."""

from typing import Any

from ml_collections import ConfigDict

from cfjax.core.errors import UserError

NEVER = 2_000_000_000
# Switches of the toy that is steered -> how its networks are told the keys, and the folder of its runs.
STEERED = {"actions": ("embedding", "toy_steered"), "action_attention": ("attention", "toy_steered_attention")}
MINI = "wan_mini"  # the preset of tests/synthetic.py's releases
MINI_VIDEO = {"frames": 33, "height": 64, "width": 96}  # pixels
MINI_LATENTS = (9, 8, 12)  # of such a video: frames, height, width


def switches(arg: str, *known: str) -> list[str]:
    """The switches in a config's argument, `configs/NAME.py:switch,switch`; `toy` too, where one is of the toy alone.

    Raises:
      UserError: a switch that is not `known`.
    """
    words = [word for word in arg.split(",") if word]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UserError(f"--config=...:{arg}: unknown switch {unknown[0]!r}; use {', '.join(known)}")
    return [*words, "toy"] if "toy" not in words and any(word in STEERED for word in words) else words


def one_of(words: list[str], *alternatives: str) -> None:
    """Raises UserError for switches that exclude each other.

    Raises:
      UserError: more than one of `alternatives` is among the switches.
    """
    given = [word for word in words if word in alternatives]
    if len(given) > 1:
        raise UserError(f"--config=...:{','.join(words)}: {given[0]} and {given[1]} exclude each other; leave one out")


def with_toy(words: list[str], word: str) -> None:
    """Raises UserError for a switch of the toy world, without `toy`.

    Raises:
      UserError: `toy` is not among the switches.
    """
    if "toy" not in words:
        raise UserError(f"--config=...:{word}: {word} and Wan exclude each other; use toy,{word}")


def optimizer(lr: float, b1: float = 0.0, b2: float = 0.999, **overrides: Any) -> ConfigDict:
    """The reference's AdamW: constant rate, decay 0.01 on everything, clip 10 (`trainer/distillation.py`)."""
    values: dict[str, Any] = {
        "name": "adamw",
        "lr": lr,
        "b1": b1,
        "b2": b2,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "clip": 10.0,
        "schedule": "constant",
        "warmup": 0,
        "decay_fraction": 0.4,
        "adam_lr": 0.0,
        "accumulate": 1,
    }
    return ConfigDict({**values, **overrides})


def toy_optimizer(lr: float = 0.01, **overrides: Any) -> ConfigDict:
    """Muon with a warm-up, a plateau and a linear end: learns the toy world in a third of AdamW's steps."""
    values = {"name": "muon", "weight_decay": 0.0, "clip": 1.0, "schedule": "wsd", "warmup": 50, "adam_lr": 0.3 * lr}
    return optimizer(lr, 0.9, 0.99, **{**values, **overrides})


def toy_adam(lr: float, **overrides: Any) -> ConfigDict:
    """AdamW for the toy's distribution matching."""
    values = {"weight_decay": 0.0, "clip": 1.0, "warmup": 20, **overrides}
    return optimizer(lr, 0.0, 0.99, **values)


def role(
    preset: str,
    *,
    init: str = "",
    init_role: str = "student",
    init_ema: bool = False,
    stages: tuple = (),
    storage: str = "float32",
):
    """One network: its preset, and which run's role it starts from ("" is random, a shipped asset by its name).

    `stages` names the stages whose checkpoints are accepted. A frozen role's weights may take less memory: `storage`
    "bfloat16" (no number changes where `precision` is bfloat16 too) or "int8" (kernels of the blocks, one scale per
    output channel; flows change by about a per cent), and `offload` keeps its matrices in host memory, from where
    each layer's are copied when needed. A trained role is stored in float32 on the device.
    """
    return ConfigDict(
        {
            "preset": preset,
            "remat": "full",
            "precision": "float32" if preset in ("toy", "toy_small", MINI) else "bfloat16",
            "attention": "auto",
            "storage": storage,
            "offload": False,
            "init": init,
            "init_role": init_role,
            "init_ema": init_ema,
            "init_stages": stages,
            "lora": lora(),
        }
    )


def lora(rank: int = 0, alpha: float = 0.0, targets: str = "blocks") -> ConfigDict:
    """Low-rank adapters that a role trains beside its frozen `init`, instead of its weights; rank 0 is none.

    `alpha` 0 is the rank. `targets`: "attention", "blocks" (the feed-forward layers too) or "all" (every linear one).
    """
    return ConfigDict({"rank": rank, "alpha": alpha, "targets": targets})


def actions(form: str = "embedding") -> ConfigDict:
    """How a network is told the four arrow keys: "embedding", or Matrix-Game-2's "attention" (docs/actions.md)."""
    return ConfigDict({"form": form, "keys": 4, "window": 6, "frames": 3, "width": 64})


def steered(c: ConfigDict, words: list[str]) -> ConfigDict:
    """With one of the switches `STEERED`, a toy stage's config where arrow keys steer; else the config as it is.

    Its networks are told the keys, its clips are others, and runs lie in another folder.
    """
    one_of(words, *STEERED)
    switch = next((word for word in words if word in STEERED), "")
    if not switch:
        return c
    form, folder = STEERED[switch]
    for network in c.roles.values():
        network.actions = actions(form)
        network.init = network.init.replace("runs/toy/", f"runs/{folder}/")
    c.data.path = "runs/toy_steered/data"
    c.data.steering = ConfigDict({"speed": 1.5, "held": (1, 8), "still": 0.35, "both": 0.05, "silent": 0.5})
    return c


def branch(ffn_dim: int = 0) -> ConfigDict:
    """The GAN's classifier branch on a critic; empty `layers` and `ffn_dim` 0 follow the network."""
    return ConfigDict({"layers": (), "ffn_dim": ffn_dim, "num_class": 1, "time_embedding": False})


def game() -> ConfigDict:
    """The GAN's weights: the PyTorch reference's, see `objectives.gan.GanConfig`."""
    weights = {"generator_weight": 1e-2, "critic_weight": 1e-2, "r1_weight": 0.0, "r2_weight": 0.0}
    return ConfigDict({**weights, "r1_sigma": 0.01, "r2_sigma": 0.01, "relativistic": False})


def scorers() -> ConfigDict:
    """Settings of every scorer that is installed, by name; "" is none, this environment, and cuda where there is one.

    A package that adds a scorer (`cfjax.evaluation.scorers`) has its keys here with no change.
    """
    from cfjax.evaluation.scorers import known_scorers  # other configs need no decoder of videos

    keys = ("weights", "python", "device", "options")
    return ConfigDict({name: ConfigDict(dict.fromkeys(keys, "")) for name in known_scorers()})


def blocks(framewise: bool = False) -> ConfigDict:
    """Three latent frames per block ("chunk-wise"), or one."""
    return ConfigDict({"frames": 1 if framewise else 3, "independent_first_frame": False, "window": 0, "sink": 0})


def wan_data(path: str) -> ConfigDict:
    """Precomputed Wan latents, 21 x 60 x 104 x 16: 81 frames of 480 x 832.

    `max_corrupt`: the fraction of records that may be broken; each is reported and replaced by another.
    `reversed_name`: the dataset of the captions of the clips played backwards, for BAgger.
    `lmdb`: where the LMDB with a set's latents was moved to ("": where it was, or beside the set).
    `ground_truth`: whether the last state of ODE pairs is the clean clip; False: it is the ODE's end point.
    """
    values = {"path": path, "name": "clips", "source": "", "assets": "", "clips": 0, "batch_size": 64}
    return ConfigDict({**values, "max_corrupt": 0.001, "reversed_name": "", "lmdb": "", "ground_truth": True})


def toy_data(path: str = "runs/toy/data", *, assets: str = "toy_teacher", name: str = "clips") -> ConfigDict:
    """The moving-shapes world: 32 x 32 pixels, 12 frames, 4 tokens per frame; made on first use."""
    return ConfigDict(
        {
            "path": path,
            "name": name,
            "source": "shapes",
            "assets": assets,
            "clips": 16384,
            "batch_size": 32,
            "max_corrupt": 0.0,
            "reversed_name": "",
            "lmdb": "",
            "ground_truth": True,
            "channels": 16,
            "text_length": 8,
            "shapes": ConfigDict(
                {
                    "size": 32,
                    "frames": 12,
                    "shapes": ("circle", "square", "triangle"),
                    "colours": ("red", "green", "blue", "yellow", "magenta", "cyan"),
                    "directions": ("left", "right", "up", "down"),
                    "speed": (1.3, 1.65),
                    "radius": (4.8, 5.6),
                    "branching": 0.0,
                    "bounces": False,
                }
            ),
        }
    )


def branching_data(path: str = "runs/branching/data", *, assets: str = "branching_teacher") -> ConfigDict:
    """The world with an uncertain future: one small white shape of 16 x 16 pixels and 9 frames, one token each,
    which turns by 90 degrees in half of the clips, to either side, at a moment that nothing announces.
    """
    c = toy_data(path, assets=assets)
    c.shapes.update({"size": 16, "frames": 9, "colours": ("white",), "speed": (0.9, 1.1), "radius": (1.8, 2.2)})
    c.shapes.branching = 0.5
    return c


def many_step(steps: int = 50, guidance: float = 3.0, *, causal: bool = True) -> ConfigDict:
    """PF-ODE sampler with guidance."""
    kind = "many_step" if causal else "bidirectional"
    return ConfigDict({"kind": kind, "solver": "unipc", "steps": steps, "shift": 5.0, "guidance": guidance})


def few_step(steps: tuple = (1000, 750, 500, 250), first_steps: tuple = ()) -> ConfigDict:
    """The distilled student's sampler."""
    return ConfigDict({"kind": "few_step", "steps": steps, "first_steps": first_steps, "shift": 5.0})


def guard() -> ConfigDict:
    """What is sampled every `sample_every` steps to warn of a collapse (cfjax/experiment/preview.py).

    `world` decodes Wan latents ("": the one that the dataset was made in).
    """
    return ConfigDict({"enabled": True, "prompts": 4, "seeds": 3, "world": ""})


def experiment(stage: str, *, steps: int, seed: int = 0) -> ConfigDict:
    """What every experiment has; the config adds roles, data, objective, optim, ema and sampler.

    Few-step students are sampled six times a run: their samples cost a fraction of a step.
    """
    few = stage in ("ode_regression", "consistency", "dmd")
    return ConfigDict(
        {
            "stage": stage,
            "seed": seed,
            "steps": steps,
            "accept_changes": False,  # resume with settings that change the run's meaning: experiment/resume.py
            "reference": False,  # the PyTorch reference's quirks and numbers for this stage: experiment/reference.py
            "roles": ConfigDict(),
            "optim": ConfigDict(),
            "ema": ConfigDict(),
            "cadence": ConfigDict(),
            "log_every": 50,
            "save_every": 1000,
            "keep": 2,
            "checksums": True,  # of each checkpoint's files, beside them; compared whenever it is read
            "loss_growth": 1000.0,  # a loss beyond so many times its running median: saves go aside; 0 is never
            "sample_every": min(1000, max(1, steps // 6)) if few else 1000,
            "sample_clips": 12,
            "guard": guard(),
            "progress": True,
            "profile": "",  # iterations to write an XProf trace of to workdir/profile, such as 100:105
            "stall_seconds": 1800.0,  # a run in which no iteration ends for so long ends itself; 0 is never
            "mesh": ConfigDict({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}),
        }
    )


def mini(c: ConfigDict) -> ConfigDict:
    """A Wan stage's config as a rehearsal on a laptop: the same stage, roles and objective, a dozen steps of two clips.

    Networks are those of tests/synthetic.py, or whatever `checkpoints/wan_1_3b` holds (also in place of the 14B real
    score): weights that a role starts from keep their sizes. Everything is float32, as a CPU multiplies that faster.
    """
    for network in c.roles.values():
        network.update({"preset": MINI, "precision": "float32", "storage": "float32"})
        network.init = network.init.replace("wan_14b", "wan_1_3b")
    c.data.batch_size = 2
    c.steps = c.steps and 12
    c.log_every, c.sample_every = 4, max(1, c.steps)
    c.guard.update({"prompts": 1, "seeds": 2})
    if "sampler" in c and c.sampler.kind in ("many_step", "bidirectional"):
        c.sampler.steps = 8
    return c


def ema(decay: float = 0.99, start: int = 0) -> ConfigDict:
    """Averaged weights of a role."""
    return ConfigDict({"decay": decay, "start": start})
