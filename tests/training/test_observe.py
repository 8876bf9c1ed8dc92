"""Where time goes: the clock's arithmetic, and collectives found in a real trace."""

import platform

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfjax.core.errors import UserError
from cfjax.training.observe import StepClock, Tracer, Work, collective_share, trace_window


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_clock_counts_training_only():
    time = Time()
    clock = StepClock(Work(30.0, {"student": 20.0}, 100.0, counts=lambda: {"data/broken_records": 2.0}), now=time)
    assert clock.values() == {}
    for _ in range(4):
        with clock.waiting():
            time.now += 0.5
        clock.updated("student")
        time.now += 1.5
        clock.step()
    with clock.outside():
        time.now += 100.0
    values = clock.values()
    assert values["perf/step_seconds"] == pytest.approx(2.0)
    assert values["perf/tokens_per_second"] == pytest.approx(15.0)
    assert values["perf/data_wait"] == pytest.approx(0.25) and values["data/broken_records"] == 2.0
    assert values["perf/mfu"] == pytest.approx(4 * 20.0 / 8.0 / 100.0)
    time.now += 3.0
    clock.step()
    assert clock.values()["perf/step_seconds"] == pytest.approx(3.0)  # a new start


def test_a_trace_window_is_two_numbers():
    assert trace_window("") is None and trace_window("100:105") == (100, 105)
    for wrong in ("100", "5:5", "a:b"):
        with pytest.raises(UserError, match="100:105"):
            trace_window(wrong)


@pytest.mark.parametrize("axes", [4, 1])
def test_a_trace_shows_the_share_of_collectives(tmp_path, axes):
    mesh = Mesh(jax.devices()[:axes], ("data",))
    x = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec("data", None)))
    total = jax.jit(lambda x: jnp.sum(x @ x.T))
    total(x)
    tracer = Tracer(tmp_path, (1, 3))
    shares = {}
    for step in range(5):
        tracer.before(step)
        shares |= tracer.after(step, total(x))
    (file,) = tmp_path.rglob("*.xplane.pb")
    assert shares == {"perf/collective_share": collective_share(file)}
    share = shares["perf/collective_share"]
    print(f"collective share on {axes} devices: {share:.3f}")
    assert 0.05 < share < 1.0 if axes > 1 else share == 0.0


def traced(workdir):
    """What a tracer tells of one iteration."""
    tracer = Tracer(workdir, (0, 1))
    tracer.before(0)
    return tracer.after(0, jnp.ones(3) + 1)


def test_of_many_hosts_the_first_one_shows_its_own_share(tmp_path, monkeypatch):
    other = tmp_path / "profile/plugins/profile/9999_12_31_23_59_59/zz.xplane.pb"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half written")
    assert traced(tmp_path).keys() == {"perf/collective_share"}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert traced(tmp_path) == {}


def test_a_trace_that_cannot_be_read_or_begun_is_a_warning(tmp_path, monkeypatch):
    lines, stop = [], jax.profiler.stop_trace
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))

    def cut():
        stop()
        for file in tmp_path.rglob(f"{platform.node()}.xplane.pb"):
            file.write_bytes(b"half written")

    monkeypatch.setattr(jax.profiler, "stop_trace", cut)
    assert traced(tmp_path) == {} and len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}/profile: no trace, or no share of collectives (") and "\n" not in lines[0]
    with jax.profiler.trace(str(tmp_path / "another")):  # only one may run
        assert traced(tmp_path) == {} and len(lines) == 2
