#!/usr/bin/env bash
# One stage on several machines: run the same command on each of them, with a base folder that all of them share.
#   NNODES=2 HEAD=10.0.0.1:29500 bash runs/multinode.sh scripts.base_train --depth=24 --device-batch-size=16
#   HEAD: address and a free port of one of the machines     NPROC_PER_NODE: ranks on each (default: visible GPUs)
#   RUN_ID: tells runs that share HEAD apart                 SKIP_SETUP=1: the environment is there
# Machines may start in any order. Killed or not, the same command goes on from the newest checkpoint. When a
# machine disappears, the others end with an error after the time-out of the process group (30 minutes).
set -euo pipefail
if [ $# -lt 1 ] || [[ "$1" == -* ]] || [ -z "${NNODES:-}" ] || [ -z "${HEAD:-}" ]; then
    echo "error: use: NNODES=<machines> HEAD=<host:port> bash runs/multinode.sh scripts.<stage> [flags]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ranks="${NPROC_PER_NODE:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
exec python -m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="$ranks" --rdzv_backend=c10d \
    --rdzv_endpoint="$HEAD" --rdzv_id="${RUN_ID:-nanochat}" -m "$1" -- "${@:2}"
