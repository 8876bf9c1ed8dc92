"""`cfjax quickstart`: a recipe's stages from the shipped teacher, evaluation, and one page that shows it all."""

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax
import jax
from ml_collections import ConfigDict

from cfjax import __version__, evaluate, precompute, train
from cfjax.core.cli import parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints, read_if_whole, write_atomically
from cfjax.evaluation.curves import read_curves
from cfjax.evaluation.report import Report, StageReport, write_report
from cfjax.experiment.measure import load_evaluation, real_clips
from cfjax.experiment.measure_streams import LONG, SWITCH, load_streams
from cfjax.experiment.runs import open_run
from cfjax.worlds.toy import two_captions

DESCRIPTION = """Trains every stage of a recipe (Causal Forcing's, unless the config names another) on the toy world,
evaluates each over captions that none of them saw, and writes report/index.html. Interrupted? The same command goes
on from there."""
WALL_CLIPS = 8
SWITCHED = ("a red circle moving right", "a blue square moving left")
SHIPPED = "toy_teacher"
EVALUATE = "evaluate "  # key of an evaluation: this and the key of what it measures

VERBS: dict[str, Callable[[Sequence[str]], int | None]] = {"train": train.main, "precompute": precompute.main}


@dataclass(frozen=True)
class Step:
    """One command of the recipe."""

    key: str
    verb: str
    argv: list[str]
    run: Callable[[Sequence[str]], int | None]
    done: Callable[[], bool] = lambda: False  # whether there is nothing left to do; a stage knows that itself

    def command(self) -> str:
        """The shell command."""
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
    check_checkpoints(root)
    with holding(root):
        _same_settings(root, c)
        steps = recipe(c, root, _prompts(c), other_shapes(c))
        seconds = run_steps(steps, root)
        report(c, root, steps, seconds)
    return 0


def _same_settings(root: Path, c: ConfigDict) -> None:
    """A workdir belongs to one budget, teacher, seed and layout: recipes in it share the stages they have in common."""
    file = root / "quickstart.json"
    settings = {"budget": c.budget, "budgets": c.budgets[c.budget].to_dict()}
    record = {**settings, "teacher": c.teacher, "seed": c.seed, "layout": c.layout}
    if (found := read_if_whole(file)) is not None and found != record:
        raise UserError(f"{root} holds a quickstart with other settings; choose another --workdir, or remove it")
    write_atomically(file, json.dumps(record, indent=1))


def _prompts(c: ConfigDict) -> tuple[str, str]:
    """The two captions of the sessions whose prompt changes."""
    if not c.streams:
        return SWITCHED
    try:
        return two_captions(open_run(c.teacher, with_model=False).toy.shapes)
    except UserError as error:
        raise UserError(f"{error}; --config.streams=False leaves long videos and prompt switches out") from error


def other_shapes(c: ConfigDict) -> dict[str, str]:
    """The keys in which the teacher's world is not the shipped one, as a command line sets them."""
    if c.teacher == SHIPPED:
        return {}
    own, usual = (open_run(name, with_model=False).toy.shapes.to_json() for name in (c.teacher, SHIPPED))
    shown = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return {f"data.shapes.{name}": shown(own[name]) for name in own if own[name] != usual[name]}


def recipe(
    c: ConfigDict, root: Path, prompts: tuple[str, str] = SWITCHED, shapes: Mapping[str, str] = MappingProxyType({})
) -> list[Step]:
    """The commands, in order: the stages of `c.stages`, an evaluation of the teacher and of each network, then of the
    student's long videos and of sessions whose prompt changes from the first to the second of `prompts`.

    Args:
      shapes: keys of the teacher's world, where it is another than the shipped one.
    """
    budget = c.budgets[c.budget]
    shared = {"data.path": f"{root}/data", "data.assets": c.teacher, "data.clips": budget.clips, "seed": c.seed}
    shared |= {"data.batch_size": budget.batch} if "batch" in budget else {}
    shared |= shapes
    shared |= {} if c.guard else {"guard.enabled": False}

    def stage(s: ConfigDict) -> Step:
        start = {role: c.teacher if key == "teacher" else f"{root}/{key}" for role, key in s.init.items()}
        amount = {"pairs" if s.verb == "precompute" else "steps": budget[s.budget]}
        keys = {**amount, **{f"roles.{role}.init": init for role, init in start.items()}, **shared}
        workdir = [] if s.verb == "precompute" else [f"--workdir={root}/{s.key}"]
        argv = [f"--config={s.config}", *workdir, *(f"--config.{name}={value}" for name, value in keys.items())]
        return Step(s.key, s.verb, argv, VERBS[s.verb])

    def evaluation(key: str) -> Step:
        argv = [
            f"--config.run={c.teacher if key == 'teacher' else f'{root}/{key}'}",
            f"--workdir={root}/evaluation/{key}",
            f"--config.clips={budget.evaluation}",
            f"--config.batch={min(60, budget.evaluation)}",
        ]
        folder = root / "evaluation" / key
        return Step(EVALUATE + key, "evaluate", argv, evaluate.main, lambda: load_evaluation(folder) is not None)

    def streams(kind: str) -> Step:
        folder, keys = root / "streams" / networks(c)[-1], {"clips": budget.streams}
        keys |= {"prompts": "|".join(prompts)} if kind == SWITCH else {"batch": budget.streams}
        argv = [f"--config=configs/evaluate.py:{kind}", f"--config.run={root}/{networks(c)[-1]}", f"--workdir={folder}"]
        argv += [f"--config.{name}={value}" for name, value in keys.items()]
        return Step(EVALUATE + kind, "evaluate", argv, evaluate.main, lambda: load_streams(folder, kind) is not None)

    kinds = [LONG, SWITCH] if c.streams else []
    return [*map(stage, c.stages), *map(evaluation, ["teacher", *networks(c)]), *map(streams, kinds)]


