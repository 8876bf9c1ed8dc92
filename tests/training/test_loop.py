"""The loop: cadence, curves, and every way a run can end and go on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cfjax.core.errors import Temporary, UserError
from cfjax.training import loop, watchdog
from cfjax.training.checkpoint import CheckpointStore
from cfjax.training.loop import NonFiniteLoss
from cfjax.training.observe import Work
from cfjax.training.watchdog import STALLED
from tests.training.toy import Counted, arrays, run

ROOT = Path(__file__).parents[2]


def start(workdir: Path, *options: str) -> subprocess.Popen:
    """The toy run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/training/toy.py"), str(workdir), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_saved(process: subprocess.Popen, workdir: Path, timeout: float = 300.0) -> None:
    """Waits for the first complete checkpoint."""
    limit = time.monotonic() + timeout
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)


def assert_same_run(one: Path, state_one, two: Path, state_two) -> None:
    for name, value in arrays(state_one).items():
        np.testing.assert_array_equal(value, arrays(state_two)[name], err_msg=name)
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()


def test_cadence_counts_and_batches(tmp_path):
    data = Counted()
    state = run(tmp_path, 11, data=data, log_every=2)
    counts = {name: int(leaf) for name, leaf in arrays(state).items() if re.fullmatch(r"opt/\w+/1/count", name)}
    assert counts == {"opt/student/1/count": 3, "opt/critic/1/count": 11}
    assert int(state.step) == 11 and data.position == 14
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10]
    assert ["student/loss" in line for line in lines] == [True, False, False, True, False, True]
    assert {"critic/loss", "critic/grad_norm", "critic/worst"} <= lines[1].keys()


def test_times_and_rates_have_a_file_of_their_own_and_a_trace_is_written(tmp_path):
    work = Work(tokens=10.0, flops={"critic": 1e6}, peak=1e9, trace=(4, 6))
    run(tmp_path, 11, log_every=5, work=work)
    lines = [json.loads(line) for line in (tmp_path / "performance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10]
    for line in lines:
        rate = line["perf/tokens_per_second"] * line["perf/step_seconds"] / 10.0  # updates per iteration
        assert 1.0 - 1e-6 <= rate <= 2.0 + 1e-6 and 0.0 <= line["perf/data_wait"] <= 1.0
        assert line["perf/mfu"] == pytest.approx(1e6 / 1e9 / line["perf/step_seconds"])
    assert lines[1]["perf/collective_share"] == 0.0  # of one device
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole", 33)
    run(tmp_path / "parts", 14)
    parts = run(tmp_path / "parts", 33)
    for name, value in arrays(whole).items():
        np.testing.assert_array_equal(value, arrays(parts)[name], err_msg=name)


def test_a_finished_run_returns_at_once(tmp_path, capsys):
    first = run(tmp_path, 10)
    data = Counted()
    again = run(tmp_path, 10, data=data)
    assert data.position == 0 and "is done already" in capsys.readouterr().out
    for name, value in arrays(again).items():
        np.testing.assert_array_equal(value, arrays(first)[name])


def test_a_template_is_not_trained_from(tmp_path):
    """Of a run that goes on, the given state is empty: without a checkpoint to fill it nothing starts."""
    with pytest.raises(UserError, match="its checkpoints are gone; run the same command again"):
        run(tmp_path, 4, going_on=True)
    run(tmp_path, 4)
    assert int(run(tmp_path, 6, going_on=True).step) == 6


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    process = start(tmp_path / "killed", "150", "sleep=0.02")
    until_saved(process, tmp_path / "killed")
    time.sleep(random.uniform(0.0, 0.5))
    process.kill()
    process.communicate()
    saved = sorted(int(path.name) for path in (tmp_path / "killed/checkpoints").glob("*") if path.name.isdigit())
    assert saved and saved[-1] < 150
    resumed = run(tmp_path / "killed", 150)
    whole = run(tmp_path / "whole", 150)
    assert_same_run(tmp_path / "whole", whole, tmp_path / "killed", resumed)


def test_killed_inside_a_save_it_goes_on_from_the_one_before(tmp_path):
    process = start(tmp_path / "killed", "40", "die_in_save=20", "width=512")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path / "killed")
    assert store.steps() in ([10], [10, 20])
    store.close()
    resumed = run(tmp_path / "killed", 25, width=512)
    whole = run(tmp_path / "whole", 25, width=512)
    assert_same_run(tmp_path / "whole", whole, tmp_path / "killed", resumed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_polite_signal_saves_and_exits_with_0(tmp_path, name):
    process = start(tmp_path, "100000", "sleep=0.002")
    until_saved(process, tmp_path)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    step = int(re.fullmatch(rf"{name}: saved step (\d+) of 100000 in .*\n", out)[1])
    store = CheckpointStore(tmp_path)
    assert store.steps()[-1] == step
    store.close()


def test_a_doubled_sigterm_is_one_and_a_later_one_kills(monkeypatch):
    """An echo within seconds is not the second signal; Ctrl-C twice is."""
    monkeypatch.setattr(loop, "ECHO_SECONDS", 1.0)
    killed, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "raise_signal", killed.append)
        with loop.StopSignal() as stop:
            assert stop.name(0) is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.name(0) == "SIGTERM" and killed == []
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert killed == [signal.SIGTERM, signal.SIGINT]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    bad = 12 + 3
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, 40, data=Counted(bad=bad))
    records = list(range(bad * 8, bad * 8 + 8))
    assert f"step 12, role 'critic': loss nan, gradient norm nan; batch records {records}" in str(caught.value)
    assert "last checkpoint: step 10" in str(caught.value)
    whole = run(tmp_path / "whole", 20)
    resumed = run(tmp_path, 20)
    assert_same_run(tmp_path, resumed, tmp_path / "whole", whole)


