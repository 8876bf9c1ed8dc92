#!/usr/bin/env bash
# Starts one command on every worker of a TPU slice, by ssh or through xpk.
#
#   launch/tpu_pod.sh setup --tpu=NAME --zone=ZONE                       the committed tree and its environment, everywhere
#   launch/tpu_pod.sh run   --tpu=NAME --zone=ZONE -- cfjax train --config=configs/dmd.py --workdir=/shared/runs/dmd
#   launch/tpu_pod.sh logs  --tpu=NAME --zone=ZONE                       the last lines of every worker
#   launch/tpu_pod.sh stop  --tpu=NAME --zone=ZONE                       SIGTERM: saves, then ends; `run` goes on from there
#   launch/tpu_pod.sh run   --hosts=10.0.0.2,10.0.0.3 -- cfjax train ...  plain ssh: any machines, the first is process 0
#   launch/tpu_pod.sh run   --xpk --cluster=NAME --tpu-type=v5p-128 --image=IMAGE -- cfjax train ...
#   launch/tpu_pod.sh --dry-run ...                                      prints the commands instead
#
#   --project=PROJECT  --directory=cfjax (on the workers)  --device=tpu (what setup installs: tpu, gpu, cpu)
#   --python=python3 (3.11 or newer, for setup)  --port=8476 (of process 0, with --hosts)
#   --name=cfjax --slices=1 --restarts=100 --grace=300 (with --xpk)
#   --env=NAME=VALUE  a variable of every process; may be repeated
#
# A multislice or queued resource is asked for with gcloud first; its nodes are then reached by --tpu, one call each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "launch/tpu_pod.sh: $*" >&2
  exit 2
}
source launch/options.sh
plain "$@"

action="" tpu="" zone="" project="" hosts="" xpk="" cluster="" tpu_type="" image="" dry=""
directory=cfjax device=tpu python=python3 port=8476 name=cfjax slices=1 restarts=100 grace=300 env=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tpu=* | --zone=* | --project=* | --hosts=* | --cluster=* | --tpu-type=* | --image=* | --directory=* | --device=* | \
      --python=* | --port=* | --name=* | --slices=* | --restarts=* | --grace=*)
      key="${1%%=*}" key="${key#--}"
      printf -v "${key//-/_}" '%s' "${1#*=}"
      ;;
    --env=*)
      [[ "${1#*=}" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1: write --env=NAME=VALUE"
      env+=("${1#*=}")
      ;;
    --xpk) xpk=yes ;;
    --dry-run) dry=yes ;;
    --help) sed -n '2,18s/^# \{0,1\}//p' launch/tpu_pod.sh && exit 0 ;;
    --) shift && break ;;
    setup | run | logs | stop)
      [ -z "$action" ] || fail "$action and $1: one at a time"
      action="$1"
      ;;
    *) fail "unknown argument $1; the command stands behind --" ;;
  esac
  shift
done
[ -n "$action" ] || fail "say what to do: setup, run, logs or stop"
whole port 1 65535
whole slices 1
whole grace 1
whole restarts 0
word device 'tpu|gpu|cpu' "tpu, gpu or cpu"
for key in directory python; do word "$key" '[^-].*' "must not begin with a dash"; done
[ -n "$directory" ] || fail "--directory is empty: name a folder on the workers, from their home folder"
if [ "$action" = run ]; then
  [ $# -gt 0 ] || fail "no command behind --, as in -- cfjax train --config=configs/dmd.py --workdir=/shared/runs/dmd"
else
  [ $# -eq 0 ] || fail "$action takes no command; leave out -- $*"
fi
case "$tpu:$hosts:$xpk" in
  ?*:: | :?*: | ::?*) ;;
  *) fail "name the machines by one of --tpu=NAME, --hosts=A,B or --xpk" ;;
