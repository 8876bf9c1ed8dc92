"""`cfjax evaluate`: how well a run's videos follow captions it never saw, measured from pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import write_atomically
from cfjax.evaluation.clip_folders import PAGE, RESULT, Scoring, compare_folders, score_folder, summary_lines
from cfjax.evaluation.clip_score import Settings
from cfjax.evaluation.clip_summary import VIDEOS
from cfjax.evaluation.scorers import ScorerSettings, check_names, parse_options
from cfjax.evaluation.tables import gather, write_table
from cfjax.evaluation.vbench_total import RESULT as VBENCH
from cfjax.evaluation.vbench_total import read_results, total_json, total_lines
from cfjax.experiment.measure import evaluate_run, save_evaluation
from cfjax.experiment.measure_streams import LONG, SWITCH, measure_long, measure_switch, save_streams
from cfjax.experiment.runs import Run, open_run
from cfjax.rollout.session_state import Mode

DESCRIPTION = """Generates videos for held-out captions with a run's own sampler and measures them from decoded pixels.
Writes evaluation.json and samples.npz to the workdir. With --config=configs/evaluate.py:table it puts evaluations side
by side instead: mean and standard deviation over seeds, table.json and table.md. With configs/evaluate.py:long it
measures long videos under memory policies over time, with :switch sessions whose prompt changes: long.json, switch.json
and their videos. With --config.videos=FOLDER it measures the clips of any system in that folder: videos.json. With
--config.compare=A,B it compares two such folders, prompt by prompt: compare.html and compare.json. Beside either,
--config.score=NAME runs official scorers, or your own. With --config.vbench=FOLDER it sums up what VBench wrote there
to quality, semantic and total: vbench.json."""
SHOWN = (
    "all_correct",
    "shape_correct",
    "colour_correct",
    "direction_correct",
    "presence",
    "step",
    "jerkiness",
    "residual",
    "diversity",
)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, evaluates, prints the table."""
    c, workdir, _ = parse("evaluate", argv, description=DESCRIPTION, default_config="configs/evaluate.py", bucket=True)
    if c.vbench:
        return _vbench(c, workdir)
    if c.videos or c.compare or c.against:
        return _clips(c, workdir)
    if c.score:
        raise UserError(f"--config.score={','.join(c.score)}: scorers score clips: give --config.videos or compare")
    if c.evaluations:
        say(write_table(workdir, gather(c.evaluations)))
        say(f"written to {workdir}/table.json and {workdir}/table.md")
        return 0
    run = open_run(c.run, ema=c.ema)
    if c.memories or c.prompts:
        return _streams(c, run, workdir)
    result = evaluate_run(run, clips=c.clips, batch=c.batch, seed=c.seed, kept=c.kept)
    save_evaluation(workdir, result)
    summary = result["summary"]
    say(f"{run.name} ({run.stage}, step {run.step}): {counted(c.clips, 'video')} of held-out captions")
    for name in (name for name in SHOWN if name in summary):  # one clip per caption has no diversity
        bounds = f"  [{summary[name + '_low']:.3f}, {summary[name + '_high']:.3f}]" if name + "_low" in summary else ""
        say(f"  {name:18s} {summary[name]:.3f}{bounds}")
    say(f"  network calls      {result['network_calls']}   frames/s {result['frames_per_second']:.1f}")
    say(f"written to {workdir}/evaluation.json")
    return 0


def _vbench(c: ConfigDict, workdir: Path) -> int:
    """VBench's own results; see `evaluation.vbench_total`."""
    if others := [name for name in ("videos", "against", "compare", "score") if c[name]]:
        raise UserError(f"vbench sums up results that are there: leave {', '.join(others)} out")
    scores = read_results(c.vbench)
    with holding(workdir):
        write_atomically(workdir / VBENCH, total_json(scores, c.vbench))
    for line in total_lines(scores):
        say(line)
    say(f"written to {workdir}/{VBENCH}")
    return 0


