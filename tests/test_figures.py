"""Figures of the documentation: tables are those of the benchmarks' records, and no page tells another number."""

import json
import re
import runpy
import statistics
import sys

from tests.commands import ROOT
from tests.documents import table_under

RESULTS = ROOT / "benchmarks" / "results"


def record(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def plain(cell: str) -> str:
    return cell.replace("`", "").replace("*", "").strip()


def spread(number: dict, scale: float, digits: int) -> str:
    """Mean, and standard deviation where there are seeds."""
    mean, deviation = number["mean"] * scale, number["sd"]
    return f"{mean:.{digits}f}" + (f" ± {deviation * scale:.{digits}f}" if deviation is not None else "")


def test_recipes_are_those_of_the_records():
    """The rows of docs/results.md are what was recorded, but for the teacher, which ships."""
    rows = [row for name in ("recipes.json", "recipes_framewise.json") for row in record(name)["rows"]]
    recorded = set()
    for row in rows:
        numbers, seeds = row["numbers"], row["seeds"]
        captions = spread(numbers["all_correct"], 100, 1) + (f" ({seeds})" if seeds > 1 else "")
        calls = f"{numbers['network_calls']['mean']:.0f}"
        if row["key"] != "teacher":
            recorded.add((captions, spread(numbers["step"], 1, 2), spread(numbers["jerkiness"], 1, 2), calls))
    shown = table_under("docs/results.md", "Objectives and baselines")
    assert len(shown) == 30 and {tuple(row[2:]) for row in shown} == recorded


def test_plans_are_those_of_the_record(monkeypatch):
    """docs/pods.md has the table that the benchmark prints, and each row's command; the README three rows of it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"))
    sys.modules.pop("measure", None)
    rows = record("plans.json")["rows"]
    assert made["table"](rows) in text_of("docs/pods.md")
    assert f"```bash\n{made['commands']()}\n```" in text_of("docs/pods.md")
    gib, known = made["GIB"], set()
    for row in rows:
        if row["memory_per_device"]:
            of = f"{row['memory_per_device'] / gib:.1f}".removesuffix(".0")
            known.add((row["topology"], f"{row['peak'] / gib:.1f}", of, f"{row['executed'] / row['peak_flops']:.1f}"))
    shown = [tuple(map(plain, row[1:])) for row in table_under("README.md", "Train on a pod")]
    assert len(shown) == 3 and set(shown) <= known


def test_second_starts_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "second_starts.py"))["table"]
    sys.modules.pop("measure", None)
    first, second = rows = record("second_starts.json")["rows"]
    assert table(rows) in text_of("docs/performance.md")
    assert second["read"] == first["kept"] > 0
    for seconds in ("compile_seconds", "printed_seconds"):
        assert second[seconds] <= 0.2 * first[seconds]


def test_fused_commits_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "fused_commit.py"))["table"]
    sys.modules.pop("measure", None)
    assert table(record("fused_commit.json")["rows"]) in text_of("docs/results.md")


def test_the_smallest_slice_is_that_of_the_record():
    last = record("fit.json")["plans"][-1]
    peak = max(cost["peak"] for cost in last["costs"]) / 2**30
    assert last["topology"]["name"] in text_of("docs/pods.md") and f"{peak:.1f} GiB of 95" in text_of("docs/pods.md")


def test_decoders_and_replay_are_those_of_the_record():
    text = " ".join(text_of("docs/results.md").split())
    made = record("decoders.json")
    (row,) = [r for r in made["rows"] if (r["latent_frames"], r["step"]) == (3, "later")]
    millions = [f"{made['parameters'][name]['decoder'] / 1e6:.1f} M" for name in ("tiny", "wan")]
    tera = [row[name]["gflop_at_480p"] / 1e3 for name in ("tiny", "wan")]
    state = [row[name]["state_mib_at_480p"] for name in ("tiny", "wan")]
    assert f"{millions[0]} parameters against {millions[1]}, {row['speedup']['median']:.0f} times less time" in text
    assert f"{tera[0]:.1f} TFLOP against {tera[1]:.0f}" in text
    assert f"{state[0]:.0f} MiB of stream state against {state[1] / 1024:.1f} GiB" in text
    rows = record("replay.json")["rows"]
    saved = sorted(100 * (1 - row["replay"]["temp_mib"] / row["sequential"]["temp_mib"]) for row in rows)
    assert f"{saved[0]:.0f} to {saved[-1]:.0f} % less temporary memory" in text
    for row in rows:
        assert f"{row['speedup']['median']:.2f} with {row['frames'] // row['frames_per_block']}" in text


def test_the_speed_of_measuring_videos_is_that_of_the_record():
    made = record("evaluate_videos.json")
    rows, text = {row["case"]: row for row in made["rows"]}, " ".join(text_of("docs/evaluate.md").split())
    whole, faster = rows["all"], made["faster_than_vbench"]
    shares = [100 * share for row in rows.values() for share in row["others_share"]]
    assert f"On {made['cores']} cores of which other programs took {min(shares):.0f} to {max(shares):.0f} %:" in text
    real_time = f"{whole['times_real_time']:.1f} times real time"
    assert f"{max(whole['frames_per_s']):.0f} frames a second with everything, {real_time}" in text
    assert f"{max(whole['frames_per_cpu_s']):.0f} a second of one core's time, and {whole['grown_mib']:.0f} MiB" in text
    assert f"{faster['median']:.1f} times less time than VBench's function ({faster['min']:.1f} at least)" in text
    assert f"{made['largest_difference']:.1e} apart" in text


def test_errors_against_diffusers_are_those_of_the_record():
    """What `cfjax compare` recorded, as docs/compare.md tells it; the README's figures are no smaller."""
    rows, text = record("compare_diffusers.json")["rows"], " ".join(text_of("docs/compare.md").split())
    worst: dict[str, float] = {}
    for row in rows:
        part = "flow" if row["what"].startswith("flow") else row["part"]
        worst[part] = max(worst.get(part, 0.0), row["max_rel"])
    told = {"flow": "flow", "gradients": "gradient of every parameter", "vae": "VAE", "text": "text rows"}
    told |= {"unipc": "50 UniPC steps", "sampling": "whole samplers"}
    assert worst.keys() == told.keys() and f"recorded {len(rows)} rows" in text
    for part, name in told.items():
        assert f"{name} {worst[part]:.1e}".replace("e-0", "e-") in text, part
    shown = {row[0]: float(row[2]) for row in table_under("README.md", "Compared with PyTorch")}
    assert shown["Wan DiT, flow"] >= worst["flow"] and shown["UMT5 encoder"] >= worst["text"]


def test_replay_equals_the_loop_as_recorded():
    worst = max(row["gradient_difference"] for row in record("replay.json")["rows"])
    assert f"equal to the sequential loop to {worst:.1e}".replace("e-0", "e-") in " ".join(text_of("README.md").split())


def test_the_readmes_sentences_are_of_its_tables():
    """Parameters of the shipped teacher, the student's interval and its calls against its teacher's."""
    text = " ".join(text_of("README.md").split())
    teacher = json.loads((ROOT / "cfjax" / "assets" / "toy_teacher" / "model.json").read_text())
    assert f"{teacher['parameters'] / 1e6:.2f} M parameters" in text
    student = table_under("docs/results.md", "The quickstart")[-1]
    low, high = re.search(r"\[(.*), (.*)\]", student[1]).groups()
    assert f"(95 % interval {low} to {high})" in text
    (*_, ar, ode, dmd) = table_under("README.md", "What comes out")
    assert round(int(ar[3]) / int(dmd[3])) in (20, 21) and "with a twentieth of the calls" in text
    pairs = ode[5].partition(" + ")[2]
    assert f"{pairs} minutes go into ODE pairs" in text
    assert f"+ {pairs} min of pairs" in table_under("docs/results.md", "The quickstart")[-2][8]
    trained = sum(float(part) for row in (ar, ode, dmd) for part in row[5].split(" + "))
    assert trained <= 20 and "trains for at most 20 minutes" in text


def test_the_quickstart_is_that_of_the_record():
    made = record("quickstart.json")
    stages, minutes = made["stages"], {key: seconds / 60 for key, seconds in made["seconds"].items()}
    trained = {"ar": f"{minutes['ar']:.1f} min", "dmd": f"{minutes['dmd']:.1f} min"}
    trained["ode"] = f"{minutes['ode']:.1f} min + {minutes['pairs']:.1f} min of pairs"
    shown = table_under("docs/results.md", "The quickstart")
    for row, key in zip(shown, ("real", "codec", "teacher", "ar", "ode", "dmd"), strict=True):
        stage = stages[key]
        part = {name: f"{100 * stage[name]:.1f}" for name in stage if "_correct" in name and stage[name] is not None}
        assert row[1] == f"{part['all_correct']} % [{part['all_correct_low']}, {part['all_correct_high']}]"
        assert row[2] == " / ".join(part[f"{name}_correct"] for name in ("shape", "colour", "direction")) + " %"
        assert row[3:6] == [f"{stage['step_ratio']:.2f}", f"{stage['jerkiness']:.2f}", f"{stage['residual']:.3f}"]
        assert row[6] == str(stage["network_calls"] or "")
        assert row[7] == (f"{stage['frames_per_second']:.0f}" if stage["network_calls"] else "")
        assert row[8] == trained.get(key, "")
    whole, training = made["whole_command_s"] / 60, sum(minutes[key] for key in ("ar", "pairs", "ode", "dmd"))
    told = f"took {whole:.1f} minutes there, installation and evaluation included, {training:.1f} of them training"
    assert told in " ".join(text_of("docs/results.md").split())


def test_the_readmes_rows_are_those_of_the_pages():
    """The quickstart's six rows as docs/results.md has them, and the errors against PyTorch as docs/compare.md."""
    whole, short = table_under("docs/results.md", "The quickstart"), table_under("README.md", "What comes out")
    assert len(whole) == len(short) == 6
    for (_, captions, _, motion, _, _, calls, rate, _), row in zip(whole, short, strict=True):
        assert [captions.partition(" %")[0], motion, calls, rate] == row[1:5]
    numbers = re.compile(r"\d+(?:\.\d+)?e-\d+")
    errors = {e for row in table_under("docs/compare.md", "Numbers") for e in numbers.findall(row[2])}
    shown = table_under("README.md", "Compared with PyTorch")
    assert len(shown) == 6 and {e for row in shown for e in numbers.findall(row[2])} <= errors


def test_steering_is_as_recorded(monkeypatch):
    """docs/actions.md has the table that the benchmark makes."""
    monkeypatch.syspath_prepend(str(ROOT))
    made, found = runpy.run_path(str(ROOT / "benchmarks" / "actions.py")), record("actions.json")
    assert made["loop_table"](found) in text_of("docs/actions.md")
    if "form" in found:
        assert made["form_table"](found) in text_of("docs/actions.md")


def test_the_uncertain_world_is_that_of_the_record():
    """Exact teachers by initialisation, then every network of the learned world that is measured, by layout."""
    made = record("study/uncertain.json")
    paths, shown = made["paths"]["0.5"], table_under("docs/results.md", "Measured: exact teachers")
    for (_, init, seeds, *cells), key in zip(shown, paths[0], strict=True):
        of = {m: [seed[key][m] for seed in paths] for m in paths[0][key]}
        assert init == f"`{key}`" and seeds == str(len(paths))
        spreads = [(statistics.fmean(of[m]), statistics.stdev(of[m])) for m in ("motion", "turns", "between")]
        told = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in spreads]
        told.append(f"{statistics.fmean(of['energy']):.4f}")
        assert cells == told
    rows = table_under("docs/results.md", "Measured: the learned world")
    found = {
        (layout, network): [f"{statistics.fmean(of[m].values()):.2f}" for m in LEARNED]
        for layout, networks in made["numbers"].items()
        for network, of in networks.items()
    }
    assert rows and {(row[0], plain(row[1])): row[3:] for row in rows} == found


LEARNED = ("sharpness", "motion", "turns", "between", "energy", "spread")
