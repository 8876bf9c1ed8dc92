"""How verbs read their command line: `--config=file.py[:arg]`, `--config.a.b=value`, `--workdir`, flags of their own.

Every mistake becomes a `UserError` of one line that names what is wrong and what would be right.
"""

import ast
import difflib
import os
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import UnsupportedOperationError

from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.keys import help_lines, hint_for
from cfjax.core.paths import in_bucket, local_path, path_of
from cfjax.core.settings import check_settings
from cfjax.core.tuples import parse_tuple

PACKAGE = Path(__file__).parents[1]
# What tuples hold that configs leave empty, by the last word of their keys.
EMPTY = {
    "compare": str,
    "dmd": str,
    "first_steps": int,
    "init_stages": str,
    "layers": int,
    "origins": str,
    "score": str,
    "seeds": int,
    "steps": int,
}
PROSE = {"prompt", "negative_prompt"}  # texts that may begin in any way
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # would break lines of messages and of scripts
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """A flag of one verb; its type is `kind`, one of str, int, float, bool; `choices` bounds a str."""

    name: str
    help: str
    kind: type = str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()


COMPILE_CACHE = Flag(
    "compile_cache",
    "folder of compiled programs for the next start (docs/performance.md); off: none; '': ~/.cache/cfjax",
    default="",
)


def _define(values: flags.FlagValues, flag: Flag) -> None:
    if flag.choices:
        flags.DEFINE_enum(flag.name, flag.default, list(flag.choices), flag.help, flag_values=values)
    else:
        kinds: dict[type, Any] = {
            str: flags.DEFINE_string,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            bool: flags.DEFINE_bool,
        }
        kinds[flag.kind](flag.name, flag.default, flag.help, flag_values=values)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def take_flag(name: str, argv: Sequence[str], example: str) -> tuple[str | None, list[str]]:
    """(the value of --NAME or None, the rest).

    Raises:
      UserError: there is no value.
    """
    value, rest, index = None, [], 0
    while index < len(argv):
        found = re.fullmatch(rf"--?{name}(?:=(.*))?", argv[index], re.DOTALL)
        if found is None:
            rest.append(argv[index])
        elif found[1] is not None:
            value = found[1]
        elif index + 1 < len(argv):
            index += 1
            value = argv[index]
        else:
            raise UserError(f"--{name} needs a value: --{name}={example}")
        index += 1
    return value, rest


def config_file(spec: str) -> tuple[Path, str]:
    """The file and the argument of `file.py[:arg]`.

    configs/NAME.py is the current folder's, or else the one that came with the package: beside it in a checkout, in it
    where it was installed.

    Raises:
      UserError: there is no such file.
    """
    name, _, arg = spec.partition(":")
    path, candidates = Path(name), [Path()]
    if path.parts[:1] == ("configs",):
        candidates.append(PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent)
    for place in candidates:
        if (place / path).is_file():
            return place / path, arg
    near = {str(path.parent / file.name) for place in candidates for file in (place / path.parent).glob("*.py")}
    raise UserError(f"--config: no file {path}{_nearest(str(path), sorted(near))}")


def _located(spec: str) -> str:
    """`spec` with the path of the file that is read."""
    path, arg = config_file(spec)
    return f"{path}:{arg}" if arg else str(path)


def _load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `spec` with its overrides, on flag values of its own."""
    values = flags.FlagValues()
    argv = [f"--config={spec}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(["cfjax", *argv])
    return values["config"].value


def _load_plain(spec: str) -> ConfigDict:
    """The config without overrides; an error that its file raises is reported with its line number."""
    try:
        return _load(spec)
    except Exception as error:
        root: BaseException = error
        while root.__context__ is not None:
            root = root.__context__
        if isinstance(root, UserError):
            raise UserError(str(root)) from None
        path = spec.partition(":")[0]
        line = traceback.extract_tb(root.__traceback__)[-1].lineno
        line = root.lineno if isinstance(root, SyntaxError) else line
        reason = " ".join(str(root).split())
        raise UserError(f"--config={spec}: {path}, line {line}: {type(root).__name__}: {reason}") from error


def _load_overridden(spec: str, plain: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config with overrides of known keys; an error for a value of another type names the default."""
    known = keys_of(plain)
    given: dict[str, str] = {}  # as ml_collections reads them; of a scalar the last one holds
    for arg in overrides:
        key = _override_key(arg)
        old = known[key]
        if isinstance(old, tuple):
            if key in given:  # they would be joined into a longer one
                raise UserError(f"{arg}: --config.{key} is given twice; write one --config.{key}=A,B")
            given[key] = f"--config.{key}={_tuple_of(arg, key, old)!r}"
        else:
            _check_value(spec, arg, key, old)
            given[arg.partition("=")[0].lstrip("-")] = arg
    return _load(spec, list(given.values()))