def _clips(c: ConfigDict, workdir: Path) -> int:
    """Clips of any system; see `evaluation.clip_folders`."""
    if c.videos and c.compare:
        raise UserError("videos and compare exclude each other: measure a folder, or compare two")
    if c.against and not c.videos:
        raise UserError(f"against={c.against}: is compared with the clips of --config.videos; give both")
    settings = Settings(tuple(c.metrics), c.block, c.first_block, c.fps)
    scoring = Scoring(_scorers(c), c.prompts)
    with holding(workdir):
        if c.compare:
            compare_folders(tuple(c.compare), settings, workdir, workers=c.workers, tell=say, scoring=scoring)
            say(f"written to {workdir}/{PAGE} and {workdir}/{RESULT}")
            return 0
        score_folder(c.videos, c.against, settings, workdir, workers=c.workers, scoring=scoring)
        for line in summary_lines(workdir):
            say(line)
    say(f"written to {workdir}/{VIDEOS}")
    return 0


def _scorers(c: ConfigDict) -> list[ScorerSettings]:
    """The settings of the scorers that `score` names."""
    check_names(tuple(c.score))
    for name, keys in c.scorers.items():
        if name not in c.score and (given := [key for key, value in keys.items() if value]):
            raise UserError(
                f"scorers.{name}.{given[0]} is set, and score does not name {name}: add --config.score={name}"
            )
    out = []
    for name in c.score:
        if name not in c.scorers:
            raise UserError(f"--config.score={name}: this config has no group scorers.{name}; use configs/evaluate.py")
        keys = c.scorers[name]
        options = parse_options(keys.options, f"--config.scorers.{name}.options")
        out.append(ScorerSettings(name, keys.weights, keys.python, keys.device, options))
    return out


def _streams(c: ConfigDict, run: Run, workdir: Path) -> int:
    """Long videos, or sessions whose prompt changes; see `experiment.measure_streams`."""
    trained = run.latent_shape[0]
    if c.memories:
        result = measure_long(
            run, _listed(c.memories), frames=c.frames or 10 * trained, clips=c.clips, batch=c.batch, seed=c.seed,
            kept=c.kept,
        )  # fmt: skip
        save_streams(workdir, LONG, result)
        say(f"{run.name}: {counted(c.clips, 'video')} of {counted(result['frames'], 'latent frame')} under each policy")
        say(f"  {'shape and colour as captioned, first and last piece':60s} residual")
        for name, policy in result["policies"].items():
            follows, residual = policy["over_time"]["follows"], policy["over_time"]["residual"]
            say(f"  {name:44s} {follows[0]:7.3f} {follows[-1]:7.3f} {residual[0]:8.3f} {residual[-1]:7.3f}")
        say(f"written to {workdir}/{LONG}.json and {LONG}.npz")
        return 0
    prompts, modes = _listed(c.prompts), cast(list[Mode], _listed(c.modes))
    if len(prompts) != 2:
        raise UserError(f"prompts={c.prompts!r}: give two, with a | between them")
    if unknown := [mode for mode in modes if mode not in get_args(Mode)] or not modes:
        raise UserError(f"modes={c.modes!r}: {unknown} is none of {', '.join(get_args(Mode))}")
    result = measure_switch(
        run, (prompts[0], prompts[1]), modes, memory=c.memory, frames=c.frames or 2 * trained, clips=c.clips,
        seed=c.seed, kept=c.kept,
    )  # fmt: skip
    save_streams(workdir, SWITCH, result)
    sessions = counted(c.clips, "session")
    say(f"{run.name}: {sessions} a mode; {prompts[0]!r} becomes {prompts[1]!r} at block {result['switch']}")
    for mode, shares in result["modes"].items():
        bounds = f"[{shares['settled_low']:.3f}, {shares['settled_high']:.3f}]"
        say(f"  {mode:8s} follow all of it two blocks later: {shares['settled']:.3f} {bounds}")
    say(f"written to {workdir}/{SWITCH}.json and {SWITCH}.npz")
    return 0


def _listed(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split("|")) if part]
