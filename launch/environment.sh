# shellcheck shell=bash
# Sourced by the scripts beside it: makes virtual environments once, and again when setup.cfg changes.

# make_environment DIR REQUIREMENT: DIR is the environment, REQUIREMENT what pip installs in editable mode, e.g. ".[test]".
make_environment() {
  local dir="$1" requirement="$2" python="${PYTHON:-python3}" stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "cfjax needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    return 2
  }
  stamp="$requirement $(cat setup.cfg setup.py pyproject.toml | cksum)"
  if [ "$(cat "$dir/cfjax-stamp-${requirement//[^a-z]/}" 2>/dev/null)" != "$stamp" ]; then
    [ -x "$dir/bin/python" ] || "$python" -m venv "$dir"
    echo "installing cfjax into $dir (once; a few minutes)" >&2
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement"
    echo "$stamp" >"$dir/cfjax-stamp-${requirement//[^a-z]/}"
  fi
}

# make_lowest DIR: what cfjax needs, in the lowest versions that setup.cfg allows and that are there as wheels, and pytest.
# uv, which can tell them, is in DIR/uv.
make_lowest() {
  local dir="$1" stamp
  stamp="$(cat setup.cfg setup.py pyproject.toml | cksum)"
  [ "$(cat "$dir/cfjax-stamp-lowest" 2>/dev/null)" != "$stamp" ] || return 0
  echo "installing the lowest versions into $dir" >&2
  rm -rf "$dir"
  "${PYTHON:-python3}" -m venv --without-pip "$dir"
  "${PYTHON:-python3}" -m venv "$dir/uv"
  "$dir/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
  "$dir/bin/python" - >"$dir/requirements.txt" <<'EOF'
from configparser import RawConfigParser

setup = RawConfigParser()
setup.read("setup.cfg")
tests = setup["options.extras_require"]["test"].splitlines()
print(setup["options"]["install_requires"], *(line for line in tests if line.startswith("pytest>=")), sep="\n")
EOF
  "$dir/uv/bin/uv" pip install --quiet --python "$dir" --only-binary :all: --resolution lowest-direct \
    --requirements "$dir/requirements.txt"
  echo "$stamp" >"$dir/cfjax-stamp-lowest"
}

# make_files DIR LIST: the packages of a requirements file, unpacked into DIR for their files alone; again when it changes.
make_files() {
  local dir="$1" list="$2" partial="$1.partial"
  cmp --quiet "$list" "$dir/cfjax-list" && return 0
  echo "fetching the files of $list into $dir" >&2
  rm -rf "$dir" "$partial" &&
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$partial" \
      --requirement "$list" && cp "$list" "$partial/cfjax-list" && mv "$partial" "$dir"
}

# make_browser: a browser for the test of the page: Chromium or Chrome that is there, else Debian's package.
make_browser() {
  local name apt=(apt-get)
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null && return 0
  done
  if command -v apt-get >/dev/null; then
    [ "$(id -u)" = 0 ] || apt=(sudo -n apt-get)
    echo "installing chromium (once; ${apt[*]})" >&2
    { "${apt[@]}" update --quiet=2 && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install --quiet=2 --yes chromium; } >/dev/null &&
      command -v chromium >/dev/null && return 0
  fi
  echo "no browser: install Chromium or Chrome" >&2
  return 1
}
