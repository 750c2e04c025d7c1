"""The real model: exported within its limits, and greedy text in ONNX Runtime is torch's, token for token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from demo import __main__ as demo
from demo.smollm2 import unpacked
from onnx_directories import greedy, source_of
from transformers import AutoModelForCausalLM

from axolotl_medusa.decoding.tree import default_tree
from axolotl_medusa.model.anatomy import output_embedding
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa
from axolotl_medusa.onnx_decoding.tokenizer import LightTokenizer
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

pytestmark = pytest.mark.long

PROMPTS = Path(__file__).parents[2] / "data_generation" / "prompts_heldout.jsonl"
NEW, COUNT, HEADS = 128, 50, 2
LONGEST_EXPORT_S, MOST_MEMORY, LONGEST_START_S = 180, 3.0, 3.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Heads as training begins with them, beside a link to the model."""
    directory = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(unpacked(demo.MODEL), dtype=torch.float32).eval()
    weight = output_embedding(model).weight
    heads = MedusaHeads(weight.shape[1], weight.shape[0], HEADS)
    heads.start_output_layers_from(weight)
    source_of(directory, model, heads, tokenizer=False)
    return model, directory


@pytest.fixture(scope="module")
def exported(run):
    """The export's directory, its seconds, and its memory at most as a multiple of what model and heads have."""
    model, directory = run
    code = (
        "import resource, sys; from axolotl_medusa.cli import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(status)"
    )
    arguments = ["export", str(directory / "medusa_heads"), "--to", "onnx", "--out", str(directory / "out")]
    begin = time.perf_counter()
    arguments += ["--base-model", str(unpacked(demo.MODEL))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    heads = MedusaHeads(model.config.hidden_size, model.config.vocab_size, HEADS, device="meta")
    size = sum(parameter.numel() * 4 for module in (model, heads) for parameter in module.parameters())
    return directory / "out", seconds, int(done.stdout.splitlines()[-1]) / size


def test_export_is_quick_and_small(exported):
    out, seconds, memory = exported
    assert seconds < LONGEST_EXPORT_S
    assert memory < MOST_MEMORY
    assert json.loads((out / "medusa_onnx.json").read_text())["model"]["layers"] == 30


def test_start_is_quick(exported):
    begin = time.perf_counter()
    OnnxMedusa.from_pretrained(exported[0])
    LightTokenizer(exported[0])
    assert time.perf_counter() - begin < LONGEST_START_S


def test_greedy_text_is_torchs(run, exported):
    model, medusa, tokenizer = run[0], OnnxMedusa.from_pretrained(exported[0]), LightTokenizer(exported[0])
    prompts = [prompt_tokens(tokenizer, row) for row in read_prompts(PROMPTS, COUNT)]
    tree = default_tree(HEADS, 8)
    for prompt in prompts:
        assert medusa.generate([prompt], NEW, tree=tree, eos_token_id=[])[0][0] == greedy(model, prompt, NEW)
