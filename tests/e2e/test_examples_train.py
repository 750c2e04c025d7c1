"""Every example for GPUs trains a tiny model of its family through axolotl's own command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl_process import run_module
from conftest import H100, TORCH, make_model
from example_files import BIG, load
from example_tokenizers import make_tokenizer
from transformers import PreTrainedTokenizerFast

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.usefixtures("no_network")

FAMILIES = {"vicuna": "llama", "zephyr": "mistral", "mistral": "mistral", "qwen3": "qwen3"}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer random model and its tokenizer for each family, wide enough for 4-bit blocks of 64."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in FAMILIES.items():
        tokenizer = make_tokenizer(name)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 1024}
        make_model(family, vocab_size=len(tokenizer), **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 conversations as the generator writes them, and the same as ShareGPT has them."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "messages.jsonl").open("w") as own, (folder / "conversations.jsonl").open("w") as sharegpt:
        for number in range(40):
            answer = " ".join(str(number + k) for k in range(3 + number % 9))
            texts = [("user", "human", f"Count from {number}."), ("assistant", "gpt", answer)]
            turns = [{"role": role, "content": text} for role, _, text in texts]
            own.write(json.dumps({"messages": turns, "finish_reasons": ["stop"]}) + "\n")
            turns = [{"from": role, "value": text} for _, role, text in texts]
            sharegpt.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")
    return folder


def on_cpu(name: str, tiny_models: Path, tiny_data: Path, output: Path) -> dict[str, Any]:
    """An example with a tiny model and what a CPU cannot do replaced."""
    cfg = load(name)
    cfg["base_model"] = str(tiny_models / name.split("_")[0])
    cfg["datasets"][0]["path"] = str(tiny_data / f"{cfg['datasets'][0]['field_messages']}.jsonl")
    for key in ("deepspeed", "evals_per_epoch", "saves_per_epoch"):
        cfg.pop(key, None)
    cpu = {"attn_implementation": "sdpa", "bf16": False, "tf32": False, "optimizer": "adamw_torch"}
    short = {"sequence_len": 256, "max_steps": 2, "val_set_size": 0.0, "warmup_steps": 0, "save_strategy": "no"}
    paths = {"output_dir": str(output), "dataset_prepared_path": str(output.with_name(output.name + "-prepared"))}
    processes = {"dataset_num_proc": 1, "dataloader_num_workers": 0}
    return {**cfg, **cpu, **short, **paths, **processes}


@pytest.mark.parametrize("name", ["vicuna_7b_stage2", "zephyr_7b_self_distillation", "qwen3"])
def test_lora_lines_adapt_every_linear_layer_and_lm_head(name, tiny_models, tiny_data, tmp_path):
    """`lora_target_linear` alone leaves lm_head out."""
    from axolotl.loaders import ModelLoader, load_tokenizer
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = on_cpu(name, tiny_models, tiny_data, tmp_path)
    cfg = {key: value for key, value in cfg.items() if key != "plugins" and not key.startswith("medusa_")}
    adapted = {}
    for targets in (cfg["lora_target_modules"], None):
        own = DictDefault(json.loads(json.dumps({**cfg, "lora_target_modules": targets})))
        own = validate_config(own, capabilities={**H100, "compute_capability": None}, env_capabilities=TORCH)
        normalize_config(own)
        model, _ = ModelLoader(own, load_tokenizer(own)).load()
        found = {path for path, module in model.named_modules() if hasattr(module, "lora_A")}
        adapted[str(targets)] = {path.rpartition(".")[2] for path in found}
        assert len(found) == 2 * len(LINEAR) + bool(targets), found
    assert adapted == {"['lm_head']": LINEAR | {"lm_head"}, "None": LINEAR}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path, tiny_data: Path) -> Callable[[str], Path]:
    """Trains an example with axolotl's own command, stage 1 before stage 2, and returns its output_dir."""
    folder = tmp_path_factory.mktemp("outputs")
    outputs = {load(name)["output_dir"]: name for name in BIG}

    def train(name: str) -> Path:
        output = folder / name
        if (output / "medusa_heads").is_dir():
            return output
        cfg = on_cpu(name, tiny_models, tiny_data, output)
        if cfg.get("medusa_init_from"):
            cfg["medusa_init_from"] = str(train(outputs[cfg["medusa_init_from"]]))
        file = folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(cfg), encoding="utf-8")
        result = run_module("axolotl.cli.train", [str(file)], folder / f"{name}.log")
        assert result.returncode == 0, result.output[-6000:]
        return output

    return train


@pytest.mark.e2e
@pytest.mark.parametrize("name", BIG)
def test_example_trains_a_tiny_model_of_its_family(name, trained):
    output, cfg = trained(name), load(name)
    heads = read_heads(output / "medusa_heads").head_tensors()
    moved = {key for key, tensor in heads.items() if ".linear." in key and tensor.abs().max() > 0}
    assert len(moved) == 2 * cfg["medusa_num_heads"], "every head's weight and bias left zero"
    assert (output / "adapter_model.safetensors").is_file() is not cfg["medusa_only_heads"]
    if cfg.get("chat_template_jinja"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "medusa_heads")
        assert "USER: " in tokenizer.chat_template
