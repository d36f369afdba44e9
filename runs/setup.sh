# Prepare the environment of the run scripts. Sourced, from any directory, by scripts with `set -euo pipefail`.
# Installs uv with pip when it is missing, checks for Rust, and installs the project into .venv. Where the flags of
# the script only ask for a plan or for help, nothing is installed.

mkdir -p "${NANOCHAT_BASE_DIR:=$HOME/.cache/nanochat}"
NANOCHAT_BASE_DIR="$(cd "$NANOCHAT_BASE_DIR" && pwd)" # absolute, because the folder changes below
export NANOCHAT_BASE_DIR
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds that torchrun lets ranks save
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment="${UV_PROJECT_ENVIRONMENT:-.venv}"
only_shows=0
for argument in "$@"; do # of the script that sources this file
    case "$argument" in
    -h | --help | --dry[-_]run | --dry[-_]run=[1TtYy]*) only_shows=1 ;;
    esac
done

if [ "$only_shows" = "0" ] && [ "${SKIP_SETUP:-0}" != "1" ]; then
    # A command that exists may still not run (a version manager's shim), so it is tried.
    own_uv="$NANOCHAT_BASE_DIR/uv/bin/uv"
    if uv --version >/dev/null 2>&1; then
        uv_command=uv
    elif [ -x "$own_uv" ]; then
        uv_command="$own_uv"
    else
        python_command="$(command -v python3 || command -v python || true)"
        if [ -z "$python_command" ] || ! "$python_command" -m pip --version >/dev/null 2>&1; then
            echo "error: neither uv nor pip was found; install uv (https://docs.astral.sh/uv) and run this again" >&2
            exit 2
        fi
        echo "uv is missing; installing it into $NANOCHAT_BASE_DIR/uv with pip"
        # A folder of its own: works without venv, leaves the system's Python as it is.
        "$python_command" -m pip install --quiet --target "$NANOCHAT_BASE_DIR/uv" uv
        uv_command="$own_uv"
    fi

    # rustup puts cargo here, but a shell that was open before does not have it on its PATH.
    if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
        export PATH="$HOME/.cargo/bin:$PATH"
    fi
    if ! cargo --version >/dev/null 2>&1; then
        echo "error: the tokenizer is built with Rust, and cargo was not found. Install it and run this again:" >&2
        echo "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y" >&2
        exit 2
    fi

    "$uv_command" sync --inexact # leaves extras that were installed on purpose
fi

# Every stage imports torch, which takes three times as long where Python may not keep what it has compiled.
unset PYTHONDONTWRITEBYTECODE

# shellcheck disable=SC1091
if [ -f "$environment/bin/activate" ]; then
    source "$environment/bin/activate"
elif [ "$only_shows" = "0" ]; then
    echo "error: $environment does not exist; run this again without SKIP_SETUP=1" >&2
    exit 2
fi
# Without an environment of ours, the python on the PATH may be able to show it.
if [ "$only_shows" = "1" ] && ! python -c 'import nanochat.plans, importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    echo "error: the packages that show this are not installed; set up first: bash -e runs/setup.sh" \
        "(downloads them and builds the Rust crate, some minutes), then run this again" >&2
    exit 2
fi
