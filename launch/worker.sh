#!/usr/bin/env bash
# One process of a run, as every launcher here starts it: `bash launch/worker.sh cfjax train ...`.
#
# A run that is told to stop (SIGTERM) saves and exits with 0, which a scheduler would take for the end of the work. This
# turns it into 75 ("try again later"): slurm.sh and the JobSet start such a run again, and it goes on from what it saved.
# A run that was at its last step anyway is started once more, finds its work done, and exits with 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -gt 0 ] || { echo "launch/worker.sh: no command, as in launch/worker.sh cfjax train ..." >&2; exit 2; }
export PATH="$PWD/.venv/bin:$PATH"

child="" stopped=""
# shellcheck disable=SC2329  # called by the trap
stop() {
  stopped=yes
  # SLURM signals every process of a step by itself, and a second SIGTERM would kill without a save.
  [ -n "${SLURM_STEP_ID:-}" ] || [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM
"$@" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # the trap ended the wait, not the child
  wait "$child"
  status=$?
done
if [ -n "$stopped" ]; then
  wait "$child"
  status=$?
  [ "$status" -ne 0 ] || status=75
fi
exit "$status"
