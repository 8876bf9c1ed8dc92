"""`cfjax study`: the experiment on the paper's claim, exact on toy laws, and learned on the toy world."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.data.sets import open_dataset
from cfjax.evaluation.tables import gather, summarise_seeds
from cfjax.experiment import blocks_of
from cfjax.quickstart import TITLES, environment, networks, recipe, run_steps
from cfjax.runs import open_run
from cfjax.studies.ablation import compare_networks, figure, left_open, open_table, opened_verdicts, verdicts
from cfjax.studies.injectivity import Plan, run
from cfjax.studies.page import commit, page, table_html, verdict_list, write, write_study
from cfjax.studies.students import Budget

INJECTIVITY = """Does the initialisation's teacher decide whether a few-step student is well-posed? On video laws whose
scores are closed form: what stays ambiguous, exact collisions, where students trained on each teacher's pairs end, and
how good their videos are. Writes report/index.html and study.json. Interrupted? The same command goes on."""
ABLATION = """Trains the toy world's pipeline with only the initialisation's teacher changed, over seeds, before and
after DMD, and tabulates quality, motion, captions and diversity with intervals and p-values. Interrupted? The same
command goes on."""
KINDS = {
    "injectivity": (INJECTIVITY, "configs/study.py", "runs/study"),
    "ablation": (ABLATION, "configs/study.py:ablation", "runs/ablation"),
}


def main(argv: Sequence[str]) -> int:
    """`cfjax study injectivity|ablation ...`.

    Raises:
      UserError: neither word, or a config of the other.
    """
    kind, *rest = [*argv] or [""]
    if kind in ("--help", "-h"):
        kind = "injectivity"
        rest = ["--help"]
    if kind not in KINDS:
        raise UserError(f"say what to study: cfjax study {' or cfjax study '.join(KINDS)}; got {kind!r}")
    description, config, workdir = KINDS[kind]
    c, root, _ = parse(f"study {kind}", rest, description=description, default_config=config, default_workdir=workdir)
    if ("recipes" in c) != (kind == "ablation"):
        other = KINDS["injectivity" if kind == "ablation" else "ablation"][1]
        raise UserError(f"this config is for the other study; cfjax study {kind} takes --config={config}, not {other}")
    command = shlex.join(["cfjax", "study", *argv])
    return {"injectivity": injectivity, "ablation": ablation}[kind](c, root, command)


def plan_of(c: ConfigDict) -> Plan:
    """The plan of a config."""
    values = c.to_dict()
    return Plan(**{**values, "budget": Budget(**values["budget"])})


def injectivity(c: ConfigDict, root: Path, command: str) -> int:
    """The exact part: computes what is missing, writes the page and the raw numbers."""
    results = run(plan_of(c), root, say)
    write_study(
        root / "report" / "index.html", root / "study.json", results, command=command, environment=environment()
    )
    say(f"report: {root}/report/index.html, numbers: {root}/study.json")
    return 0


def _recipe_config(c: ConfigDict, name: str, seed: int) -> ConfigDict:
    keys = {"seed": seed, "budget": c.budget, "teacher": c.teacher, "guard": False}
    argv = [f"--config=configs/quickstart.py:{name}", *(f"--config.{key}={value}" for key, value in keys.items())]
    return parse("quickstart", argv, description="", default_workdir="runs/ablation")[0]


def _pairs_of(c: ConfigDict) -> dict[str, list[tuple[str, str]]]:
    """Stage of the comparison -> (network, what it is compared with): the first recipe's, at the same stage."""
    trained = {name: networks(_recipe_config(c, name, 0)) for name in (*c.recipes, *c.forcings)}
    first = trained[c.recipes[0]]
    return {
        "Before DMD": [(trained[name][-2], first[-2]) for name in c.recipes],
        "After DMD": [(trained[name][-1], first[-1]) for name in c.recipes],
        "Stage 1": [(name, first[0]) for name in (first[0], *(trained[f][0] for f in c.forcings))],
    }


def ablation(c: ConfigDict, root: Path, command: str) -> int:
    """The learned part: trains and evaluates every recipe of every seed, then compares.

    Raises:
      UserError: a workdir of another ablation.
    """
    record = {"budget": c.budget, "teacher": c.teacher}
    file = root / "ablation.json"
    if file.exists() and json.loads(file.read_text()) != record:
        raise UserError(f"{root} holds an ablation with other settings; choose another --workdir, or remove it")
    compared = _pairs_of(c)  # a misspelt recipe is told before anything is written
    write(file, json.dumps(record, indent=1))
    for seed in range(c.seeds):
        folder = root / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*c.recipes, *c.forcings):
            run_steps(recipe(_recipe_config(c, name, seed), folder), folder)
    report_ablation(c, root, command, compared)
    return 0


def report_ablation(c: ConfigDict, root: Path, command: str, compared: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Writes report/index.html and study.json from what was trained and evaluated under `root`."""
    numbers = {key: summarise_seeds(found) for key, found in gather(f"{root}/seed*/evaluation/*").items()}
    titles = {key: title for key, (title, *_) in TITLES.items()}
    opened = _left_open(c, root)
    tables = [*compare_networks(numbers, compared, titles), *([open_table(opened, titles)] if opened else [])]
    rows = [(a, b) for (a, _), (b, _) in zip(compared["Before DMD"], compared["After DMD"], strict=True)]
    found = [*verdicts(numbers), *opened_verdicts(opened)]
    about = {"command": command, "commit": commit(), **environment(), "seeds": c.seeds, "budget": c.budget}
    lead = (
        "The toy world's pipeline with only the teacher of the initialisation changed: the same data, seeds and "
        "updates. 95 % t-intervals over seeds; p by Welch's test against the first row, Holm-corrected per table. "
        "Before DMD, a recipe without initialisation shows the AR network with its own many-step sampler."
    )
    parts = [
        verdict_list(found),
        f"<section><h2>Figures</h2>{figure(numbers, rows, opened)}</section>",
        "<section><h2>Numbers</h2></section>",
        *map(table_html, tables),
    ]
    write(root / "report" / "index.html", page("One change: the initialisation's teacher", lead, parts, about))
    record = {**about, "numbers": numbers, "left_open": opened, "verdicts": [vars(v) for v in found]}
    write(root / "study.json", json.dumps({**record, "tables": [vars(t) for t in tables]}, indent=1) + "\n")
    say(f"report: {root}/report/index.html, numbers: {root}/study.json")


def _left_open(c: ConfigDict, root: Path) -> dict[str, list[list[float]]]:
    """Every regression's student -> by seed, by block, what it leaves of its teacher's end points."""
    out: dict[str, list[list[float]]] = {}
    for seed in range(c.seeds):
        for network in ("ode", "bi_pairs_ode"):
            if not (root / f"seed{seed}" / network).exists():
                continue
            run = open_run(str(root / f"seed{seed}" / network))
            how, data = run.config.objective.past, run.config.data
            pairs = open_dataset(Path(data.path) / data.name)
            records = [pairs[i] for i in range(len(pairs))]
            out.setdefault(network, []).append(left_open(run.model, records, blocks_of(run.config), past=how))
    return out
