"""Configs and tokenizers of published models, as far as the pages' estimates and the examples' recipes need them.

`CONFIGS` has what their `config.json` says of sizes, `TOKENIZERS` what their `tokenizer_config.json` says of special tokens
and, of the chat template, whether there is one and whether it has a switch for thoughts.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "HuggingFaceH4/zephyr-7b-beta": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "meta-llama/Meta-Llama-3-70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_TEMPLATE_WITH_SWITCH = _TEMPLATE + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN3 = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": _TEMPLATE_WITH_SWITCH}

TOKENIZERS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": _LLAMA,
    "HuggingFaceH4/zephyr-7b-beta": {**_LLAMA, "pad_token": "</s>", "chat_template": _TEMPLATE},
    "mistralai/Mistral-7B-Instruct-v0.3": {**_LLAMA, "chat_template": _TEMPLATE},
    "Qwen/Qwen3-8B": _QWEN3,
    "Qwen/Qwen3-32B": _QWEN3,
}
