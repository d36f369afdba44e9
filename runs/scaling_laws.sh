#!/usr/bin/env bash
# Every depth at every FLOPs budget, a CSV row for each; then fit: python -m dev.scaling_analysis results.csv
#   bash runs/scaling_laws.sh [series name] [flags of scripts.sweep]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    export SERIES_NAME="$1"
    shift
fi
exec python -m scripts.sweep --kind=scaling "$@"