def _tuple_of(arg: str, key: str, old: tuple[Any, ...]) -> tuple[Any, ...]:
    name, _, text = arg.partition("=")
    if name.lstrip("-") != f"config.{key}":
        raise UserError(f"{arg}: a tuple is set as a whole, as --config.{key}={','.join(map(str, old)) or 'A,B'}")
    return parse_tuple(f"--config.{key}", text, old, EMPTY.get(key.rpartition(".")[2]))


def _check_value(spec: str, arg: str, key: str, old: Any) -> None:
    """Raises UserError unless the override sets a value that the key may have."""
    try:
        keys_of(_load(spec, [arg]))[key]
    except UnsupportedOperationError:
        raise UserError(f"{arg}: a value of type {type(old).__name__} can be set in the config's file only") from None
    except (flags.Error, TypeError, ValueError, IndexError):
        raise UserError(f"{arg}: needs a value of type {type(old).__name__}, as the default {old!r}") from None


def _override_key(arg: str) -> str:
    found = _OVERRIDE.fullmatch(arg)
    assert found is not None
    return re.sub(r"\[.*\]$", "", found[1])


def given_keys(argv: Sequence[str]) -> set[str]:
    """The keys of the config that a command line sets, as "objective.shift"."""
    return {_override_key(arg) for arg in argv if _OVERRIDE.fullmatch(arg)}


