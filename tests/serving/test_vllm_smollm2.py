"""The drafter in a real vLLM with SmolLM2 in fp32: 40 prompts, heads that know the answers to some of them by heart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from demo import __main__ as demo
from demo.smollm2 import unpacked
from transformers import AutoTokenizer
from vllm_runs import ROOT, TIMEOUT_S, Runs

pytestmark = pytest.mark.vllm

FORMS = ("shared", "separate")
PROMPTS = ROOT / "data_generation" / "prompts_heldout.jsonl"
NUM_PROMPTS, LEARNT = 40, 6
GREEDY = {"temperature": 0, "max_tokens": 64, "detokenize": False}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("smollm2")
    model = unpacked(demo.MODEL)
    (directory / "model").symlink_to(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    asked = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    runs = Runs(directory)
    runs.add("plain", asked, GREEDY, max_model_len=2048)
    for form in FORMS:
        command = [sys.executable, "-m", "benchmarks.overfitted_heads", model, directory / form, "--form", form]
        command += ["--limit", LEARNT, "--max-new-tokens", 96, "--steps", 80]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        runs.add(f"builtin {form}", asked, GREEDY, form, builtin=True, max_model_len=2048)
        runs.add(f"fixed {form}", asked, GREEDY, form, max_model_len=2048)
        added = {"medusa_adaptive": True}
        runs.add(f"adaptive {form}", asked, GREEDY, form, additional=added, rounds=2, max_model_len=2048)
    return runs.answers()


@pytest.mark.parametrize("form", FORMS)
def test_accepted_drafts_are_those_of_the_builtin_method_at_every_position(
    form: str, answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found, expected = answers[f"fixed {form}"]["counters"], answers[f"builtin {form}"]["counters"]
    with capsys.disabled():
        print(f"\n{form}: accepted by place {found['accepted_tokens_per_pos']} of {found['drafts']}")
    assert found == expected
    assert expected["accepted_tokens_per_pos"][0] > 0.05 * expected["drafts"], "nothing to compare"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["fixed", "adaptive"])
def test_greedy_text_is_plain_vllms_token_for_token(form: str, how: str, answers: dict[str, Any]) -> None:
    assert answers[f"{how} {form}"]["tokens"] == answers["plain"]["tokens"]
