"""Runs in a bucket are those in a folder, bit for bit; the bucket is a server on this machine with GCS's protocol."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfjax.core import paths
from cfjax.core.errors import Temporary, UserError
from cfjax.experiment.measure import load_evaluation, save_evaluation
from cfjax.models.tokenizer import PieceTokenizer, load_tokenizer
from cfjax.training.checkpoint import CheckpointStore, load_role, open_role, read_meta, stored_roles
from cfjax.training.metrics import EventWriter
from cfjax.training.observe import Tracer
from cfjax.training.state import TrainState
from cfjax.worlds.open import find_world, is_wan_world
from cfjax.worlds.wan import FORMAT, KIND, load_codec, read_record
from tests.bucket import Bucket, serving
from tests.commands import cfjax, tiny
from tests.tiny_tokenizer import spiece_model
from tests.training.toy import arrays, setup, two_roles


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[tuple[Bucket, dict[str, str]]]:
    with serving() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket, environment


@pytest.fixture
def bucket(server) -> Iterator[Bucket]:
    """The bucket, empty and open."""
    server[0].objects.clear()
    yield server[0]
    server[0].forbidden.clear()


def fresh() -> TrainState:
    return setup(two_roles(), 0, 4)[0]


def save(store: CheckpointStore, *steps: int) -> dict[int, dict[str, np.ndarray]]:
    """Saves a state that differs from step to step; what was saved."""
    saved = {}
    for step in steps:
        state = jax.tree.map(
            lambda x, n=step: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else (x + n).astype(x.dtype), fresh()
        )
        saved[step] = arrays(state)
        store.save(step, state, {"position": step}, {"stage": "toy"})
    store.wait()
    return saved


def assert_equal(state: TrainState, saved: dict[str, np.ndarray]) -> None:
    assert arrays(state).keys() == saved.keys()
    for name, value in arrays(state).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)


# ---- checkpoints


def test_checkpoints_are_those_of_a_folder(bucket, tmp_path):
    restored = []
    for workdir in (tmp_path, "gs://bucket/run"):
        store = CheckpointStore(workdir, keep=2)
        assert store.restore_latest(fresh()) is None
        saved = save(store, 1, 2, 3)
        store.close()
        store = CheckpointStore(workdir, keep=2)
        assert store.steps() == [2, 3]
        state, *rest = store.restore_latest(fresh(), stage="toy")
        assert_equal(state, saved[3])
        store.close()
        restored.append((arrays(state), rest, read_meta(workdir), stored_roles(workdir)))
    (here, *local), (there, *remote) = restored
    assert local == remote and all((here[name] == there[name]).all() for name in here)
    assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"2", "3"}
    assert bucket.names("run/") == bucket.names("run/checkpoints/")  # and nothing else is left there


def test_a_role_is_read_alone(bucket):
    store = CheckpointStore("gs://bucket/run")
    saved = save(store, 1)[1]
    store.close()
    prefix = "params/student/"
    wanted = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
    read = open_role("gs://bucket/run", "student")
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(read[name].read(), value)
    model = load_role("gs://bucket/run", "student", fresh().params["student"], stages=("toy",))
    for leaf, name in zip(jax.tree.leaves(model), wanted, strict=True):
        np.testing.assert_array_equal(leaf, wanted[name])
    with pytest.raises(UserError, match="gs://bucket/other: no run here"):
        read_meta("gs://bucket/other")


def cut(bucket: Bucket, prefix: str) -> None:
    """Cuts the largest object in half."""
    largest = max(bucket.names(prefix), key=lambda name: len(bucket.objects[name].data))
    bucket.put(largest, bucket.objects[largest].data[: len(bucket.objects[largest].data) // 2])


def lose(bucket: Bucket, prefix: str) -> None:
    """Removes the arrays."""
    for name in [name for name in bucket.names(prefix) if "/d/" in name]:
        del bucket.objects[name]


@pytest.mark.parametrize("damage", [cut, lose])
def test_a_broken_checkpoint_is_passed_over(bucket, monkeypatch, damage):
    store = CheckpointStore("gs://bucket/run", keep=3)
    saved = save(store, 1, 2)
    store.close()
    damage(bucket, "run/checkpoints/2/state/")
    left, lines = len(bucket.names("run/checkpoints/2/")), []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    store = CheckpointStore("gs://bucket/run", keep=3)
    state, data_state, _ = store.restore_latest(fresh())
    assert_equal(state, saved[1])
    assert data_state == {"position": 1} and store.steps() == [1]
    broken = [line for line in lines if line.startswith("checkpoint gs://bucket/run/checkpoints/2 is broken")]
    assert len(broken) == 1 and "\n" not in broken[0]
    assert len(bucket.names("run/checkpoints_broken/2/")) == left and not bucket.names("run/checkpoints/2/")
    saved = save(store, 2)  # the same number again
    store.close()
    store = CheckpointStore("gs://bucket/run")
    assert_equal(store.restore_latest(fresh())[0], saved[2])
    store.close()


def test_a_save_that_was_killed_is_none(bucket):
    store = CheckpointStore("gs://bucket/run")
    saved = save(store, 1, 2)
    store.close()
    del bucket.objects["run/checkpoints/2/commit_success.txt"]  # the last thing that a save writes
    store = CheckpointStore("gs://bucket/run")
    assert store.steps() == [1]
    assert_equal(store.restore_latest(fresh())[0], saved[1])
    store.close()


def test_old_ones_that_cannot_be_removed_are_left(bucket, monkeypatch):
    store, lines = CheckpointStore("gs://bucket/run", keep=1), []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    bucket.forbidden.add("DELETE")
    save(store, 1, 2, 3)
    store.close()
    assert any("Forbidden" in line and "\n" not in line for line in lines if line.startswith("closing gs://"))
    bucket.forbidden.clear()
    store = CheckpointStore("gs://bucket/run", keep=1)
    saved = save(store, 4)
    store.close()
    assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"4"}  # the next run makes room
    store = CheckpointStore("gs://bucket/run")
    assert_equal(store.restore_latest(fresh())[0], saved[4])
    store.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops futures that failed
def test_a_bucket_that_refuses_is_reported_in_one_line(bucket):
    with pytest.raises(
        UserError, match=r"^gs://other/run/checkpoints: files cannot be written and removed there"
    ) as caught:
        CheckpointStore("gs://other/run")
    assert caught.type is UserError  # no such bucket: to try again would not mend it
    store = CheckpointStore("gs://bucket/run")
    save(store, 1)
    bucket.forbidden.add("POST")
    with pytest.raises(Temporary, match=r"could not be written .*; that of step 1 is good") as caught:
        save(store, 2)
    assert "\n" not in str(caught.value)
    store.close()
    with pytest.raises(Temporary, match=r"cannot be written and removed there .*you may not POST"):
        CheckpointStore("gs://bucket/run")
    bucket.forbidden.add("GET")
    with pytest.raises(Temporary, match=r"^gs://bucket/run/checkpoints: the bucket cannot be reached \(.*\)$"):
        read_meta("gs://bucket/run")
    gc.collect()


# ---- curves and files


def test_curves_go_on_where_the_bucket_left_them(bucket, tmp_path):
    for workdir in (tmp_path / "curves", "gs://bucket/curves"):
        for start in (0, 3):
            with EventWriter(workdir) as writer:
                writer.restart(start)
                for step in range(start, 5):
                    writer.scalars(step, {"loss": step + 10 * start})
                writer.performance(4, {"perf/tokens": 1.0})
    for name in ("metrics.jsonl", "performance.jsonl"):
        assert bucket.objects[f"curves/{name}"].data == (tmp_path / "curves" / name).read_bytes()
    rows = [json.loads(line) for line in bucket.objects["curves/metrics.jsonl"].data.splitlines()]
    assert [row["loss"] for row in rows] == [0, 1, 2, 33, 34]
    events = bucket.names("curves/events/")
    assert len(events) == 2 and len(bucket.names("curves/")) == 4
    for name in events:
        (tmp_path / Path(name).name).write_bytes(bucket.objects[name].data)
    curve = EventAccumulator(str(tmp_path)).Reload().Scalars("1_training/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 0), (1, 1), (2, 2), (3, 33), (4, 34)]


def test_curves_are_sent_when_asked_and_never_a_reason_to_stop(bucket, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    with EventWriter("gs://bucket/run") as writer:
        writer.flush()
        before = len(bucket.requests)
        for step in range(3):
            writer.scalars(step, {"loss": 1.0})
        assert len(bucket.requests) == before  # a point costs no request
        bucket.forbidden.add("POST")
        writer.flush()
        assert len(lines) == 1 and lines[0].startswith("gs://bucket/run: not up to date (OSError: Forbidden")
        bucket.forbidden.clear()
        writer.flush()
        assert bucket.objects["run/metrics.jsonl"].data.count(b"\n") == 3
        monkeypatch.setattr("cfjax.training.metrics.LONGEST", 10)
        writer.scalars(3, {"loss": 1.0})
        writer.flush()
    assert len(bucket.names("run/events/")) == 2  # a long event file is ended, and another begun


@pytest.mark.parametrize("size", [0, 2**20 + 1, 5 * 2**20 + 1])
def test_a_file_of_any_size_is_sent_whole(bucket, size):
    """In one request, in one that aiohttp calls large, in an upload of its own."""
    data = np.random.default_rng(0).bytes(size)
    with paths.replacing("gs://bucket/some/file") as partial:
        partial.write_bytes(data)
    assert bucket.objects["some/file"].data == data


def test_a_trace_is_sent(bucket):
    tracer = Tracer("gs://bucket/run", (1, 2))
    for step in range(3):
        tracer.before(step)
        tracer.after(step, jnp.ones(3) + step)
    assert any(name.endswith(".xplane.pb") for name in bucket.names("run/profile/"))


def test_evaluations_and_other_files(bucket, monkeypatch):
    result = {"summary": {"presence": 0.5}, "captions": ["a"], "videos": np.arange(24, dtype=np.uint8).reshape(2, 12)}
    place = paths.path_of("gs://bucket/evaluation")
    assert load_evaluation(place) is None
    save_evaluation(place, result)
    read = load_evaluation(place)
    np.testing.assert_array_equal(read.pop("videos"), result.pop("videos"))
    assert read == result
    with pytest.raises(RuntimeError), paths.replacing(place / "evaluation.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(bucket.objects["evaluation/evaluation.json"].data) == result


def test_a_world_beside_a_run_is_found_and_read(bucket):
    about = {"negative_prompt": "blurry", "fps": 16}
    record = {"kind": KIND, "format": FORMAT, "text_length": 8, **about}
    bucket.put("wan/world/world.json", json.dumps(record).encode())
    bucket.put("wan/world/tokenizer/spiece.model", spiece_model())
    for recorded in ("world", "", "gs://bucket/wan/world"):
        assert str(find_world("gs://bucket/wan", recorded)) == "gs://bucket/wan/world"
    assert find_world("gs://bucket/other", "world") is None
    assert is_wan_world("gs://bucket/wan/world") and read_record("gs://bucket/wan/world") == record
    tokens = load_tokenizer("gs://bucket/wan/world/tokenizer")
    assert isinstance(tokens, PieceTokenizer)
    with pytest.raises(UserError, match="gs://bucket/wan/world has no vae"):
        load_codec("gs://bucket/wan/world", "vae")


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_large_files_arrive_whole(bucket):
    data = np.random.default_rng(0).bytes(6 << 20)  # beyond what is sent in one piece
    with paths.replacing("gs://bucket/large") as partial:
        partial.write_bytes(data)
    assert bucket.objects["large"].data == data


# ---- what is refused


def test_only_buckets_of_one_kind(monkeypatch):
    assert paths.path_of("runs/x") == Path("runs/x") and not paths.in_bucket(paths.path_of("runs/x"))
    for place in ("s3://bucket/run", "gs://", "http://host/run", str(Path("gs://bucket/run"))):
        with pytest.raises(UserError, match="name a folder, or a bucket's folder as gs://BUCKET/FOLDER"):
            paths.path_of(place)
    monkeypatch.setattr(paths, "PACKAGES", ("no_such_package.for_buckets",))
    with pytest.raises(UserError, match=r"no_such_package.for_buckets is missing.*pip install -e '\.\[gcs\]'"):
        paths.path_of("gs://bucket/run")


@pytest.mark.parametrize(
    ("verb", "config", "workdir", "keys", "message"),
    [
        (
            "train",
            "bidirectional.py:toy",
            "gs://bucket/train",
            {"data__path": "gs://bucket/data"},
            "mapped into memory",
        ),
        ("export", "export.py", "gs://bucket/export", {}, "--workdir=gs://bucket/export: cfjax export writes to this"),
        ("convert", "convert.py", "x", {"source": "gs://bucket/wan"}, "--config.source=gs://bucket/wan: weights are"),
        ("precompute", "precompute.py", "x", {"source": "gs://bucket/clips"}, "--config.source=gs://bucket/clips: "),
        ("evaluate", "evaluate.py", "x", {"run": "gs://bucket/none"}, "no such run directory"),
    ],
)
def test_what_cannot_be_in_a_bucket_is_refused(bucket, capsys, tmp_path, verb, config, workdir, keys, message):
    place = workdir if "://" in workdir else tmp_path / workdir
    assert cfjax(verb, config, place, **keys) == 2
    output = capsys.readouterr().err
    assert message in output and output.count("\n") == 1
    assert not [name for name in bucket.objects if name.startswith(verb)] and not list(tmp_path.iterdir())


# ---- the command line


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_in_the_bucket(server, bucket, tmp_path):
    keys = {**tiny(tmp_path), "steps": 4, "save_every": 2, "sampler__steps": 2}
    assert cfjax("train", "bidirectional.py:toy", tmp_path / "run", **keys) == 0

    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    command = [sys.executable, "-m", "cfjax", "train", "--config=configs/bidirectional.py:toy", *flags]
    root = Path(__file__).parents[2]
    child = subprocess.Popen([*command, "--workdir=gs://bucket/run"], cwd=root, env=os.environ | server[1])
    done = "run/checkpoints/2/commit_success.txt"
    try:
        bucket.written = lambda name: os.kill(child.pid, signal.SIGKILL) if name == done else None
        assert child.wait(300) == -signal.SIGKILL
    finally:
        bucket.written = lambda name: None
        child.kill()
    assert not bucket.names("run/checkpoints/4/commit") and b'"step": 1,' in bucket.objects["run/metrics.jsonl"].data

    assert cfjax("train", "bidirectional.py:toy", "gs://bucket/run", **keys) == 0
    assert bucket.objects["run/metrics.jsonl"].data == (tmp_path / "run/metrics.jsonl").read_bytes()
    for ema in (False, True):
        local, remote = (open_role(run, "student", ema=ema) for run in (tmp_path / "run", "gs://bucket/run"))
        assert local.keys() == remote.keys()
        for name, array in local.items():
            np.testing.assert_array_equal(array.read(), remote[name].read(), err_msg=name)

    for run, out in ((tmp_path / "run", tmp_path / "out"), ("gs://bucket/run", "gs://bucket/out")):
        assert cfjax("evaluate", "evaluate.py", out, run=run, clips=4, batch=4) == 0
    here, there = json.loads((tmp_path / "out/evaluation.json").read_text()), load_evaluation(paths.path_of(str(out)))
    assert (there["step"], there["summary"]) == (4, here["summary"])
