"""Evaluation, calibration and tree tuning on models whose results are known."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model
from decoding_models import counting_heads, counting_model, fitted_heads, prompts, varied_model
from naive_decoding import head_tokens, plain_hidden

from axolotl_medusa.decoding import medusa_model as generate_module
from axolotl_medusa.decoding.acceptance import Accepted
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.measuring import evaluate as evaluate_module
from axolotl_medusa.measuring import step_times, tree_tuning
from axolotl_medusa.measuring.calibration import HeadRanks, head_ranks
from axolotl_medusa.measuring.evaluate import PromptTokens, environment, evaluate
from axolotl_medusa.measuring.step_times import measure_steps
from axolotl_medusa.measuring.tree_search import JointRanks, search_tree
from axolotl_medusa.measuring.tree_tuning import CHECKED_PROMPTS, held_out, largest_that_pays, tune_tree

TREES = {"chain": chain(5), "tree": Tree.from_choices([(0,), (1,)])}


def counting(right):
    return MedusaModel(counting_model(), counting_heads(right))


@pytest.fixture
def clock(monkeypatch):
    """Replaces time: what runs is listed, and takes as long as `seconds` says."""

    class Clock:
        def __init__(self):
            self.ran, self.seconds = [], lambda name, count: 1.0

        def timed(self, run, _):
            owner = getattr(run, "__self__", None)
            if owner is None:
                name = run.__name__
            elif isinstance(owner, PlainDecoding):
                name = "plain step"
            else:
                name = owner._tree.tree.num_nodes
            run()
            self.ran.append(name)
            return self.seconds(name, len(self.ran))

    clock = Clock()
    for module in (evaluate_module, step_times):
        monkeypatch.setattr(module, "timed", clock.timed)
    return clock


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gemma2-softcap", {"sliding_window": 6}), ("cohere-logit-scale", {}), ("gpt2", {})],
)
def test_plain_decoding_writes_what_transformers_writes(family, changes):
    model = varied_model(family, **changes)
    ids = prompts(1)[0]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    for eos, length in (((), 20), ((expected[7],), expected.index(expected[7]) + 1)):
        plain = PlainDecoding(model, ids, 20, eos)
        while not plain.done:
            plain.step()
        assert plain.tokens == expected[:length]


def test_report_of_heads_of_fixed_logits():
    """13 tokens: the prompt's forward gives one; with two right heads four steps give three each."""
    model = counting([True, True, False, True, True])
    rows = [PromptTokens("a", [3], "sums"), PromptTokens("b", [5, 6], "words"), PromptTokens("c", [9], "words")]
    report = evaluate(model, rows, TREES, max_new_tokens=13)
    assert report["overall"]["prompts"] == 3
    assert {name: group["prompts"] for name, group in report["categories"].items()} == {"sums": 1, "words": 2}
    for group in (report["overall"], *report["categories"].values()):
        count = group["prompts"]
        assert [head["positions"] for head in group["heads"]] == [n * count for n in (12, 11, 10, 9, 8)]
        assert [head["top"]["1"] for head in group["heads"]] == [1, 1, 0, 1, 1]
        found = {name: (row["forward_passes"], row["step_lengths"]) for name, row in group["decoders"].items()}
        assert found == {
            "plain": (13 * count, {"1": 12 * count}),
            "chain": (5 * count, {"3": 4 * count}),
            "tree": (7 * count, {"2": 6 * count}),
        }
        assert [row["acceptance_length"] for row in group["decoders"].values()] == [1, 13 / 5, 13 / 7]
        assert all(row["agreement"] == 1 and row["tokens_per_s"] > 0 for row in group["decoders"].values())
    assert report["trees"] == {"chain": [[0] * n for n in range(1, 6)], "tree": [[0], [1]]}
    json.dumps(report)


def test_prompts_without_category_are_in_no_category():
    report = evaluate(counting([True]), [PromptTokens("a", [3])], {"chain": chain(1)}, 4)
    assert report["categories"] == {}


def test_speed_up_is_the_median_of_ratios_and_decoders_take_turns_to_begin(clock):
    """Ratios 2, 2 and 8 to plain decoding: the median is 2, a ratio of sums would be 12 / 4.5."""
    runs_of_plain = iter([1, 1, 2, 2, 8])
    clock.seconds = lambda name, _: next(runs_of_plain) if name == "run_plain" else 1.0
    rows = [PromptTokens(str(i), [3]) for i in range(3)]
    report = evaluate(counting([True]), rows, {"chain": chain(1)}, 5)
    # a warm-up of both, then every prompt begins with the next decoder
    assert clock.ran == ["run_plain", "run", "run_plain", "run", "run", "run_plain", "run_plain", "run"]
    decoders = report["overall"]["decoders"]
    assert decoders["chain"]["speed_up"] == 2
    assert decoders["plain"]["speed_up"] == 1
    assert decoders["chain"]["tokens_per_s"] == 15 / 3
    assert decoders["plain"]["tokens_per_s"] == 15 / 5


