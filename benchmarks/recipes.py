"""Recipes and baselines on the toy world, side by side, over seeds: trains, evaluates, tabulates.

    python benchmarks/recipes.py --seeds 0 1 2 --root runs/recipes
    python benchmarks/recipes.py --seeds 0 --root runs/recipes --recipes none sid causvid
    python benchmarks/recipes.py --seeds 0 --root runs/recipes --recipes causal_forcing_pp,framewise,2step
    python benchmarks/recipes.py --seeds --root runs/recipes     trains nothing: tabulates what is there

Each recipe is `cfjax quickstart --config=configs/quickstart.py:RECIPE` in the root's folder of that seed (and layout),
so stages in common are trained once per seed, and what is done is not done again. The table holds everything found
under the root.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import commit, parser, write

from cfjax.__main__ import main as cfjax
from cfjax.evaluation.tables import gather, markdown, summarise_seeds
from cfjax.quickstart import environment

RECIPES = ("causal_forcing", "causal_forcing_pp", "self_forcing", "causvid")
COMMITS = "commits"  # in a seed's folder: recipe -> the commit that trained it
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
TITLES = runpy.run_path(str(CONFIG))["TITLES"]  # network -> title, short title, a sentence


def train(root: Path, seeds: Sequence[int], recipes: Sequence[str], budget: str) -> None:
    """Every recipe of every seed, seed by seed."""
    for seed in seeds:
        for recipe in recipes:
            layout = recipe.partition(",")[2].replace(",", "_")
            folder = f"{layout}_seed{seed}" if layout else f"seed{seed}"
            argv = [f"--config={CONFIG}:{recipe}", f"--workdir={root}/{folder}", f"--config.budget={budget}"]
            if cfjax(["quickstart", *argv, f"--config.seed={seed}", "--config.guard=False"]):
                raise SystemExit(f"{recipe}, seed {seed}: failed; run again to go on")
            made = root / folder / COMMITS / recipe
            if not made.exists():  # nothing is trained again by a later commit
                made.parent.mkdir(exist_ok=True)
                made.write_text(commit())


def tabulate(root: Path) -> dict[str, dict[str, Any]]:
    """Stage (and layout) -> {"title", "seeds", "numbers"}, in the order of the pipeline, layout by layout."""
    rows: dict[str, dict[str, Any]] = {}
    for layout in sorted({folder.name.rpartition("seed")[0] for folder in root.glob("*seed*")}):
        found = gather(f"{root}/{layout}seed*/evaluation/*")
        words = layout.strip("_").replace("_", ", ")
        if words:
            found.pop("teacher", None)
        elif "teacher" in found:
            found["teacher"] = found["teacher"][:1]  # it ships: every seed measures the same weights on the same noise
        for key in (key for key in TITLES if key in found):
            row = {"seeds": len(found[key]), "numbers": summarise_seeds(found[key])}
            rows[layout + key] = {"title": TITLES[key][0] + (f": {words}" if words else ""), **row}
    return rows


def commits(root: Path) -> dict[str, list[str]]:
    """Recipe (with its layout) -> the commits that trained it, over all seeds."""
    out: dict[str, set[str]] = {}
    for file in root.glob(f"*/{COMMITS}/*"):
        out.setdefault(file.name, set()).add(file.read_text())
    return {recipe: sorted(found) for recipe, found in sorted(out.items())}


def save(out: Path, root: Path, budget: str, note: str) -> None:
    """The JSON record of everything under the root, and the markdown table beside it."""
    rows = tabulate(root)
    every = [{"key": key, **row} for key, row in rows.items()]
    write(out, every, commit=commit(), commits=commits(root), budget=budget, note=note, environment=environment())
    titles = {key: str(row["title"]) for key, row in rows.items()}
    out.with_suffix(".md").write_text(markdown(rows, titles) + "\n")


if __name__ == "__main__":
    command = parser(__doc__, "recipes.json")
    command.add_argument("--root", type=Path, default=Path("runs/recipes"))
    command.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    command.add_argument("--recipes", nargs="*", default=list(RECIPES))
    command.add_argument("--budget", default="short")
    command.add_argument("--note", default="", help="what the record should say besides")
    given = command.parse_args()
    train(given.root, given.seeds, given.recipes, given.budget)
    save(given.out, given.root, given.budget, given.note)
