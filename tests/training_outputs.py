"""Output directories as training leaves them, made with transformers and peft directly: no axolotl, no training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import HIDDEN, VOCAB, randomize
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from axolotl_medusa.model.head_form import HeadForm
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import heads_config, heads_file, heads_meta, without_heads, write_heads

EVAL_METRICS = {"eval_medusa0_top1": 0.62, "eval_medusa1_top1": 0.41, "eval_medusa_acceptance_length": 1.87}


def save_base(directory: Path, model: PreTrainedModel, **options: Any) -> Path:
    """A base model as it comes from the Hub; `max_shard_size` splits it."""
    model.save_pretrained(directory, **options)
    save_tokenizer(directory)
    return directory


def as_torch_files(directory: Path, num_shards: int = 1, keep: bool = False) -> Path:
    """Writes a model's safetensors as `torch.save` does, as older models are published; `keep` leaves both forms."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    for file in [] if keep else directory.glob("*.safetensors*"):
        file.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer, which such files hold
    names = sorted(tensors)
    if num_shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return directory
    files = [f"pytorch_model-{number:05d}-of-{num_shards:05d}.bin" for number in range(1, num_shards + 1)]
    for number, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[number::num_shards]}, directory / file)
    weight_map = {name: files[place % num_shards] for place, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def save_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def as_if_trained(model: nn.Module) -> None:
    """Moves every trainable parameter: saved modules and token rows start as plain copies, LoRA's B at zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def write_run(
    directory: Path,
    model: PreTrainedModel | PeftModel,
    recipe: str,
    base: Path | str,
    form: HeadForm = "shared",
    num_heads: int = 3,
    num_layers: int = 1,
    yaml: Mapping[str, Any] | None = None,
    draft_vocab: int | None = None,
) -> Path:
    """Writes an output_dir with a checkpoint as training does: heads, and for Medusa-2 what the model became.

    Args:
        directory: Where.
        model: The trained model, under peft for LoRA; heads are attached to it here.
        recipe: `medusa-1` or `medusa-2`.
        base: What the YAML calls base_model.
        form: Of the heads.
        num_heads: Number of heads.
        num_layers: Residual blocks per head.
        yaml: Further keys of the YAML.
        draft_vocab: Tokens that the heads choose among, None for all.

    Returns:
        `directory`.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    assert model.config.get_text_config().hidden_size == HIDDEN and rows >= VOCAB
    attach_heads(
        model, randomize(MedusaHeads(HIDDEN, rows, num_heads, num_layers, form, draft_vocab=draft_vocab), std=0.2)
    )
    heads = heads_file(
        model,
        heads_config(_attached(model), str(base)),
        heads_meta(model, recipe, {"base_model": str(base), "datasets": [{"path": "org/data"}], **(yaml or {})}),
    )
    checkpoint = directory / "checkpoint-4"
    for folder in (directory, checkpoint):
        folder.mkdir(parents=True, exist_ok=True)
        if recipe == "medusa-2":
            model.save_pretrained(folder, state_dict=without_heads(model.state_dict()))
        save_tokenizer(folder)
        write_heads(folder / "medusa_heads", heads)
        save_tokenizer(folder / "medusa_heads")
    model.config.save_pretrained(directory)
    history = [{"loss": 3.0, "step": 2}, {**EVAL_METRICS, "eval_loss": 2.5, "step": 4}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 4}))
    return directory


def _attached(model: PreTrainedModel | PeftModel) -> MedusaHeads:
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    return lm.medusa_heads
