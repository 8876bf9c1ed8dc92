"""`cfjax study`: the experiment on the paper's claim, exact on toy laws, and learned on the toy world."""

import itertools
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints, read_if_whole
from cfjax.core.progress import followed
from cfjax.data.sets import open_dataset
from cfjax.evaluation.tables import gather, summarise_seeds
from cfjax.experiment.measure import load_evaluation
from cfjax.experiment.measure_turns import GIVEN, SAMPLERS, Trial, everything_after, futures_of, trial_of
from cfjax.experiment.runs import open_run
from cfjax.experiment.stage import blocks_of
from cfjax.quickstart import Step, environment, networks, other_shapes, recipe, run_steps, titles_of
from cfjax.studies import turning_paths
from cfjax.studies.ablation import compare_networks, figure, left_open, open_table, verdicts
from cfjax.studies.injectivity import Plan, run
from cfjax.studies.laws import Turns
from cfjax.studies.page import PAIRED, commit, page, provenance, table_html, verdict_list, write, write_study
from cfjax.studies.students import Budget
from cfjax.studies.turning import Futures, dose
from cfjax.studies.uncertain import MEASURES, decisive, others, relative, summarise
from cfjax.studies.uncertain import figure as uncertain_figure
from cfjax.studies.uncertain import tables as uncertain_tables
from cfjax.studies.verdicts import judge

INJECTIVITY = """Does the initialisation's teacher decide whether a few-step student is well-posed? On video laws whose
scores are closed form: what stays ambiguous, exact collisions, where students trained on each teacher's pairs end, and
how good their videos are. Writes report/index.html and study.json. Interrupted? The same command goes on."""
ABLATION = """Trains the toy world's pipeline with only the initialisation's teacher changed, over seeds, before and
after DMD, and tabulates quality, motion, captions and diversity with intervals and p-values. Interrupted? The same
command goes on."""
UNCERTAIN = """The paper's Table 2 in a toy world whose objects turn where nothing announces it: every initialisation,
block size and seed, before and after DMD, against the exact law of the futures of the same pasts. The decisive cells
come first; a report is written after each seed. Interrupted? The same command goes on."""
MADE = "made.json"  # in a seed's folder: what each recipe was finished with
# whose networks a recipe's are compared with: what differs is then the teacher alone; else the first recipe's
REFERENCES = {"asymmetric_cd": "causal_forcing_pp"}
KINDS = {
    "injectivity": (INJECTIVITY, "configs/study.py", "runs/study"),
    "ablation": (ABLATION, "configs/study.py:ablation", "runs/ablation"),
    "uncertain": (UNCERTAIN, "configs/study.py:uncertain", "runs/uncertain"),
}
LAYOUTS = ("chunkwise", "framewise")
# Recipe of configs/quickstart.py -> the networks that are measured of it, before and after DMD; with SAMPLERS' endings.
CELLS: dict[str, dict[str, tuple[str, ...]]] = {
    "causal_forcing": {"before": ("ode", "ode_one"), "after": ("dmd",)},
    "self_forcing": {"before": ("bi_ode", "bi_ode_one"), "after": ("bi_ode_dmd",)},
    "bidirectional_pairs": {"before": ("bi_pairs_ode", "bi_pairs_ode_one"), "after": ("bi_pairs_ode_dmd",)},
    "causal_forcing_pp": {"before": ("cd", "cd_one"), "after": ("cd_dmd",)},
    "asymmetric_cd": {"before": ("asymmetric_cd", "asymmetric_cd_one"), "after": ("asymmetric_cd_dmd",)},
    "none": {"before": ("ar", "ar_solver"), "after": ("ar_dmd",)},
}
REAL_SEED = 1_000_003
UNGUIDED = ("pairs", "bi_pairs", "cd", "asymmetric_cd")  # stages with guidance of their own


def main(argv: Sequence[str]) -> int:
    """`cfjax study injectivity|ablation|uncertain ...`.

    Raises:
      UserError: none of these words, or a config of another.
    """
    kind, *rest = [*argv] or [""]
    if kind in ("--help", "-h"):
        kind = "injectivity"
        rest = ["--help"]
    if kind not in KINDS:
        raise UserError(f"say what to study: cfjax study {' or cfjax study '.join(KINDS)}; got {kind!r}")
    description, config, workdir = KINDS[kind]
    c, root, _ = parse(f"study {kind}", rest, description=description, default_config=config, default_workdir=workdir)
    if (other := kind_of(c)) != kind:
        raise UserError(
            f"this config is for another study; cfjax study {kind} takes --config={config}, not {KINDS[other][1]}"
        )
    command = shlex.join(["cfjax", "study", *argv])
    if kind != "injectivity":
        check_checkpoints(root)
    with holding(root):
        return {"injectivity": injectivity, "ablation": ablation, "uncertain": uncertain}[kind](c, root, command)