def networks(c: ConfigDict) -> list[str]:
    """The keys of the recipe's stages that train a network, in order; the last is the student."""
    return [s.key for s in c.stages if s.verb == "train"]


def titles_of(c: ConfigDict, key: str) -> Mapping[str, str]:
    """A network's "title", "brief" title and "text"; its key where a config of one's own has none for it."""
    found: Mapping[str, str] = c.get("titles", {}).get(key, {"title": key, "brief": key, "text": ""})
    return found


def run_steps(steps: Sequence[Step], root: Path) -> dict[str, float]:
    """Runs what is not done yet; returns seconds by step, summed over interruptions."""
    file = root / "seconds.json"
    seconds: dict[str, float] = read_if_whole(file) or {}
    for step in steps:
        if step.done():
            continue
        say(f"\n$ {step.command()}")
        begun = time.monotonic()
        try:
            step.run(step.argv)
        finally:
            seconds[step.key] = seconds.get(step.key, 0.0) + time.monotonic() - begun
            write_atomically(file, json.dumps(seconds, indent=1))
    return seconds


def report(c: ConfigDict, root: Path, steps: Sequence[Step], seconds: dict[str, float]) -> None:
    """Writes the recipe's page and metrics.json, and says what comes next."""
    page = root / ("report" if c.recipe == "causal_forcing" else f"report_{c.recipe}") / "index.html"
    shown = ["teacher", *networks(c)]
    student, against = shown[-1], shown[min(1, len(shown) - 2)]  # the recipe's end, against its start
    world = open_run(c.teacher).toy
    results: dict[str, Any] = {key: load_evaluation(root / "evaluation" / key) for key in shown}
    real = real_clips(world, c.budgets[c.budget].evaluation)
    commands = {step.key: step.command() for step in steps}
    stages = [
        StageReport(
            key=key,
            title=titles_of(c, key)["title"],
            brief=titles_of(c, key)["brief"],
            text=titles_of(c, key)["text"],
            videos=results[key]["videos"][:WALL_CLIPS],
            summary=results[key]["summary"],
            network_calls=results[key]["network_calls"],
            frames_per_second=results[key]["frames_per_second"],
            train_seconds=seconds.get(key),
            curves=_curves(root / key),
            command=commands.get(key, ""),
        )
        for key in shown
    ]
    trained = sum(seconds.get(s.key, 0.0) for s in c.stages)
    content = Report(
        title=f"{c.recipe.replace('_', ' ').capitalize()} on a laptop",
        real_videos=real["videos"][:WALL_CLIPS],
        captions=results[student]["captions"][:WALL_CLIPS],
        real_summary=real["summary"],
        codec_summary=real["codec_summary"],
        stages=stages,
        student=student,
        against=against,
        commands=[step.command() for step in steps],
        long=load_streams(root / "streams" / student, LONG),
        switch=load_streams(root / "streams" / student, SWITCH),
        config=c.to_dict(),
        environment=environment(),
        notes=[
            f"Training (with the ODE pairs, where there are any) took {trained / 60:.1f} minutes here.",
            "Captions were held out from every stage; each video is judged from its decoded pixels alone.",
            "Frames per second: a batch of at most 60 videos, compiled, decoding included.",
        ],
    )
    write_report(page, content)
    for key in (student, against):
        result = results[key]
        correct, calls = 100 * result["summary"]["all_correct"], result["network_calls"]
        say(
            f"{titles_of(c, key)['title']}: {correct:.1f} % of captions all right with {counted(calls, 'network call')}"
        )
    say(f"report: {page}")
    say(f'your own: cfjax generate --config.run={root}/{student} --config.prompt="a red circle moving left"')
    say(f"live: cfjax serve --config.run={root}/{student}")


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that the report shows."""
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
