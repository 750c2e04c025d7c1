"""Exports in a real vLLM server: what it accepts is what our own evaluation of a chain of heads predicts.

Heads for SmolLM2 are trained for STEPS steps on the model's own answers, exported with the user's command, and served with
`--speculative-config`. For the same prompts and answers, the training module's heads say which drafts are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demo import __main__ as demo
from demo import model_server
from demo.smollm2 import unpacked
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "data_generation" / "prompts.jsonl"
NUM_PROMPTS = 32
ANSWER_TOKENS = 96
NUM_HEADS = 3
STEPS = 30
TIMEOUT_S = 900
TOLERANCE = 0.02
"""Largest accepted difference of a share of accepted drafts. Both sides compute in fp32; what is left are near-ties, and
vLLM's counting of drafts past an answer's end (at most NUM_HEADS of the drafts for ANSWER_TOKENS tokens)."""

RECIPES: dict[str, dict[str, Any]] = {
    "medusa-1-shared": {"medusa_lm_head": "shared"},
    "medusa-1-separate": {"medusa_lm_head": "separate"},
    "medusa-1-trained": {"medusa_lm_head": "trained", "medusa_head_loss": "kl", "medusa_head_weighting": "chain"},
    "medusa-2-shared": {"medusa_lm_head": "shared", "learning_rate": 5e-4},
    "medusa-2-separate": {"medusa_lm_head": "separate", "learning_rate": 5e-4},
}
LORA = {
    "medusa_only_heads": False,
    "medusa_lr_multiplier": 4.0,
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "lora_target_modules": ["lm_head"],
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}


def run(command: list[Any], log: Path) -> None:
    """Runs a command of the user's, with its output in `log`."""
    environment = {**os.environ, **model_server.ENVIRONMENT}
    words = [str(part) for part in command]
    with log.open("wb") as output:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=TIMEOUT_S)
    assert done.returncode == 0, log.read_text(errors="replace")[-4000:]


def ask(address: str, model: Path, output: Path) -> list[dict[str, Any]]:
    """Lets a server answer the prompts greedily; returns the rows, with the token ids of prompts and answers."""
    script = ROOT / "data_generation" / "generate.py"
    command = [sys.executable, script, "--chat", "--token_ids", "--server", f"{address}/v1", "--model", model]
    command += ["--data_path", PROMPTS, "--limit", NUM_PROMPTS, "--max_tokens", ANSWER_TOKENS, "--temperature", 0]
    run([*command, "--num_threads", 16, "--output_path", output], output.with_suffix(".log"))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == NUM_PROMPTS
    return rows


@pytest.fixture(scope="module")
def model() -> Path:
    """The model's directory, the same as the demo's."""
    return unpacked(demo.MODEL)


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's own answers to the prompts."""
    output = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    with model_server.server("vllm", model, output.with_name("server.log"), dtype="float32") as address:
        ask(address, model, output)
    return output


@pytest.fixture
def train(model: Path, answers: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains heads briefly with axolotl's own command; returns the output_dir."""

    def run_training(keys: dict[str, Any]) -> Path:
        cfg: dict[str, Any] = yaml.safe_load(demo.EXAMPLE.read_text(encoding="utf-8"))
        cfg = {key: value for key, value in cfg.items() if not key.startswith(("eval_", "test_"))}
        cfg |= {
            "base_model": str(model),
            "datasets": [{"path": str(answers), "ds_type": "json", "type": None}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "medusa_num_heads": NUM_HEADS,
            "val_set_size": 0.0,
            "num_epochs": 100,
            "max_steps": STEPS,
            "bf16": model_server.half_precision(),
            **keys,
        }
        file = tmp_path / "run.yml"
        file.write_text(yaml.safe_dump(cfg), encoding="utf-8")
        accelerate = Path(sys.executable).with_name("accelerate")
        run([accelerate, "launch", "-m", "axolotl.cli.train", file], tmp_path / "train.log")
        return tmp_path / "out"

    return run_training


@torch.no_grad()
def right_heads(model: PreTrainedModel, heads: MedusaHeads, ids: list[int]) -> tuple[list[int], list[int]]:
    """What the model and its heads say at every position of a sequence.

    Returns:
        The base model's own next token at each position, and how many heads in a row, from head 0, are right there.
    """
    tokens = torch.tensor([ids])
    hidden = model.model(tokens).last_hidden_state[0]
    base = model.lm_head(hidden).argmax(-1).tolist()
    drafts = []
    for index in range(heads.num_heads):
        layer = heads.output_layer(index) or model.lm_head
        drafts.append(layer(heads.hidden(index, hidden)).argmax(-1).tolist())
    in_a_row = []
    for position in range(len(ids)):
        row = 0
        while row < len(drafts) and position + 2 + row < len(ids) and drafts[row][position] == ids[position + 2 + row]:
            row += 1
        in_a_row.append(row)
    return base, in_a_row


def predict(model: PreTrainedModel, heads: MedusaHeads, rows: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Walks through the answers as a chain of drafts does, one verification after the other.

    Returns:
        Share of verifications in which the draft at each place was accepted, and the share of tokens that are the
        model's own first choice.
    """
    steps, own, tokens = 0, 0, 0
    accepted = [0] * heads.num_heads
    for row in rows:
        ids = row["input_ids"]
        prompt = row["labels"].index(next(label for label in row["labels"] if label != -100))
        base, in_a_row = right_heads(model, heads, ids)
        own += sum(base[position - 1] == ids[position] for position in range(prompt, len(ids)))
        tokens += len(ids) - prompt
        position = prompt - 1  # the model reads this token, says the next one, and the heads guess those after it
        while position + 2 < len(ids):
            steps += 1
            for place in range(in_a_row[position]):
                accepted[place] += 1
            position += 1 + in_a_row[position]
    return [count / steps for count in accepted], own / tokens


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_accepts_what_our_heads_predict(
    recipe: str, train: Callable[..., Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = RECIPES[recipe] | (LORA if recipe.startswith("medusa-2") else {})
    trained, exported = train(keys), tmp_path / "export"
    command = [sys.executable, "-m", "axolotl_medusa", "export", trained, "--to", "vllm", "--out", exported]
    merged = ["--model", "merged"] if recipe.startswith("medusa-2") else []
    run([*command, *merged], tmp_path / "export.log")

    served = exported / "merged_model" if merged else model
    with model_server.server("vllm", served, tmp_path / "server.log", exported, dtype="float32") as address:
        rows = ask(address, served, tmp_path / "served.jsonl")
        counters = model_server.spec_decode_counters(address)

    heads = read_heads(trained / "medusa_heads").build().float()
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    predicted, own = predict(model, heads, rows)
    found = [counters[f"accepted_tokens_per_pos_{place}"] / counters["drafts"] for place in range(NUM_HEADS)]
    with capsys.disabled():
        shares = ", ".join(f"{ours:.3f}/{theirs:.3f}" for ours, theirs in zip(predicted, found, strict=True))
        print(f"\n{recipe}: accepted by place, predicted/vLLM: {shares}; AL {1 + sum(found):.3f}; {own:.4f} own tokens")
    assert own > 0.99, "the served model is not the one that the heads were trained with"
    assert predicted[0] > 0.1, "nothing to compare: the heads learned nothing"
    assert found == pytest.approx(predicted, abs=TOLERANCE)
