"""The house rules that code can hold: who may import whom, no print, short files, docstrings everywhere."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfjax.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cfjax"

# Which rooms of cfjax a room may import besides itself. Verbs may import any room.
MAY_IMPORT = {
    "core": set(),
    "flow": {"core"},
    "nn": {"core"},
    "memory": {"core", "nn"},
    "models": {"core", "flow", "nn"},
    "rollout": {"core", "flow", "nn", "memory", "models"},
    "objectives": {"core", "flow", "nn", "models", "rollout"},
    "training": {"core", "flow", "nn", "models", "rollout", "objectives"},
    "data": {"core"},
    "conversion": {"core", "models"},
    "evaluation": {"core", "flow", "data"},
    "planning": {"core"},
    "worlds": {"core", "data", "models", "training"},
    "experiment": {"core", "flow", "nn", "memory", "models", "rollout", "objectives", "training"}
    | {"data", "evaluation", "planning", "worlds"},
    "serving": {"core", "data", "evaluation", "experiment", "memory", "models", "rollout", "worlds"},
    "studies": {"core", "flow", "nn", "models", "rollout", "objectives", "training", "evaluation"},
    "comparison": {"core", "flow", "nn", "models", "rollout", "objectives", "conversion"},
}
# Top-level files of cfjax are verbs, but for the entry point, and for modules under names that scripts and configs of
# one's own may import, which hold nothing but imports.
OLD_NAMES = {"presets.py", "runs.py", "world.py", "wan_world.py"}
NOT_VERBS = {"__init__.py", "__main__.py", *OLD_NAMES}
MADE_OF_VERBS = {"quickstart.py", "study.py"}
# Training, plans and preview samples take an `Experiment`; only what makes one, or opens a run, reads a ConfigDict.
WITHOUT_CONFIG = {"train.py", "plan.py", "experiment/preview.py", "experiment/programs.py", "experiment/notes.py"}
# The files of experiment/ in the order in which they may import each other, from the first to the last.
EXPERIMENT = (
    *("presets", "record", "lora", "reference", "stage", "data", "networks"),
    *("adapters", "build"),  # a config has become an Experiment
    *("programs", "notes", "resume", "preview"),  # what is done with one
    *(
        "checks",
        "pictures",
        "runs",
        "experts",
        "job",
        "batches",
        "measure",
        "measure_streams",
        "measure_turns",
        "speed",
        "streams",
        "stream_plan",
    ),  # what was trained, opened
)
ML_COLLECTIONS_IN_LIBRARY = {"core/cli.py"}  # besides experiment/: ConfigDict stops there
# Where arrays are made contiguous for the library, which takes their memory as it lies.
WRITES_SAFETENSORS = {"core/tensor_files.py"}
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 60, 10


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


FILES = {relative(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
CONFIGS = {path.name: ast.parse(path.read_text()) for path in sorted((ROOT / "configs").rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports anywhere, `from a import b` as a.b (b may be a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(tree: ast.Module) -> Iterator[str]:
    """The rooms or top-level files of cfjax that a file imports."""
    return (name.split(".")[1] for name in imports(tree) if name.startswith("cfjax."))


def room_of(file: str) -> str | None:
    return file.split("/")[0] if "/" in file else None


@pytest.mark.parametrize("room", sorted({room_of(file) for file in FILES} - {None}))
def test_imports_run_one_way(room):
    allowed = MAY_IMPORT[room] | {room}
    wrong = [(f, r) for f, tree in FILES.items() if room_of(f) == room for r in rooms(tree) if r not in allowed]
    assert not wrong


def test_the_table_has_no_cycle_and_no_empty_room():
    assert MAY_IMPORT.keys() == {room_of(file) for file in FILES} - {None}
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, needs in left.items() if not needs & left.keys()]
        assert free, f"cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_the_report_writer_stands_alone():
    """A report is made from files of results: it needs neither models nor data."""
    assert set(rooms(FILES["evaluation/report.py"])) <= {"core", "evaluation"}


def test_only_verbs_see_a_config_dict():
    found = {
        f
        for f, tree in FILES.items()
        if room_of(f) not in (None, "experiment") and any(n.startswith("ml_collections") for n in imports(tree))
    }
    assert found <= ML_COLLECTIONS_IN_LIBRARY


def test_the_files_of_experiment_import_in_order():
    assert set(EXPERIMENT) == {Path(file).stem for file in FILES if room_of(file) == "experiment"} - {"__init__"}
    for place, name in enumerate(EXPERIMENT):
        used = {
            module.split(".")[2] for module in imports(FILES[f"experiment/{name}.py"]) if "cfjax.experiment." in module
        }
        assert used <= set(EXPERIMENT[:place]), name


def test_training_plans_and_previews_take_an_experiment():
    wrong = {f for f in WITHOUT_CONFIG if any(n.startswith("ml_collections") for n in imports(FILES[f]))}
    assert not wrong


def test_top_level_files_are_verbs():
    """Each is a command of `cfjax`, with a `main`."""
    verbs = {file.removesuffix(".py") for file in FILES if room_of(file) is None and file not in NOT_VERBS}
    assert verbs == set(VERBS)
    for verb in verbs:
        assert any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in FILES[f"{verb}.py"].body), verb


def test_old_names_are_imports_alone_that_nothing_of_ours_uses():
    for file in OLD_NAMES:
        docstring, *rest = FILES[file].body
        assert isinstance(docstring, ast.Expr) and all(isinstance(node, ast.ImportFrom) for node in rest), file
    old = {f"cfjax.{file.removesuffix('.py')}" for file in OLD_NAMES}
    trees = {**FILES, **CONFIGS}
    assert not [file for file, tree in trees.items() if old & {".".join(n.split(".")[:2]) for n in imports(tree)}]


def test_a_verb_imports_no_verb():
    """But for those that are made of verbs."""
    found = {}
    for verb in VERBS:
        names = {name.split(".")[1] for name in imports(FILES[f"{verb}.py"]) if name.startswith("cfjax.")}
        found[f"{verb}.py"] = names & set(VERBS)
    assert {file for file, names in found.items() if names} <= MADE_OF_VERBS


def writes_safetensors(tree: ast.Module) -> bool:
    """Whether a file imports one of the library's writers, or all of a module that has one."""
    names = {name for name in imports(tree) if name.split(".")[0] == "safetensors"}
    writers = {"save", "save_file", "save_model", "serialize", "serialize_file"}
    return any(name.split(".")[-1] in writers | {"safetensors", "numpy", "torch", "flax"} for name in names)


