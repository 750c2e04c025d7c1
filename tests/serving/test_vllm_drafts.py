"""The drafter in a real vLLM on a tiny model: text and acceptance against plain vLLM and its built-in method, all in fp32.

Every engine runs in one process of vLLM's environment, one after the other (`vllm_answers.py`).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_served_model import HEADS, VOCAB
from transformers import LlamaForCausalLM
from vllm_runs import TIMEOUT_S, Runs

from axolotl_medusa.serving.draft_plan import read_plan

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
FORMS = ("shared", "separate")
GREEDY = {"temperature": 0, "max_tokens": 48, "detokenize": False, "ignore_eos": True}
SAMPLES, SAMPLED_TOKENS = 4000, 4
NEAR_TIE = 1e-3
"""Difference of logits (of 10 and more) that sums in another order may turn round in fp32."""
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""A core for each; vLLM looks for memory nodes of their own otherwise."""
FALSE_ALARMS = 1e-4
"""Probability that a position's χ² test fails though both distributions are the same."""


def prompts(number: int, shortest: int = 3, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB) for _ in range(generator.randint(shortest, longest))] for _ in range(number)]


def with_shared_beginnings(number: int) -> list[list[int]]:
    """Prompts of which many begin alike, so that the prefix cache has something."""
    beginnings = prompts(3, 64, 64, seed=1)
    return [beginnings[place % 3] + rest for place, rest in enumerate(prompts(number, 1, 20, seed=2))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its heads and an adapter."""
    directory = tmp_path_factory.mktemp("tiny")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tiny_served_model", str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def different_ends(number: int) -> list[dict[str, Any]]:
    """Requests that end at other lengths, some of them at a stop token."""
    return [{**GREEDY, "max_tokens": 1 + 7 * place % 60, "stop_token_ids": [place % 16]} for place in range(number)]


def usual_runs(runs: Runs, directory: Path) -> None:
    usual, with_logprobs = prompts(40), {**GREEDY, "logprobs": 0}
    runs.add("plain", usual, with_logprobs)
    for form in FORMS:
        runs.add(f"builtin {form}", usual, GREEDY, form, builtin=True)
        runs.add(f"fixed {form}", usual, with_logprobs, form)
        record = {"medusa_adaptive": True, "medusa_record": str(directory / f"record-{form}")}
        runs.add(f"adaptive {form}", usual, GREEDY, form, additional=record, rounds=6)
    runs.add("one draft", usual, GREEDY, "shared", drafts=1)


def narrow_runs(runs: Runs, directory: Path) -> None:
    usual, alike = prompts(40), with_shared_beginnings(40)
    narrow = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 14, "block_size": 32}
    short = {"max_model_len": 64, "max_num_seqs": 8}
    runs.add("alike plain", alike, different_ends(40))
    for adaptive in (False, True):
        added = {"medusa_adaptive": adaptive}
        runs.add(f"alike narrow {adaptive}", alike, different_ends(40), "shared", additional=added, rounds=2, **narrow)
    runs.add("limit plain", usual, {**GREEDY, "max_tokens": 1000}, **short)
    runs.add("limit", usual, {**GREEDY, "max_tokens": 1000}, "separate", **short)


def lora_runs(runs: Runs, directory: Path) -> None:
    for form in FORMS:
        runs.add(f"lora builtin {form}", prompts(40), GREEDY, form, builtin=True, lora=True)
        runs.add(f"lora {form}", prompts(40), GREEDY, form, lora=True)


def sampled_runs(runs: Runs, directory: Path) -> None:
    usual = {"temperature": 1.0, "max_tokens": SAMPLED_TOKENS, "detokenize": False}
    sampling = [{**usual, "seed": place} for place in range(SAMPLES)]
    asked = [[1, 2, 3]] * SAMPLES
    runs.add("sampled plain", asked, sampling, max_num_seqs=256)
    runs.add("sampled", asked, sampling, "shared", max_num_seqs=256)
    added = {"medusa_adaptive": True}
    runs.add("sampled adaptive", asked, sampling, "separate", additional=added, max_num_seqs=256)
    runs.add("warmer", asked, {**usual, "temperature": 1.25}, max_num_seqs=256)


class Answers:
    """Answers by the run's name; a group of runs is made when one of its answers is wanted."""

    def __init__(self, directory: Path) -> None:
        self.groups: list[Runs] = []
        self.found: dict[str, Any] = {}
        for add in (usual_runs, narrow_runs, lora_runs, sampled_runs):
            runs = Runs(directory)
            add(runs, directory)
            self.groups.append(runs)

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.found:
            group = next(group for group in self.groups if name in group.runs)
            self.found |= group.answers()
        answer: dict[str, Any] = self.found[name]
        return answer


@pytest.fixture(scope="module")
def answers(tiny: Path) -> Answers:
    return Answers(tiny)


def assert_same_text(directory: Path, asked: list[list[int]], found: Any, expected: Any) -> None:
    """Token for token; where they part, both tokens must be as likely as fp32 can tell, since batches differ in shape."""
    for place, (prompt, own, plain) in enumerate(zip(asked, found, expected, strict=True)):
        if own != plain:
            gap = likelihood_gap(directory, prompt, own[0], plain[0])
            assert gap < NEAR_TIE, f"prompt {place}: texts part where the tokens' logits differ by {gap}"


@torch.no_grad()
def likelihood_gap(directory: Path, prompt: list[int], own: list[int], plain: list[int]) -> float:
    """Difference of the two tokens' logits, in fp64, where two texts part."""
    model: Any = LlamaForCausalLM.from_pretrained(directory / "model")
    place = next(place for place, (one, other) in enumerate(zip(own, plain, strict=False)) if one != other)
    logits = model.double()(input_ids=torch.tensor([prompt + plain[:place]])).logits[0, -1]
    return float((logits[own[place]] - logits[plain[place]]).abs())


def tokens(answers: Any, name: str) -> list[list[list[int]]]:
    assert "error" not in answers[name], answers[name]["error"]
    found: list[list[list[int]]] = answers[name]["tokens"]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_accepted_drafts_are_those_of_the_builtin_method_at_every_position(answers, form):
    found, expected = answers[f"fixed {form}"]["counters"], answers[f"builtin {form}"]["counters"]
    assert found == expected
    assert min(expected["accepted_tokens_per_pos"]) > 0, "nothing to compare at some position"


@pytest.mark.parametrize(
    "name", [*(f"{how} {form}" for form in FORMS for how in ("fixed", "adaptive", "builtin")), "one draft"]
)
def test_greedy_text_is_plain_vllms_token_for_token(answers, tiny, name):
    assert_same_text(tiny, prompts(40), tokens(answers, name), tokens(answers, "plain"))


def test_one_draft_is_the_first_head(answers):
    one, all_ = (answers[name]["counters"] for name in ("one draft", "fixed shared"))
    assert len(one["accepted_tokens_per_pos"]) == 1
    assert one["draft_tokens"] == one["drafts"]
    assert one["accepted_tokens"] > 0 < all_["accepted_tokens"]


def test_logarithms_of_probabilities_are_plain_vllms(answers):
    for form in FORMS:
        own, plain = (torch.tensor(answers[name]["logprobs"]) for name in (f"fixed {form}", "plain"))
        torch.testing.assert_close(own, plain, atol=2e-4, rtol=0)  # sums in another order, batch by batch


@pytest.mark.parametrize("form", FORMS)
def test_adaptive_drafts_write_down_what_they_learnt(answers, tiny, form):
    assert (
        answers[f"adaptive {form}"]["counters"]["draft_tokens"]
        < 6 * answers[f"fixed {form}"]["counters"]["draft_tokens"]
    )
    plan = read_plan(tiny / f"record-{form}")
    assert plan.step_times is not None
    assert plan.calibration is not None
    assert len(plan.calibration.heads) == HEADS
    assert plan.rest["served"]["steps"] > 100


@pytest.mark.parametrize("adaptive", [False, True])
def test_chunked_prompts_preemption_prefix_cache_and_different_ends_change_no_token(answers, tiny, adaptive):
    name = f"alike narrow {adaptive}"
    assert_same_text(tiny, with_shared_beginnings(40), tokens(answers, name), tokens(answers, "alike plain"))
    assert answers[name]["counters"]["num_preemptions"] > 0
    assert adaptive or answers[name]["counters"]["accepted_tokens"] > 0


def test_requests_that_reach_the_context_limit_have_plain_vllms_text(answers, tiny):
    found = tokens(answers, "limit")
    assert_same_text(tiny, prompts(40), found, tokens(answers, "limit plain"))
    lengths = {len(prompt) + len(own[0]) for prompt, own in zip(prompts(40), found, strict=True)}
    assert lengths == {64}


@pytest.mark.parametrize("form", FORMS)
def test_requests_with_and_without_an_adapter_are_served_as_by_the_builtin_method(answers, form):
    """Not held to plain vLLM, whose adapters on a CPU change texts of requests without one in the same batch."""
    assert tokens(answers, f"lora {form}") == tokens(answers, f"lora builtin {form}")
    assert answers[f"lora {form}"]["counters"] == answers[f"lora builtin {form}"]["counters"]
    assert answers[f"lora {form}"]["counters"]["accepted_tokens"] > 0


def chi_square_p(first: list[int], second: list[int]) -> float:
    """Probability of counts that differ as much, if both samples come from one distribution (homogeneity, rare tokens joined)."""
    counts = torch.stack([torch.bincount(torch.tensor(sample), minlength=VOCAB) for sample in (first, second)]).double()
    order = counts.sum(0).argsort(descending=True)
    counts = counts[:, order]
    common = int((counts.sum(0) >= 20).sum())
    counts = torch.cat([counts[:, :common], counts[:, common:].sum(1, keepdim=True)], 1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(counts.shape[1] - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def at(answers: Answers, name: str, place: int) -> list[int]:
    return [completion[0][place] for completion in tokens(answers, name)]


@pytest.mark.parametrize("place", range(SAMPLED_TOKENS))
@pytest.mark.parametrize("name", ["sampled", "sampled adaptive"])
def test_tokens_sampled_at_temperature_1_are_distributed_as_plain_vllms(answers, name, place):
    assert chi_square_p(at(answers, name, place), at(answers, "sampled plain", place)) > FALSE_ALARMS


def test_drafts_are_accepted_and_rejected_at_temperature_1(answers):
    counters = answers["sampled"]["counters"]
    assert 0 < counters["accepted_tokens"] < counters["draft_tokens"]


def test_another_distribution_is_seen(answers):
    """What the test can see: plain vLLM a quarter warmer."""
    assert chi_square_p(at(answers, "warmer", 1), at(answers, "sampled plain", 1)) < FALSE_ALARMS


def test_two_ranks_of_tensor_parallelism_write_the_same_text(tiny, answers):
    runs, usual = Runs(tiny), prompts(40)
    for form in FORMS:
        added = {"medusa_adaptive": form == "separate"}
        runs.add(form, usual, GREEDY, form, additional=added, rounds=4, tensor_parallel_size=2)
    found = runs.answers(**TWO_RANKS)
    for form in FORMS:
        assert_same_text(tiny, usual, tokens(found, form), tokens(answers, "plain"))
    accepted = found["shared"]["counters"]["accepted_tokens_per_pos"]
    expected = [4 * count for count in answers["fixed shared"]["counters"]["accepted_tokens_per_pos"]]
    assert accepted == pytest.approx(expected, rel=0.02)  # sums over two ranks are in another order


def test_mistakes_end_before_the_model_answers(tiny):
    runs, usual = Runs(tiny), prompts(1)
    runs.add("stages", usual, GREEDY, "shared", pipeline_parallel_size=2)
    runs.add("too many", usual, GREEDY, "shared", drafts=HEADS + 1)
    runs.add("unknown key", usual, GREEDY, "shared", additional={"medusa_adaptiv": True})
    found = runs.answers(**TWO_RANKS)
    assert "error" in found["stages"]
    assert f"num_speculative_tokens is {HEADS + 1}, expected at most {HEADS}" in found["too many"]["error"]
    assert "found medusa_adaptiv in --additional-config" in found["unknown key"]["error"]
