#!/usr/bin/env bash
# Submits a command to SLURM: one process per GPU, started again from its checkpoint when it is preempted or out of time.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 -- cfjax train --config=configs/dmd.py --workdir=/shared/runs/dmd
#   launch/slurm.sh --nodes=1 --gpus=1 --array=commands.txt --parallel=4       one array task per line of a file
#   launch/slurm.sh --dry-run ...                                             prints the batch script instead
#
#   --name=cfjax  --nodes=1  --gpus=8 (per node; 0: one process per node on its CPUs)  --cpus=8 (per process)
#   --time=24:00:00  --grace=300 (seconds between SIGTERM and the end of the time)  --restarts=100  --log=logs
#   --sbatch=OPTION  any other option of sbatch, as --sbatch=--partition=h100; may be repeated
#
# The folder must be the same on all nodes; `bash launch/setup.sh gpu` makes its environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "launch/slurm.sh: $*" >&2
  exit 2
}
source launch/options.sh
plain "$@"

name=cfjax nodes=1 gpus=8 cpus=8 time=24:00:00 grace=300 restarts=100 log=logs array="" parallel=0 dry="" extra=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name=* | --nodes=* | --gpus=* | --cpus=* | --time=* | --grace=* | --restarts=* | --log=* | --array=* | --parallel=*)
      key="${1%%=*}"
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --dry-run) dry=yes ;;
    --) shift && break ;;
    --help) sed -n '2,12s/^# \{0,1\}//p' launch/slurm.sh && exit 0 ;;
    *) fail "unknown option $1; the command stands behind --" ;;
  esac
  shift
done
for key in nodes cpus grace; do whole "$key" 1; done
for key in gpus restarts parallel; do whole "$key" 0; done
for key in name time log; do
  [ -n "${!key}" ] || fail "--$key is empty"
  word "$key" '[^[:space:]"'"'"'\\#]+' "no spaces, quotes, \\ and #, which an #SBATCH line would cut"
done
if [ -n "$array" ]; then
  [ $# -eq 0 ] || fail "--array=$array holds the commands; none may stand behind --"
  [ -f "$array" ] && [ -s "$array" ] || fail "--array=$array: no such file, or an empty one"
else
  [ $# -gt 0 ] || fail "no command behind --, as in -- cfjax train --config=configs/dmd.py --workdir=/shared/runs/dmd"
fi

tasks=$((gpus > 0 ? gpus : 1))
commands="$*"
[ -z "$array" ] || commands="$(cat -- "$array")"
# Processes join for train and precompute only (SHARED in cfjax/__main__.py); of the rest there would be copies.
single="$(awk '$1 == "cfjax" && $2 !~ /^(train|precompute)$/ { print $2; exit }' <<<"$commands")"
[ -z "$single" ] || [ $((nodes * tasks)) -eq 1 ] || fail "cfjax $single is one process's work; add --nodes=1 --gpus=1"

# shellcheck disable=SC2016  # what stands in single quotes is for the batch script to expand
script() {
  local option
  echo "#!/usr/bin/env bash"
  echo "#SBATCH --job-name=$name"
  echo "#SBATCH --nodes=$nodes"
  echo "#SBATCH --ntasks-per-node=$tasks"
  echo "#SBATCH --cpus-per-task=$cpus"
  # All GPUs of a node are visible to each of its processes: JAX picks the one of its SLURM_LOCALID.
  [ "$gpus" -eq 0 ] || echo "#SBATCH --gres=gpu:$gpus"
  echo "#SBATCH --time=$time"
  echo "#SBATCH --signal=TERM@$grace"
  echo "#SBATCH --requeue"
  echo "#SBATCH --open-mode=append"
  if [ -n "$array" ]; then
    local last=$(($(grep -c '' <"$array") - 1)) most=""
    [ "$parallel" -eq 0 ] || most="%$parallel"
    echo "#SBATCH --array=0-$last$most"
    echo "#SBATCH --output=$log/%x-%A_%a.log"
  else
    echo "#SBATCH --output=$log/%x-%j.log"
  fi
  for option in ${extra[@]+"${extra[@]}"}; do echo "#SBATCH $option"; done
  printf '\nset -uo pipefail\ncd %q || exit 2\n' "$PWD"
  echo "trap : TERM # the run gets it too, and this script has to outlive it"
  # An error where there is no GPU, instead of a run on CPUs.
  [ "$gpus" -eq 0 ] || echo 'export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"'
  if [ -n "$array" ]; then
    printf 'eval "set -- $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" %q)"\n' "$(realpath -- "$array")"
    echo 'job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
  else
    echo "set --$(printf ' %q' "$@")"
    echo 'job="$SLURM_JOB_ID"'
  fi
  cat <<EOS
srun --cpus-per-task=$cpus --kill-on-bad-exit=0 --wait=120 bash launch/worker.sh "\$@"
status=\$?
# 75: stopped by a signal, saved. Running: nobody cancelled the job.
if [ "\$status" -eq 75 ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ] && [ "\$(squeue -h -j "\$job" -o %T)" = RUNNING ]; then
  scontrol requeue "\$job" && sleep 60 # until the job is taken off the nodes
fi
exit "\$status"
EOS
}

if [ -n "$dry" ]; then
  script "$@"
else
  command -v sbatch >/dev/null || fail "no sbatch here; --dry-run shows what would be submitted"
  mkdir -p "$log"
  script "$@" | sbatch
fi
