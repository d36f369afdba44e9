#!/usr/bin/env bash
# Set up what is missing and run the test suite; arguments go to pytest (-m slow: the long tests).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m pytest "$@"
