"""Pretraining on one card of 24 GB: python -m scripts.base_train runs/presets/card_24gb.py (estimated peak 17.9 GB)."""

depth = 16
device_batch_size = 8
