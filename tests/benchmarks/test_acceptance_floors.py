"""Floors of acceptance on tiny heads: what they reached passes, and every fault that they are there for fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import acceptance_floors as floors
from benchmarks.acceptance_floors import ANSWERS, FLOORS, HELDOUT_PROMPTS, ROOT, Answer
from decoding_models import varied_model
from demo import __main__ as demo
from demo.smollm2 import unpacked
from example_tokenizers import ZEPHYR, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_medusa.model.anatomy import output_embedding
from axolotl_medusa.model.file_names import HEADS_FILE
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import HeadsFile, heads_config, heads_meta, heads_tensors, write_heads
from axolotl_medusa.terminal.prompts import read_prompts
from axolotl_medusa.training.objective import Objective, install_objective

SHIPPED = ROOT / "examples" / "medusa" / "smollm2-heads"
STEPS = 120
NUM_PROMPTS = 24
TEMPLATE = ZEPHYR + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


def train(model: Any, answers: list[Answer]) -> MedusaHeads:
    """Heads that have learnt the answers."""
    model.requires_grad_(False)
    heads = MedusaHeads(model.config.hidden_size, model.config.vocab_size, 3)
    heads.start_output_layers_from(output_embedding(model).weight)
    attach_heads(model, heads)
    install_objective(model, Objective(only_heads=True, logging=False))
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for step in range(STEPS):
        each = answers[step % len(answers)]
        text = torch.tensor([[*each.prompt, *each.answer]])
        labels = text.masked_fill(torch.arange(text.shape[1]) < len(each.prompt), -100)
        model(input_ids=text, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads


def arguments(folder: Path, heads: Path | None = None) -> list[str]:
    files = {"base-model": "model", "answers": "answers.json", "floors": "floors.json", "prompts": "prompts.jsonl"}
    named = [word for option, file in files.items() for word in (f"--{option}", str(folder / file))]
    return [*([str(heads)] if heads else []), *named]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its tokenizer, answers to prompts, heads that learnt them, and the floors of these."""
    folder = tmp_path_factory.mktemp("floors")
    torch.manual_seed(0)
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = TEMPLATE
    model = varied_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"id": f"h{number}", "prompt": f"Question {number * 7919}?"}) for number in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    assert floors.main(["answers", *arguments(folder)]) == 0
    heads = train(model, floors.read_answers(folder / "answers.json"))
    meta = heads_meta(model, "medusa-1", {"base_model": str(folder / "model")})
    write_heads(folder / "heads", HeadsFile(heads_tensors(model), heads_config(heads, str(folder / "model")), meta))
    tokenizer.save_pretrained(folder / "heads")
    assert floors.main(["record", *arguments(folder, folder / "heads")]) == 0
    return folder


Check = Callable[[Callable[[Path], None]], int]


@pytest.fixture
def check(folder: Path, tmp_path: Path) -> Check:
    """Checks a copy of the heads that `change` has changed."""

    def command(change: Callable[[Path], None]) -> int:
        heads = tmp_path / "heads"
        heads.mkdir()
        for file in (folder / "heads").iterdir():
            (heads / file.name).write_bytes(file.read_bytes())
        change(heads)
        return floors.main(["check", *arguments(folder, heads)])

    return command