def test_one_file_writes_safetensors():
    assert {file for file, tree in FILES.items() if writes_safetensors(tree)} == WRITES_SAFETENSORS


def test_configs_import_nothing_of_cfjax_but_presets():
    wrong = [(f, n) for f, tree in CONFIGS.items() for n in imports(tree) if n.startswith("cfjax")]
    assert not [(f, n) for f, n in wrong if not n.startswith("cfjax.experiment.presets")]


def test_nobody_prints():
    calls = [
        f"{file}:{node.lineno}"
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, "speak through core.console.say, log through absl.logging"


def test_files_are_short():
    lengths = {file: len((PACKAGE / file).read_text().splitlines()) for file in FILES}
    assert not {file: n for file, n in lengths.items() if n > MAX_LINES}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters, but for a method's own object or class."""
    args = function.args
    named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg]
    return [name for name in named if name not in ("self", "cls")]


def test_functions_are_short_and_take_few_parameters():
    long, wide = {}, {}
    for file, tree in (FILES | {f"configs/{name}": tree for name, tree in CONFIGS.items()}).items():
        for node in functions(tree):
            long[f"{file}:{node.name}"] = node.end_lineno - node.lineno + 1
            wide[f"{file}:{node.name}"] = len(parameters(node))
    print(
        f"longest {max(long.items(), key=lambda item: item[1])}, widest {max(wide.items(), key=lambda item: item[1])}"
    )
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}
    assert not {name: count for name, count in wide.items() if count > MAX_PARAMETERS}


def opaque_keywords(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[int]:
    """Lines of calls with `**values` where the function made `values` as {"name": ...}: no type checker sees them."""
    made = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        if isinstance(node.value, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.value.keys)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    splats = [(call.lineno, keyword.value) for call in calls for keyword in call.keywords if keyword.arg is None]
    return [line for line, value in splats if getattr(value, "id", "") in made]


def test_keyword_arguments_are_written_where_they_are_passed():
    """But for calls of the PyTorch reference, whose classes take any."""
    ours = {file: tree for file, tree in FILES.items() if not file.startswith("comparison/reference")}
    wrong = [f"{file}:{line}" for file, tree in ours.items() for f in functions(tree) for line in opaque_keywords(f)]
    assert not wrong


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "findings").iterdir()))
def test_a_finding_stands_alone(file):
    """Pinned versions, a folder of its own, nothing of cfjax, and a note of what was seen."""
    path = ROOT / "findings" / file
    text = path.read_text()
    assert path.suffix == ".sh" and os.access(path, os.X_OK) and "mktemp -d" in text and "# Output seen" in text
    assert re.search(r"pip\" install .*==", text) and "cfjax" not in text


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module without a docstring."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("file", FILES)
def test_every_module_and_public_name_says_what_it_is(file):
    assert ast.get_docstring(FILES[file]), "the module needs a docstring"
    assert not undocumented(FILES[file])


@pytest.mark.parametrize("file", CONFIGS)
def test_every_config_says_its_command(file):
    assert "cfjax " in (ast.get_docstring(CONFIGS[file]) or "")
