#!/usr/bin/env bash
# The large run: depth 32 and about 35 billion tokens, two days on eight H100s.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m scripts.speedrun --plan=run1000 "$@"