def change_tensors(heads: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(heads / HEADS_FILE)
    change(tensors)
    save_file(tensors, heads / HEADS_FILE, metadata={"format": "pt"})


def test_answers_are_every_third_prompt_in_the_chat_template(folder: Path) -> None:
    answers = floors.read_answers(folder / "answers.json")
    assert [each.id for each in answers] == [f"h{number}" for number in range(0, NUM_PROMPTS, 3)]
    tokenizer = make_tokenizer("zephyr")
    assert tokenizer.decode(answers[1].prompt) == f"<|user|>\nQuestion {3 * 7919}?</s>\n<|assistant|>\n"
    assert len({tuple(each.answer) for each in answers}) == len(answers)


def test_answers_are_the_greedy_text_up_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = read_prompts(folder / "prompts.jsonl")[:6]
    monkeypatch.setattr(floors, "TOGETHER", 4)
    whole = floors.answered(model, tokenizer, prompts)
    for each in whole:
        inputs = torch.tensor([each.prompt])
        text = model.generate(inputs, max_new_tokens=floors.ANSWER_TOKENS, do_sample=False)[0, inputs.shape[1] :]
        assert each.answer == text.tolist()
        assert each.ended is (each.answer[-1] == model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = [whole[0].answer[5], 1]
    first = floors.answered(model, tokenizer, prompts)[0]
    end = whole[0].answer.index(whole[0].answer[5]) + 1
    assert first.ended and first.answer == whole[0].answer[:end]


def test_heads_reach_what_they_reached(folder: Path, check: Check) -> None:
    recorded = json.loads((folder / "floors.json").read_text())
    assert recorded["acceptance_length"] == pytest.approx(1 + sum(recorded["accepted_up_to_head"]), abs=1e-3)
    assert recorded["accepted_up_to_head"][0] > 0.2, "the heads learnt too little to show faults"
    assert check(lambda _: None) == 0


def test_permuted_heads_are_below_the_floor(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("0.")]:
            other = "1" + name[1:]
            tensors[name], tensors[other] = tensors[other], tensors[name]

    assert check(lambda heads: change_tensors(heads, swap)) == 1
    assert "heads 0 to 0 are all right at" in capsys.readouterr().err


@pytest.mark.parametrize("head", range(3))
def test_a_dropped_bias_is_below_the_floor(check: Check, head: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(lambda heads: change_tensors(heads, lambda tensors: tensors[f"{head}.0.linear.bias"].zero_())) == 1
    assert f"head {head} gives" in capsys.readouterr().err


def test_a_changed_template_is_told(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    def change(heads: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(heads)
        tokenizer.chat_template = TEMPLATE.replace("<|assistant|>\n", "<|assistant|>")
        assert tokenizer.chat_template != TEMPLATE
        tokenizer.save_pretrained(heads)

    assert check(change) == 1
    error = capsys.readouterr().err
    assert "found other tokens than recorded for 8 of 8 prompts, the first h0" in error


def test_floors_are_5_percent_below_what_was_recorded() -> None:
    recorded = {"accepted_up_to_head": [0.4, 0.1], "ranks": [["0" * 100, "1" * 100]]}
    for shares, ranks, problems in (
        ([0.4, 0.1], ["0" * 100, "1" * 100], 0),
        ([0.3801, 0.0951], ["0" * 98 + "55", "1" * 100], 0),
        ([0.3799, 0.0951], ["0" * 100, "1" * 100], 1),
        ([0.4, 0.0949], ["0" * 97 + "555", "1" * 100], 2),
        ([0.4], ["0" * 100], 1),
    ):
        found = {"accepted_up_to_head": shares, "ranks": [ranks]}
        assert len(floors.acceptance_problems(found, recorded)) == problems


def test_what_is_measured_is_the_share_of_chains_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[0, 0], [0, 1], [5, 0], [0, -1]]
    monkeypatch.setattr(floors, "head_ranks", lambda *_: rows)

    class Two:
        heads = MedusaHeads(4, 4, 2)

    model: Any = Two()
    cut, ended = Answer("a", [1], [1, 2, 3], False), Answer("b", [1], [1, 2, 3], True)
    assert floors.measured(model, [cut]) == {
        "acceptance_length": 2.0,
        "accepted_up_to_head": [0.6667, 0.3333],
        "positions": 3,
        "ranks": [["0050", "010-"]],
    }
    assert floors.measured(model, [ended])["accepted_up_to_head"] == [0.75, 0.25]


def test_committed_answers_are_small_and_in_the_template_of_smollm2() -> None:
    assert ANSWERS.stat().st_size < 60_000
    answers, prompts = floors.read_answers(), read_prompts(HELDOUT_PROMPTS)
    assert [each.id for each in answers] == [prompt.id for prompt in prompts[:: floors.EVERY]]
    assert floors.template_problems(AutoTokenizer.from_pretrained(unpacked(demo.MODEL)), prompts, answers) == []


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="no heads are shipped yet")
def test_shipped_heads_reach_their_floors() -> None:
    assert FLOORS.is_file(), "heads are shipped without floors: run python -m benchmarks.acceptance_floors record"
    assert (SHIPPED / HEADS_FILE).stat().st_size <= 4 * 2**20
    assert floors.main(["check", str(SHIPPED), "--base-model", str(unpacked(demo.MODEL))]) == 0
