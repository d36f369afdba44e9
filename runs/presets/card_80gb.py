"""Pretraining on one card of 80 GB: python -m scripts.base_train runs/presets/card_80gb.py (estimated peak 66.1 GB)."""

depth = 24
device_batch_size = 16
