"""The branching walk: exact scores against samples, collisions, and what students of each teacher learn, in small."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.core.errors import UserError
from cfjax.models.cache import init_cache, write
from cfjax.models.context import clean_context
from cfjax.models.wan import embed_text, forward_block, replay, teacher_forced
from cfjax.studies.findings import tables
from cfjax.studies.injectivity import Plan, run
from cfjax.studies.laws import LinearGaussian, Walk, joint_velocity, sample, velocity
from cfjax.studies.page import provenance
from cfjax.studies.results import quality, settled, truth
from cfjax.studies.statistics import energy_distance, holm, paired, summary, welch
from cfjax.studies.students import Budget
from cfjax.studies.toys import FRAMEWISE, Exact, Student, ToyConfig, windows
from cfjax.studies.verdicts import WORSE, Claim, gaps, judge, verdicts, washed_out
from cfjax.studies.walk import collide, facts, probes, round_trip
from tests.commands import ROOT

WALK = Walk()
SHAPE = (3, 5, 1, 1, 1)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def by_components(law, x, sigma):
    """E[eps - x0 | x_s] one component at a time, by solving with its covariance."""
    means, log_weights, covariance = law.mixture()
    noisy = (1 - sigma) ** 2 * covariance + sigma**2 * np.eye(law.frames)
    out, total = np.zeros_like(x), np.zeros(len(x))
    for mean, log_weight in zip(means, log_weights, strict=True):
        distance = x - (1 - sigma) * mean
        solved = np.linalg.solve(noisy, distance.T).T
        weight = np.exp(log_weight - 0.5 * np.sum(distance * solved, axis=1))
        clean = mean + (1 - sigma) * solved @ covariance
        out += weight[:, None] * (sigma * solved - clean)
        total += weight
    return out / total[:, None]


@pytest.mark.parametrize("law", [WALK, LinearGaussian()])
def test_the_joint_velocity_is_the_posterior_mean(law):
    x = np.random.default_rng(0).standard_normal((7, 5))
    with jax.enable_x64(True):
        got = np.asarray(jax.jit(partial(joint_velocity, law))(jnp.asarray(x), jnp.full(7, 0.4, jnp.float64)))
    np.testing.assert_allclose(got, by_components(law, x, 0.4), rtol=1e-10)


def test_the_conditional_velocity_of_a_walk_is_that_of_its_next_step():
    """Given x^{i-1} the next frame is a fair coin between two Gaussians: a law of one frame, by hand."""
    x, past, s = 0.3, np.array([0.1, 0.7]), 0.6
    means, variance = past[-1] + np.array([0.5, -0.5]), 0.12**2
    total = (1 - s) ** 2 * variance + s**2
    weight = np.exp(-0.5 * (x - (1 - s) * means) ** 2 / total)
    clean = means + (1 - s) * variance / total * (x - (1 - s) * means)
    flow = np.sum(weight / weight.sum() * ((x - clean) / s))
    with jax.enable_x64(True):
        got = jax.jit(partial(velocity, WALK, 2))(jnp.array([[x]]), jnp.array([s]), jnp.asarray(past[None]))
    assert float(got[0, 0]) == pytest.approx(flow, rel=1e-9)


def test_toys_obey_the_protocols_law():
    """A teacher-forced pass equals the cached rollout over clean blocks, and the replay against their context."""
    student = Student(ToyConfig(5), jax.random.key(0))
    student = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), student)
    noisy, clean, sigma = normal(1), normal(2), jax.random.uniform(jax.random.key(3), (3, 5))
    text_kv = embed_text(student, jnp.zeros((3, 1, 1)))

    @jax.jit
    def three_ways(student):
        whole = teacher_forced(student, noisy, sigma, clean, text_kv, FRAMEWISE)
        context = clean_context(student, clean, text_kv, FRAMEWISE)
        cache, flows = init_cache(student.config, 3, 5, 1, FRAMEWISE), []
        for i in range(5):
            start, own = jnp.int32(i), slice(i, i + 1)
            flows.append(forward_block(student, noisy[:, own], sigma[:, own], text_kv, cache, start, FRAMEWISE)[0])
            _, kv = forward_block(student, clean[:, own], jnp.zeros((3, 1)), text_kv, cache, start, FRAMEWISE)
            cache = write(cache, kv, start, 1, FRAMEWISE)
        return whole, replay(student, noisy, sigma, text_kv, context, FRAMEWISE), jnp.concatenate(flows, axis=1)

    whole, replayed, cached = three_ways(student)
    np.testing.assert_allclose(replayed, whole, atol=1e-6)
    np.testing.assert_allclose(cached, whole, atol=1e-6)


def test_a_teacher_that_looks_ahead_averages_to_the_ar_one():
    """The tower property: E[v given noisy future | noisy frame, clean past] = v_AR, by regression of their gap."""
    rng = np.random.default_rng(0)
    clean = jnp.asarray(sample(WALK, rng, 20_000), jnp.float32)[:, :, None, None, None]
    noisy = 0.3 * clean + 0.7 * jnp.asarray(rng.standard_normal(clean.shape), jnp.float32)
    sigma = jnp.full(clean.shape[:2], 0.7)
    text_kv = embed_text(Exact(WALK), jnp.zeros((len(clean), 1, 1)))

    @jax.jit
    def flows(noisy, clean):
        ar, ahead = (teacher_forced(Exact(WALK, k), noisy, sigma, clean, text_kv, FRAMEWISE) for k in (0, 4))
        return (ahead - ar)[:, 1, 0, 0, 0], (Exact(WALK)(noisy, sigma, text_kv) - ar)[:, 1, 0, 0, 0]

    ahead, noisy_past = map(np.asarray, flows(noisy, clean))
    features = np.stack(
        [np.asarray(noisy[:, 1, 0, 0, 0]), np.asarray(clean[:, 0, 0, 0, 0]), np.ones(len(clean))], axis=1
    )
    slopes = [np.linalg.lstsq(features, y, rcond=None)[0] for y in (ahead, noisy_past)]
    print("regression of v - v_AR, clean and noisy past:", slopes, "rms", ahead.std(), noisy_past.std())
    assert ahead.std() > 0.1 and np.abs(slopes[0]).max() < 0.03 and np.abs(slopes[1]).max() > 0.2


def test_windows_hold_the_frames_that_follow():
    x = jnp.arange(10.0).reshape(2, 5)
    got = windows(x, 2)[0, :, 0, 0]
    np.testing.assert_array_equal(got, [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0], [4, 0, 0]])


def test_the_walk_is_ambiguous_under_the_bidirectional_teacher_alone():
    of = {t: probes(WALK, t, 4, 300, 0, (1.0,), (1, 4)) for t in ("bidirectional", "causal")}
    known = {t: [facts(p, ar) for p, ar in zip(found, of["causal"], strict=True)] for t, found in of.items()}
    ratio = {t: [row["of_prior"] for row in rows] for t, rows in known.items()}
    print("E Var / prior, frames 2 and 5:", ratio)
    assert 0.3 < ratio["bidirectional"][0] < 0.6 and ratio["bidirectional"][1] < 5e-3
    assert max(ratio["causal"]) < 5e-3 and known["causal"][0]["monotone"] > 0.999
    bi, ar = known["bidirectional"][0], known["causal"][0]
    print("floors", {t: [(row["floor_map"], row["floor_mean"]) for row in rows] for t, rows in known.items()})
    assert np.mean(bi["by_past"]) == pytest.approx(bi["ambiguity"]) and len(bi["by_past"]) == 4
    assert 0 < ar["floor_map"] < 1e-6 and 0.5 < bi["central"] / bi["ambiguity"] < 1.5
    # the fit smooths the AR map, which its own variance does not know of
    assert 2e-3 > ar["floor_mean"] > 1.5 * of["causal"][0].fit_variance()
    assert bi["floor_mean"] == ar["floor_mean"] + of["bidirectional"][0].fit_variance()


@pytest.mark.slow
def test_collisions_exist_where_there_is_a_future():
    assert round_trip(WALK, 100, 0) < 1e-5
    middle, last = collide(WALK, 1, 10, 3), collide(WALK, 4, 4, 3)
    print("ends of frame 2", middle.ends, "residual", middle.residual, "frame 5 sd", last.ends.std())
    assert len(middle.ends) >= 6 and middle.residual < 1e-8 and middle.ends.std() > 0.03
    assert len(last.ends) and last.ends.std() < 1e-4


def test_statistics_by_known_answers():
    assert welch([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    s = summary([1.0, 2.0, 3.0])
    assert (s["mean"], s["sd"]) == (2.0, 1.0) and s["high"] - 2.0 == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert paired([1.0, 2.0, 4.0], [0.0, 1.5, 3.5]) == pytest.approx(0.0572, abs=1e-4)  # t = 4, two degrees of freedom
    assert paired([1.0, 1.1], [2.0, 2.1]) == 0.0 and np.isnan(paired([1.0], [2.0]))
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 800, 2))
    assert abs(energy_distance(a, b)) < 0.02 < energy_distance(a, c + 1.0)


SMALL = Plan(
    seeds=2,
    pasts=6,
    futures=300,
    levels=(1.0,),
    collisions=4,
    videos=1000,
    inits=("causal_ode", "bi_ode", "causal_cd", "asym_cd_cp", "asym_cd"),
    ahead=(1,),
    dmd=("causal_ode", "bi_ode"),
    dmd_at=(50,),
    budget=Budget(ar_steps=500, ode_steps=500, cd_steps=500, batch=128, pool=4096, lr=3e-3, solver_steps=48),
)


@pytest.mark.slow
def test_students_end_where_their_teachers_pairs_put_them(tmp_path):
    """The whole study in small: signs and rough sizes of its effects; nothing is computed twice."""
    results = run(SMALL, tmp_path, print, {"commit": "first"})
    mean = lambda init, m: float(np.mean(quality(results, init, m)))
    print({i: {m: round(mean(i, m), 3) for m in ("energy", "spread", "motion")} for i in SMALL.inits})
    assert mean("bi_ode", "energy") > 0.03 > 0.02 > mean("causal_ode", "energy")
    assert mean("causal_ode", "spread") - mean("bi_ode", "spread") > 0.2
    assert mean("causal_ode", "spread") > mean("ahead_1", "spread") > mean("bi_ode", "spread")
    assert mean("asym_cd_cp", "spread") > mean("asym_cd", "spread")
    assert mean("asym_cd", "motion") > mean("causal_cd", "motion")  # it moves too much, not too little
    rows = [row for seed in results["seeds"] for row in seed["settling"] if row["frame"] in (2, 3, 4)]
    bi = [(row["dist_map"], row["dist_mean"]) for row in rows if row["init"] == "bi_ode"]
    assert all(to_map > 0.07 and to_mean < 0.3 * to_map for to_map, to_mean in bi)
    assert all(row["dist_map"] < 0.04 for row in rows if row["init"] == "causal_ode")
    for seed in results["seeds"]:
        assert np.isfinite(list(seed["dmd"]["bi_ode"]["50"].values())).all()
        assert seed["flow_error"]["diffusion"] > seed["flow_error"]["teacher"]
    top, frames = SMALL.levels[0], range(1, 5)
    kept, of_ar = (np.mean(settled(results, init, top, "kept", [2, 3, 4])) for init in ("bi_ode", "causal_ode"))
    left = truth(results, "bidirectional", top, [2, 3, 4], "of_prior")
    # The law of total variance; both networks shrink a little.
    assert kept / of_ar == pytest.approx(1.0 - left, abs=0.1)
    assert np.mean(settled(results, "bi_ode", top, "dist_map", frames)) == pytest.approx(
        truth(results, "bidirectional", top, frames, "central"), rel=0.25
    )
    found = verdicts(results)
    print(*(f"{v.claim} {v.numbers} {v.outcome}\n" for v in found))
    outcomes = {v.claim: v.outcome for v in found}
    assert outcomes["Before DMD the bidirectional ODE initialisation is worse in spread."] == "holds"
    print("gaps after DMD", {m: (gaps(results, m), gaps(results, m, 50)) for m in WORSE})
    assert min(gaps(results, "static", 50)) > 0  # in-between frames outlive a little DMD
    assert washed_out(found, "static") in ("no", "in part", "washed out", "over-corrected", "not significant")
    titles = [table.title for table in tables(results, found)]
    assert len(set(titles)) == len(titles) and "What DMD leaves of the bidirectional start's harm" in titles
    again = run(SMALL, tmp_path, lambda message: pytest.fail(f"{message} is computed again"), {"commit": "second"})
    assert again == results and results["seeds"][1]["made"] == {"commit": "first"}


@pytest.mark.slow
def test_the_command_writes_page_and_numbers(tmp_path, capsys):
    """One seed of almost nothing, end to end."""
    keys = {"seeds": 1, "frames": 3, "pasts": 2, "futures": 60, "collisions": 1, "videos": 50, "ahead": "(1,)"}
    keys |= {"inits": "('causal_ode','bi_ode')", "levels": "(1.0,)", "forcing": False}
    keys |= {f"budget.{name}": 4 for name in ("ar_steps", "ode_steps")} | {"budget.pool": 256, "budget.batch": 16}
    keys |= {"budget.solver_steps": 8, "budget.width": 8}
    argv = [f"--config.{name}={value}" for name, value in keys.items()]
    config = [f"--config={ROOT}/configs/study.py", f"--workdir={tmp_path}"]
    assert main(["study", "injectivity", *config, *argv]) == 0
    page, record = (tmp_path / "report" / "index.html").read_text(), json.loads((tmp_path / "study.json").read_text())
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "") and len(page) < 1_000_000
    assert len(record["verdicts"]) >= 8 and record["commit"] and record["jax"] == jax.__version__
    tested = {v["outcome"] for v in record["verdicts"][1:]}
    assert tested == {"not tested"} and "NaN" not in json.dumps(record["verdicts"])  # of one seed nothing is known
    assert all(f"<h3>{name}" in page for name in ("Linear-Gaussian V_1(1)", "Variance of a frame"))
    assert main(["study", "injectivity", *config, *argv, "--config.futures=61"]) == 2
    assert "of other settings" in capsys.readouterr().err


def test_one_rule_judges_every_claim():
    """By direction and p < 0.05 after Holm over all of them; a nan is never significant."""
    high, low, wide = [1.0, 1.01, 1.02], [0.5, 0.51, 0.53], [0.2, 1.0, 1.9]
    found = judge(
        [
            Claim("so", "1", high, low),
            Claim("the other way", "2", low, high),
            Claim("unclear", "3", wide, high),
            Claim("a gap", "4", high, low, test="paired"),
        ]
    )
    assert [v.outcome for v in found] == ["holds", "reversed", "not significant", "holds"]
    assert found[0].p == pytest.approx(holm({"a": welch(high, low), "b": 0.0, "c": 1.0, "d": 1e-4})["a"], rel=0.5)
    assert found[0].numbers.startswith("1, p ") and "(paired " in found[0].numbers
    (alone,) = judge([Claim("of one seed", "", [1.0], [0.0])])
    assert (alone.outcome, alone.p, alone.p_paired) == ("not tested", None, None)


def test_a_page_names_the_commit_of_every_part():
    made = {"linear": {"commit": "a", "jax": "1"}, "seed0": {"commit": "b", "jax": "1"}, "seed1": {"commit": "b"}}
    assert provenance(made) == {"commit": "a (linear); b (seed0, seed1)", "jax": "1 (linear, seed0); unknown (seed1)"}
    assert provenance({"linear": made["linear"]}) == made["linear"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("levels", ()),
        ("levels", (1.5,)),
        ("levels", (0.0,)),
        ("pasts", 0),
        ("futures", 1),
        ("videos", 0),
        ("collisions", -1),
        ("futures_seed", -1),
        ("seeds", -1),
        ("dmd_at", ()),
        ("dmd_at", (0, 5)),
        ("dmd_at", (7,)),
    ],
)
def test_a_plan_that_cannot_be_is_reported_in_one_line(key, value):
    with pytest.raises(UserError, match=key) as message:
        Plan(**{"dmd": ("bi_ode",), key: value})
    assert "\n" not in str(message.value)


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, message in (
        (["history"], "cfjax study injectivity or cfjax study ablation"),
        (["ablation", f"--config={ROOT}/configs/study.py", f"--workdir={tmp_path}"], "for another study"),
        (["injectivity", f"--config={ROOT}/configs/study.py", "--config.inits=('ode',)"], "unknown initialisations"),
        (["ablation", f"--config={ROOT}/configs/study.py:ablation", "--config.seeds=0"], "seeds=0: use 1 or more"),
        (["ablation", f"--config={ROOT}/configs/study.py:ablation", "--config.recipes=()"], "at least one recipe"),
        (
            ["ablation", f"--config={ROOT}/configs/study.py:ablation", "--config.recipes=('bidirectional',)"],
            "before DMD",
        ),
    ):
        assert main(["study", *argv]) == 2
        assert message in capsys.readouterr().err
