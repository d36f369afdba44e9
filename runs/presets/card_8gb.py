"""Pretraining on one card of 8 GB: python -m scripts.base_train runs/presets/card_8gb.py (estimated peak 5.1 GB)."""

depth = 8
device_batch_size = 8
