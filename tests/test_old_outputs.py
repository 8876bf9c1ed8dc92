"""What an older commit wrote is opened, gone on with and made again: runs, data, exports, videos.

tests/golden/old_outputs.tar.xz holds its folders and expected.json, what it made of them;
tests/golden/record_old_outputs.py tells which commit that was, and its commands, which are given here again.

Last bits depend on the processor's vector instructions and on the versions of JAX and FFmpeg. What does not pass a
network is compared by hashes where these are the recording machine's (`recorded.machine`). Attention and convolutions
have been rewritten since: of what a network computes, some numbers of weights, averages and latents are compared within
a tolerance, beside names, shapes, integers and settings; 4e-7 was measured with AVX2 in place of AVX-512.
"""

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.convert import LATENTS
from tests.golden import record_old_outputs as recorded

ARCHIVE = Path(recorded.__file__).with_name("old_outputs.tar.xz")
QUICK = "ar"  # the run of the default suite; the others take up to a minute each
# Of weights after two more updates: 4e-7 was seen with AVX2 in place of AVX-512, but Adam can turn the last bits of a
# gradient near 0 into a step of up to its learning rate.
TOLERANCE = 1e-3
# Of a network that computes in bfloat16, with guidance 3: 0.009 was seen with AVX2.
BFLOAT16 = 2e-2
# Values that are others since, by the config's file and the key: now, and then. 0 is the release's own; the budget that
# only proves that everything is wired does so with less.
OTHERWISE = {
    ("convert.py", "latents"): ([0, 0, 0], [*LATENTS[16]]),
    ("quickstart.py", "budgets.tiny.clips"): (64, 256),
    ("quickstart.py", "budgets.tiny.pairs"): (8, 64),
    ("quickstart.py", "budgets.tiny.evaluation"): (16, 24),
}


