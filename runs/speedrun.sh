#!/usr/bin/env bash
# From an empty folder to a model that you can talk to, on this machine. Flags: bash runs/speedrun.sh --help
#   bash runs/speedrun.sh                           the plan is chosen by hardware; run again to go on
#   bash runs/speedrun.sh --dry-run                 show the plan: stages, sizes, time, memory, disk; installs nothing
#   NANOCHAT_DATA=tinyworld bash runs/speedrun.sh   embedded data: no GPU, no network
#   WANDB_RUN=speedrun bash runs/speedrun.sh        log to wandb as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m scripts.speedrun "$@"