def test_data_that_ends_is_reported(tmp_path):
    class Short(Counted):
        def __next__(self):
            if self.position == 5:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="the data ended at step 4"):
        run(tmp_path, 10, data=Short())


def test_samples_are_drawn_on_time_and_at_the_end(tmp_path):
    seen = []
    run(tmp_path, 11, sample_every=4, sample_fn=lambda state, step, writer: seen.append((step, int(state.step))))
    assert seen == [(4, 4), (8, 8), (11, 11)]


def test_a_first_sample_is_drawn_once_and_keeps_its_curves(tmp_path):
    """Before the first iteration of a fresh run, not of one that goes on; its point survives the restart."""
    seen = []

    def sample(state, step, writer):
        seen.append(step)
        writer.scalars(step, {"look": step})

    for steps in (3, 5):
        run(tmp_path, steps, sample_first=True, sample_fn=sample)
    assert seen == [0, 3, 5]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "look" in line] == [0, 5]  # 3 is withdrawn


def test_the_bar_names_roles_and_losses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tmp_path, 6, progress=True)
    assert re.search(r"6/6 .*step.*student=.*critic=", capsys.readouterr().err)


def test_batches_are_placed_and_accumulated_as_asked(tmp_path):
    placed = []

    def put(batch):
        placed.append(batch["x_BD"].shape)
        return batch

    run(tmp_path, 2, put_batch=put, accumulate={"critic": 4})
    assert placed == [(8, 4)] * 3


@pytest.mark.parametrize(
    "error, code", [(UserError("another stage"), 2), (Temporary("no bucket"), STALLED), (OSError("gone"), STALLED)]
)
def test_one_of_several_processes_that_cannot_go_on_ends_at_once(tmp_path, monkeypatch, capsys, error, code):
    """Those that can are waiting for it; `os._exit` waits for nobody."""

    def leave(status):
        raise SystemExit(status)

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(watchdog, "jax", SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1))
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(CheckpointStore, "restore_latest", restore)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, 3)
    assert ended.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cfjax: process 1 of 2 ends: ") and (code != 2 or "another stage" in last)


def test_a_restore_that_hangs_ends_with_a_line(tmp_path):
    process = start(tmp_path, "100", "hang_in_restore=1", "stall=1.5")
    out, err = process.communicate(timeout=300)
    assert process.returncode == STALLED, (out, err)
    assert "process 0 of 1: no checkpoint was restored in 1.5 s; another process died" in err.splitlines()[-1]


def test_a_run_that_no_longer_moves_ends_with_a_line(tmp_path):
    process = start(tmp_path, "100", "hang_at=24", "stall=1.5")
    out, err = process.communicate(timeout=300)
    assert process.returncode == STALLED, (out, err)
    line = err.splitlines()[-1]
    assert re.match(r"cfjax: process 0 of 1: no iteration ended in 1\.5 s after step 19; .* goes on", line)
    store = CheckpointStore(tmp_path)
    assert 10 in store.steps()
    store.close()
