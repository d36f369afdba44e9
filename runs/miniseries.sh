#!/usr/bin/env bash
# One compute-optimal model per depth, and a CSV row for each. Run again to go on.
#   bash runs/miniseries.sh [series name] [flags of scripts.sweep]
#   SKIP_SETUP=1: environment, data and tokenizer are there.   NPROC_PER_NODE: ranks (default: visible GPUs)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    export SERIES_NAME="$1"
    shift
fi
exec python -m scripts.sweep --kind=miniseries "$@"
