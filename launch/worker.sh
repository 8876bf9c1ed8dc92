#!/usr/bin/env bash
# One process of a run, as every launcher here starts it: `bash launch/worker.sh cfjax train ...`.
#
# A run that gets SIGTERM saves and exits with 0, which a scheduler would take for the end of the work. This
# turns it into 75 ("try again later"): slurm.sh and the JobSet start such a run again, and it goes on from what it saved.
# So does one that the signal killed before it could listen. A run that was at its last step anyway is started once more,
# finds its work done, and exits with 0.
#
# Variables, all optional:
#   XLA_CLIENT_MEM_FRACTION    share of a GPU's memory that JAX takes, 0.95 (JAX's own is 0.75; `cfjax plan` counts on more)
#   JAX_COMPILATION_CACHE_DIR  compiled programs for the next start: of cfjax train in a folder, WORKDIR/.cache/jax
#   CFJAX_MAINTENANCE_URL      a page that says NONE until its machine is to be taken away, asked every
#   CFJAX_MAINTENANCE_SECONDS  10 seconds; the run then gets SIGTERM
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -gt 0 ] || { echo "launch/worker.sh: no command, as in launch/worker.sh cfjax train ..." >&2; exit 2; }
export PATH="$PWD/.venv/bin:$PATH"

# JAX refuses both names of one setting.
[ -n "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] || export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.95}"
# Only where all processes read the same cache: XLA shares out the tuning of kernels, and one that needs none would be
# waited for by the others. Only for train: other verbs ask whether their workdir is empty.
for word in "$@"; do
  case "$1 ${2:-} $word" in
    "cfjax train --workdir="*://*) ;;
    "cfjax train --workdir="?*) export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${word#*=}/.cache/jax}" ;;
  esac
done

child="" stopped="" signalled=""
# Once: a second SIGTERM would kill without a save. Always: SLURM may signal this process alone (SignalChildrenProcesses
# of its cgroup.conf is "no" by default), and where it signals the run too, the run takes the two for one.
tell() {
  if [ -n "$child" ] && [ -z "$signalled" ]; then
    signalled=yes
    kill -TERM "$child" 2>/dev/null
  fi
}
trap 'stopped=yes; tell' TERM

watch() {
  local event
  while sleep "${CFJAX_MAINTENANCE_SECONDS:-10}" >/dev/null 2>&1; do
    event="$(curl -sf --noproxy '*' --max-time 5 -H 'Metadata-Flavor: Google' "$CFJAX_MAINTENANCE_URL")"
    case "$event" in
      "" | NONE) ;;
      *)
        echo "launch/worker.sh: maintenance of this machine ($event): telling the run to stop" >&2
        kill -TERM $$
        return
        ;;
    esac
  done
}
if [ -n "${CFJAX_MAINTENANCE_URL:-}" ]; then
  watch &
  # shellcheck disable=SC2064  # the watcher's id, now
  trap "kill $! 2>/dev/null" EXIT
fi

"$@" &
child=$!
[ -z "$stopped" ] || tell # the signal came while it was started
while :; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || break # else the trap ended the wait, not the child
done
if [ -n "$stopped" ]; then
  wait "$child"
  status=$?
  case "$status" in 0 | 143) status=75 ;; esac
fi
# srun reports the highest code of its processes: those that JAX aborts because another one ended would hide its reason.
if [ -n "${SLURM_PROCID:-}" ] && [ "$status" -gt 128 ]; then
  echo "launch/worker.sh: process $SLURM_PROCID died of signal $((status - 128)) (exit code $status, passed on as 1)" >&2
  status=1
fi
exit "$status"