def keys_of(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Leaf keys 'a.b' with their values, and the groups themselves."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out[prefix + name] = value
        if isinstance(value, ConfigDict):
            out |= keys_of(value, f"{prefix}{name}.")
    return out


def _check_overrides(spec: str, config: ConfigDict, overrides: Sequence[str]) -> None:
    known = keys_of(config)
    for arg in overrides:
        key = _override_key(arg)
        if key not in known:
            leaves = [name for name in known if not isinstance(known[name], ConfigDict)]
            raise UserError(f"--config.{key}: {spec} has no such key{hint_for(key, leaves)}")
        if isinstance(known[key], ConfigDict):
            inside = next((name for name in known if name.startswith(f"{key}.")), f"{key}.NAME")
            raise UserError(f"--config.{key} is a group; set one of its keys, as --config.{inside}=value")


def _docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[Any] = [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_config")]
    return "\n\n".join(text for text in (ast.get_docstring(node) for node in nodes) if text)


def _help(verb: str, description: str, own: Sequence[Flag], spec: str | None, default_config: str | None) -> None:
    head = "[--config=configs/NAME.py[:arg]]" if default_config else "--config=configs/NAME.py[:arg]"
    say(f"usage: cfjax {verb} {head} [--config.KEY=value ...] [--FLAG=value ...]\n\n{description}\n\nflags:")
    for flag in own:
        tail = "required" if flag.required else f"default: {flag.default if flag.default != '' else repr('')}"
        say(f"  --{flag.name}: {flag.help} ({tail})")
    if spec is None:
        return say("\nadd --config=FILE to see that config's purpose and keys")
    say(f"\n{spec}:\n{_docstrings(Path(spec.partition(':')[0]))}\n\nkeys:")
    leaves = {key: value for key, value in keys_of(_load_plain(spec)).items() if not isinstance(value, ConfigDict)}
    for line in help_lines(verb, leaves):
        say(line)


def _own_values(verb: str, argv: list[str], own: Sequence[Flag]) -> dict[str, Any]:
    """The verb's own flags; every flag given must be one of them."""
    values = flags.FlagValues()
    for flag in own:
        _define(values, flag)
    try:
        left = values([verb, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = ["--config", *(f"--{flag.name}" for flag in own)]
        raise UserError(f"unknown flag --{error.flagname}{_nearest('--' + error.flagname, known)}") from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if left:
        raise UserError(f"unexpected argument {left[0]!r}; flags are written --name=value")
    out = {flag.name: values[flag.name].value for flag in own}
    for flag in own:
        if flag.required and out[flag.name] is None:
            raise UserError(f"--{flag.name} is missing: {flag.help}")
    return out


def _workdir(given: str, verb: str, bucket: bool) -> Path:
    """The folder of `--workdir`, which need not exist yet; `.` and `..` are resolved.

    Raises:
      UserError: a run cannot be there.
    """
    if not given.strip() or _CONTROL.search(given):
        raise UserError(f"--workdir={given!r}: name a folder, as --workdir=runs/NAME")
    given = _in_home(given)
    path = path_of(given) if bucket else local_path(given, "--workdir", f"cfjax {verb} writes to this machine")
    if in_bucket(path):
        return path
    whole = path.resolve() if path.name in ("", "..") else path
    if whole == Path(whole.anchor):
        raise UserError(f"--workdir={given}: a run has a folder of its own, as --workdir=runs/NAME")
    there = next((part for part in (whole, *whole.parents) if os.path.lexists(part)), Path())
    if not there.is_dir():
        raise UserError(f"--workdir={given}: {there} is a file, or leads nowhere; name a folder")
    return whole


def _in_home(value: str) -> str:
    """A path below `~`, which shells leave alone behind an equals sign, as the whole path; other texts as they are."""
    return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value


def _expand_home(config: ConfigDict, given: Iterable[str]) -> None:
    """`_in_home` of the given keys' texts, and of texts in tuples, but for what is no path."""
    for key in given:
        group, _, name = key.rpartition(".")
        if name in PROSE:
            continue
        holder = config
        for part in group.split(".") if group else ():
            holder = holder[part]
        value = holder[name]
        if isinstance(value, str) and (whole := _in_home(value)) != value:
            holder[name] = whole
        elif isinstance(value, tuple) and any(isinstance(x, str) for x in value):
            holder[name] = tuple(_in_home(x) if isinstance(x, str) else x for x in value)


def parse(
    verb: str,
    argv: Sequence[str],
    *,
    description: str,
    extra_flags: Sequence[Flag] = (),
    default_config: str | None = None,
    default_workdir: str | None = None,
    bucket: bool = False,
) -> tuple[ConfigDict, Path, dict[str, Any]]:
    """Reads `argv` (without the verb): (the locked config with its overrides, the workdir, the verb's own flags).

    Args:
      description: what `--help` says first.
      default_config: used when --config is absent; None makes --config required.
      default_workdir: the same for --workdir.
      bucket: whether the workdir may be in a bucket (`core.paths`).

    Raises:
      UserError: a missing file, an unknown key or flag, a value of the wrong type or out of its range
        (`core.settings`), a required flag that is absent, a workdir that cannot be one.
      SystemExit: after `--help`.
    """
    about = "folder of this run" + (", here or in a bucket (gs://BUCKET/FOLDER)" if bucket else "")
    own = [Flag("workdir", about, default=default_workdir, required=default_workdir is None), *extra_flags]
    own.append(COMPILE_CACHE)  # for `cfjax.__main__`, which has read it
    spec, rest = take_flag("config", argv, "configs/NAME.py")
    spec = spec or default_config
    if {"--help", "-h", "-help"} & set(rest):
        _help(verb, description, own, spec and _located(spec), default_config)
        raise SystemExit(0)
    overrides = [arg for arg in rest if _OVERRIDE.fullmatch(arg)]
    for arg in overrides:
        if "=" not in arg and not arg.lstrip("-").startswith("noconfig."):
            raise UserError(f"{arg}: write the value behind an equals sign, as {arg}=value")
    extras = _own_values(verb, [arg for arg in rest if arg not in overrides], own)
    workdir = _workdir(extras.pop("workdir"), verb, bucket)
    del extras[COMPILE_CACHE.name]
    if spec is None:
        raise UserError("--config is missing: name an experiment, as --config=configs/NAME.py")
    spec = _located(spec)
    plain = _load_plain(spec)
    _check_overrides(spec, plain, overrides)
    config = _load_overridden(spec, plain, overrides)
    _expand_home(config, given_keys(overrides))
    extras = {name: _in_home(value) if isinstance(value, str) else value for name, value in extras.items()}
    check_settings(verb, keys_of(config) | {f"--{name}": value for name, value in extras.items()})
    return config, workdir, extras