def kind_of(c: ConfigDict) -> str:
    """Which study a config is for."""
    return "uncertain" if "layouts" in c else "ablation" if "recipes" in c else "injectivity"


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


def _uncertain_recipe(c: ConfigDict, name: str, seed: int, layout: str) -> ConfigDict:
    """A quickstart's config with this study's budget."""
    words = [name, "framewise"] if layout == "framewise" else [name]
    keys = {"seed": seed, "teacher": c.teacher, "guard": False, "streams": False}
    keys |= {f"budgets.default.{key}": value for key, value in c.budget.items() if key != "solver_steps"}
    argv = [f"--config=configs/quickstart.py:{','.join(words)}", *(f"--config.{k}={v}" for k, v in keys.items())]
    return parse("quickstart", argv, description="", default_workdir="runs/uncertain")[0]


def _commands(c: ConfigDict, q: ConfigDict, folder: Path) -> list[Step]:
    """The recipe's stages, without guidance: here the law is judged, which guidance narrows. Nothing is sampled."""
    steps = [s for s in recipe(q, folder, shapes={**other_shapes(q), "sample_clips": "0"}) if s.verb != "evaluate"]
    own = {key: ["--config.objective.guidance=1.0"] for key in UNGUIDED}
    solver = f"--config.objective.solver_steps={c.budget.solver_steps}"
    own |= {key: [*own[key], solver] for key in ("pairs", "bi_pairs")}
    return [replace(s, argv=[*s.argv, *own.get(s.key, [])]) for s in steps]


def uncertain(c: ConfigDict, root: Path, command: str) -> int:
    """Table 2 in a world with an uncertain future: the exact part, then cell after cell, the decisive ones first.

    Raises:
      UserError: a workdir of other settings, a teacher of another world, or nothing to compare.
    """
    if unknown := {*c.recipes} - {*CELLS}:
        raise UserError(
            f"recipes={c.recipes}: {sorted(unknown)[0]!r} is not in Table 2; use some of {', '.join(CELLS)}"
        )
    if unknown := {*c.layouts} - {*LAYOUTS}:
        raise UserError(f"layouts={c.layouts}: {sorted(unknown)[0]!r} is none; use some of {', '.join(LAYOUTS)}")
    record = {key: c[key].to_dict() if key == "budget" else c[key] for key in ("budget", "teacher", "pasts", "futures")}
    record |= {"paths": {key: value for key, value in c.paths.items() if key not in ("turn", "inits")}}
    file = root / "uncertain.json"
    if (found := read_if_whole(file)) is not None and found != record:
        raise UserError(f"{root} holds a study with other settings; choose another --workdir, or remove it")
    trial = trial_of(open_run(c.teacher, with_model=False).toy, c.pasts, c.futures)
    write(file, json.dumps(record, indent=1))
    exact = exact_part(trial, root / "exact.json", c.exact.to_dict())
    futures = trial.real(REAL_SEED)  # that all networks are held against
    real = _summary(trial, trial.real(REAL_SEED + 1), futures)
    paths = paths_part(c, root / "paths")
    soon, late = c.recipes[: c.first], c.recipes[c.first :]
    stages = ("before", "after") if c.dmd else ("before",)
    for recipes, stage in ((r, s) for s in stages for r in (soon, late) if r):
        for layout, seed in itertools.product(c.layouts, range(c.seeds)):
            for name in recipes:
                _cell(c, (trial, futures, real), root / f"seed{seed}" / layout, name, stage)
            report_uncertain(c, root, command, (exact, paths), real)
    return 0


