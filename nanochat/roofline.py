"""What a decode step has to read and compute, and what the hardware could do: the yardstick of inference.

Decoding reads all weights and the keys and values of every row for each token, so that memory bandwidth bounds
it; reading a prompt is bound by arithmetic.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from nanochat.common import by_name, synchronize
from nanochat.gpt import GPT
from nanochat.quantize import QuantizedLinear

# Bytes/s of device memory by the vendors' data sheets; the first row whose words all occur in the name.
_PEAK_BANDWIDTH: list[tuple[str, float]] = [
    ("gb200", 8.0e12), ("grace blackwell", 8.0e12), ("b200", 8.0e12), ("b100", 8.0e12), ("gh200", 4.0e12),
    ("h200", 4.8e12), ("h100 nvl", 3.9e12), ("h100 pcie", 2.0e12), ("h100", 3.35e12), ("h800 pcie", 2.0e12),
    ("h800", 3.35e12), ("a100 40gb", 1.555e12), ("a100", 2.0e12), ("a800", 2.0e12), ("a40", 696e9),
    ("a30", 933e9), ("l40s", 864e9), ("l40 s", 864e9), ("l40", 864e9), ("l4", 300e9), ("t4", 320e9),
    ("mi355x", 8.0e12), ("mi325x", 6.0e12), ("mi300x", 5.3e12), ("mi300a", 5.3e12), ("mi250x", 3.28e12),
    ("mi250", 3.28e12), ("5090", 1.79e12), ("4090", 1.01e12), ("3090", 936e9),
]  # fmt: skip
_PROBE_BYTES = 128 << 20  # beyond every cache


def peak_bandwidth(device_name: str) -> float | None:
    """Bytes/s that a GPU's memory delivers by its name; None when unknown."""
    return by_name(_PEAK_BANDWIDTH, device_name)


@torch.inference_mode()
def measured_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes/s of the better of copying (read and written bytes) and summing a large tensor, best of some tries.

    Elsewhere than on a processor a try is many in a row: starting one takes a share of its time.
    """
    times = 1 if device.type == "cpu" else 20
    source = torch.ones(_PROBE_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for moved, work in ((2, lambda: target.copy_(source)), (1, source.sum)):
        for _ in range(repeats):
            synchronize(device)
            begun = time.perf_counter()
            for _ in range(times):
                work()
            synchronize(device)
            best = max(best, times * moved * source.nbytes / (time.perf_counter() - begun))
    return best


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes and FLOPs of generation. weight_bytes: all parameters as stored; weight_bytes_read: the matrices.

    windows: keys that each layer sees at most; kv_width: 2 * n_kv_head * head_dim * bytes per element.
    """

    num_params: int
    param_dtypes: dict[str, int]
    weight_bytes: int
    weight_bytes_read: int
    matrix_params: int
    windows: tuple[int, ...]
    kv_width: int
    query_width: int

    @classmethod
    def of(cls, model: GPT) -> ModelCost:
        """Count a model; tables are no matrices."""
        config = model.config
        stored = [
            *model.parameters(),
            *(b for name, b in model.named_buffers() if name not in ("cos", "sin")),
        ]
        dtypes: Counter[str] = Counter()
        for tensor in stored:
            dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
        return cls(
            num_params=sum(dtypes.values()),
            param_dtypes=dict(dtypes),
            weight_bytes=sum(t.nbytes for t in stored),
            weight_bytes_read=sum(t.nbytes for m in matrices for t in (*m.parameters(), *m.buffers())),
            matrix_params=sum(m.in_features * m.out_features for m in matrices),
            windows=tuple(config.window_sizes),
            kv_width=2 * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize,
            query_width=config.n_head * config.head_dim,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        return len(self.windows) * self.kv_width

    def kv_read_bytes(self, context: int) -> int:
        """Bytes of keys and values that one row reads in one step."""
        return sum(self.kv_width * min(context, window) for window in self.windows)

    def decode_flops(self, context: int) -> int:
        """FLOPs of one token of one row."""
        seen = sum(min(context, window) for window in self.windows)
        return 2 * self.matrix_params + 4 * self.query_width * seen

    def prefill_flops(self, length: int) -> int:
        """FLOPs of reading one prompt."""
        flops = 2 * self.matrix_params * length
        for window in self.windows:
            w = min(window, length)
            flops += 4 * self.query_width * (w * (w + 1) // 2 + (length - w) * w)
        return flops


def percentile(values: list[float], share: float) -> float:
    """The value below which a share (0 to 1) of the values lies; the upper one between two."""
    ordered = sorted(values)
    return ordered[min(math.floor(share * len(ordered)), len(ordered) - 1)]
