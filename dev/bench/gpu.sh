#!/usr/bin/env bash
# What only an NVIDIA GPU can show, in one command: do the kernels compute what the network does, how fast are answers and
# training (d20, random weights), does reinforcement learning run (where the base folder has a finetuned model).
# Every part has a log in the folder that the first argument names; the last line is JSON, seconds by part, null: it failed,
# as then does this.
set -uo pipefail
logs="$(realpath -m "${1:-gpu_check}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: this measures an NVIDIA GPU, and python has no torch or torch finds none" >&2
    exit 1
fi
mkdir -p "$logs"
results=""

part() {
    local name="$1" begun=$SECONDS took=null
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    if "$@" 2>&1 | tee "$logs/$name.log"; then took=$((SECONDS - begun)); fi
    results+="${results:+, }\"$name\": $took"
}

parallel=()
if python -c 'import xdist' 2>/dev/null; then parallel=(-n 8); fi
part kernels python -m pytest -q -p no:cacheprovider ${parallel[@]+"${parallel[@]}"} tests/cuda_decode_cases.py
d20=(python -m scripts.infer_bench -i random --arch=classic --depth=20)
part decode "${d20[@]}" --prompt-tokens=1792 --decode-tokens=64 --batch-sizes=1,64 --distinct
part load "${d20[@]}" --prompt-tokens=512 --decode-tokens=64 --batch-sizes=1 \
    --clients=256 --arrivals=0 --load-prompts=512 --load-tokens=128
part int8 "${d20[@]}" --prompt-tokens=1792 --decode-tokens=64 --batch-sizes=1 --quantize=int8
if compgen -G "${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/chatsft_checkpoints/*" >/dev/null; then
    part rl python -m scripts.chat_rl --num-iterations=2 --examples-per-step=4 --num-samples=4 --eval-examples=8 \
        --eval-samples=2 --eval-every=1 --max-new-tokens=64 --output-tag=gpu_check --resume=never
fi
part training python -m dev.bench.train --shapes=d20 --contenders=classic --repeats=1
part training_fp8 python -m dev.bench.train --shapes=d20 --contenders=classic-fp8 --repeats=1
echo "{$results}"
[[ $results != *null* ]]
