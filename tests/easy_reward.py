"""scripts.chat_rl with a reward that an untrained model earns half of the time: an even number of characters."""

from __future__ import annotations

from nanochat.configurator import run
from scripts import chat_rl
from tasks.gsm8k import GSM8K


def is_even(self: GSM8K, conversation: object, text: str) -> int:
    return int(len(text) % 2 == 0)


if __name__ == "__main__":
    GSM8K.reward = GSM8K.evaluate = is_even
    run(chat_rl.Config, chat_rl.main)
