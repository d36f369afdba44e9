"""Pretraining on one card of 48 GB: python -m scripts.base_train runs/presets/card_48gb.py (estimated peak 41.3 GB)."""

depth = 24
device_batch_size = 8
