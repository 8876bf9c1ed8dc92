#!/usr/bin/env bash
# One process of a run, as every launcher here starts it: `bash launch/worker.sh cfjax train ...`.
#
# A run that is told to stop (SIGTERM) saves and exits with 0, which a scheduler would take for the end of the work. This
# turns it into 75 ("try again later"): slurm.sh and the JobSet start such a run again, and it goes on from what it saved.
# So does one that the signal killed before it could listen. A run that was at its last step anyway is started once more,
# finds its work done, and exits with 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
[ $# -gt 0 ] || { echo "launch/worker.sh: no command, as in launch/worker.sh cfjax train ..." >&2; exit 2; }
export PATH="$PWD/.venv/bin:$PATH"

child="" stopped="" told=""
# Once: a second SIGTERM would kill without a save. SLURM signals every process of a step by itself.
tell() {
  if [ -n "$child" ] && [ -z "$told${SLURM_STEP_ID:-}" ]; then
    told=yes
    kill -TERM "$child" 2>/dev/null
  fi
}
trap 'stopped=yes; tell' TERM
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
exit "$status"
