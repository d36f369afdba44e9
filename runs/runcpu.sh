#!/usr/bin/env bash
# A small model on web text without a GPU, to see every stage at work. Needs the hub; about an hour on a laptop.
# For a model that answers, without network and in minutes: NANOCHAT_DATA=tinyworld bash runs/speedrun.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m scripts.speedrun --plan=cpu "$@"
