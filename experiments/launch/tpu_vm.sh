#!/usr/bin/env bash
# Runs an rpt command on every worker of a Cloud TPU VM slice, and waits for it.
#
#     experiments/launch/tpu_vm.sh NAME ZONE rpt train experiments/qwen_1_5b_v5e.py --checkpoint.folder gs://BUCKET/run
#
# NAME is a slice that exists (gcloud compute tpus tpu-vm create, or spot.sh). This checkout goes to all workers as it is
# committed, is installed there once, and the command starts on all of them at the same moment; they find each other by
# the slice's own metadata. Paths in the command are those of the workers. Needs gcloud, logged in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=${1:?name of the slice} zone=${2:?its zone}
shift 2
[ $# -gt 0 ] || { echo "tpu_vm.sh: no command: e.g. rpt train experiments/qwen_1_5b_v5e.py" >&2; exit 2; }
on_all=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command)

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
archive=$place/rpt_jax.tar.gz
git archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:rpt_jax.tar.gz" --zone "$zone" --worker all
"${on_all[@]}" 'set -e
    mkdir -p rpt_jax && tar -xzf rpt_jax.tar.gz -C rpt_jax && cd rpt_jax
    if [ ! -x .venv/bin/pip ]; then
        python=$(command -v python3.12 || command -v python3.11) ||
            { echo "no Python 3.11 or 3.12 on $(hostname): sudo apt-get install python3.11-venv, on all workers" >&2; exit 1; }
        "$python" -m venv .venv
    fi
    .venv/bin/pip install --quiet -c constraints.txt -e ".[tpu,gcs]"'
exec "${on_all[@]}" "cd rpt_jax && PATH=\$PWD/.venv/bin:\$PATH $(printf '%q ' "$@")"
