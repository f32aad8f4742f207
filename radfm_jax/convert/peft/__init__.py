"""LoRA adapters of the language model <-> folders of the library PEFT: their config, names and layouts.

Merging adapters into weights belongs to `convert/merge.py`, the adapters themselves to `models/lora.py`.
"""