def exact_part(trial: Trial, file: Path, doses: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What bidirectional pairs leave open, by the chance of a turn and the frames of a block; computed once."""
    if (found := read_if_whole(file)) is not None:
        return list(found)
    every = [Futures(**everything_after(past, trial)) for past in trial.pasts[: doses["pasts"]]]
    first = trial.shows.start - trial.given
    most = every[0].latents_KFD.shape[1] - first
    sizes = sorted({min(frames, most) for frames in doses["frames"]})
    draws = {name: doses[name] for name in ("noises", "again")}
    rows = [
        dose(every, first, turn=turn, frames=frames, **draws)
        for turn, frames in followed(
            list(itertools.product(doses["turn"], sizes)), len(sizes) * len(doses["turn"]), "dose", "exact part"
        )
    ]
    write(file, json.dumps(rows, indent=1))
    return rows


def paths_part(c: ConfigDict, folder: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Students of exact teachers, by chance of a turn and by seed; each computed once."""
    out: dict[str, list[dict[str, dict[str, float]]]] = {}
    for turn, seed in itertools.product(c.paths.turn, range(c.seeds)):
        file = folder / f"{turn:g}_{seed}.json"
        found: dict[str, dict[str, float]] = read_if_whole(file) or {}
        if missing := [init for init in c.paths.inits if init not in found]:
            law, budget = Turns(branching=turn), turning_paths.plan_of(c.paths.to_dict())
            found |= turning_paths.seed_of(law, missing, budget, seed, c.paths.videos, say)
            write(file, json.dumps(found, indent=1))
        out.setdefault(f"{turn:g}", []).append(found)
    return out


def _summary(trial: Trial, table: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, Any]:
    return summarise(table, real, trial.pasts, given=trial.given, shows=trial.shows)


def _cell(c: ConfigDict, against: tuple[Trial, Any, Mapping[str, Any]], folder: Path, name: str, stage: str) -> None:
    """Trains what a cell of the table needs and is not there, and measures it; a measured one is left alone."""
    (trial, futures, real), layout, seed = against, folder.name, int(folder.parent.name.removeprefix("seed"))
    files = {network: folder / "measured" / f"{network}.json" for network in CELLS[name][stage]}
    if all(read_if_whole(file) is not None for file in files.values()):
        return
    steps = _commands(c, _uncertain_recipe(c, name, seed, layout), folder)
    for step in steps if stage == "after" else steps[:-1]:
        note = folder / "done" / f"{step.key}.json"
        if read_if_whole(note) is None:
            say(f"\n$ {step.command()}")
            begun = time.monotonic()
            step.run(step.argv)
            write(note, json.dumps({"seconds": time.monotonic() - begun, **_made()}, indent=1))
    for network, file in files.items():
        ending = next(ending for ending in SAMPLERS if network.endswith(ending))
        run = open_run(str(folder / network.removesuffix(ending)))
        table = futures_of(run, trial, seed, SAMPLERS[ending])
        found = relative(_summary(trial, table, futures), real)
        write(file, json.dumps({**found, "made": _made()}, indent=1))
        told = ", ".join(f"{measure} {found[measure]:.3f}" for measure, *_ in MEASURES)
        say(f"{layout}, seed {seed}, {network}: {told}")


def report_uncertain(c: ConfigDict, root: Path, command: str, theory: tuple[Any, Any], real: Mapping[str, Any]) -> None:
    """Writes report/index.html and study.json from what is measured so far."""
    exact, paths = theory
    of_paths = turning_paths.claims(paths)
    numbers: dict[str, Any] = {layout: {} for layout in c.layouts}
    made: dict[str, dict[str, str]] = {}
    for file in sorted(root.glob("seed*/*/measured/*.json")):
        found, layout, seed = read_if_whole(file), file.parts[-3], int(file.parts[-4].removeprefix("seed"))
        if found is None or layout not in numbers or seed >= c.seeds:
            continue
        made[f"seed{seed} {layout} {file.stem}"] = found.pop("made")
        for measure, value in found.items():
            numbers[layout].setdefault(file.stem, {}).setdefault(measure, {})[seed] = value
    for layout in c.layouts:
        numbers[layout]["real"] = {measure: {0: value} for measure, value in relative(real, real).items()}
    networks = {n for name in c.recipes for of in CELLS[name].values() for n in of}
    wanted = c.seeds * len(c.layouts) * len(networks)
    first, rest = judge([*of_paths[0], *decisive(numbers)]), judge([*of_paths[1], *others(numbers)])
    about = {"command": command, **provenance(made), "seeds": c.seeds, "measured": f"{len(made)} of {wanted} cells"}
    about |= {"pasts": c.pasts, "futures": c.futures, "budget": json.dumps(c.budget.to_dict())}
    parts = [
        verdict_list(first, "The decisive claims, named before anything was measured", PAIRED),
        verdict_list(rest, "All other comparisons", PAIRED),
        f"<section><h2>Figures</h2>{uncertain_figure(numbers, exact, first=GIVEN)}</section>",
        "<section><h2>Numbers</h2></section>",
        *map(table_html, shown := [turning_paths.table(paths), *uncertain_tables(numbers, exact)]),
    ]
    lead = (
        "Objects of this world turn where nothing announces it, so a past leaves its future open. Every network goes "
        "on from the same clean pasts; its futures are held against the exact law of what may follow. Mean [95 % "
        "t-interval] over seeds; tests are paired by seed."
    )
    write(root / "report" / "index.html", page("An uncertain world", lead, parts, about))
    record = {**about, "made": made, "real": real, "exact": exact, "paths": paths, "numbers": numbers}
    record |= {
        "decisive": [vars(v) for v in first],
        "others": [vars(v) for v in rest],
        "tables": [vars(t) for t in shown],
    }
    write(root / "study.json", json.dumps(record, indent=1) + "\n")
    say(f"{about['measured']}; report: {root}/report/index.html, numbers: {root}/study.json")
