"""Whether an exported folder is the model: same ids, same rendering, same logits, same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, print0
from nanochat.gpt import GPT
from nanochat.interop.hf_config import is_classic
from nanochat.interop.hf_tokenizer import first_difference
from nanochat.samples import CONVERSATIONS, PARAGRAPHS, PROBES
from nanochat.tokenizer import HuggingFaceTokenizer, RustBPETokenizer
from nanochat.tokenizer_base import SPECIAL_TOKENS

TOLERANCE = 1e-4  # of logits in fp32; two orders of summation differ by 1e-5 at depth 4
GREEDY_TOKENS = 16


def verify(directory: Path, model: GPT, tokenizer: RustBPETokenizer) -> None:
    """Load a folder with transformers and compare it with the model (fp32, on the CPU) that it was made from.

    Prints what was compared. Raises UserError at the first difference, or if transformers cannot run it.
    """
    try:
        _compare(directory, model, tokenizer)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip() or "nothing said").splitlines()[0]
        raise UserError(f"transformers cannot run {directory}: {type(error).__name__}: {reason}") from error


def _compare(directory: Path, model: GPT, tokenizer: RustBPETokenizer) -> None:
    own_code = not is_classic(model.config)
    loaded = load_with_transformers(directory, trust_remote_code=own_code)
    _compare_tokenizers(directory, tokenizer, own_code)
    rows = [tokenizer.encode(text, prepend="<|bos|>") for text in PARAGRAPHS]
    rows += [_ids_of(conversation, tokenizer) for conversation in CONVERSATIONS]
    context, window = model.config.sequence_len, min(model.config.window_sizes)
    if window < context:  # so long that in short windows the beginning is out of sight
        rows.append((rows[0] * (2 * window // len(rows[0]) + 1))[: 2 * window + 1])
    worst = max(logit_difference(loaded, model, row[:context]) for row in rows)
    same = f"{len(PROBES)} texts and {len(CONVERSATIONS)} conversations give the same ids"
    print0(f"verified: {same}; logits on {len(rows)} rows differ by at most {worst:.1e}")
    if not worst <= TOLERANCE:
        raise UserError(f"the exported model's logits differ by {worst:.1e} (allowed: {TOLERANCE:.0e})")
    _compare_generation(loaded, model, rows[0][: context // 2], GREEDY_TOKENS)
    if window < context:  # the cache has to forget from the first token on
        _compare_generation(loaded, model, rows[-1][: min(window + 2, context)], GREEDY_TOKENS // 4)


def load_with_transformers(directory: Path, trust_remote_code: bool = False) -> Any:
    """The folder's model in fp32. Raises UserError if a weight is missing or left over."""
    loaded: Any = transformers_package().AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=trust_remote_code, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise UserError(
                f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}"
            )
    return model.eval()


def transformers_package() -> Any:
    """The package transformers. Raises UserError, saying how to get it, where it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "an export is verified with the package transformers; run: uv sync --extra hf"
        ) from None
    return transformers


@torch.inference_mode()
def logit_difference(loaded: Any, model: GPT, ids: list[int]) -> float:
    """Largest absolute difference of the logits (1, T, V) of two models; infinite for another shape or NaN."""
    row = torch.tensor([ids])
    theirs, ours = loaded(row).logits.float(), model(row)
    if theirs.shape != ours.shape:
        return float("inf")
    worst = (theirs - ours).abs().max().item()
    return worst if worst == worst else float("inf")


def _ids_of(conversation: dict, tokenizer: RustBPETokenizer) -> list[int]:
    return tokenizer.render_conversation(conversation, 1 << 20)[0]


def _compare_tokenizers(directory: Path, tokenizer: RustBPETokenizer, trust_remote_code: bool) -> None:
    differing = first_difference(tokenizer, HuggingFaceTokenizer.from_directory(directory), PROBES)
    if differing is not None:
        raise UserError(f"the exported tokenizer encodes {differing!r} differently")
    # Without the permission transformers asks the user before it reads the configuration of a model of our own.
    theirs = transformers_package().AutoTokenizer.from_pretrained(
        directory, trust_remote_code=trust_remote_code
    )
    for name in SPECIAL_TOKENS:
        if theirs.convert_tokens_to_ids(name) != tokenizer.encode_special(name):
            raise UserError(f"the exported tokenizer has another id for {name}")
    for conversation in CONVERSATIONS:
        rendered = theirs.apply_chat_template(conversation["messages"], return_dict=False)
        if rendered != _ids_of(conversation, tokenizer):
            raise UserError("the exported chat template renders a conversation differently")


def _compare_generation(loaded: Any, model: GPT, prompt: list[int], count: int) -> None:
    """Greedy tokens of a generation with transformers' cache against ours without any."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    theirs = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    ours = list(model.generate(prompt, count, temperature=0))
    if theirs != ours:
        raise UserError(f"the exported model continues a text with {theirs}, the original with {ours}")
