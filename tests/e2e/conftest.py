"""What end-to-end tests share: a tiny model with a real tokenizer, chat data, and axolotl's own commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl_process import Result, run_module
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2_tokenizer(tmp_path_factory) -> Path:
    """The tokenizer of SmolLM2, from the package that carries it."""
    from demo.smollm2 import EOS, PAD, gguf_file

    source = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token, tokenizer.pad_token = EOS, PAD
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, smollm2_tokenizer) -> Path:
    """A 2-layer random Llama with SmolLM2's vocabulary, untied."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(smollm2_tokenizer, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,  # the block size of 4-bit weights
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """40 short conversations of very different lengths, some with several turns."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(40):
            turns = []
            for turn in range(1 + number % 3):
                turns.append({"role": "user", "content": f"Count from {number} in step {turn + 1}."})
                answer = " ".join(str(number + (turn + 1) * k) for k in range(3 + number))
                turns.append({"role": "assistant", "content": answer})
            lines.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture
def make_yaml(tmp_path, tiny_base, chats) -> Callable[..., Path]:
    """Writes a YAML for a short run; keyword arguments override or add keys, None removes one."""

    def make(**changes: Any) -> Path:
        cfg: dict[str, Any] = {
            "base_model": str(tiny_base),
            "plugins": ["axolotl_medusa.MedusaPlugin"],
            "medusa_num_heads": 3,
            "medusa_only_heads": True,
            "medusa_lm_head": "shared",
            "datasets": [{"path": str(chats), "type": "chat_template", "field_messages": "messages"}],
            "val_set_size": 0.0,
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 256,
            "sample_packing": True,
            "attn_implementation": "sdpa",
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "bf16": False,
            "tf32": False,
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "seed": 7,
        }
        cfg |= changes
        file = tmp_path / f"run{len(list(tmp_path.glob('run*.yml')))}.yml"
        file.write_text(
            yaml.safe_dump({key: value for key, value in cfg.items() if value is not None}), encoding="utf-8"
        )
        return file

    return make


@pytest.fixture
def two_chats(tmp_path) -> list[dict[str, str]]:
    """Two conversations of very different lengths: every step sees both, in whatever order and on whatever rank."""
    file = tmp_path / "two.jsonl"
    answers = [" ".join(map(str, range(length))) for length in (60, 12)]
    rows = [[{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}] for text in answers]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return [{"path": str(file), "type": "chat_template", "field_messages": "messages"}]


@pytest.fixture
def zero3(tmp_path) -> str:
    """Our ZeRO-3 config in fp32."""
    config = json.loads((ROOT / "deepspeed_configs" / "zero3_bf16.json").read_text())
    config["bf16"] = {"enabled": False}
    file = tmp_path / "zero3_fp32.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.fixture
def axolotl(tmp_path) -> Callable[..., Result]:
    """Runs `python -m axolotl.cli.COMMAND`; fails the test on an unexpected exit status."""

    def run(command: str, *arguments: Any, ok: bool = True, env: dict[str, str] | None = None) -> Result:
        log = tmp_path / f"{command}{len(list(tmp_path.glob('*.log')))}.log"
        result = run_module(f"axolotl.cli.{command}", [str(argument) for argument in arguments], log, env)
        assert (result.returncode == 0) is ok, result.output[-6000:]
        return result

    return run
