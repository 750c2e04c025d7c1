"""Heads as trainers leave them, through `axolotl-medusa import`: their logits come out equal, or one line says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_model, randomize
from safetensors.torch import save_file
from torch import Tensor
from training_outputs import save_base

from axolotl_medusa.cli import main
from axolotl_medusa.model.head_form import HeadForm
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import read_heads

HIDDEN_STATES = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
Tensors = dict[str, Tensor]


def heads_of(form: HeadForm = "separate", num_layers: int = 1) -> Tensors:
    """Two heads as a trainer has them in memory."""
    return dict(randomize(MedusaHeads(HIDDEN, VOCAB, 2, num_layers, form)).state_dict())


def base_tensors() -> Tensors:
    return {name: tensor.clone() for name, tensor in make_model().state_dict().items()}


def logits(tensors: Tensors, lm_head: Tensor) -> list[Tensor]:
    """What heads compute, written down anew: residual blocks, then their own output layer or the model's."""
    found = []
    for head in range(2):
        hidden, layer = HIDDEN_STATES, 0
        while f"{head}.{layer}.linear.weight" in tensors:
            weight = tensors[f"{head}.{layer}.linear.weight"].float()
            bias = tensors.get(f"{head}.{layer}.linear.bias", torch.zeros(HIDDEN)).float()
            hidden = hidden + torch.nn.functional.silu(hidden @ weight.T + bias)
            layer += 1
        found.append(hidden @ tensors.get(f"{head}.{layer}.weight", lm_head).float().T)
    return found


# How a name is written


def in_model(name: str) -> str:
    return f"medusa_head.{name}"


def after(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def fsdp_everywhere(name: str) -> str:
    """Every module wrapped by itself, inside a compiled model."""
    head, layer, *rest = name.split(".")
    wrapped = "._fsdp_wrapped_module."
    inner = (wrapped if rest[0] == "linear" else ".").join(rest)
    return f"_orig_mod{wrapped}medusa_head.{head}{wrapped}{layer}._checkpoint_wrapped_module.{inner}"


def native(name: str, prefix: str = "") -> str:
    head, layer, *rest = name.split(".")
    own = f"blocks.{head}.layers.{layer}.{rest[-1]}" if "linear" in rest else f"lm_heads.{head}.weight"
    return prefix + own


def tensorrt(name: str) -> str:
    head, layer, *rest = name.split(".")
    place = f"medusa_layers.{layer}.linear.{rest[-1]}" if "linear" in rest else "lm_head.weight"
    return f"medusa_heads.{head}.{place}"


# How files are written


def one_file(directory: Path, tensors: Any, file: str, old: bool = False) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / file)
    else:
        torch.save(tensors, directory / file, _use_new_zipfile_serialization=not old)


def shards(directory: Path, tensors: Tensors, file: str, with_index: bool = True) -> None:
    """Two files whose tensors alternate, so that every head lies in both."""
    stem, _, kind = file.rpartition(".")
    names, weight_map = sorted(tensors), {}
    for number in (0, 1):
        shard = f"{stem}-0000{number + 1}-of-00002.{kind}"
        one_file(directory, {name: tensors[name] for name in names[number::2]}, shard)
        weight_map |= dict.fromkeys(names[number::2], shard)
    if with_index:
        (directory / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@dataclass(frozen=True)
class Case:
    """One way to leave heads behind.

    Attributes:
        rename: Writes a canonical name as the trainer does.
        form: `separate`: output layers of their own. `shared`: none, the base model's follows the blocks.
        num_layers: Residual blocks per head.
        dtype: What the values are saved in, by their canonical names where they differ.
        extra: Tensors beside the heads, by their names in the file.
        change: What else happens to the tensors, under their names in the file.
        nest: What is saved in place of the tensors, in files of torch.
        file: The file.
        write: How it is written.
        config: Keys of `config.json` beside `base_model_name_or_path`; None leaves the file away.
        beside: Writes more into the directory.
        point: What the command is given, in the directory.
        note: What the command also says.
        refused: The reason, where it does not import.
    """

    rename: Callable[[str], str] = str
    form: HeadForm = "separate"
    num_layers: int = 1
    dtype: torch.dtype | Callable[[str], torch.dtype] = torch.float32
    extra: Callable[[], Tensors] = dict
    change: Callable[[Tensors], Tensors] = dict
    nest: Callable[[Tensors], Any] | None = None
    file: str = "medusa_lm_head.pt"
    write: Callable[..., None] = one_file
    config: dict[str, Any] | None = None
    beside: Callable[[Path], None] | None = None
    point: str = "."
    note: str = ""
    refused: str = ""


def optimizer(tensors: Tensors) -> dict[str, Any]:
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": tensor * 9} for number, tensor in enumerate(tensors.values())
    }
    return {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1]}]}


