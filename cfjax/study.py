"""`cfjax study`: the experiment on the paper's claim, exact on toy laws, and learned on the toy world."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints, read_if_whole
from cfjax.data.sets import open_dataset
from cfjax.evaluation.tables import gather, summarise_seeds
from cfjax.experiment.measure import load_evaluation
from cfjax.experiment.runs import open_run
from cfjax.experiment.stage import blocks_of
from cfjax.quickstart import environment, networks, recipe, run_steps, titles_of
from cfjax.studies.ablation import compare_networks, figure, left_open, open_table, verdicts
from cfjax.studies.injectivity import Plan, run
from cfjax.studies.page import commit, page, provenance, table_html, verdict_list, write, write_study
from cfjax.studies.students import Budget

INJECTIVITY = """Does the initialisation's teacher decide whether a few-step student is well-posed? On video laws whose
scores are closed form: what stays ambiguous, exact collisions, where students trained on each teacher's pairs end, and
how good their videos are. Writes report/index.html and study.json. Interrupted? The same command goes on."""
ABLATION = """Trains the toy world's pipeline with only the initialisation's teacher changed, over seeds, before and
after DMD, and tabulates quality, motion, captions and diversity with intervals and p-values. Interrupted? The same
command goes on."""
MADE = "made.json"  # in a seed's folder: what each recipe was finished with
# whose networks a recipe's are compared with: what differs is then the teacher alone; else the first recipe's
REFERENCES = {"asymmetric_cd": "causal_forcing_pp"}
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
    if kind == "ablation":
        check_checkpoints(root)
    with holding(root):
        return {"injectivity": injectivity, "ablation": ablation}[kind](c, root, command)


def plan_of(c: ConfigDict) -> Plan:
    """The plan of a config."""
    values = c.to_dict()
    return Plan(**{**values, "budget": Budget(**values["budget"])})


def injectivity(c: ConfigDict, root: Path, command: str) -> int:
    """The exact part: computes what is missing, writes the page and the raw numbers."""
    results = run(plan_of(c), root, say, _made())
    write_study(root / "report" / "index.html", root / "study.json", results, command=command)
    say(f"report: {root}/report/index.html, numbers: {root}/study.json")
    return 0


def _made() -> dict[str, str]:
    """What a part is made with that is made now."""
    return {"commit": commit(), **environment()}


def _recipe_config(c: ConfigDict, name: str, seed: int) -> ConfigDict:
    keys = {"seed": seed, "budget": c.budget, "teacher": c.teacher, "guard": False}
    argv = [f"--config=configs/quickstart.py:{name}", *(f"--config.{key}={value}" for key, value in keys.items())]
    return parse("quickstart", argv, description="", default_workdir="runs/ablation")[0]


def _pairs_of(c: ConfigDict) -> dict[str, list[tuple[str, str]]]:
    """Stage of the comparison -> (network, what it is compared with, at the same stage).

    That is the first recipe's, or that of the recipe in `REFERENCES` where it is among them.

    Raises:
      UserError: no recipe, no seed, or a recipe with nothing before its last network.
    """
    if not c.recipes or c.seeds < 1:
        raise UserError(f"recipes={c.recipes}, seeds={c.seeds}: name at least one recipe, and one seed or more")
    trained = {name: networks(_recipe_config(c, name, 0)) for name in (*c.recipes, *c.forcings)}
    if short := [name for name in c.recipes if len(trained[name]) < 2]:
        raise UserError(f"recipes={short}: nothing comes before DMD there; use recipes with an initialisation")
    first = trained[c.recipes[0]]
    of = {name: trained[REFERENCES[name]] if REFERENCES.get(name) in c.recipes else first for name in c.recipes}
    return {
        "Before DMD": [(trained[name][-2], of[name][-2]) for name in c.recipes],
        "After DMD": [(trained[name][-1], of[name][-1]) for name in c.recipes],
        "Stage 1": [(name, first[0]) for name in (first[0], *(trained[f][0] for f in c.forcings))],
    }


def ablation(c: ConfigDict, root: Path, command: str) -> int:
    """The learned part: trains and evaluates every recipe of every seed, then compares.

    Raises:
      UserError: a workdir of another ablation, or nothing to compare.
    """
    record = {"budget": c.budget, "teacher": c.teacher}
    file = root / "ablation.json"
    if (found := read_if_whole(file)) is not None and found != record:
        raise UserError(f"{root} holds an ablation with other settings; choose another --workdir, or remove it")
    compared = _pairs_of(c)  # a misspelt recipe is an error before anything is written
    write(file, json.dumps(record, indent=1))
    for seed in range(c.seeds):
        folder = root / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*c.recipes, *c.forcings):
            _run_recipe(_recipe_config(c, name, seed), name, folder)
    report_ablation(c, root, command, compared)
    return 0


def _run_recipe(c: ConfigDict, name: str, folder: Path) -> None:
    """Trains and evaluates what is missing, and notes what finished it: "unknown" where it was done already."""
    steps, note = recipe(c, folder), folder / MADE
    made: dict[str, dict[str, str]] = read_if_whole(note) or {}
    was_done = all(load_evaluation(folder / "evaluation" / network) is not None for network in networks(c))
    run_steps(steps, folder)
    if name not in made:
        made[name] = {"commit": "unknown"} if was_done else _made()
        write(note, json.dumps(made, indent=1))


def _named(c: ConfigDict) -> set[str]:
    """Every network of this config's recipes."""
    return {key for name in (*c.recipes, *c.forcings) for key in networks(_recipe_config(c, name, 0))}


