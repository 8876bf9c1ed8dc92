"""The uncertain world: the exact part against integrals, numbers of real futures, claims, and the command (slow)."""

import json

import numpy as np
import pytest
from scipy import integrate, stats

from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.data.shapes import ShapesSource
from cfjax.evaluation.turns import first_turned, measure_turns, pasts_of, real_futures
from cfjax.studies.laws import Turns, sample
from cfjax.studies.turning import Futures, four_steps, left_open, with_chance
from cfjax.studies.turning_paths import claims, measure_paths, table
from cfjax.studies.uncertain import MEASURES, decisive, figure, others, relative, summarise, tables
from cfjax.studies.verdicts import judge
from cfjax.study import CELLS, _commands, _uncertain_recipe
from tests.commands import ROOT
from tests.evaluation.test_turns import GIVEN, WORLD

STUDY = f"--config={ROOT}/configs/study.py:uncertain"


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    """Recipes name their configs as a user in a clone would."""
    monkeypatch.chdir(ROOT)


def two_futures(apart: tuple[float, ...]) -> Futures:
    """Two equally likely futures of one pixel, which part by `apart` in each frame."""
    half = np.array(apart) / 2
    latents = np.stack([half, -half])[:, :, None]
    centres = np.concatenate([latents, np.zeros_like(latents)], axis=2)
    return Futures(latents, np.full(2, 0.5), np.einsum("kfd,lfd->fkl", latents, latents), centres, np.zeros(2))


def test_what_is_left_open_is_the_integral():
    """Two points: the PF-ODE ends at the one on whose side all the noise is, so of the block's own noise g along its
    part a of the difference, P(first) = Phi(g / b), b the part behind it; E Var over Var is E[4 P (1 - P)].
    """
    for a, b in ((3.0, 3.0), (3.0, 9.0), (9.0, 3.0)):
        p = lambda z, r=a / b: stats.norm.cdf(z * r)
        wanted = integrate.quad(lambda z, p=p: 4 * p(z) * (1 - p(z)) * stats.norm.pdf(z), -8, 8)[0]
        found = left_open(two_futures((a, b)), np.full(2, 0.5), 0, 1, noises=300, again=120, seed=0)
        print(f"{a:g}, {b:g}: {found.left:.4f} against {wanted:.4f}")
        assert found.left == pytest.approx(wanted, abs=0.03)
        # of a mean of +-a/2 with weights p, 1 - p: (2 p - 1)^2 of the energy, and |2 p - 1| of the way
        assert found.sharpness == pytest.approx(1 - found.left, abs=0.01)


def test_nothing_behind_a_block_or_no_choice_leaves_nothing_open():
    futures = two_futures((2.0, 2.0, 4.0))
    assert left_open(futures, futures.chance_K, 1, 2, noises=50, again=5, seed=0).left == 0.0
    assert left_open(futures, np.array([1.0, 0.0]), 0, 1, noises=50, again=5, seed=0).left == 0.0
    more = [left_open(futures, futures.chance_K, 0, n, noises=300, again=50, seed=0).left for n in (1, 2, 3)]
    assert more[0] > more[1] > more[2] == 0.0
    np.testing.assert_allclose(with_chance(two_futures((1.0,)), 0.25), [0.75, 0.25])


def test_four_steps_of_a_map_reach_its_ends_and_of_a_mean_do_not():
    """The causal student's blocks are the contents, but for the estimator's bias; the chances are the law's."""
    futures = two_futures((6.0, 6.0))
    causal, bi = (four_steps(futures, np.full(2, 0.5), 0, 1, behind=behind, seed=0) for behind in (False, True))
    print(f"causal {causal}, bidirectional {bi}")
    assert causal.left < 0.05 and causal.sharpness > 0.95 and causal.mixed < 0.05
    assert bi.left > 0.2 and bi.sharpness < 0.8 and bi.mixed > 2 * causal.mixed


