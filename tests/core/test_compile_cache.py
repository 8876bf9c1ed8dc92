"""Second starts: compiled programs are kept by default, whatever else happens to their folder."""

import errno
import json
import os
import subprocess
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from cfjax import __main__ as entry
from cfjax.core import compile_cache as cc
from cfjax.core.compile_cache import compile_cache, folder_name, no_compile_cache, tidy
from cfjax.core.errors import UserError
from cfjax.core.paths import path_of

ROOT = Path(__file__).parents[2]
SETTINGS = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}
DIR, MOST = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of one's own, in a JAX that was told nothing; every program is worth a file (as the variable says)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "home" / "cfjax"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def counted():
    """How often a program was looked for, read and written."""
    counts: Counter[str] = Counter()

    def listen(event: str, **_) -> None:
        counts[event.rpartition("/")[2]] += 1

    monitoring.register_event_listener(listen)
    yield counts
    monitoring.unregister_event_listener(listen)


def start(counted: Counter[str], times: int = 2) -> tuple[int, int]:
    """(programs read, programs written) by a function that this process has not yet seen."""
    counted.clear()
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: x * times + 1)(x), x * times + 1)
    return counted["cache_hits"], counted["cache_misses"]


def programs(home: Path) -> list[Path]:
    return sorted(home.glob(f"*/*{cc.PROGRAM}"))


def test_a_second_start_reads_what_the_first_one_compiled(home, counted):
    before = {name: getattr(jax.config, name) for name in (DIR, MOST)}
    with compile_cache():
        assert start(counted) == (0, 1)
    (program,) = programs(home)
    assert program.parent == home / folder_name()
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in (home, program.parent))  # who writes there runs code
    with compile_cache():
        assert start(counted) == (1, 0)
    assert before == {name: getattr(jax.config, name) for name in before}
    assert start(counted) == (0, 0)


def test_programs_compiled_ahead_of_time_are_kept_too_and_tell_their_memory(counted):
    def compiled():
        jitted = jax.jit(lambda x, y: (x @ y, y @ y @ x), donate_argnums=0)
        return jitted.lower(*2 * [jax.ShapeDtypeStruct((8, 8), "float32")]).compile()

    with compile_cache():
        first = compiled()
    with compile_cache():
        second = compiled()
    assert counted["cache_hits"] == 1
    sizes = ("argument_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    for size in sizes:
        assert getattr(first.memory_analysis(), size) == getattr(second.memory_analysis(), size) > 0
    assert first.cost_analysis()["flops"] == second.cost_analysis()["flops"] > 0
    x, y = np.arange(128, dtype=np.float32).reshape(2, 8, 8)
    for one, other in zip(first(jnp.array(x), y), second(given := jnp.array(x), y), strict=True):
        np.testing.assert_array_equal(one, other)
    assert given.is_deleted()


def test_off_keeps_nothing(home, counted):
    with compile_cache("off"):
        assert start(counted) == (0, 0)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with compile_cache(), compile_cache(str(home / "named")):
            assert start(counted) == (0, 0)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    with compile_cache():
        with no_compile_cache():
            assert start(counted) == (0, 0)
        assert start(counted) == (0, 1)


def test_what_jax_was_told_stands_but_for_the_flag(home, tmp_path, monkeypatch, counted):
    theirs, named = tmp_path / "theirs", tmp_path / "named"
    jax.config.update(DIR, str(theirs))
    with compile_cache():
        assert getattr(jax.config, MOST) == -1 and start(counted) == (0, 1)
    assert len(list(theirs.glob(f"*{cc.PROGRAM}"))) == 1 and not home.exists()
    with compile_cache(str(named)):
        assert start(counted) == (0, 1)
    assert len(programs(named)) == 1
    monkeypatch.setenv(MOST.upper(), "77")
    jax.config.update(MOST, 77)
    try:
        with compile_cache(str(named)):
            assert getattr(jax.config, MOST) == 77
    finally:
        jax.config.update(MOST, -1)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    with compile_cache(str(named)):
        assert jax.config.jax_persistent_cache_min_compile_time_secs == cc.LEAST_SECONDS


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[::-1]])
def test_a_broken_program_is_compiled_and_written_again_without_a_warning(home, counted, damage):
    with compile_cache():
        start(counted)
        start(counted, times=5)
    whole = {path: path.read_bytes() for path in programs(home)}
    for path, data in whole.items():
        path.write_bytes(damage(data))
    with warnings.catch_warnings(record=True) as caught, compile_cache():
        assert start(counted) == (0, 1)
    assert not caught
    with compile_cache():
        assert start(counted) == (1, 0)
    assert sum(len(path.read_bytes()) > len(damage(whole[path])) for path in programs(home)) >= 1


