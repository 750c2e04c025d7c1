"""The three commands with a real vLLM: what `serve` starts is what `check-server` finds right, and mistakes are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from benchmarks.overfitted_heads import examples, train, write
from demo import __main__ as demo
from demo import model_server
from demo.smollm2 import unpacked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_medusa.model.anatomy import output_embedding
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

pytestmark = pytest.mark.vllm

PROMPTS = demo.ROOT / "data_generation" / "prompts_heldout.jsonl"
NUM_PROMPTS, TOKENS, STEPS, NUM_HEADS = 4, 48, 60, 3
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """Heads that know SmolLM2's answers to a few prompts by heart, by way of their biases too."""
    torch.manual_seed(0)
    base = unpacked(demo.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    weight = output_embedding(model).weight
    found = MedusaHeads(weight.shape[1], weight.shape[0], NUM_HEADS)
    found.start_output_layers_from(weight)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=1.0)
    prompts = [prompt_tokens(tokenizer, row) for row in read_prompts(PROMPTS, NUM_PROMPTS)]
    rows = [examples(model, prompt, TOKENS, NUM_HEADS) for prompt in prompts]
    train(found, weight, *(torch.cat(parts) for parts in zip(*rows, strict=True)), STEPS)
    directory = tmp_path_factory.mktemp("heads") / "medusa_heads"
    write(directory, model, found, base)
    for file in (*base.glob("tokenizer*"), *base.glob("chat_template*")):
        shutil.copyfile(file, directory / file.name)
    return directory


def changed(heads: Path, directory: Path, order=(0, 1, 2), **config) -> Path:
    """The heads as somebody spoiled them on the way to a server."""
    shutil.copytree(heads, directory)
    file = directory / "medusa_lm_head.safetensors"
    tensors = load_file(file)
    moved = {
        f"{place}.{name.partition('.')[2]}": tensors[name]
        for place, i in enumerate(order)
        for name in tensors
        if name[0] == str(i)
    }
    save_file(moved, file, metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "axolotl_medusa", *map(str, arguments)]


@contextmanager
def served(heads: Path, log: Path, *options: object) -> Iterator[str]:
    """`axolotl-medusa serve`, as a user starts it."""
    port = model_server.free_port()
    own = ("--vllm-python", model_server.VLLM_PYTHON, "--port", port, "--host", "127.0.0.1")
    words = command("serve", heads, *own, "--dtype", "float32", "--max-model-len", 1024, *options)
    environment = {**os.environ, **model_server.ENVIRONMENT}
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
        try:
            model_server.wait_for_server(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def checked(url: str, heads: Path) -> subprocess.CompletedProcess[str]:
    options = ("--prompts", PROMPTS, "--limit", NUM_PROMPTS, "--max-new-tokens", TOKENS, "--dtype", "fp32")
    words = command("check-server", url, heads, *options)
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    "options", [("--fixed",), ("--method", "built-in"), ()], ids=["drafter", "built-in", "adaptive"]
)
def test_what_serve_starts_is_found_right(heads, options, tmp_path, capsys):
    with served(heads, tmp_path / "log", *options) as url:
        found = checked(url, heads)
    with capsys.disabled():
        print(f"\n{options}:\n{found.stdout}{found.stderr[-600:]}")
    assert found.returncode == 0, found.stderr
    assert f"the tokens of {NUM_PROMPTS} of {NUM_PROMPTS} chats" in found.stdout
    assert "nothing is wrong" in found.stdout


@pytest.mark.parametrize(
    ("changes", "options", "cause"),
    [
        ({"order": (2, 0, 1)}, ("--fixed",), "the heads in another order: heads 2, 0, 1 at places 0 to 2"),
        ({"medusa_fc_bias": False}, ("--method", "built-in"), "the server has the heads without their biases"),
        ({}, ("--method", "none"), "it does not speculate"),
    ],
    ids=["order", "biases", "none"],
)
def test_mistakes_are_named(heads, changes, options, cause, tmp_path, capsys):
    spoiled = changed(heads, tmp_path / "spoiled", **changes)
    with served(spoiled, tmp_path / "log", *options) as url:
        found = checked(url, heads)
    with capsys.disabled():
        print(f"\n{options}:\n{found.stdout}{found.stderr[-600:]}")
    assert found.returncode == 1
    assert cause in found.stderr.splitlines()[-1]


def test_plan_measures_and_its_plan_is_read(heads, tmp_path):
    own = changed(heads, tmp_path / "planned")
    options = ("--vllm-python", model_server.VLLM_PYTHON, "--concurrency", "1,4", "--repeats", 1, "--draft-tokens", 1)
    words = command("plan", own, *options, "--max-tokens", 16, "--logs", tmp_path / "logs", "--dtype", "float32")
    environment = {**os.environ, **model_server.ENVIRONMENT}
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((own / "plan.json").read_text())
    assert list(content["measured"]) == ["plain", "k = 1", "adaptive"]
    assert content["step_s"] and (own / "draft_calibration.json").is_file()
    assert content["measured"]["k = 1"]["1"]["acceptance_length"] > 1
    assert "adaptive drafts, calibration and step times" in (tmp_path / "logs" / "adaptive.log").read_text()
