#!/usr/bin/env bash
# Serve an exported classic model with vLLM, on one machine or many GPUs: bash dev/serve_vllm.sh FOLDER [vllm options]
# See dev/guides/serving-with-vllm.md.
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = "--help" ]; then
    echo "usage: bash dev/serve_vllm.sh FOLDER [options of vllm serve]" >&2
    exit 2
fi
folder="$1"
shift
if [ ! -f "$folder/config.json" ]; then
    echo "error: $folder is no exported model; make one with python -m scripts.export_hf" >&2
    exit 2
fi
# The space after the colon and the exact value: nanochat_modern must not match.
if ! grep -q '"model_type": "nanochat"' "$folder/config.json"; then
    echo "error: vLLM runs classic models only: it keeps no state for the smear of the modern network." >&2
    echo "       Serve a modern model with python -m scripts.chat_web, or train with --arch=classic" >&2
    exit 2
fi
if ! command -v vllm >/dev/null 2>&1; then
    echo "error: vllm was not found. It pins its own torch, so give it an environment of its own:" >&2
    echo "       uv venv vllm-env && uv pip install --python vllm-env/bin/python vllm" >&2
    echo "       and put vllm-env/bin on the PATH" >&2
    exit 2
fi

# transformers: vLLM has no nanochat class of its own. string: the template gets texts as clients wrote them.
exec vllm serve "$folder" --model-impl transformers --chat-template-content-format string \
    --served-model-name "$(basename "$(cd "$folder" && pwd)")" "$@"
