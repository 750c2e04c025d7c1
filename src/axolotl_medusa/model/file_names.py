"""Names that training, decoding and servers agree on: files and the tensor that heads share.

Contract: constants alone; imports nothing.
"""

from __future__ import annotations

HEADS_FOLDER = "medusa_heads"
"""The heads directory inside an output_dir or a checkpoint."""

HEADS_FILE = "medusa_lm_head.safetensors"
CONFIG_FILE = "config.json"
META_FILE = "medusa_meta.json"

STATE_FILE = "trainer_state.json"
"""The Trainer's own, in each of its checkpoints; it is written last."""
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
"""peft's."""
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Weights as transformers wrote them before safetensors."""
CARD_FILE = "README.md"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)
"""Patterns of what a tokenizer consists of; its code is a model's code."""

SHARED_OUTPUT_LAYER = "lm_heads.0.weight"
"""The one output layer of the shared form. Never `lm_head.weight`: a server would find that name in two files."""
