"""Small random models, axolotl's validation of a YAML, and the environment that every test runs in."""

from __future__ import annotations

import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = "0" if os.environ.get("MEDUSA_TEST_DEVICE") == "cuda" else ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("WANDB_MODE", "disabled")

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DEVICE = os.environ.get("MEDUSA_TEST_DEVICE", "cpu")
"""`cuda`: the tests of the losses (`make test-cuda`) make their tensors on a GPU. No other test looks at one."""

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

VOCAB, HIDDEN = 131, 32

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
# Everything that makes families differ for heads: tied or not, biases, scaled embeddings, capped or scaled logits.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma2-softcap": {"model_type": "gemma2", "tie_word_embeddings": True, "final_logit_softcapping": 0.5},
    "phi-lm-head-bias": {"model_type": "phi"},
    "phi3": {"model_type": "phi3"},
    "cohere-logit-scale": {"model_type": "cohere", "tie_word_embeddings": True, "logit_scale": 0.0625},
    "granite-logits-scaling": {"model_type": "granite", "logits_scaling": 8.0},
    "gpt2": {"model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


PLUGIN = "axolotl_medusa.MedusaPlugin"
AXOLOTL_YAML = {
    "base_model": "org/model",
    "plugins": [PLUGIN],
    "sequence_len": 64,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_epochs": 1,
    "learning_rate": 0.001,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "datasets": [{"path": "org/data", "type": "chat_template"}],
}
"""A YAML that axolotl accepts; tests add the keys that they are about."""

H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
TORCH = {"torch_version": "2.13.0"}
"""What axolotl is told of the machine when it validates a YAML."""

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def make_model(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random 2-layer model in fp32; weights are scaled up so that logits are far from uniform."""
    options = {**COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif "bias" in name:
                parameter.normal_(std=0.5)
    return model


def add_lora(model: PreTrainedModel, targets: object = "all-linear", **options: object) -> PeftModel:
    """`model` under peft, with adapters that are not at their start (where they would do nothing)."""
    torch.manual_seed(5)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config)


def randomize(module: nn.Module, seed: int = 7, std: float = 0.3) -> nn.Module:
    """Gives every parameter of `module` normal values, and returns it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


@pytest.fixture
def model_factory() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses every connection of this process but those to the fork server of the end-to-end tests."""

    def refuse(_socket: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address} was tried")

    connect = socket.socket.connect

    def only_local(own: socket.socket, address: Any) -> None:
        (connect if own.family == socket.AF_UNIX else refuse)(own, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("axolotl."):
            self.lines.append(record.getMessage())


@pytest.fixture
def axolotl_warnings() -> Iterator[list[str]]:
    """What axolotl, without this plugin, warns of."""
    handler = Warnings()
    logger = logging.getLogger("axolotl")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], Any]:
    """Axolotl's own steps from a YAML to a config: plugins, then its validator, as on a machine with an H100."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())

    def run(cfg: Mapping[str, Any]) -> Any:
        own = DictDefault(json.loads(json.dumps(cfg)))
        prepare_plugins(own)
        return validate_config(own, capabilities=H100, env_capabilities=TORCH)

    return run


@pytest.fixture
def with_local_paths(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replaces the paths that an earlier step would have made: a downloaded model, the heads of stage 1."""

    def replace(cfg: dict[str, Any]) -> dict[str, Any]:
        if cfg["base_model"].startswith("."):
            model = tmp_path / "model"
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text("{}")
            (model / "model.safetensors").touch()
            cfg = {**cfg, "base_model": str(model)}
        if cfg.get("medusa_init_from"):
            heads = tmp_path / "stage1" / "medusa_heads"
            heads.mkdir(parents=True, exist_ok=True)
            config = {"medusa_num_heads": 5, "medusa_num_layers": 1, "original_lm_head": False}
            (heads / "config.json").write_text(json.dumps(config))
            (heads / "medusa_lm_head.safetensors").touch()
            cfg = {**cfg, "medusa_init_from": str(heads.parent)}
        return cfg

    return replace
