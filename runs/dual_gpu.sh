#!/usr/bin/env bash
# The whole speedrun on two cards of one machine; depth and batch are chosen from their memory.
#   bash runs/dual_gpu.sh [flags of scripts.speedrun, such as --dry-run]
#   CUDA_VISIBLE_DEVICES=2,3   which two (default 0,1)
#   NCCL_P2P_DISABLE=1         if the run hangs at its start: some consumer cards cannot write to each other
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1}"
if [[ ! "$CUDA_VISIBLE_DEVICES" =~ ^[^,]+,[^,]+$ ]]; then
    echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES does not name two cards, such as 0,1" >&2
    exit 2
fi
exec python -m scripts.speedrun "$@"