def test_real_futures_are_the_law():
    source, rng, futures = ShapesSource(WORLD, 5, 40), np.random.default_rng(1), 24
    pasts = pasts_of([source[i] for i in range(len(source))], WORLD)
    factors = [past.factors for past in pasts for _ in range(futures)]
    draws = [np.concatenate([real_futures(past, WORLD, rng, futures) for past in pasts]) for _ in range(2)]
    table, real = (measure_turns(video, factors, WORLD, given=GIVEN) for video in draws)
    shows = slice(first_turned(WORLD), 8)
    found = summarise(table, real, pasts, given=GIVEN, shows=shows)
    print({name: round(value, 4) for name, value in found.items() if name != "by_frame"})
    assert found["turns"] == pytest.approx(1.0, abs=0.1) and found["spread"] == pytest.approx(1.0, abs=0.1)
    assert abs(found["energy"]) < 0.1 and found["between"] == 0.0 and len(found["by_frame"]) == 6
    same = np.repeat(draws[0][::futures], futures, axis=0)  # one future, over and over
    worse = summarise(measure_turns(same, factors, WORLD, given=GIVEN), real, pasts, given=GIVEN, shows=shows)
    assert worse["energy"] > 0.5 and worse["spread"] < 1e-9
    assert relative(worse, found)["motion"] == pytest.approx(worse["motion"] / found["motion"])


def numbers(**changed):
    """Six measures of networks by seed, in one layout."""
    base = {"sharpness": 0.95, "motion": 0.98, "turns": 0.9, "between": 0.05, "energy": 0.02, "spread": 0.9}
    out = {}
    for network, values in changed.items():
        rows = {m: {s: v + 0.001 * s for s in range(5)} for m, v in {**base, **values}.items()}
        out[network] = {**rows, "by_frame": {s: [1.0] * 6 for s in range(5)}}
    return {"chunkwise": out}


def test_claims_are_paired_by_seed_and_in_two_families():
    blurred = numbers(ode={}, bi_ode={"sharpness": 0.6, "motion": 1.2}, cd={}, asymmetric_cd={"between": 0.3})
    noise = np.random.default_rng(0).normal(0, 1e-3, (2, 5))
    for row, network in zip(noise, ("ode", "bi_ode"), strict=True):
        for m in ("sharpness", "motion"):
            for s, value in enumerate(row):
                blurred["chunkwise"][network][m][s] += value
    found = judge(decisive(blurred))
    assert [v.outcome for v in found] == ["holds", "reversed", "not significant", "holds", "holds", "holds"] and all(
        v.p < 0.01 for v in (*found[:2], *found[3:])
    )
    assert "sharpness at turns, of real: 0.60" in found[0].numbers and found[0].test == "paired"
    rest = others(blurred)
    assert not {c.text for c in rest} & {v.claim for v in found}
    assert sum("asymmetric CD, against causal CD" in c.text for c in rest) == len(MEASURES)
    del blurred["chunkwise"]["bi_ode"]["motion"][4]  # not measured yet
    (claim,) = [c for c in decisive(blurred) if "motion" in c.text and "bidirectional" in c.text]
    assert len(claim.larger) == len(claim.smaller) == 4
    block = {"left": 0.1, "sharpness": 0.9, "motion": 0.9, "mixed": 0.2, "turns": 1.0}
    kinds = dict.fromkeys(("one_step", "four_steps", "causal"), block)
    exact = [{"turn": 0.5, "frames": n, "behind": 5 - n, **kinds} for n in (1, 2)]
    shown = tables(blurred, exact)
    assert [len(table.rows) for table in shown] == [4, 2] and shown[0].rows[0][0] == "causal ODE"
    assert figure(blurred, exact, first=GIVEN).startswith("<svg")


def test_every_cell_is_a_recipes_network():
    c = parse("study uncertain", [STUDY, "--workdir=unused"], description="")[0]
    assert set(c.recipes) == set(CELLS) and c.seeds >= 5
    for name, of in CELLS.items():
        for layout in c.layouts:
            q = _uncertain_recipe(c, name, 1, layout)
            steps = _commands(c, q, ROOT / "unused")
            assert [s.key for s in steps if s.verb == "train"][-2:] == [of["before"][0], of["after"][0]]
            for step in steps:
                read = parse(step.verb, [*step.argv, "--workdir=unused"], description="")[0]
                frames = 3 if layout == "chunkwise" else 1
                assert (read.blocks.frames, read.seed, read.data.shapes.branching) == (frames, 1, 0.5)
                assert "guidance" not in read.objective or read.objective.guidance == 1.0


