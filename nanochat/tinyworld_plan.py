"""The plan of a whole run on the embedded data, with neither GPU nor network."""

from __future__ import annotations

import math

from nanochat.memory import training_bytes
from nanochat.pipeline import Plan
from nanochat.plans import Launcher, Row, evaluation_row, model_facts
from nanochat.report_render import format_bytes
from nanochat.scaling import Horizon
from nanochat.sizing import Shape, checkpoint_bytes

TINY = Shape(4, vocab_size=2048, sequence_len=128, aspect_ratio=32, head_dim=128, window_pattern="L")
ROWS, BATCH, STEPS, CHARS = 16, 2048, 800, 6_000_000
# The flagship's rates are for batches 256 times larger; these were found by trial (LOG 2026-11-25). Smear from the
# start and slow scalars let the model find a letter behind a choice, with which multiple choice begins.
_RATES = (
    "--matrix-lr=0.32 --embedding-lr=0.16 --unembedding-lr=0.032 --scalar-lr=0.032 --smear-lr=0.002 --smear-init=1"
    " --weight-decay=0"
)
# Conversations are longer than the rows of pretraining: half as many rows of twice the length.
_CHAT = (
    f"--max-seq-len={2 * TINY.sequence_len} --device-batch-size={ROWS // 2} --total-batch-size={BATCH}"
    " --eval-every=-1 --save-every=200 --keep-last=2"
)
_EVAL = "--max-new-tokens=224"


def rows(seed: int, steps: int) -> list[Row]:
    """The stages of the embedded plan, with seconds on two cores. steps: of pretraining."""
    return [
        Row("tinyworld", "write a small world as text and tasks", 8, (),
            f"nanochat.tinyworld --seed={seed} --chars={CHARS}"),
        Row("tok_train", "learn the vocabulary", 5, ("tinyworld",),
            f"scripts.tok_train --vocab-size={TINY.vocab_size}"),
        Row("tok_eval", "measure compression", 8, ("tok_train",), "scripts.tok_eval"),
        Row("base_train", "pretrain on the world's text", 230, ("tok_train",),
            f"scripts.base_train --depth={TINY.depth} --aspect-ratio={TINY.aspect_ratio}"
            f" --head-dim={TINY.head_dim} --window-pattern={TINY.window_pattern} --max-seq-len={TINY.sequence_len}"
            f" --device-batch-size={ROWS} --total-batch-size={BATCH} {_RATES} --packing=stream"
            f" --momentum-warmup-steps=100 --warmup-steps=20 --warmdown-ratio=0.4 --num-iterations={steps}"
            f" --eval-every=400 --eval-tokens=65536 --core-metric-every=-1 --sample-every=-1 --save-every=400"
            f" --keep-last=2 --seed={seed}"),
        Row("base_eval", "CORE, bits per byte, samples", 20, ("base_train",),
            f"scripts.base_eval --device-batch-size={ROWS} --split-tokens=65536 --max-per-task=100"),
        Row("mid_train", "learn conversations and tools", 170, ("base_train",),
            f"scripts.mid_train {_CHAT} --supervise=assistant --warmdown-ratio=0.3 --gsm8k-stop=800"
            " --simple-spelling-size=500 --spelling-bee-size=1400 --num-iterations=460"),
        evaluation_row("mid", "mid_train", 30, _EVAL),
        Row("chat_sft", "finetune on answers", 150, ("mid_train",),
            f"scripts.chat_sft {_CHAT} --chatcore-every=-1 --mmlu-epochs=1 --gsm8k-epochs=1 --gsm8k-stop=800"
            " --smoltalk-stop=2000 --simple-spelling-size=500 --spelling-bee-size=1200 --num-iterations=420"),
        evaluation_row("sft", "chat_sft", 30, _EVAL),
        Row("chat_rl", "reinforce correct answers", 90, ("chat_sft",),
            "scripts.chat_rl --num-iterations=30 --examples-per-step=16 --num-samples=8 --device-batch-size=32"
            " --max-new-tokens=96 --eval-every=15 --eval-examples=100 --eval-samples=4 --save-every=15"
            # Tables that learn as fast as in pretraining unlearn what the problems do not practise (LOG 2026-11-25).
            " --embedding-lr=0.01 --unembedding-lr=0.002 --matrix-lr=0.06"),
        evaluation_row("rl", "chat_rl", 30, _EVAL),
    ]  # fmt: skip


def tinyworld_plan(why: str, cores: int = 2, seed: int = 0) -> Plan:
    """The plan for this many cores: thirteen minutes on two slow ones; more train longer in the same time."""
    # A model this small uses further cores badly: twice the steps on 8, three times on 18 and beyond.
    steps = round(STEPS * min(3.0, math.sqrt(max(1.0, cores / 2))))
    facts = model_facts(TINY, Horizon(steps, BATCH, 1.0, 1.0, "--num-iterations")) | {
        "memory": f"about {format_bytes(training_bytes(TINY, ROWS, 1, on_gpu=False) + 500e6)}",
        "data": f"tinyworld, {CHARS:,} characters, seed {seed}",
        "cores": str(cores),
    }
    stages = Launcher(1, f"d{TINY.depth}").stages(rows(seed, steps))
    disk = CHARS + 4 * checkpoint_bytes(TINY)
    return Plan("tinyworld", why, stages, {"NANOCHAT_DATA": "tinyworld"}, facts, disk)