def test_output_that_differs_from_plain_is_counted(monkeypatch):
    """A rule that accepts every draft: the first token is right, the wrong draft after it is not."""

    def accept_all(logits, tokens, tree):
        last = torch.full((len(logits),), len(tree.depths) - 1)
        return Accepted(last, logits[:, -1].argmax(-1))

    monkeypatch.setattr(generate_module, "accept_greedy", accept_all)
    report = evaluate(counting([False]), [PromptTokens("a", [3])], {"chain": chain(1)}, 5)
    row = report["overall"]["decoders"]["chain"]
    assert (row["agreement"], row["agreement_before_first_difference"]) == (0, 1 / 5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are 0 prompts, expected at least 1"),
        ([PromptTokens("a", [3]), PromptTokens("b", [])], "prompt b: prompt 0 is empty"),
        ([PromptTokens("c", [3] * 200)], "prompt c: a prompt has 200 tokens, but the model's context has 128"),
    ],
)
def test_unusable_prompts_are_named_before_anything_runs(rows, message, clock):
    with pytest.raises(ValueError, match=message):
        evaluate(counting([True]), rows, TREES, 5)
    assert clock.ran == []


def test_environment_says_what_a_measurement_depends_on():
    model = counting([True])
    torch.manual_seed(77)
    found = environment(model)
    assert found["seed"] == 77
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["device"] and found["hardware"]["torch_threads"] == torch.get_num_threads()
    assert (found["model"]["dtype"], found["model"]["num_heads"]) == ("float32", 1)
    json.dumps(found)


# Ranks


@pytest.mark.parametrize("at_once", [1 << 25, 1], ids=["at once", "row by row"])
def test_ranks_equal_the_naive_reference(at_once, monkeypatch):
    monkeypatch.setattr("axolotl_medusa.measuring.calibration._LOGITS_AT_ONCE", at_once)
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    text = model.generate(ids.flip(1)[:1], max_new_tokens=15, do_sample=False, eos_token_id=None)[0].tolist()
    hidden = plain_hidden(model, text)
    expected = []
    for t in range(8, len(text) - 2):
        best = head_tokens(model, medusa.heads, hidden[t], 4)
        wanted = text[t + 2 : t + 7]
        ranks = [top.index(token) if token in top else 4 for top, token in zip(best, wanted, strict=False)]
        expected.append(ranks + [-1] * (5 - len(ranks)))
    assert head_ranks(medusa, text[:9], text[9:], 4) == expected
    assert {rank for row in expected for rank in row} > {-1, 0, 4}


def test_continuation_of_one_token_has_no_ranks():
    assert head_ranks(counting([True]), [3], [4]) == []


@pytest.mark.parametrize(("ended", "positions", "length"), [(False, 1, 3.0), (True, 3, 1 + 3 / 3)])
def test_joint_ranks_end_where_the_text_does(ended, positions, length):
    """At a token limit the last positions are unknown, after an end of text nothing more can be accepted."""
    ranks = HeadRanks(2, top_k=3)
    ranks.add([[0, 0], [0, -1], [3, -1]], ended=ended)
    assert ranks.joint.positions == positions
    assert ranks.joint.expected_length(chain(2)) == length
    assert [ranks.positions(head) for head in range(2)] == [3, 1]
    assert (ranks.accuracy(0, 1), ranks.accuracy(0, 3), ranks.accuracy(1, 1)) == (2 / 3, 2 / 3, 1)
    assert HeadRanks(1).accuracy(0, 1) is None


# Step times


def test_steps_are_timed_in_turn_and_their_ratios_are_medians(clock):
    plain = iter([9, 9, 9, 1, 2, 4])  # the prompt, two rounds to warm up, three rounds
    clock.seconds = lambda name, _: next(plain) if name == "plain step" else 4.0
    model = counting([True, True])
    times = measure_steps(model, [3, 4], [Tree(), chain(2)], rounds=3)
    assert clock.ran == ["plain step", 1, 3] * 6
    assert (times.plain_s, times.ratios, times.rounds, times.context_tokens) == (2, {1: 2.0, 3: 2.0}, 3, 2)
    assert times.step_s == {1: 4.0, 3: 4.0}


def test_steps_are_timed_within_the_models_context():
    model = counting([True, False, False])
    times = measure_steps(model, [3] * 120, [default_tree(3, 16)], rounds=2)
    assert times.context_tokens == 128 - 5 * 4
    assert times.plain_s > 0 and times.ratios[16] > 0
    with pytest.raises(ValueError, match="timing steps takes 172 tokens, but the model's context has 128"):
        measure_steps(model, [3], [chain(3)], rounds=40)


# Tuning


def tune(clock, *, step, decoded, nodes=64):
    """Tunes for three heads, two of them right; `step` and `decoded` are seconds beside 1 of plain decoding."""
    clock.seconds = lambda name, _: 1.0 if name in ("plain step", "run_plain") else decoded if name == "run" else step
    rows = [PromptTokens(str(i), [i]) for i in range(3, 6)]
    return tune_tree(counting([True, True, False]), rows, nodes, 12)