def test_what_a_killed_process_left_keeps_nobody_from_writing(home, counted):
    """JAX writes a program and then its time; without the time it can write no other program."""
    with compile_cache():
        start(counted)
        lost = programs(home)[0].with_name(f"jit_f-{'0' * 64}{cc.PROGRAM}")
        lost.write_bytes(b"half")
        start(counted, times=3)  # cannot be written, which clears the way
        assert not lost.exists() and start(counted, times=3) == (0, 1)
        lost.write_bytes(b"half")
    with compile_cache():
        assert not lost.exists() and start(counted, times=4) == (0, 1)


def test_other_warnings_are_shown(counted):
    with warnings.catch_warnings(record=True) as caught, compile_cache():
        warnings.simplefilter("always")
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_a_lock_that_cannot_be_had_ends_the_waiting(home, counted):
    message = "Error reading persistent compilation cache entry for 'jit_f': Timeout: the lock cannot be acquired"
    with compile_cache():
        start(counted)
        warnings.warn(message, UserWarning, stacklevel=1)
        assert start(counted) == (0, 0)
    with compile_cache():
        assert start(counted) == (1, 0)


def test_a_folder_that_others_are_at_work_in_is_used_as_it_is(home, counted, monkeypatch):
    with compile_cache():
        start(counted)
    monkeypatch.setattr(cc, "_LOCK_SECONDS", 0.05)
    held = FileLock(home / folder_name() / cc.LOCK)
    with held, compile_cache():
        held.release()
        assert start(counted) == (1, 0)


def unwritable(root: Path, monkeypatch) -> None:
    root.parent.write_text("a file")


def foreign(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4321)


def no_locks(root: Path, monkeypatch) -> None:
    def lock(*args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(cc, "FileLock", lock)


def homeless(root: Path, monkeypatch) -> None:
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)


def read_only(root: Path, monkeypatch) -> None:
    """As a mount is: for any user, the one that tests run as too."""
    make = os.mkdir

    def refused(path, *args, **kwargs):
        if Path(path).is_relative_to(root.parent):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refused)


@pytest.mark.parametrize("trouble", [unwritable, foreign, no_locks, homeless, read_only])
def test_a_home_that_cannot_be_used_is_done_without(home, monkeypatch, counted, trouble):
    trouble(home, monkeypatch)
    with compile_cache():
        assert getattr(jax.config, DIR) is None and start(counted) == (0, 0)


def test_a_folder_that_was_named_must_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"--compile_cache=.*file.*: .*; name a folder that can be written, or off"
    with pytest.raises(UserError, match=message), compile_cache(str(tmp_path / "file")):
        pass


def test_the_folder_is_bounded(home, counted, monkeypatch):
    with compile_cache():
        start(counted)
    size = programs(home)[0].stat().st_size
    monkeypatch.setattr(cc, "MOST_BYTES", int(2.5 * size))
    with compile_cache():
        for times in (3, 4, 5):
            start(counted, times=times)
        assert start(counted, times=5) == (1, 0) and start(counted) == (0, 1)
    assert sum(path.stat().st_size for path in programs(home)) <= cc.MOST_BYTES
    monkeypatch.setattr(cc, "MOST_PROGRAMS", 1)
    tidy(home / folder_name())
    assert len(programs(home)) == 1
    with compile_cache():
        assert start(counted) == (1, 0)  # the one that was used last
    monkeypatch.setattr(cc, "MOST_BYTES", 10)
    with compile_cache():
        start(counted, times=6)  # larger than all that may be there: without a warning
    assert len(programs(home)) == 1


def test_folders_that_nobody_uses_are_removed(home, counted):
    with compile_cache():
        start(counted)
    old, new, other = home / "jax-0.8.1-py3.11-0123abcd", home / "jax-0.9.0-py3.12-0123abcd", home / "mine"
    for folder in (old, new, other):
        folder.mkdir()
    for folder in (old, other, home / folder_name()):
        os.utime(folder, (0, 0))
    with compile_cache():
        assert start(counted) == (1, 0)
    assert not old.exists() and new.exists() and other.exists()


X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
cpu MHz\t\t: 2300.000
flags\t\t: fpu avx2 avx512f

processor\t: 1
vendor_id\t: GenuineIntel
cpu MHz\t\t: 3100.000
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def test_programs_of_another_processor_are_not_loaded():
    """XLA would load them, and may die of an instruction that is not there."""
    assert folder_name() == folder_name() and "/" not in folder_name()
    same = [X86, X86.replace("2300", "1200"), X86 + "\nprocessor\t: 2\n"]
    assert len({*map(folder_name, same)}) == 1
    others = [X86, X86.replace(" avx512f", ""), X86.replace(": 85", ": 106"), ARM, ARM.replace(" sve", ""), ""]
    assert len({*map(folder_name, others)}) == len(others)


