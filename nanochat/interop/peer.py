"""Hugging Face transformers on the same weights, in a process of its own, as the peer of a benchmark.

Of its own, so that neither library's settings (allocator, threads, compiled code) help or hinder the other.
The child is `python -m nanochat.interop.peer FOLDER`: one JSON request per line in, one JSON answer per line out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, write_json
from nanochat.gpt import GPT
from nanochat.interop import hf_config
from nanochat.interop.hf_export import write_shards
from nanochat.interop.verification import load_with_transformers


class TransformersPeer:
    """`generate` of transformers; a context manager. Raises UserError for a modern model or a missing package."""

    def __init__(self, model: GPT) -> None:
        if not hf_config.is_classic(model.config):
            raise UserError("--peer=transformers compares classic models; use --arch=classic")
        self._folder = tempfile.TemporaryDirectory()
        folder, dtype = Path(self._folder.name), str(model.compute_dtype).removeprefix("torch.")
        state = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
        write_shards(hf_config.to_hf_state(state, model.config), folder, 4 << 30)
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        write_json(folder / "config.json", hf_config.to_hf_config(model.config) | ends)
        command = [sys.executable, "-m", "nanochat.interop.peer", str(folder), str(model.get_device()), dtype]
        threads = str(torch.get_num_threads())
        self._child = subprocess.Popen(
            [*command, threads], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> TransformersPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._child.wait()
        self._folder.cleanup()

    def generate(
        self, prompts: list[list[int]], max_tokens: int, temperature: float, top_k: int | None
    ) -> tuple[float, list[list[int]]]:
        """(seconds, new tokens of each row) for prompts of one length."""
        request = {"prompts": prompts, "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k}
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(f"the transformers process ended with status {self._child.wait()}; see above")
        found = json.loads(answer)
        return found["seconds"], found["tokens"]


def _answer(model: Any, request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    from nanochat.common import synchronize

    ids = torch.tensor(request["prompts"], device=device)
    sampled = request["temperature"] > 0
    options: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        options |= {"temperature": request["temperature"], "top_k": request["top_k"] or 0}
    synchronize(device)
    begun = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_tokens"],
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    synchronize(device)
    return {"seconds": time.perf_counter() - begun, "tokens": found[:, ids.size(1) :].tolist()}


def _main(folder: str, device_name: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    device = torch.device(device_name)
    model = load_with_transformers(Path(folder)).to(device, getattr(torch, dtype))
    for line in sys.stdin:
        print(json.dumps(_answer(model, json.loads(line), device)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
