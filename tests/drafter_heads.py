"""Small random heads for the drafter's tests: in memory, stacked, in a heads directory, and as an export for vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import randomize
from safetensors.torch import load_file, save_file

from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE
from axolotl_medusa.model.heads import HeadForm, MedusaHeads
from axolotl_medusa.model.heads_directory import HeadsFile, heads_config, write_heads
from axolotl_medusa.serving.draft_heads import DraftHeads
from axolotl_medusa.serving.format_rules import TARGETS, plan, target_config

HIDDEN, VOCAB, HEADS = 12, 37, 3
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB}


def stacked(heads: MedusaHeads) -> DraftHeads:
    """The training module's weights as the drafter holds them."""
    blocks = [heads.blocks(index) for index in range(heads.num_heads)]
    layers = range(heads.num_layers)
    weights = tuple(torch.stack([block[layer].linear.weight.detach() for block in blocks]) for layer in layers)
    biases = tuple(torch.stack([block[layer].linear.bias.detach() for block in blocks]) for layer in layers)
    if not (outputs := heads.output_layers()):
        return DraftHeads(weights, biases)
    return DraftHeads(weights, biases, torch.stack([layer.weight.detach() for layer in outputs]))


def write(directory: Path, form: HeadForm, layers: int = 1, draft_vocab: int | None = None) -> MedusaHeads:
    """Writes random heads as training does; returns them."""
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, HEADS, layers, form, draft_vocab=draft_vocab))
    tensors = {name: tensor.detach() for name, tensor in heads.state_dict().items()}
    if form == "shared":
        tensors["lm_heads.0.weight"] = torch.randn(VOCAB, HIDDEN)
    write_heads(directory, HeadsFile(tensors, heads_config(heads, "org/model")))
    return heads


def export_for_vllm(source: Path, directory: Path) -> Path:
    """The names and the config of `export --to vllm`."""
    config = json.loads((source / CONFIG_FILE).read_text())
    tensors = load_file(source / HEADS_FILE)
    directory.mkdir()
    named = {planned.name: tensors[planned.source].clone() for planned in plan(TARGETS["vllm"], config)}
    save_file(named, directory / TARGETS["vllm"].file)
    (directory / CONFIG_FILE).write_text(json.dumps(target_config(TARGETS["vllm"], config, "org/model")))
    return directory
