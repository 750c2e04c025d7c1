"""Models, adapters and tokenizers, which transformers and peft load for the commands that decode.

Loading takes longer than reading, so that these get fewer inputs than the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import add_lora
from damage import damaged_json
from decoding_models import varied_model
from example_tokenizers import make_tokenizer
from hypothesis.strategies import SearchStrategy
from package_readers import damaged_safetensors
from peft import get_peft_model_state_dict
from reader import Reader
from safetensors.torch import save as as_safetensors
from training_outputs import save_base, write_run

from axolotl_medusa.decoding.load_decoder import load_decoder

VOCABULARY = {"vocab_size": 300, "eos_token_id": None}
BASE, RUN, TOKENIZER = "base", "run", "run/medusa_heads"


def make_trained(directory: Path) -> None:
    base = save_base(directory / BASE, varied_model(**VOCABULARY))
    write_run(directory / RUN, add_lora(varied_model(**VOCABULARY), targets=["q_proj"]), "medusa-2", base)
    make_tokenizer("zephyr").save_pretrained(directory / TOKENIZER)
    (directory / BASE / "generation_config.json").write_text(json.dumps(GENERATION))
    (directory / TOKENIZER / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS))


def load(directory: Path) -> None:
    model, tokenizer = load_decoder(directory / RUN, str(directory / BASE))
    assert all(isinstance(token, int) for token in model.eos_token_ids) and tokenizer.decode([5])


GENERATION = {"eos_token_id": [2, 3], "max_new_tokens": 20, "temperature": 0.7, "do_sample": True}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}


def damage_of(files: dict[str, Any]) -> dict[str, SearchStrategy[bytes]]:
    return {name: damaged_json(content) for name, content in files.items()}


MODEL_CONFIG = json.loads(varied_model(**VOCABULARY).config.to_json_string(use_diff=False))
ADAPTER = as_safetensors(get_peft_model_state_dict(add_lora(varied_model(**VOCABULARY), targets=["q_proj"])))
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "bias": "none",
    "rank_pattern": {},
    "modules_to_save": None,
    "base_model_name_or_path": "base",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 64,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True, "lstrip": False}},
}
TOKENIZER_JSON = json.loads(make_tokenizer("zephyr").backend_tokenizer.to_str())

LOADER_READERS = [
    Reader(
        name,
        make_trained,
        load,
        damage,
        inputs,
        free_bytes=60_000_000,
        free_address_space=True,
    )
    for name, damage, inputs in (
        ("load-model", damage_of({f"{BASE}/config.json": MODEL_CONFIG}), 60),
        ("load-generation-config", damage_of({f"{BASE}/generation_config.json": GENERATION}), 30),
        (
            "load-adapter",
            {
                **damage_of({f"{RUN}/adapter_config.json": ADAPTER_CONFIG}),
                f"{RUN}/adapter_model.safetensors": damaged_safetensors(ADAPTER),
            },
            40,
        ),
        (
            "load-tokenizer",
            damage_of(
                {
                    f"{TOKENIZER}/tokenizer.json": TOKENIZER_JSON,
                    f"{TOKENIZER}/tokenizer_config.json": TOKENIZER_CONFIG,
                    f"{TOKENIZER}/special_tokens_map.json": SPECIAL_TOKENS,
                }
            ),
            60,
        ),
    )
]  # fmt: skip
"""All of them."""
