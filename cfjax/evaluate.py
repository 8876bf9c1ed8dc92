"""`cfjax evaluate`: how well a run's videos follow captions it never saw, measured from pixels."""

from collections.abc import Sequence

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.evaluation.tables import gather, write_table
from cfjax.experiment.measure import evaluate_run, save_evaluation
from cfjax.experiment.runs import open_run

DESCRIPTION = """Generates videos for held-out captions with a run's own sampler and measures them from decoded pixels.
Writes evaluation.json and samples.npz to the workdir. With --config=configs/evaluate.py:table it puts evaluations side
by side instead: mean and standard deviation over seeds, table.json and table.md."""
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
    if c.evaluations:
        say(write_table(workdir, gather(c.evaluations)))
        say(f"written to {workdir}/table.json and {workdir}/table.md")
        return 0
    run = open_run(c.run, ema=c.ema)
    result = evaluate_run(run, clips=c.clips, batch=c.batch, seed=c.seed, kept=c.kept)
    save_evaluation(workdir, result)
    summary = result["summary"]
    say(f"{run.name} ({run.stage}, step {run.step}): {c.clips} videos of held-out captions")
    for name in (name for name in SHOWN if name in summary):  # one clip per caption has no diversity
        bounds = f"  [{summary[name + '_low']:.3f}, {summary[name + '_high']:.3f}]" if name + "_low" in summary else ""
        say(f"  {name:18s} {summary[name]:.3f}{bounds}")
    say(f"  network calls      {result['network_calls']}   frames/s {result['frames_per_second']:.1f}")
    say(f"written to {workdir}/evaluation.json")
    return 0