def test_processes_of_one_run_share_a_folder_that_was_named_or_none(home, tmp_path, counted):
    """XLA shares out the tuning of GPU kernels: all of them find a program, or all compile it."""
    with compile_cache(joined=True):
        assert start(counted) == (0, 0)
    assert not home.exists()
    with compile_cache(str(tmp_path / "named"), joined=True):
        assert getattr(jax.config, MOST) == -1 and start(counted) == (0, 1)  # no bound: no lock to wait for
    with compile_cache(str(tmp_path / "named")):
        assert start(counted) == (0, 1)  # a bound would need the times that the others do not write
    with compile_cache(str(tmp_path / "named"), joined=True):
        assert start(counted) == (1, 0)


def test_a_bucket_has_no_bound_and_is_left_to_jax(home):
    """JAX's lock would be in a folder gs: of this machine."""
    with compile_cache("gs://bucket/programs/"):
        assert getattr(jax.config, DIR) == f"gs://bucket/programs/{folder_name()}"
        assert getattr(jax.config, MOST) == -1
    assert not home.exists() and not path_of("gs:").exists()


def test_every_verb_that_compiles_takes_the_flag(home, tmp_path, monkeypatch, capsys):
    seen = []
    for verb in entry.VERBS:
        module = types.ModuleType(f"cfjax.{verb}")
        module.main = lambda argv: seen.append(getattr(jax.config, DIR))
        monkeypatch.setitem(sys.modules, f"cfjax.{verb}", module)
        assert entry.main([verb]) == entry.main([verb, f"--compile_cache={tmp_path / 'named'}"]) == 0
        own, named = seen[-2:]
        if verb not in entry.COMPILES_NOTHING:
            assert Path(own).parent == home and Path(named).parent == tmp_path / "named"
    assert entry.main(["generate", "--compile_cache"]) == 2
    assert capsys.readouterr().err == "cfjax generate: --compile_cache needs a value: --compile_cache=FOLDER\n"


# ---- whole processes

COUNTED = """
import json, sys
from collections import Counter
from jax import monitoring
counts = Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
"""
TWO = """
import jax, numpy as np
from cfjax.core.compile_cache import compile_cache
with compile_cache():
    print("ready", flush=True)
    sys.stdin.readline()
    for times in range(12):
        assert jax.jit(lambda x: x * times + 1)(np.ones(3))[0] == times + 1
print(json.dumps(counts))
"""


def process(code: str, *argv: str, **environment: str) -> subprocess.Popen:
    every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COUNTED + code, *argv]
    return subprocess.Popen(command, env=os.environ | every, stdin=-1, stdout=-1, stderr=-1, text=True)


def ended(child: subprocess.Popen, say: str = "") -> dict[str, int]:
    out, errors = child.communicate(say, timeout=600)
    assert child.returncode == 0 and "Error" not in errors, errors
    return json.loads(out.splitlines()[-1])


def test_two_processes_at_once(home):
    children = [process(TWO) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    counts = [ended(child) for child in children]
    assert all(count["compile_requests_use_cache"] >= 12 for count in counts)
    names = {path.name.removesuffix(cc.PROGRAM) for path in programs(home)}
    assert len(names) >= 12
    assert names == {path.name.removesuffix(cc.TIME) for path in home.glob(f"*/*{cc.TIME}")}


GENERATE = """
from cfjax.__main__ import main
assert main(["generate", *sys.argv[1:]]) == 0
print(json.dumps(counts))
"""


def latents_of(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)["latents_FHWC"]


def test_generate_compiles_nothing_the_second_time_and_makes_the_same_bits(home, tmp_path):
    asked = ("run=toy_teacher", "videos=1", "sampler.solver=euler", "sampler.solver_steps=2", "save_latents=True")

    def generating(workdir: str, *more: str) -> subprocess.Popen:
        keys = [f"--config.{key}" for key in (*asked, "progress=False")]
        return process(GENERATE, *keys, f"--workdir={tmp_path / workdir}", *more)

    without, first = generating("without", "--compile_cache=off"), generating("first")
    assert "compile_requests_use_cache" not in ended(without)
    counts = ended(first)
    assert counts["cache_misses"] == counts["compile_requests_use_cache"] > 10 and "cache_hits" not in counts
    counts = ended(generating("second"))
    assert counts["cache_hits"] == counts["compile_requests_use_cache"] and "cache_misses" not in counts
    made = [latents_of(tmp_path / workdir) for workdir in ("without", "first", "second")]
    for other in made[1:]:
        np.testing.assert_array_equal(made[0], other)
