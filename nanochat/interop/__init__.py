"""Bridges to other ecosystems: Hugging Face folders, upstream's checkpoints, GGUF, the evaluation harness.

chat_template.jinja            our rendering of a conversation as a template
hf_tokenizer, hf_config        vocabulary and configuration, both ways
hf_export, hf_import           whole folders, both ways; model_card and verification serve the export, hub_access both
modeling_nanochat_modern.py    the network for transformers, copied into exported folders
weights, imported              what all imports share: tensors checked and named as ours, and the checkpoint they become
upstream, upstream_import      checkpoints of earlier nanochat implementations
gguf_export                    files for llama.cpp
lm_harness                     our models as a subject of EleutherAI's lm-evaluation-harness
"""