esac
[ -z "$tpu" ] || [ -n "$zone" ] || fail "--tpu=$tpu needs --zone"
machine='[A-Za-z0-9_.][A-Za-z0-9_.@:%-]*'
word hosts "$machine(,$machine)*" "name machines with commas between them, as 10.0.0.2,me@10.0.0.3"
IFS=, read -ra workers <<<"$hosts"
# A path as the workers' shells are to read it: quoted, but for the home folder in front.
quoted() {
  # shellcheck disable=SC2088  # theirs, not this machine's
  case "$1" in
    "~/"?*) printf '~/%q' "${1#"~/"}" ;;
    "~" | "~/") printf '~' ;;
    *) printf '%q' "$1" ;;
  esac
}
folder="$(quoted "$directory")"

# Runs a command of this machine, or shows it.
do_() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# everywhere COMMAND: on every worker at once; fails if it fails on one.
everywhere() {
  if [ -n "$tpu" ]; then
    do_ gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" ${project:+--project="$project"} --worker=all --command="$1"
    return
  fi
  local index running=() failed=0 address="${workers[0]##*@}:$port"
  for index in "${!workers[@]}"; do
    local joined="export JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=${#workers[@]} JAX_PROCESS_ID=$index; $1"
    if [ -n "$dry" ]; then
      do_ ssh -o BatchMode=yes "${workers[$index]}" "$joined"
    else
      (ssh -o BatchMode=yes "${workers[$index]}" "$joined" 2>&1 | sed "s/^/[${workers[$index]}] /") &
      running+=($!)
    fi
  done
  for index in ${running[@]+"${running[@]}"}; do wait "$index" || failed=1; done
  return "$failed"
}

send() {
  local archive index
  archive="$(mktemp -d)/cfjax.tar.gz"
  do_ git archive --format=tar.gz --output="$archive" HEAD
  if [ -n "$tpu" ]; then
    do_ gcloud compute tpus tpu-vm scp "$archive" "$tpu:cfjax.tar.gz" --zone="$zone" ${project:+--project="$project"} --worker=all
  else
    for index in "${!workers[@]}"; do do_ scp -o BatchMode=yes "$archive" "${workers[$index]}:cfjax.tar.gz"; done
  fi
  rm -rf "$(dirname "$archive")"
}

if [ -n "$xpk" ]; then
  [ "$action" = run ] || fail "--xpk only runs; xpk workload list, delete and its logs do the rest"
  for key in cluster tpu_type image; do [ -n "${!key}" ] || fail "--xpk needs --${key//_/-}"; done
  do_ xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$tpu_type" --num-slices="$slices" \
    ${zone:+--zone="$zone"} ${project:+--project="$project"} --docker-image="$image" --max-restarts="$restarts" \
    --restart-on-exit-codes=75 --termination-grace-period-seconds="$grace" ${env[@]+"${env[@]/#/--env=}"} \
    --command="bash launch/worker.sh$(printf ' %q' "$@")"
  exit
fi

case "$action" in
  setup)
    send
    everywhere "mkdir -p $folder && tar xzf cfjax.tar.gz -C $folder && cd $folder && PYTHON=$(quoted "$python") bash launch/setup.sh $device"
    ;;
  run)
    # Cloud TPU machines ask their metadata server who the others are, and whether they are to be maintained; without a
    # TPU a run there is an error. The run outlives the connection.
    about=http://metadata.google.internal/computeMetadata/v1/instance/maintenance-event
    [ -z "$tpu" ] || env=(CFJAX_DISTRIBUTED=auto "JAX_PLATFORMS=tpu,cpu" "CFJAX_MAINTENANCE_URL=$about" ${env[@]+"${env[@]}"})
    variables="$([ ${#env[@]} -eq 0 ] || printf ' %q' "${env[@]}")"
    alone="{ ! kill -0 \$(cat logs/run.pid 2>/dev/null) 2>/dev/null || { echo 'a run is there already: stop it first' >&2; false; }; }"
    everywhere "cd $folder && mkdir -p logs && $alone && { nohup env$variables bash launch/worker.sh$(printf ' %q' "$@") >logs/run.log 2>&1 </dev/null & echo \$! >logs/run.pid; }"
    ;;
  logs) everywhere "tail -n 20 $folder/logs/run.log" ;;
  stop) everywhere "kill -TERM \$(cat $folder/logs/run.pid)" ;;
esac
