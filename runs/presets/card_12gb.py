"""Pretraining on one card of 12 GB: python -m scripts.base_train runs/presets/card_12gb.py (estimated peak 10.3 GB)."""

depth = 12
device_batch_size = 8