def test_fastest_tree_is_taken_where_it_pays(clock):
    tuned = tune(clock, step=1.1, decoded=0.5)
    assert tuned.tree.choices[:2] == ((0,), (0, 0))
    assert tuned.search.expected_lengths[:3] == (1, 2, 3)
    assert tuned.speed_ups == {tuned.tree.num_nodes: 2.0}
    assert "against plain decoding" in tuned.reasons[0]
    facts = tuned.facts()
    assert facts["expected_acceptance_length"] == tuned.search.expected_lengths[tuned.tree.num_nodes - 1]
    assert facts["step_ratios"]["1"] == 1.1
    json.dumps(facts)


def test_choice_is_checked_on_prompts_that_had_no_part_in_it(clock, monkeypatch):
    asked = {"calibration": [], "check": []}
    ranks, speed_up = tree_tuning.head_ranks, tree_tuning.measured_speed_up

    def counted(model, prompt, *rest):
        asked["calibration"].append(prompt[0])
        return ranks(model, prompt, *rest)

    def measured(model, prompts, *rest):
        asked["check"] += [prompt.input_ids[0] for prompt in prompts]
        return speed_up(model, prompts, *rest)

    monkeypatch.setattr(tree_tuning, "head_ranks", counted)
    monkeypatch.setattr(tree_tuning, "measured_speed_up", measured)
    clock.seconds = lambda name, _: 0.5 if name == "run" else 1.0
    rows = [PromptTokens(f"row {i}", [i]) for i in range(3, 15)]
    tuned = tune_tree(counting([True, True, False]), rows, 3, 12)
    assert asked == {"calibration": [3, 4, 6, 7, 8, 10, 11, 12, 14], "check": [5, 9, 13]}
    assert (tuned.calibrated_on, tuned.checked_on) == (9, ("row 5", "row 9", "row 13"))
    assert (tuned.facts()["calibrated_on"], tuned.facts()["checked_on"]) == (9, ["row 5", "row 9", "row 13"])


@pytest.mark.parametrize(
    ("prompts", "checked"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 3), (100, CHECKED_PROMPTS), (33, CHECKED_PROMPTS)]
)
def test_a_quarter_of_the_prompts_is_held_out(prompts, checked):
    rows = [PromptTokens(str(i), [i]) for i in range(prompts)]
    calibrating, checking = held_out(rows)
    assert len(checking) == checked
    assert sorted(calibrating + checking, key=lambda row: int(row.id)) == rows
    assert abs(sum(int(row.id) for row in checking) / checked - prompts / 2) <= 1


def test_one_prompt_cannot_both_calibrate_and_check():
    with pytest.raises(ValueError, match=r"there are 1 calibration prompts, expected at least 2: one is held out"):
        tune_tree(counting([True]), [PromptTokens("a", [3])], 8, 12)


def test_no_tree_is_taken_where_steps_cost_too_much(clock):
    tuned = tune(clock, step=5.0, decoded=0.5)
    assert (tuned.tree, tuned.speed_ups) == (Tree(), {})
    assert tuned.reasons[0].startswith("no tree: the best size")
    assert tuned.facts()["expected_acceptance_length"] == 1


def test_no_tree_is_left_where_none_runs_faster_in_fact(clock):
    """The steps promise a gain, but decoding takes 1.05 as long as plain decoding."""
    tuned = tune(clock, step=1.1, decoded=1.05, nodes=3)
    assert tuned.tree == Tree()
    assert tuned.speed_ups == {3: pytest.approx(1 / 1.05)}
    assert tuned.reasons[1].endswith("the speed of plain decoding, less than 0.98: falling back to no tree")


@pytest.mark.parametrize(
    ("speeds", "kept", "tried"),
    [
        ({16: 1.0}, 16, [16]),
        ({16: 0.98}, 16, [16]),
        ({16: 0.979, 8: 0.99}, 8, [16, 8]),
        ({16: 0.5, 8: 0.5, 4: 0.5}, 1, [16, 8, 4]),
    ],
)
def test_smaller_sizes_are_tried_until_one_pays(speeds, kept, tried):
    ranks = JointRanks(16)
    ranks.add([[rank] for rank in range(16)])
    search = search_tree(ranks, 16)
    sizes, reasons = [1, 4, 8, 16], []
    found, measured, reasons = largest_that_pays(search, 16, sizes, lambda tree: speeds[tree.num_nodes])
    assert (found, list(measured)) == (kept, tried)
    assert len(reasons) == len(tried) - (kept > 1)
    assert largest_that_pays(search, 1, sizes, lambda tree: 0) == (1, {}, [])


def test_speed_up_of_a_tree_is_measured_against_plain_decoding(clock):
    clock.seconds = lambda name, _: 3.0 if name == "run_plain" else 2.0
    rows = [PromptTokens("a", [3]), PromptTokens("b", [4])]
    assert tree_tuning.measured_speed_up(counting([True]), rows, chain(1), 6) == 1.5


def test_an_answer_that_ends_at_once_cannot_calibrate():
    model = make_model("llama", vocab_size=16, eos_token_id=None).eval()
    medusa = MedusaModel(model, counting_heads([True]))
    with pytest.raises(ValueError, match="0 calibration positions were counted"):
        tune_tree(medusa, [PromptTokens("a", [3]), PromptTokens("b", [4])], 8, 1)
