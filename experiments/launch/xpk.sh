#!/usr/bin/env bash
# Runs an rpt command on TPU slices of a GKE cluster, by xpk; the workload is restarted when its nodes are taken away.
#
#     experiments/launch/xpk.sh CLUSTER v5litepod-16 IMAGE NAME rpt train experiments/qwen_1_5b_v5e.py \
#         --checkpoint.folder gs://BUCKET/run
#
# IMAGE is a container with this project installed (pip install '.[tpu,gcs]') and its experiments/ in the working folder.
# SLICES=4 takes four slices, over which the mesh's data axis has to divide; RESTARTS=20 says how often it may start
# anew. `rpt sweep --print-xpk` writes such commands for the cells of a sweep. Needs xpk and gcloud, logged in.
set -euo pipefail

cluster=${1:?cluster} type=${2:?TPU type} image=${3:?container image} name=${4:?name of the workload}
shift 4
[ $# -gt 0 ] || { echo "xpk.sh: no command: e.g. rpt train experiments/qwen_1_5b_v5e.py" >&2; exit 2; }
exec xpk workload create --cluster "$cluster" --workload "$name" --tpu-type "$type" --num-slices "${SLICES:-1}" \
  --docker-image "$image" --max-restarts "${RESTARTS:-20}" --command "$(printf '%q ' "$@")"