def nested(*keys: str, **beside: Any) -> Callable[[Tensors], Any]:
    """The tensors under keys within keys, with an optimizer and numbers at each level, as checkpoints have them."""

    def content(tensors: Tensors) -> Any:
        found: Any = tensors
        for key in reversed(keys):
            found = {"epoch": 3, key: found, "optimizer": optimizer(tensors), "lr": 0.1, "args": None, **beside}
        return found

    return content


def original_modules() -> Tensors:
    """What peft keeps of the modules that it copies to train them."""
    return {
        f"base_model.model.medusa_head.original_module.{name}": torch.zeros_like(tensor)
        for name, tensor in heads_of().items()
    }


def no_biases(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}


def quantized(tensors: Tensors, dtype: torch.dtype, scale: str) -> Tensors:
    weight = "medusa_heads.0.0.linear.weight"
    scales = {f"{weight.removesuffix('weight')}{scale}": torch.ones(1)} if scale else {}
    return {**tensors, weight: tensors[weight].to(dtype), **scales}


def lora_on_heads(tensors: Tensors) -> Tensors:
    linear = "base_model.model.medusa_head.0.0.linear"
    matrices = {f"{linear}.lora_A.weight": torch.ones(4, HIDDEN), f"{linear}.lora_B.weight": torch.ones(HIDDEN, 4)}
    return {**tensors, **matrices}


def one_matrix_for_all(tensors: Tensors) -> Tensors:
    return {name: tensor.new_zeros(0) for name, tensor in tensors.items()}


def the_model(directory: Path, file: str = "model.safetensors") -> None:
    one_file(directory, base_tensors(), file)


def an_adapter(directory: Path) -> None:
    matrix = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    one_file(directory, {matrix: torch.ones(4, HIDDEN)}, "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")


def trainer_files(directory: Path) -> None:
    torch.save(optimizer(heads_of()), directory / "optimizer.pt")
    torch.save({"last_epoch": 3, "_step_count": 4}, directory / "scheduler.pt")
    torch.save([1, 2], directory / "training_args.bin")


