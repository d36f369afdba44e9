"""Pretraining on one card of 32 GB: python -m scripts.base_train runs/presets/card_32gb.py (estimated peak 28.2 GB)."""

depth = 20
device_batch_size = 8
