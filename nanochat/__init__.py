"""The library by layer, ground first: a module imports at its top level only from its own layer or those above it here.

ground      common options configurator machine environment native terminal_log confidence
text        tokenizer tokenizer_base tokenizer_hf tokenizer_files conversation samples
data        download manifests hub dataset dataset_commands validation_data text_import tinyworld document_reader packing
            mixture prefetch dataloader chat_loader contamination
network     network_config scaling sizing memory gpt parameter_groups head_loss head_products growth kv_cache
            flash_attention cpu_attention precision fp8 mxfp4 compilation config_versions
optimizer   muon sharding optim schedule lora batch_fit
training    metrics snapshot checkpoint_manager training_run trainer loss_eval
tools       calculator private_folder sandbox_harness execution
inference   sampling_params sampling requests answer_parts engine scheduler row_cache page_pool prefix_store speculation quantize
            cpu_decode cuda_decode cuda_graphs cuda_kernels cuda_network cuda_read python_tool roofline sweep_bench load_bench
chat        dialogue live_markdown chat remote_chat serve
evaluation  core_bundle core_scoring core_eval hf_eval reference_scores
report      report_render report_scores report_html report report_compare plots plots_compared
exchange    interop
stages      stage finetune dpo rl
plans       dry_run pipeline plans tinyworld_plan
"""

import os

# Threads of torch wait for each other many times a layer. By default they spin for 16 milliseconds before they sleep: beside
# one busy process that costs up to four fifths of the speed, so short a wait half, and alone they are equal (LOG 2026-11-26).
# torch's OpenMP reads it when it is loaded, so it must be set before anything imports torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
