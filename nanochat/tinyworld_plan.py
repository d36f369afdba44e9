"""The plan of a whole run on the embedded data, with neither GPU nor network.

A network this small does not learn multiple choice from exams (LOG 2026-11-25 and 26). So the plan teaches it before
everything else: two layers learn the facts, two more are put on top and learn to find a letter, then all learn exams,
from short lists of choices to whole ones.
What is connected by then survives the usual stages.
"""

from __future__ import annotations

import math

from nanochat.memory import training_bytes
from nanochat.network_config import GPTConfig
from nanochat.pipeline import Plan
from nanochat.plans import Launcher, Row, evaluation_row, model_facts
from nanochat.report_render import format_bytes
from nanochat.scaling import Horizon, model_dimensions
from nanochat.sizing import checkpoint_bytes

TINY = GPTConfig.modern(
    vocab_size=2048, sequence_len=128, window_pattern="L", tie_embeddings=True, **model_dimensions(4, 32, 32)
)
FIRST_LAYERS = 2
ROWS, BATCH, STEPS, CHARS = 16, 2048, 650, 6_000_000
# The flagship's rates are for batches 256 times larger; these were found by trial (LOG 2026-11-25). Smear from the
# start, slow scalars and sharp attention let the model find a letter behind a choice.
_RATES = (
    "--matrix-lr=0.32 --embedding-lr=0.16 --scalar-lr=0.032 --smear-lr=0.002 --smear-init=1 --weight-decay=0"
)
# On two cores a compiled step takes three quarters of the time, but on a machine that has not compiled it before each
# shape costs 40 to 60 s, and each stage 15 s more (LOG 2026-11-26): as much as it saves.
_EAGER = "--compile=off"
# Conversations are longer than the rows of pretraining: half as many rows of twice the length.
_CHAT = (
    f"--max-seq-len={2 * TINY.sequence_len} --device-batch-size={ROWS // 2} --total-batch-size={BATCH}"
    f" --eval-every=-1 --save-every=200 --keep-last=2 {_EAGER}"
)
_EVAL = "--max-new-tokens=224"


def rows(seed: int, steps: int) -> list[Row]:
    """The stages of the embedded plan, with seconds on two cores. steps: of pretraining."""
    first = f"--model-tag=d{FIRST_LAYERS}"
    lesson = f"{_CHAT} --supervise=assistant --warmdown-ratio=0.3 --only-extra-data"
    # Tables that learn as fast as in pretraining unlearn what the question mark recalls, and on one seed of two exams
    # do not connect. In mid-training, with a sudden start, they undo what has connected. While the tables rest, in
    # lesson 2, the new layers' own must learn fast (LOG 2026-11-26).
    slow, fast = "--embedding-lr=0.04", "--embedding-lr=0.16"
    return [
        Row("tinyworld", "write a small world as text and tasks", 5, (),
            f"nanochat.tinyworld --seed={seed} --chars={CHARS}"),
        Row("tok_train", "learn the vocabulary", 3, ("tinyworld",),
            f"scripts.tok_train --vocab-size={TINY.vocab_size}"),
        Row("tok_eval", "measure compression", 4, ("tok_train",), "scripts.tok_eval"),
        Row("base_train", "pretrain on the world's text", 118, ("tok_train",),
            f"scripts.base_train --depth={FIRST_LAYERS} --model-tag=d{FIRST_LAYERS}"
            f" --aspect-ratio={TINY.n_embd // FIRST_LAYERS} --head-dim={TINY.head_dim} --qk-scale=2 --tie-embeddings"
            f" --window-pattern={TINY.window_pattern} --max-seq-len={TINY.sequence_len}"
            f" --device-batch-size={ROWS} --total-batch-size={BATCH} {_RATES} {_EAGER} --packing=stream"
            f" --momentum-warmup-steps=100 --warmup-steps=20 --warmdown-ratio=0.4 --num-iterations={steps}"
            f" --eval-every=400 --eval-tokens=65536 --core-metric-every=-1 --sample-every=-1 --save-every=400"
            f" --keep-last=2 --seed={seed}"),
        Row("base_eval", "CORE, bits per byte, samples", 12, ("base_train",),
            f"scripts.base_eval --device-batch-size={ROWS} --split-tokens=65536 --max-per-task=100 {first}"),
        Row("lesson_answers", "lesson 1: say what is known", 20, ("base_train",),
            f"scripts.mid_train {lesson} {slow} {first} --output-tag=answers --extra-data=answers_lesson.jsonl"
            # Half the matrix rate: two thirds of the recall are kept at the full one, five sixths at this.
            " --matrix-lr=0.16 --num-iterations=50"),
        Row("lesson_letters", "lesson 2: two more layers find the letter behind a choice", 82, ("lesson_answers",),
            f"scripts.mid_train {lesson} {fast} --source=mid --model-tag=answers --output-tag=letters"
            f" --add-layers={TINY.n_layer - FIRST_LAYERS} --freeze-layers={FIRST_LAYERS}"
            " --extra-data=letters_lesson.jsonl --matrix-lr=0.32 --num-iterations=320"),
        Row("lesson_exams", "lesson 3: exams", 75, ("lesson_letters",),
            f"scripts.mid_train {lesson} {slow} --source=mid --model-tag=letters --output-tag=exams"
            " --extra-data=exams_lesson.jsonl --num-iterations=260"),
        Row("mid_train", "learn conversations and tools", 138, ("lesson_exams",),
            f"scripts.mid_train {_CHAT} --source=mid --model-tag=exams --output-tag=d{TINY.n_layer} --warmup-ratio=0.05"
            " --supervise=assistant --warmdown-ratio=0.3 --load-optimizer=false --smoltalk-stop=3400 --gsm8k-stop=1400"
            # Without the review 100 steps can undo what has just connected, and without many single words one seed of
            # two never copies the word that is to be counted.
            " --extra-data=review_lesson.jsonl --simple-spelling-size=3000 --spelling-bee-size=2600"
            " --num-iterations=480"),
        evaluation_row("mid", "mid_train", 20, _EVAL),
        Row("chat_sft", "finetune on answers", 125, ("mid_train",),
            f"scripts.chat_sft {_CHAT} --chatcore-every=-1 --mmlu-epochs=0 --gsm8k-epochs=1 --gsm8k-stop=1800"
            " --smoltalk-stop=3000 --simple-spelling-size=2000 --spelling-bee-size=2600 --num-iterations=430"),
        evaluation_row("sft", "chat_sft", 20, _EVAL),
        Row("chat_rl", "reinforce correct answers", 65, ("chat_sft",),
            "scripts.chat_rl --num-iterations=24 --examples-per-step=16 --num-samples=8 --device-batch-size=32"
            " --max-new-tokens=96 --eval-every=12 --eval-examples=100 --eval-samples=4 --save-every=12"
            # Tables that learn as fast as in pretraining unlearn what the problems do not practise (LOG 2026-11-25).
            " --embedding-lr=0.015 --unembedding-lr=0.003 --matrix-lr=0.09"),
        evaluation_row("rl", "chat_rl", 20, _EVAL),
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
    stages = Launcher(1, f"d{TINY.n_layer}").stages(rows(seed, steps))
    environment = {"NANOCHAT_DATA": "tinyworld"}
    disk = CHARS + 4 * checkpoint_bytes(TINY)
    return Plan("tinyworld", why, stages, environment, facts, disk)