def _gathered(c: ConfigDict, root: Path) -> dict[str, list[dict[str, Any]]]:
    """Network -> its evaluations by seed: of this config's recipes and seeds only."""
    wanted, out = {"teacher", *_named(c)}, dict[str, list[dict[str, Any]]]()
    for seed in range(c.seeds):
        for key, found in gather(f"{root}/seed{seed}/evaluation/*").items():
            if key in wanted:
                out.setdefault(key, []).extend(found)
    return out


def report_ablation(c: ConfigDict, root: Path, command: str, compared: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Writes report/index.html and study.json from what was trained and evaluated under `root`."""
    numbers = {key: summarise_seeds(found) for key, found in _gathered(c, root).items()}
    recipes = [_recipe_config(c, name, 0) for name in (*c.recipes, *c.forcings)]
    titles = {key: titles_of(each, key)["title"] for each in recipes for key in ("teacher", *networks(each))}
    opened = _left_open(c, root)
    tables, tests = compare_networks(numbers, compared, titles)
    tables += [open_table(opened, titles)] if opened else []
    rows = [(a, b) for (a, _), (b, _) in zip(compared["Before DMD"], compared["After DMD"], strict=True)]
    found = verdicts(numbers, opened)
    notes = {seed: read_if_whole(root / f"seed{seed}" / MADE) or {} for seed in range(c.seeds)}
    made = {f"seed{seed} {name}": of for seed, names in notes.items() for name, of in names.items()}
    about = {"command": command, **provenance(made), "seeds": c.seeds, "budget": c.budget}
    lead = (
        "The toy world's pipeline with only the teacher of the initialisation changed: the same data, seeds and "
        "updates. 95 % t-intervals over seeds; p in tables by Welch's test against the network that is named, "
        "Holm-corrected per table; every paired p is in the numbers. "
        "Before DMD, a recipe without initialisation shows the AR network with its own many-step sampler."
    )
    parts = [
        verdict_list(found),
        f"<section><h2>Figures</h2>{figure(numbers, rows, opened)}</section>",
        "<section><h2>Numbers</h2></section>",
        *map(table_html, tables),
    ]
    write(root / "report" / "index.html", page("One change: the initialisation's teacher", lead, parts, about))
    record = {**about, "made": made, "numbers": numbers, "left_open": opened, "verdicts": [vars(v) for v in found]}
    record |= {"tests": tests, "tables": [vars(t) for t in tables]}
    write(root / "study.json", json.dumps(record, indent=1) + "\n")
    say(f"report: {root}/report/index.html, numbers: {root}/study.json")


def _left_open(c: ConfigDict, root: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Every regression's student -> `left_open` of its own pairs, by seed."""
    out: dict[str, dict[str, list[list[float]]]] = {}
    regressions = [network for network in ("ode", "bi_pairs_ode") if network in _named(c)]
    for seed in range(c.seeds):
        for network in regressions:
            run = open_run(str(root / f"seed{seed}" / network))
            how, data = run.config.objective.past, run.config.data
            pairs = open_dataset(Path(data.path) / data.name)
            records = [pairs[i] for i in range(len(pairs))]
            for kind, blocks in left_open(run.model, records, blocks_of(run.config), past=how).items():
                out.setdefault(network, {}).setdefault(kind, []).append(blocks)
    return out