DDP = after("module.medusa_head.")
PEFT = after("base_model.model.medusa_head.modules_to_save.default.")
CASES = {
    # FasterDecoding's trainers: the module list's own state dict, of vicuna 7B to 33B with a config that has other counts
    "fasterdecoding": Case(config={"medusa_num_heads": 5, "medusa_num_layers": 1, "transformers_version": "4.33"}),
    "fasterdecoding-shared": Case(form="shared"),
    "fasterdecoding-no-model-type": Case(file="medusa_lm_head.safetensors", config={"medusa_num_heads": 2}),
    "fasterdecoding-other-counts": Case(
        config={"medusa_num_heads": 2, "medusa_num_layers": 3}, note="says 3 residual blocks per head, the file has 1"
    ),
    "fasterdecoding-checkpoint": Case(
        in_model,
        extra=lambda: {f"base_model.{name}": tensor for name, tensor in base_tensors().items()},
        file="model.safetensors",
    ),
    "fasterdecoding-merged-shards": Case(
        in_model, extra=base_tensors, file="pytorch_model.bin", write=shards, config={"model_type": "llama"}
    ),
    # wrappers
    "ddp": Case(DDP, extra=lambda: {f"module.{name}": tensor for name, tensor in base_tensors().items()}),
    "ddp-of-the-heads": Case(after("module.")),
    "ddp-inside": Case(after("medusa_head.module.")),
    "compiled": Case(after("_orig_mod.medusa_head."), file="model.safetensors"),
    "compiled-heads": Case(after("_orig_mod.")),
    "ddp-of-compiled": Case(after("module._orig_mod.")),
    "compiled-ddp": Case(after("_orig_mod.module.medusa_heads.")),
    "fsdp": Case(after("_fsdp_wrapped_module.medusa_head.")),
    "fsdp-of-the-heads": Case(after("_fsdp_wrapped_module.")),
    "fsdp-everywhere": Case(fsdp_everywhere),
    "fsdp-full-state-dict": Case(in_model, extra=base_tensors, file="pytorch_model_fsdp.bin"),
    "fabric": Case(after("_forward_module.medusa_head.")),
    "lightning": Case(after("model.medusa_head."), nest=nested("state_dict"), file="last.ckpt", point="last.ckpt"),
    # peft
    "peft": Case(PEFT, extra=original_modules, file="adapter_model.safetensors"),
    "peft-saved": Case(after("base_model.model.medusa_head.modules_to_save."), file="adapter_model.bin"),
    "peft-other-adapter": Case(
        after("base_model.model.medusa_head.modules_to_save.stage_2."), file="adapter_model.bin"
    ),
    "peft-of-the-heads": Case(after("base_model.model.")),
    "peft-ddp": Case(lambda name: f"module.{PEFT(name)}"),
    "peft-compiled": Case(lambda name: f"_orig_mod.{PEFT(name)}", file="adapter_model.safetensors"),
    "peft-fsdp": Case(
        after("_fsdp_wrapped_module.base_model.model.medusa_head._fsdp_wrapped_module.modules_to_save.default.")
    ),
    "peft-with-lora": Case(
        PEFT,
        extra=lambda: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, HIDDEN)},
        file="adapter_model.safetensors",
        note="were trained together with a LoRA",
    ),
    "lora-beside-bare-names": Case(
        extra=lambda: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, HIDDEN)},
        file="adapter_model.safetensors",
        note="were trained together with a LoRA",
    ),
    "peft-original-modules-alone": Case(
        change=lambda _: original_modules(), refused="found no Medusa heads in .*the first is base_model"
    ),
    # types
    "fp16": Case(dtype=torch.float16),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16-safetensors": Case(dtype=torch.bfloat16, file="medusa_lm_head.safetensors"),
    "fp64": Case(dtype=torch.float64),
    "mixed-types": Case(
        dtype=lambda name: torch.float32 if "linear" in name else torch.bfloat16,
        note="are bfloat16 and float32: all became float32, which changes no value",
    ),
    "mixed-half-types": Case(
        dtype=lambda name: torch.float16 if "bias" in name else torch.bfloat16,
        note="are bfloat16 and float16: all became float32",
    ),
    # files
    "shards": Case(write=shards, file="model.safetensors", rename=in_model, extra=base_tensors),
    "shards-of-heads": Case(write=shards, file="medusa_lm_head.safetensors"),
    "shards-of-heads-bin": Case(write=shards, file="medusa_lm_head.bin"),
    "shards-without-index": Case(write=partial(shards, with_index=False), file="medusa_lm_head.safetensors"),
    "shards-incomplete": Case(
        write=partial(shards, with_index=False),
        file="medusa_lm_head.safetensors",
        beside=lambda directory: (directory / "medusa_lm_head-00002-of-00002.safetensors").unlink(),
        refused=r"holds 1 of 2 shards .*complete the download",
    ),
    "shards-incomplete-by-index": Case(
        write=shards,
        file="medusa_lm_head.safetensors",
        beside=lambda directory: (directory / "medusa_lm_head-00002-of-00002.safetensors").unlink(),
        refused=r"names medusa_lm_head-00002-of-00002\.safetensors, which is not beside it",
    ),
    "shards-by-index": Case(
        in_model, write=shards, file="pytorch_model.bin", point="pytorch_model.bin.index.json", extra=base_tensors
    ),
    "shards-of-an-adapter": Case(PEFT, write=shards, file="adapter_model.safetensors"),
    "shards-bin": Case(DDP, write=shards, file="pytorch_model.bin"),
    "bin": Case(in_model, file="pytorch_model.bin"),
    "bin-of-heads": Case(file="medusa_lm_head.bin"),
    "pth": Case(file="medusa_heads.pth"),
    "other-name": Case(file="medusa_head.safetensors", beside=an_adapter),
    "beside-the-model": Case(file="medusa_heads.pt", beside=the_model),
    "beside-a-sharded-model": Case(
        beside=lambda directory: shards(directory, base_tensors(), "model.safetensors"), file="medusa_head.safetensors"
    ),
    "beside-a-trainers-files": Case(file="medusa_heads.pt", beside=trainer_files),
    "one-of-several-steps": Case(
        beside=lambda directory: one_file(directory, heads_of(), "medusa_step_9.pt"),
        file="medusa_step_10.pt",
        refused=r"holds heads in several files \(medusa_step_10\.pt, medusa_step_9\.pt\), expected one: name the file",
    ),
    "step-by-name": Case(
        beside=lambda directory: one_file(directory, {"0.0.linear.weight": torch.ones(2, 2)}, "medusa_step_9.pt"),
        file="medusa_step_10.pt",
        point="medusa_step_10.pt",
    ),
    "in-a-folder": Case(
        file="medusa/medusa_lm_head.pt",
        beside=an_adapter,
        refused=r"found no Medusa heads in .*, but its folder medusa holds medusa_lm_head\.pt: give that folder",
    ),
    "old-torch": Case(write=partial(one_file, old=True)),
    "npz": Case(file="heads.npz", refused="has no weights: expected"),
    # further keys
    "beside-base-weights": Case(
        in_model,
        extra=base_tensors,
        file="pytorch_model.bin",
        note="if it was trained together with them, serve that one",
    ),
    "optimizer": Case(nest=nested("state_dict")),
    "model-key": Case(in_model, nest=nested("model"), extra=base_tensors),
    "module-key": Case(in_model, nest=nested("module"), file="mp_rank_00_model_states.pt"),
    "model-state-dict": Case(after("model.medusa_head."), nest=nested("model_state_dict")),
    "medusa-head-key": Case(nest=nested("medusa_head")),
    "medusa-heads-key": Case(nest=nested("medusa_heads", config={"num_heads": 2})),
    "medusa-head-key-beside-the-model": Case(nest=nested("medusa_head", model=base_tensors())),
    "keys-in-keys": Case(DDP, nest=nested("model", "state_dict")),
    "heads-key-in-model-key": Case(nest=nested("model", "medusa_head")),
    "unknown-key": Case(
        nest=nested("weights_of_rank_0"),
        refused="expected tensors by name, or under state_dict, .*save its state dict alone",
    ),
    "no-tensors": Case(nest=lambda _: {"epoch": 3}, refused="holds a int under 'epoch', expected tensors by name"),
    "twice": Case(
        nest=lambda tensors: {"model": tensors, "state_dict": tensors},
        refused=r"holds 0\.0\.linear\.weight under both state_dict and model",
    ),
    "code": Case(nest=lambda tensors: {"state_dict": tensors, "args": Path("x")}, refused="pickled code is never run"),
    "whole-module": Case(
        nest=lambda _: MedusaHeads(HIDDEN, VOCAB, 2), refused="it asks for .axolotl_medusa.*pickled code is never run"
    ),
    "beside-the-heads": Case(
        extra=lambda: {"model.norm.weight": torch.ones(HIDDEN)},
        refused=r"has the tensor model\.norm\.weight, expected nothing but Medusa heads",
    ),
    # what heads lack or have too much
    "no-biases": Case(change=no_biases, note="the blocks have no biases: zeros were added"),
    "no-biases-in-model": Case(in_model, change=no_biases, extra=base_tensors, note="no biases"),
    "no-output-layers-in-model": Case(in_model, form="shared", extra=base_tensors, file="model.safetensors"),
    "no-output-layers-ddp": Case(DDP, form="shared"),
    "two-blocks": Case(in_model, num_layers=2),
    "output-layers-alone": Case(
        change=lambda tensors: {name: tensor for name, tensor in tensors.items() if "linear" not in name},
        refused="found no Medusa heads in .*output layers and no residual block",
    ),
    "biased-output-layers": Case(
        in_model,
        change=lambda tensors: {**tensors, "medusa_head.0.1.bias": torch.ones(VOCAB)},
        refused=r"medusa_head\.0\.1\.bias, .*output layers without a bias",
    ),
    "biased-output-layers-alone": Case(
        change=lambda tensors: {**tensors, "0.1.bias": torch.ones(VOCAB)},
        refused=r"0\.1\.bias, .*output layers without a bias",
    ),
    "lora-on-heads": Case(
        PEFT, change=lora_on_heads, refused=r"linear\.lora_A\.weight, .*a LoRA on the heads.*merge it"
    ),
    "unknown-parts": Case(
        in_model,
        change=lambda tensors: {**tensors, "medusa_head.0.0.norm.weight": torch.ones(HIDDEN)},
        refused=r"medusa_head\.0\.0\.norm\.weight, expected residual blocks and output layers",
    ),
    "zero-3": Case(change=one_matrix_for_all, refused=r"linear\.weight is empty, .*ZeRO-3.*zero_to_fp32"),
    "fsdp-flat": Case(
        change=lambda _: {"medusa_head._fsdp_wrapped_module._flat_param": torch.ones(9)},
        refused="_flat_param, .*FSDP",
    ),
    "fsdp-slice-of-one-rank": Case(
        in_model,
        change=lambda tensors: {name: tensor[: len(tensor) // 2] for name, tensor in tensors.items()},
        file="pytorch_model_fsdp.bin",
        config={},
        refused=r"0\.0\.linear\.bias is \(16,\), expected \(32,\)",
    ),
    "fsdp-parts": Case(
        file="pytorch_model_fsdp_0/__0_0.distcp", refused="FSDP's own parts: join them with `axolotl merge-sharded"
    ),
    "uneven-heads": Case(
        num_layers=2,
        change=lambda tensors: {name.replace("1.2.", "1.1."): tensor for name, tensor in tensors.items()},
        refused=r"residual blocks \[0, 1\] and output layers after \[1, 2\] blocks",
    ),
    "missing-blocks": Case(
        num_layers=3,
        change=lambda tensors: {name: tensor for name, tensor in tensors.items() if ".2.linear" not in name},
        refused=r"residual blocks \[0, 1\] and output layers after \[3\] blocks",
    ),
    # vLLM's converters, users' own and ModelOpt's, whose names vLLM strips of their prefix
    "vllm": Case(native, file="model.safetensors", config={"model_type": "medusa", "architectures": ["MedusaModel"]}),
    "vllm-prefixed": Case(partial(native, prefix="medusa_heads."), file="model.safetensors"),
    "vllm-ddp": Case(partial(native, prefix="module."), file="model.safetensors"),
    "vllm-lm-head": Case(
        native,
        form="shared",
        extra=lambda: {"lm_head.weight": base_tensors()["lm_head.weight"]},
        file="model.safetensors",
        config={"model_type": "medusa", "original_lm_head": True},
    ),
    "vllm-prefixed-shared": Case(
        partial(native, prefix="medusa_heads."),
        form="shared",
        extra=lambda: {"medusa_heads.lm_heads.0.weight": base_tensors()["lm_head.weight"]},
        file="model.safetensors",
    ),
    "vllm-without-output-layers": Case(native, form="shared", file="model.safetensors"),
    # SpecForge and SGLang, whose draft model has an embedding and an lm_head that are not loaded
    "sglang": Case(
        after("medusa_heads."),
        form="shared",
        extra=lambda: {
            "model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN),
            "lm_head.weight": torch.zeros(VOCAB, HIDDEN),
        },
        file="model.safetensors",
        config={"architectures": ["LlamaForCausalLMMedusa"], "model_type": "llama", "num_hidden_layers": 0},
    ),
    # NVIDIA
    "modelopt": Case(
        after("medusa_heads."), extra=base_tensors, file="model.safetensors", config={"model_type": "llama"}
    ),
    "modelopt-fp8": Case(
        after("medusa_heads."),
        change=partial(quantized, dtype=torch.float8_e4m3fn, scale="weight_scale"),
        refused=r"weight_scale, .*quantized",
    ),
    "fp8-without-scale": Case(
        after("medusa_heads."),
        change=partial(quantized, dtype=torch.float8_e4m3fn, scale=""),
        file="medusa_lm_head.safetensors",
        refused=r"linear\.weight is float8_e4m3fn, .*quantized",
    ),
    "bitsandbytes": Case(
        after("medusa_heads."),
        change=partial(quantized, dtype=torch.uint8, scale="weight.absmax"),
        refused="quantized",
    ),
    "gptq": Case(
        change=lambda tensors: {**tensors, "0.0.linear.qweight": torch.ones(4, dtype=torch.int32)}, refused="quantized"
    ),
    "tensorrt-llm-checkpoint": Case(
        tensorrt,
        extra=lambda: {"transformer.vocab_embedding.weight": torch.ones(VOCAB, HIDDEN)},
        file="rank0.safetensors",
        config={"architecture": "MedusaForCausalLM"},
    ),
    "tensorrt-llm-ranks": Case(
        tensorrt,
        file="rank0.safetensors",
        beside=lambda directory: one_file(directory, heads_of(), "rank1.safetensors"),
        refused="divided among ranks",
    ),
    # a config that says nothing
    "no-base-model": Case(in_model, config=None, extra=base_tensors, refused="names no base model .*--base-model"),
}


def published(directory: Path, base: Path, case: Case) -> Tensors:
    """Writes the case; returns what was saved, by canonical names."""
    dtype = case.dtype if callable(case.dtype) else lambda _: case.dtype
    saved = {name: tensor.to(dtype(name)) for name, tensor in heads_of(case.form, case.num_layers).items()}
    tensors = case.change({case.rename(name): tensor for name, tensor in saved.items()} | case.extra())
    content = tensors if case.nest is None else case.nest(tensors)
    directory.mkdir()
    folder, _, file = case.file.rpartition("/")
    case.write(directory / folder, content, file)
    if case.config is not None or case.refused == "":
        config = {"base_model_name_or_path": str(base), **(case.config or {})}
        (directory / folder / "config.json").write_text(json.dumps(config))
    if case.beside is not None:
        case.beside(directory)
    return {name: tensor for name, tensor in saved.items() if case.rename(name) in tensors}


@pytest.mark.parametrize("name", CASES)
def test_heads_as_trainers_leave_them(name, tmp_path, capsys, no_network):
    case, base, out = CASES[name], save_base(tmp_path / "base", make_model()), tmp_path / "out"
    saved = published(tmp_path / "published", base, case)
    capsys.readouterr()
    status = main(["import", str(tmp_path / "published" / case.point), "--to", "canonical", "--out", str(out)])
    said = capsys.readouterr()
    if case.refused:
        assert status == 1 and not out.exists()
        (line,) = said.err.splitlines()
        assert line.startswith("axolotl-medusa import: error: ")
        assert re.search(case.refused, line), line
        return
    assert status == 0, said.err
    assert case.note in said.out
    read = read_heads(out)
    lm_head = base_tensors()["lm_head.weight"]
    assert read.form == case.form and read.config["base_model_name_or_path"] == str(base)
    built = read.build().float()
    shared = read.tensors.get("lm_heads.0.weight")
    for head, expected in enumerate(logits(saved, lm_head)):
        hidden = built.hidden(head, HIDDEN_STATES)
        layer = built.output_layer(head)
        weight = layer.weight if layer is not None else shared.float()
        assert torch.equal(hidden @ weight.T, expected)


def repeated(num_layers: int) -> Tensors:
    """Heads whose one block stands in several places, as `[block] * num_layers` makes them."""
    tensors = heads_of(num_layers=num_layers)
    for name in [name for name in tensors if "linear" in name]:
        head, _, *rest = name.split(".")
        tensors[name] = tensors[".".join([head, "0", *rest])]
    return tensors


@pytest.mark.parametrize("kept", [0, 1])
def test_block_that_is_repeated_and_saved_once(kept, tmp_path, capsys):
    """Files of transformers leave out a tensor that shares another one's memory."""
    expected = repeated(num_layers=2)
    saved = {in_model(name): tensor for name, tensor in expected.items() if f".{1 - kept}.linear" not in name}
    one_file(tmp_path / "published", saved, "model.safetensors")
    arguments = ["import", str(tmp_path / "published"), "--to", "canonical", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--base-model", "org/base"]) == 0
    assert "the 2 blocks of every head are equal" in capsys.readouterr().out
    read = read_heads(tmp_path / "out")
    assert read.config["medusa_num_layers"] == 2
    for found, logits_ in zip(logits(read.tensors, torch.empty(0)), logits(expected, torch.empty(0)), strict=True):
        assert torch.equal(found, logits_)


@pytest.mark.parametrize("given", [True, False])
def test_heads_without_output_layers_take_that_of_the_model_they_lie_in(given, tmp_path):
    """Medusa-2 trains lm_head too, and a config often names the model before; what the user names comes first."""
    base = save_base(tmp_path / "base", make_model())
    model = base_tensors()
    model["lm_head.weight"] += 1
    tensors = {f"module.medusa_head.{name}": tensor for name, tensor in heads_of("shared").items()}
    one_file(
        tmp_path / "published", tensors | {f"module.{name}": own for name, own in model.items()}, "model.safetensors"
    )
    (tmp_path / "published" / "config.json").write_text(
        json.dumps({"model_type": "llama", "base_model_name_or_path": str(base)})
    )
    arguments = ["import", str(tmp_path / "published"), "--to", "canonical", "--out", str(tmp_path / "out")]
    assert main([*arguments, *(["--base-model", str(base)] if given else [])]) == 0
    expected = base_tensors()["lm_head.weight"] + (0 if given else 1)
    assert torch.equal(read_heads(tmp_path / "out").tensors["lm_heads.0.weight"], expected)


def test_heads_without_output_layers_take_the_lm_head_that_their_adapter_saved(tmp_path):
    base = save_base(tmp_path / "base", make_model())
    lm_head = base_tensors()["lm_head.weight"] + 1
    tensors = {PEFT(name): tensor for name, tensor in heads_of("shared").items()}
    one_file(
        tmp_path / "published", tensors | {"base_model.model.lm_head.weight": lm_head}, "adapter_model.safetensors"
    )
    (tmp_path / "published" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert main(["import", str(tmp_path / "published"), "--to", "canonical", "--out", str(tmp_path / "out")]) == 0
    assert torch.equal(read_heads(tmp_path / "out").tensors["lm_heads.0.weight"], lm_head)


def test_base_model_is_what_the_adapter_names_where_the_config_does_not(tmp_path):
    """Training writes the model's own config.json beside an adapter."""
    tensors = {PEFT(name): tensor for name, tensor in heads_of().items()}
    one_file(tmp_path / "published", tensors, "adapter_model.safetensors")
    (tmp_path / "published" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "published" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert main(["import", str(tmp_path / "published"), "--to", "canonical", "--out", str(tmp_path / "out")]) == 0
    assert read_heads(tmp_path / "out").config["base_model_name_or_path"] == "org/base"