def each(names: Mapping[str, Any]) -> list[Any]:
    """Parameters: all but one are slow."""
    return [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The archive, unpacked; the current folder, as all its paths are relative."""
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    with contextlib.chdir(root), recorded.miniature_networks():
        yield root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / recorded.EXPECTED).read_text())


@pytest.fixture(scope="module")
def exact(expected: dict[str, Any]) -> bool:
    """Whether the same bits can be asked for; of pictures in an mp4 this takes the same PyAV besides."""
    return {**recorded.machine(), "av": ""} == {**expected["machine"], "av": ""}


def same_arrays(found: Mapping[str, Any], wanted: Mapping[str, Any], exact: bool, tolerance: float = TOLERANCE) -> None:
    """Names, shapes, dtypes and bits; where not `exact`, kept numbers in place of the bits of real arrays."""
    assert list(found) == list(wanted)
    worst = 0.0
    for name, array in wanted.items():
        assert [found[name][key] for key in ("shape", "dtype")] == [array[key] for key in ("shape", "dtype")], name
        if exact or array["dtype"].startswith(("int", "uint")):
            assert found[name]["hash"] == array["hash"], name
        elif "values" in array:
            one, other = np.array(found[name]["values"]), np.array(array["values"])
            worst = max(worst, error := np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-6))
            assert error < tolerance, f"{name}: {one}, not {other}"
    print(f"bits {'compared' if exact else f'not compared, worst relative error {worst:.1e}'}")


def as_before(config: dict, old: dict) -> dict:
    """A config without the keys that it has got since."""
    return {
        key: as_before(config[key], value) if isinstance(value, dict) else config[key] for key, value in old.items()
    }


def same_numbers(found: Any, wanted: Any, exact: bool, where: str = "") -> None:
    """Nested records; where not `exact`, real numbers within the tolerance."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for name in wanted:
            same_numbers(found[name], wanted[name], exact, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same_numbers(one, other, exact, f"{where}[{index}]")
    elif isinstance(wanted, float) and not exact:
        assert found == pytest.approx(wanted, rel=0.01, abs=1e-4), where
    else:
        assert found == wanted, where


def printed(command: Any, *args: Any, **keys: Any) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command(*args, **keys)
    return out.getvalue()


def same_run(run: Path, name: str, expected: dict[str, Any]) -> None:
    same_arrays(recorded.leaves(run), expected["runs"][name]["leaves"], exact=False)
    same_numbers(recorded.curves(run), expected["runs"][name]["curves"], exact=False)


def test_every_key_of_every_shipped_config_is_there_with_its_value(expected):
    for spec, keys in expected["configs"].items():
        file, _, arg = spec.partition(":")
        now = recorded.keys_of(recorded.ROOT / "configs" / file, arg)
        for key in keys:
            written, meant = OTHERWISE.get((file, key), (None, None))
            if meant and now.get(key) == written:
                now[key] = meant
        missing = {key: value for key, value in keys.items() if key not in now or now[key] != value}
        assert not missing, f"{spec}: {missing}"


def test_every_folder_is_what_was_written():
    folders = [f"{group}/{name}" for group in ("runs", "data", "sets", "videos") for name in sorted(listed(group))]
    folders.remove("data/world")
    assert main(["check", *folders, "exported", *recorded.CONVERSIONS]) == 0


def listed(group: str) -> list[str]:
    return [path.name for path in Path(group).iterdir()]


@pytest.mark.parametrize("name", each(recorded.RUNS))
def test_a_run_goes_on(name, expected):
    """From the middle to the same end: weights, averages, optimisers, random numbers, curves."""
    run = Path("resumed", name)
    shutil.copytree(Path("runs", name), run)
    assert f"going on from step {recorded.HALFWAY}\n" in printed(recorded.train, name, str(run))
    same_run(run, name, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", recorded.RUNS)
def test_a_run_from_the_start(name, expected):
    """The same initial weights, batches and noise."""
    recorded.train(name, f"fresh/{name}")
    same_run(Path("fresh", name), name, expected)


@pytest.mark.parametrize("name", each(recorded.VIDEOS))
def test_videos_are_made_again(name, expected):
    wanted = expected["videos"][name]
    recorded.cfjax("generate", "generate.py", f"again/{name}", **recorded.VIDEOS[name])
    found = recorded.videos(Path("again", name))
    computed = wanted["settings"]["network"].get("precision", {}).get("compute")
    tolerance = BFLOAT16 if computed == "bfloat16" else TOLERANCE
    same_arrays(found["latents"], wanted["latents"], exact=False, tolerance=tolerance)
    assert list(found["pictures"]) == list(wanted["pictures"])
    for calls in ("network_calls", "calls"):  # the last block is no longer committed
        for settings in (found["settings"], wanted["settings"]):
            settings.pop(calls, None)
    found["settings"]["config"] = as_before(found["settings"]["config"], wanted["settings"]["config"])
    same_numbers(found["settings"], wanted["settings"], exact=False)


@pytest.mark.parametrize("name", ["dmd", "wan"])
def test_a_finished_video_set_stays_finished(name):
    """Its requests, and the record of what decides a video, are those that today's code would write."""
    keys = {**recorded.VIDEOS[name], "resume": True}
    out = printed(recorded.cfjax, "generate", "generate.py", f"videos/{name}", **keys)
    assert f"videos/{name} is complete, 2 videos; nothing to make" in out


@pytest.mark.slow
def test_data_sets_are_made_again(exact):
    """Clips, the toy world, ODE pairs; prompts and a merged set."""
    recorded.cfjax("precompute", "ode_pairs.py:toy", "none", **{**recorded.PAIRS, "data.path": "new_data"})
    recorded.make_prompt_sets("new_sets")
    for old, new in (("data", "new_data"), ("sets", "new_sets")):
        assert sorted(recorded.files(Path(old))) == sorted(recorded.files(Path(new)))
        if old == "sets":
            for pattern in ("*.np[yz]", "*.safetensors", "*.array_record"):
                assert not exact or recorded.files(Path(old), pattern) == recorded.files(Path(new), pattern)
        for file in sorted(Path(old).rglob("*.npy")):
            one, other = np.load(file), np.load(Path(new, file.relative_to(old)))
            np.testing.assert_allclose(other, one, rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(file))


@pytest.mark.slow
def test_an_export_is_made_again(exact):
    recorded.cfjax("export", "export.py", "exported_again", run="runs/teacher", clips=60)
    old, new = (recorded.files(Path(folder)) for folder in ("exported", "exported_again"))
    assert old.keys() == new.keys()
    for file in old:
        if file.endswith(".safetensors") or file in ("curves.json", "world.json", "tokenizer.json"):
            assert old[file] == new[file], file
    was, now = (json.loads(Path(folder, "model.json").read_text()) for folder in ("exported", "exported_again"))
    same_numbers(recorded.without_measured(now), recorded.without_measured(was), exact)


@pytest.mark.slow
def test_weights_are_converted_again(tmp_path_factory, expected):
    """Nothing is computed: bits anywhere."""
    with contextlib.chdir(tmp_path_factory.mktemp("converted")):
        recorded.write_release(Path())
        for name, (config, keys) in recorded.CONVERSIONS.items():
            recorded.cfjax("convert", config, name, **keys)
            same_arrays(recorded.leaves(Path(name)), expected["converted"][name], exact=True)
    for name in recorded.CONVERSIONS:
        same_arrays(recorded.leaves(Path(name)), expected["converted"][name], exact=True)


@pytest.mark.parametrize("name", each(recorded.PLANS))
def test_named_scopes_of_compiled_updates(name, expected):
    """Profiles, plans and counts of FLOPs know the parts of an update by them."""
    if expected["machine"]["jax"] != jax.__version__:
        pytest.skip("what compilation leaves of them is another version's")
    found = recorded.scopes(name, "plans")
    for role, scopes in expected["scopes"][name].items():
        assert set(scopes) <= set(found[role]), role
