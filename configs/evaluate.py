"""Measure what a trained run generates, over captions that no stage was trained on.

    cfjax evaluate --config.run=runs/quickstart/dmd --workdir=runs/evaluation/dmd
    cfjax evaluate --config.run=toy_teacher --workdir=runs/evaluation/teacher
    cfjax evaluate --config=configs/evaluate.py:table --workdir=runs/table      evaluations side by side
    cfjax evaluate --config=configs/evaluate.py:long --config.run=runs/quickstart/dmd --workdir=runs/long
    cfjax evaluate --config=configs/evaluate.py:switch --config.run=runs/quickstart/dmd --workdir=runs/switch
    cfjax evaluate --config.videos=runs/videos --workdir=runs/measured
    cfjax evaluate --config.compare=runs/videos,other/videos --workdir=runs/compared
    cfjax evaluate --config.vbench=evaluation_results --workdir=runs/vbench

Decoded pixels are judged against the captioned factors by analysis and synthesis (cfjax/evaluation/shapes_metrics.py).
The table takes every folder of `evaluations` (a glob pattern) that holds an evaluation; folders of one name, such as
`runs/seed0/evaluation/dmd` and `runs/seed1/evaluation/dmd`, are seeds of one row: mean and standard deviation.

`long` makes videos of `frames` latent frames under each of the memory policies `memories` (names as in docs/memory.md,
between them a |) from the same noise, and measures caption, motion and drift over time. `switch` opens `clips` sessions
of each of the `modes` whose prompt changes from the first to the second of `prompts` in the middle, and measures what
share follows the new one, block by block.

`videos` measures the clips of a folder, of any system, without weights (docs/evaluate.md); `against` is a folder of
references with the same names. `compare` takes two folders of clips, or of what `videos` wrote, and compares them over
their common prompts and seeds. `metrics` are groups of flickering, frames and motion; `block` is the number of frames
that were generated together, for seams, and `first_block` that of the first one (12 and 9 for Wan in chunks of three
latent frames; 0 for the same); `fps` replaces the files' frame rate, which folders of pictures do not have; `workers`
clips are measured at a time, 0 for one a core.

`score` names scorers that need weights (lpips, fvd, vbench, vbench_long, visionreward, hpsv3, or those of installed
packages), and `scorers.NAME` has what each needs: weights, a file or folder; python, of the environment that has its
package; device; options, NAME=VALUE with a | between them (docs/evaluate.md). Beside videos and compare, `prompts` is
a file: the list that the clips' prompts are from.

    cfjax evaluate --config.videos=runs/videos --config.against=real/videos --config.score=fvd \
        --config.scorers.fvd.weights=i3d_torchscript.pt --workdir=runs/scored

`vbench` is a folder with what VBench's own evaluation wrote (`*_eval_results.json`), or such a file: quality, semantic
and total as its leaderboard has them.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets

LONG = "full|window(window=12, sink=3)|ema_sink|infinity_rope"  # four policies side by side


def get_config(arg: str = ""):
    """`table`, `long` or `switch`. Keys: run, a run directory or a shipped teacher; clips, how many; kept, how many
    videos are stored; frames, latent frames of a long video or session, 0 for ten times or twice those of training.
    """
    words = presets.switches(arg, "table", "long", "switch")
    presets.one_of(words, "table", "long", "switch")
    table, long, switch = (word in words for word in ("table", "long", "switch"))
    return ConfigDict(
        {
            "run": "toy_teacher",
            "clips": 60 if long or switch else 240,
            "kept": 4 if long or switch else 8,
            "batch": 1 if switch else 60,
            "seed": 11,
            "ema": True,
            "evaluations": "runs/quickstart/evaluation/*" if table else "",
            "frames": 0,
            "memories": LONG if long else "",
            "memory": "longlive_infinity(window=9, sink=3)" if switch else "",
            "prompts": "a red circle moving right|a blue square moving left" if switch else "",
            "modes": "recache|keep|cut" if switch else "",
            "videos": "",
            "against": "",
            "compare": (),
            "metrics": ("flickering", "frames", "motion"),
            "block": 0,
            "first_block": 0,
            "fps": 0.0,
            "workers": 0,
            "vbench": "",
            "score": (),
            "scorers": presets.scorers(),
        }
    )
