#!/usr/bin/env bash
# ml_collections 1.1.0: overriding a tuple on the command line, a key given twice is one longer tuple, and more.
#
# A config with words=("a", "b") and numbers=(1, 2), its flags as `config_flags.DEFINE_config_file` makes them:
#   --config.numbers=3 --config.numbers=4   (3, 4): both, where every other kind of flag takes the last
#   --config.words=red,green                one word, "red,green"
#   --config.numbers={3,1}                  (1, 3): a set, in an order of its own
#   --config.numbers=True,2                 (True, 2), in a tuple of numbers
# A sweep that appends its overrides to a base command trains on both values; nothing is said.
# Output seen: "(3, 4); ('red,green',); (1, 3); (True, 2)".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ml_collections==1.1.0 absl-py==2.3.1
cat >"$folder/config.py" <<'PY'
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"words": ("a", "b"), "numbers": (1, 2)})
PY
"$folder/venv/bin/python" - "$folder/config.py" <<'PY'
import sys

from absl import flags
from ml_collections import config_flags


def given(*overrides):
    values = flags.FlagValues()
    argv = ["run", f"--config={sys.argv[1]}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    config = values["config"].value
    return {"words": config.words, "numbers": config.numbers}


found = [
    given("--config.numbers=3", "--config.numbers=4")["numbers"],
    given("--config.words=red,green")["words"],
    given("--config.numbers={3,1}")["numbers"],
    given("--config.numbers=True,2")["numbers"],
]
print(*found, sep="; ")
sys.exit(not (found[0] == (3, 4) and found[1] == ("red,green",) and sorted(found[2]) == [1, 3] and found[3] == (True, 2)))
PY
