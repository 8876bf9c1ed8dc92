"""The uncertain world: the exact part against integrals, numbers of real futures, claims, and the command (slow)."""

import json

import numpy as np
import pytest
from scipy import integrate, stats

from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.data.shapes import ShapesSource
from cfjax.evaluation.turns import first_turned, measure_turns, pasts_of, real_futures
from cfjax.studies.turning import Futures, four_steps, left_open, with_chance
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
    video = np.concatenate([real_futures(past, WORLD, rng, futures) for past in pasts])
    table = measure_turns(video, [p.factors for p in pasts for _ in range(futures)], WORLD, given=GIVEN)
    shows = slice(first_turned(WORLD), 8)
    found = summarise(table, pasts, given=GIVEN, shows=shows, futures=futures, seed=0)
    print({name: round(value, 4) for name, value in found.items() if name != "by_frame"})
    assert found["turns"] == pytest.approx(1.0, abs=0.1) and found["spread"] == pytest.approx(1.0, abs=0.1)
    assert abs(found["energy"]) < 0.1 and found["between"] == 0.0 and len(found["by_frame"]) == 6
    straight = np.repeat(video[::futures], futures, axis=0)  # one future, over and over
    table = measure_turns(straight, [p.factors for p in pasts for _ in range(futures)], WORLD, given=GIVEN)
    worse = summarise(table, pasts, given=GIVEN, shows=shows, futures=futures, seed=0)
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
                read = parse(step.verb, step.argv, description="")[0]
                frames = 3 if layout == "chunkwise" else 1
                assert (read.blocks.frames, read.seed, read.data.shapes.branching) == (frames, 1, 0.5)
                assert "guidance" not in read.objective or read.objective.guidance == 1.0


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path, capsys):
    keys = {"seeds": 1, "first": 1, "recipes": "('causal_forcing','none')", "layouts": "('framewise',)"}
    keys |= {"pasts": 6, "futures": 2, "exact.pasts": 1, "exact.noises": 8, "exact.again": 4}
    keys |= {f"budget.{stage}": 2 for stage in ("ar", "ode", "cd", "dmd")}
    keys |= {"budget.clips": 128, "budget.pairs": 64, "budget.solver_steps": 4}
    argv = ["study", "uncertain", STUDY, f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in keys.items())]
    assert main(argv) == 0
    record = json.loads((tmp_path / "study.json").read_text())
    assert set(record["numbers"]["framewise"]) == {"real", "ode", "ode_one", "dmd", "ar", "ar_solver", "ar_dmd"}
    assert record["measured"] == "6 of 6 cells" and len(record["exact"]) == 12 and "NaN" not in json.dumps(record)
    assert "An uncertain world" in (tmp_path / "report" / "index.html").read_text()
    capsys.readouterr()
    assert main(argv) == 0 and "$ cfjax" not in capsys.readouterr().out
    assert main([*argv, "--config.pasts=7"]) == 2 and "other settings" in capsys.readouterr().err
    assert main(["study", "uncertain", STUDY, "--config.recipes=('sid',)", f"--workdir={tmp_path}/b"]) == 2
    assert "is not in Table 2" in capsys.readouterr().err
