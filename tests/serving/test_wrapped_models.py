"""Adapters and full models whose names trainers left wrapped, through `axolotl-medusa export`: as if they were not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model, randomize
from example_tokenizers import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_outputs import as_if_trained, save_base, write_run

from axolotl_medusa.cli import main
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.wrapped_names import unwrapped

Tensors = dict[str, Tensor]

LORA = {"targets": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}


def run_of(directory: Path, adapter: bool) -> Path:
    """A Medusa-2 run of a 2-layer model."""
    base = save_base(directory / "base", make_model())
    model: Any = make_model()
    if adapter:
        model = add_lora(model, **LORA)
    as_if_trained(model)
    return write_run(directory / "run", model, "medusa-2", base)


def rewrite(run: Path, adapter: bool, change: Callable[[Tensors], Tensors]) -> None:
    file = run / ("adapter_model.safetensors" if adapter else "model.safetensors")
    save_file(
        {name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, metadata={"format": "pt"}
    )


def exported(run: Path, out: Path) -> Tensors:
    assert main(["export", str(run), "--to", "vllm", "--model", "merged", "--out", str(out)]) == 0
    return load_file(out / "merged_model" / "model.safetensors")


def named(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def after(prefix: str) -> Callable[[Tensors], Tensors]:
    return named(lambda name: prefix + name)


def fsdp_inside(name: str) -> str:
    return re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)


def with_adapter_names(name: str) -> str:
    """As in a state dict that was not taken through peft."""
    name = re.sub(r"\.(lora_(?:embedding_)?[AB])(?=\.|$)", r".\1.default", name)
    return re.sub(r"lm_head\.weight$", "lm_head.modules_to_save.default.weight", name)


def with_originals(tensors: Tensors) -> Tensors:
    """Both modules of peft's wrapper, as in a state dict that was not taken through peft."""
    saved = named(with_adapter_names)(tensors)
    original = {"base_model.model.lm_head.original_module.weight": torch.zeros(VOCAB, HIDDEN)}
    return saved | original


def heads_inside(prefix: str) -> Callable[[Tensors], Tensors]:
    """Heads of another trainer in the same file."""
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, 2)).state_dict()
    return lambda tensors: tensors | {f"{prefix}medusa_head.{name}": tensor for name, tensor in heads.items()}


WRAPPED = {
    "adapter-compiled": (True, after("_orig_mod.")),
    "adapter-ddp": (True, after("module.")),
    "adapter-fsdp": (True, after("_fsdp_wrapped_module.")),
    "adapter-fsdp-inside": (True, named(fsdp_inside)),
    "adapter-names": (True, named(with_adapter_names)),
    "adapter-originals": (True, with_originals),
    "adapter-with-heads": (True, heads_inside("base_model.model.")),
    "adapter-with-heads-of-modules-to-save": (
        True,
        lambda tensors: named(lambda name: name.replace("medusa_head.", "medusa_head.modules_to_save.default."))(
            heads_inside("base_model.model.")(tensors)
        ),
    ),
    "model-compiled": (False, after("_orig_mod.")),
    "model-ddp": (False, after("module.")),
    "model-peft": (False, after("base_model.model.")),
    "model-fsdp-inside": (False, named(fsdp_inside)),
    "model-with-heads": (False, heads_inside("")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_export_of_wrapped_names_is_that_of_the_bare_ones(name, tmp_path):
    adapter, change = WRAPPED[name]
    run = run_of(tmp_path, adapter)
    expected = exported(run, tmp_path / "bare")
    rewrite(run, adapter, change)
    found = exported(run, tmp_path / "wrapped")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


REFUSED = {
    "adapter-twice": (
        True,
        lambda tensors: tensors | after("module.")(tensors),
        "are the same parameter, expected one of them",
    ),
    "model-twice": (False, lambda tensors: tensors | after("_orig_mod.")(tensors), "are the same parameter"),
    "model-with-lora": (
        False,
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, HIDDEN)},
        r"holds model\.layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight, .*expected a merged model",
    ),
    "model-with-base-layers": (
        False,
        named(lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
        "base_layer.*expected a merged model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_is_not_whole_is_refused_in_one_line(name, tmp_path, capsys):
    adapter, change, message = REFUSED[name]
    run = run_of(tmp_path, adapter)
    rewrite(run, adapter, change)
    capsys.readouterr()
    assert main(["export", str(run), "--to", "vllm", "--model", "merged", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter-compiled", "adapter-names", "model-compiled", "model-fsdp-inside"])
def test_decoding_says_what_to_do_about_wrapped_names(name, tmp_path, capsys):
    """Transformers and peft would begin such weights anew and say so among other lines; the text would be untrained."""
    adapter, change = WRAPPED[name]
    run = run_of(tmp_path, adapter)
    rewrite(run, adapter, change)
    make_tokenizer("zephyr").save_pretrained(run / "medusa_heads")
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "a"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"renamed, expected .*axolotl-medusa export .*--model merged", line), line


def test_first_forks_adapter_is_imported_and_served_with_its_lora(tmp_path):
    """An adapter with the heads among its `modules_to_save`, of a run that knows nothing of this package."""
    expected = exported(run_of(tmp_path / "ours", adapter=True), tmp_path / "expected")
    fork = tmp_path / "fork"
    model = add_lora(make_model(), **LORA)
    as_if_trained(model)
    model.save_pretrained(fork)
    heads = dict(randomize(MedusaHeads(HIDDEN, VOCAB, 2)).state_dict())
    file = fork / "adapter_model.safetensors"
    prefix = "base_model.model.medusa_head.modules_to_save.default."
    save_file(load_file(file) | {prefix + name: tensor for name, tensor in heads.items()}, file)
    base = str(tmp_path / "ours" / "base")
    out = fork / "medusa_heads"
    assert main(["import", str(fork), "--to", "canonical", "--out", str(out), "--base-model", base]) == 0
    found = exported(fork, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(written[f"blocks.{i}.layers.0.weight"], heads[f"{i}.0.linear.weight"])
        and torch.equal(written[f"lm_heads.{i}.weight"], heads[f"{i}.1.weight"])
        for i in range(2)
    )
    assert "medusa" not in json.dumps(json.loads((tmp_path / "out" / "merged_model" / "config.json").read_text()))


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.module.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.base_model.model.lm_head.weight", "lm_head.weight"),
        ("_fsdp_wrapped_module._fpw_module.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("a.lora_A.default.weight", "a.lora_A.weight"),
        ("a.modules_to_save.default.weight", "a.modules_to_save.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.module.weight", "model.module.weight"),
        ("model.default.weight", "model.default.weight"),
        ("base_model.layers.0.weight", "base_model.layers.0.weight"),
    ],
)
def test_unwrapped_leaves_out_wrappers_alone(name, bare):
    assert unwrapped(name) == bare
