"""Every test sees eight CPU devices, strict rank promotion, and a compilation cache that outlives the run."""

import os
from pathlib import Path

from tests.quick import QUICK

# Eight devices share few cores: on a busy machine one may come to a collective long after the others, which XLA would
# take for a deadlock after 40 seconds.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",
        QUICK,
    )
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Verbs leave what JAX was told as it is, and nothing is written to the user's home.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import gc
import time
from collections.abc import Iterator

import jax
import pytest

MAPS = Path("/proc/self/maps")
MANY_MAPS, TOO_MANY_MAPS = 20_000, 40_000
COMPILES = 0.5  # seconds: a test that is quicker has compiled next to nothing
# The files that take longest begin first, slow tests or not: the last to end are short ones, and no worker waits long.
# Not beside each other stand those whose programs are the same: the later one finds them in the cache.
LONGEST = (
    "test_quickstart", "training/test_meshes", "studies/test_walk", "training/test_processes", "test_configs",
    "rollout/test_self_forcing", "objectives/test_dmd", "comparison/test_reference", "test_old_outputs",
    "studies/test_ablation", "test_rehearsal", "test_plan", "objectives/test_ode_regression", "test_generate",
    "test_device_script", "memory/test_policies", "memory/test_heads", "rollout/test_batched", "rollout/test_generate",
    "rollout/test_long_video", "rollout/test_rolling_training", "models/test_wan", "objectives/test_gan",
    "test_lora_runs", "test_long_runs",
)  # fmt: skip


def make_room(most: int) -> None:
    """Every compiled program keeps memory mappings, of which Linux allows a process 65530; beyond that it dies."""
    if MAPS.exists() and MAPS.read_text().count("\n") > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def room_after_a_file() -> Iterator[None]:
    yield
    make_room(MANY_MAPS)


@pytest.fixture(autouse=True)
def room_after_a_test() -> Iterator[None]:
    """A file of many programs (eight devices, every stage) may need room before its end."""
    begun = time.monotonic()
    yield
    if time.monotonic() - begun > COMPILES:
        make_room(TOO_MANY_MAPS)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselect with -m 'not slow'")
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: collecting garbage, which tracing makes much of, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
