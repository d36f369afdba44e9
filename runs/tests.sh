#!/usr/bin/env bash
# Set up what is missing and run the test suite on two cores or more; arguments go to pytest (-m slow: the long
# tests, -n 0: one after the other).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile "$@"