def test_paths_of_the_law_turn_as_often_as_it_says():
    law = Turns(branching=0.4)
    assert np.exp(law.mixture().log_weights_M).sum() == pytest.approx(1.0) and len(law.mixture().means_MF) == 7
    assert len(Turns(branching=1.0).mixture().means_MF) == 6
    paths, real = (sample(law, np.random.default_rng(k), 4000) for k in range(2))
    aside = np.abs(np.diff(paths, axis=1)[:, -2:].mean(axis=1))
    assert (aside > law.step / 2).mean() == pytest.approx(0.4, abs=0.03)
    assert np.abs(np.diff(paths, axis=1)[:, 0]).max() < 5 * law.noise  # straight at first
    found = measure_paths(paths[:1500], real[:1500], law)
    print(found)
    assert all(found[m] == pytest.approx(1.0, abs=0.1) for m in ("motion", "turns", "spread"))
    assert found["between"] < 0.1
    still = measure_paths(np.repeat(paths[:1500, :1], law.frames, axis=1), real[:1500], law)
    assert still["motion"] == 0.0 == still["turns"] and still["energy"] > 10 * abs(found["energy"])
    half = measure_paths(np.cumsum(np.full((1500, 6), law.step / 2), axis=1), real[:1500], law)
    assert half["between"] == 1.0


def test_claims_of_exact_teachers_are_of_the_first_law():
    good = {"motion": 1.0, "turns": 1.0, "between": 0.05, "energy": 0.0, "spread": 1.0}
    bad = {"motion": 0.8, "turns": 0.5, "between": 0.3, "energy": 0.1, "spread": 0.6}
    rng = np.random.default_rng(0)
    noisy = lambda row: {m: v + rng.normal(0, 0.01) for m, v in row.items()}
    inits = {"real": good, "causal_ode": good, "bi_ode": bad}
    paths = {turn: [{i: noisy(row) for i, row in inits.items()} for _ in range(5)] for turn in ("0.5", "1")}
    first, rest = claims(paths)
    assert [v.outcome for v in judge(first)] == ["holds"] * 3 + ["not significant"] * 3
    assert len(rest) == 2 + 5 and {v.outcome for v in judge(rest)} == {"holds"}
    assert [row[:3] for row in table(paths).rows[:3]] == [["0.5", i, "5"] for i in inits]


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path, capsys):
    keys = {"seeds": 1, "first": 1, "recipes": "('causal_forcing','none')", "layouts": "('framewise',)"}
    keys |= {"pasts": 6, "futures": 2, "exact.pasts": 1, "exact.noises": 8, "exact.again": 4}
    keys |= {f"budget.{stage}": 2 for stage in ("ar", "ode", "cd", "dmd")}
    keys |= {"paths.turn": "(0.5,)", "paths.inits": "('causal_ode','bi_ode')", "paths.videos": 50, "paths.steps": 2}
    keys |= {"paths.batch": 8, "paths.pool": 64, "paths.solver_steps": 4}
    keys |= {"budget.clips": 128, "budget.pairs": 64, "budget.solver_steps": 4}
    argv = ["study", "uncertain", STUDY, f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in keys.items())]
    assert main(argv) == 0
    record = json.loads((tmp_path / "study.json").read_text())
    assert set(record["numbers"]["framewise"]) == {"real", "ode", "ode_one", "dmd", "ar", "ar_solver", "ar_dmd"}
    assert record["measured"] == "6 of 6 cells" and len(record["exact"]) == 12 and "NaN" not in json.dumps(record)
    assert "An uncertain world" in (tmp_path / "report" / "index.html").read_text()
    capsys.readouterr()
    assert main(argv) == 0 and "$ cfjax" not in capsys.readouterr().out
    assert set(record["paths"]["0.5"][0]) == {"real", "causal_ode", "bi_ode"}
    assert main([*argv, "--config.pasts=7"]) == 2 and "other settings" in capsys.readouterr().err
    assert main(["study", "uncertain", STUDY, "--config.recipes=('sid',)", f"--workdir={tmp_path}/b"]) == 2
    assert "is not in Table 2" in capsys.readouterr().err
