"""`cfjax quickstart`: stages 1, 2 and 3 from the shipped teacher, evaluation, and one page that shows it all."""

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
from ml_collections import ConfigDict

from cfjax import __version__, evaluate, precompute, train
from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.evaluate import load_evaluation, real_clips
from cfjax.evaluation.report import StageReport, write_report
from cfjax.export import read_curves
from cfjax.runs import open_run

DESCRIPTION = """Trains the AR teacher, the ODE initialisation and the DMD student on the toy world, evaluates each
over captions that none of them saw, and writes report/index.html. Interrupted? The same command goes on from there."""
WALL_CLIPS = 8

TITLES = {
    "teacher": (
        "Bidirectional teacher",
        "Ships with the package. Sees all frames at once; 50 UniPC steps with guidance.",
    ),
    "ar": ("AR teacher (stage 1)", "Teacher forcing: a noisy block sees the clean blocks before it. 50 steps a block."),
    "ode": ("Causal ODE student (stage 2)", "Regresses the AR teacher's ODE end points given the clean past. 4 steps."),
    "dmd": ("DMD student (stage 3)", "Generates with its own cache while real and fake scores correct it. 4 steps."),
}


@dataclass(frozen=True)
class Step:
    """One command of the recipe."""

    key: str
    verb: str
    argv: list[str]
    run: Callable[[Sequence[str]], int | None]

    def command(self) -> str:
        """What one would type."""
        return shlex.join(["cfjax", self.verb, *self.argv])


def main(argv: Sequence[str]) -> int:
    """Runs the recipe, writes the page, says where it is."""
    c, root, _ = parse(
        "quickstart",
        argv,
        description=DESCRIPTION,
        default_config="configs/quickstart.py",
        default_workdir="runs/quickstart",
    )
    if c.budget not in c.budgets:
        raise UserError(f"budget={c.budget!r}: use one of {', '.join(sorted(c.budgets))}")
    budget = c.budgets[c.budget]
    _same_budget(root, c)
    steps = recipe(c, budget, root)
    seconds = run_steps(steps, root)
    report(c, root, steps, seconds)
    return 0


def _same_budget(root: Path, c: ConfigDict) -> None:
    """A workdir belongs to one budget: going on with another would mix two recipes."""
    file = root / "quickstart.json"
    record = {"budget": c.budget, "budgets": c.budgets[c.budget].to_dict(), "teacher": c.teacher, "seed": c.seed}
    if file.exists() and json.loads(file.read_text()) != record:
        raise UserError(f"{root} holds a quickstart with other settings; choose another --workdir, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1))


def recipe(c: ConfigDict, budget: ConfigDict, root: Path) -> list[Step]:
    """The commands, in order."""
    data = [
        f"--config.data.path={root}/data",
        f"--config.data.assets={c.teacher}",
        f"--config.data.clips={budget.clips}",
        f"--config.seed={c.seed}",
    ]

    def training(key: str, config: str, steps: int, *more: str) -> Step:
        argv = [f"--config=configs/{config}.py:toy", f"--workdir={root}/{key}", f"--config.steps={steps}", *data, *more]
        return Step(key, "train", argv, train.main)

    def evaluation(key: str, run: str) -> Step:
        argv = [
            f"--config.run={run}",
            f"--workdir={root}/evaluation/{key}",
            f"--config.clips={budget.evaluation}",
            f"--config.batch={min(60, budget.evaluation)}",
        ]
        return Step(f"evaluate {key}", "evaluate", argv, evaluate.main)

    pairs = [
        "--config=configs/ode_pairs.py:toy",
        f"--config.pairs={budget.pairs}",
        f"--config.roles.teacher.init={root}/ar",
        *data,
    ]
    return [
        training("ar", "ar_diffusion", budget.ar, f"--config.roles.student.init={c.teacher}"),
        Step("pairs", "precompute", pairs, precompute.main),
        training("ode", "ode_regression", budget.ode, f"--config.roles.student.init={root}/ar"),
        training(
            "dmd",
            "dmd",
            budget.dmd,
            f"--config.roles.student.init={root}/ode",
            f"--config.roles.critic.init={c.teacher}",
            f"--config.roles.real_score.init={c.teacher}",
        ),
        evaluation("teacher", c.teacher),
        *(evaluation(key, f"{root}/{key}") for key in ("ar", "ode", "dmd")),
    ]


def run_steps(steps: Sequence[Step], root: Path) -> dict[str, float]:
    """Runs what is not done yet; returns seconds by step, summed over interruptions."""
    file = root / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for step in steps:
        if step.verb == "evaluate" and load_evaluation(root / "evaluation" / step.key.split()[1]) is not None:
            continue
        say(f"\n$ {step.command()}")
        begun = time.monotonic()
        try:
            step.run(step.argv)
        finally:
            seconds[step.key] = seconds.get(step.key, 0.0) + time.monotonic() - begun
            file.write_text(json.dumps(seconds, indent=1))
    return seconds


def report(c: ConfigDict, root: Path, steps: Sequence[Step], seconds: dict[str, float]) -> None:
    """Writes report/index.html and metrics.json, and says what comes next."""
    page = root / "report" / "index.html"
    world = open_run(c.teacher).toy
    results: dict[str, Any] = {key: load_evaluation(root / "evaluation" / key) for key in TITLES}
    real = real_clips(world, c.budgets[c.budget].evaluation)
    commands = {step.key: step.command() for step in steps}
    stages = [
        StageReport(
            key=key,
            title=title,
            text=text,
            videos=results[key]["videos"][:WALL_CLIPS],
            summary=results[key]["summary"],
            network_calls=results[key]["network_calls"],
            frames_per_second=results[key]["frames_per_second"],
            train_seconds=seconds.get(key),
            curves=_curves(root / key),
            command=commands.get(key, ""),
        )
        for key, (title, text) in TITLES.items()
    ]
    trained = sum(seconds.get(key, 0.0) for key in ("ar", "pairs", "ode", "dmd"))
    write_report(
        page,
        title="Causal Forcing on a laptop",
        real_videos=real["videos"][:WALL_CLIPS],
        captions=results["dmd"]["captions"][:WALL_CLIPS],
        real_summary=real["summary"],
        codec_summary=real["codec_summary"],
        stages=stages,
        commands=[step.command() for step in steps],
        config=c.to_dict(),
        environment=environment(),
        notes=[
            f"Training (stages 1 to 3 with the ODE pairs) took {trained / 60:.1f} minutes here.",
            "Captions were held out from every stage; each video is judged from its decoded pixels alone.",
            "Frames per second: 60 videos at once, compiled, decoding included.",
        ],
    )
    student, teacher = results["dmd"], results["ar"]
    say(
        f"\nstudent: {100 * student['summary']['all_correct']:.1f} % of captions all right with "
        f"{student['network_calls']} network calls; AR teacher: {100 * teacher['summary']['all_correct']:.1f} % with "
        f"{teacher['network_calls']}"
    )
    say(f"report: {page}")
    say(f'your own: cfjax generate --config.run={root}/dmd --config.prompt="a red circle moving left"')


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves worth a panel."""
    wanted = ("student/loss", "critic/loss", "student/dmd_gradient_norm", "samples/all_correct")
    curves = read_curves(run)
    return {name: curves[name] for name in wanted if len(curves.get(name, ())) > 1}


def environment() -> dict[str, str]:
    """What the numbers were measured with."""
    return {
        "cfjax": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
