#!/usr/bin/env bash
# Trains on a spot slice that comes and goes: requests one, runs on it, and requests the next when it is taken away.
#
#     experiments/launch/spot.sh NAME ZONE v5litepod-16 RUNTIME gs://BUCKET/run rpt train experiments/qwen_1_5b_v5e.py
#
# RUNTIME is the TPU software version for the type (v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p). Checkpoints and
# the run's small files are kept in the bucket; a slice that is told to stop saves first, so that little is done twice.
# Ends with the run, or where the command fails on a slice that is still there. Needs gcloud, logged in.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

name=${1:?name of the slice} zone=${2:?zone} type=${3:?accelerator type} runtime=${4:?runtime version}
bucket=${5:?gs://... for checkpoints}
shift 5
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
state() {  # asks until there is an answer; NONE only if it is that there is no such request
  until gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)' 2>"$errors"; do
    if grep -q NOT_FOUND "$errors"; then
      echo NONE
      return
    fi
    echo "spot.sh: no answer about $name, asking again: $(cat "$errors")" >&2
    sleep "${WAIT:-60}"
  done
}
give_back() { gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet; }

while true; do
  case $(state) in
    NONE)
      echo "requesting $type as $name" >&2
      gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
        --accelerator-type "$type" --runtime-version "$runtime" --spot
      ;;
    ACTIVE)
      if "$here/tpu_vm.sh" "$name" "$zone" "$@" --checkpoint.folder "$bucket"; then
        give_back
        exit 0
      fi
      sleep "${WAIT:-60}"  # a slice that goes is still called active for a moment
      [ "$(state)" != ACTIVE ] || { echo "spot.sh: the command failed, $name is still there for a look" >&2; exit 1; }
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      echo "$name was taken away" >&2
      give_back
      ;;
    *) sleep "${WAIT:-60}" ;;  # accepted, waiting for resources, provisioning, deleting
  esac
done
