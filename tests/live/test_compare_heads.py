"""What a chain accepts, held to a count by hand, and what is said of shares that nothing or several things explain."""

from __future__ import annotations

import random

import pytest

from axolotl_medusa.live.chain import Shares, Text, chain_shares, other_orders
from axolotl_medusa.live.compare_heads import compare_heads
from axolotl_medusa.live.counters import Counters, read_counters
from axolotl_medusa.live.guesses import TRAINED, WITHOUT_BIASES, WITHOUT_BLOCKS, Along

TOKENS = 2000
FORMS = {TRAINED: (0.8, 0.5), WITHOUT_BIASES: (0.4, 0.3), WITHOUT_BLOCKS: (0.0, 0.0)}
"""By form of two heads, how often each is right by itself."""


def said(seed: int = 0) -> tuple[list[int], Along]:
    """A random text and heads of `FORMS` along it; a wrong draft is a token that no text has."""
    draw = random.Random(seed)
    tokens = [draw.randrange(100) for _ in range(TOKENS)]
    drafts = {
        form: [
            [
                tokens[i + 1 + head] if i + 1 + head < TOKENS and draw.random() < share else -1
                for head, share in enumerate(shares)
            ]
            for i in range(TOKENS)
        ]
        for form, shares in FORMS.items()
    }
    return tokens, Along([True] * TOKENS, [0.0] * TOKENS, drafts)


def compared(accepted: tuple[float, ...], kind: str = "same", drafts: int = 1000):
    tokens, along = said()
    counted = Counters(
        True, drafts, drafts * len(accepted), tuple(drafts * share for share in accepted), TOKENS, drafts
    )
    return compare_heads([along], [tokens], counted, kind)


def test_chain_is_counted_as_by_hand():
    drafts = [[2, 3], [9, 4], [4, 9], [5, 6], [9, 9], [9, 9]]
    text = Text([1, 2, 3, 4, 5, 6], drafts)
    # After 1 both are right (2, 3), 4 is the model's own; after 4 both are (5, 6), and the text is over.
    assert chain_shares([text], (0, 1)) == Shares((1.0, 1.0), 2)
    # After 1 head 1 says 3 and not 2; after 2 it says 4; after 3 it says 9; after 4 it says 6; after 5 it says 9.
    assert chain_shares([text], (1,)) == Shares((0.0,), 5)
    assert chain_shares([Text([1], [[2, 3]]), Text([], [])], (0, 1)) == Shares((0.0, 0.0), 0)


def test_orders_are_all_but_the_right_one():
    assert sorted(other_orders(3, 2)) == [(0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert len(list(other_orders(16, 16))) <= 720


def test_shares_as_predicted_have_no_cause():
    report = compared((0.8, 0.4))
    assert report.causes == [] and report.predicted.accepted == pytest.approx((0.8, 0.4), abs=0.06)


def test_more_than_predicted_is_no_fault():
    assert compared((0.95, 0.8)).causes == []


def test_shares_of_heads_without_biases_are_explained_with_the_figures():
    (cause,) = compared((0.4, 0.12)).causes
    assert cause.startswith("the server has the heads without their biases") and "0.400/0." in cause


def test_shares_that_several_mistakes_explain_name_them():
    (cause,) = compared((0.0, 0.0)).causes
    assert (
        "not loaded the heads' residual blocks" in cause and "; or the server has the heads in another order" in cause
    )


def test_shares_that_nothing_explains_are_called_other_heads_or_the_weights():
    (cause,) = compared((0.2, 0.2)).causes
    assert "no known mistake explains it" in cause
    (cause,) = compared((0.2, 0.2), "changed").causes
    assert cause.startswith("the heads guess worse on the changed weights")


def test_few_drafts_prove_nothing():
    assert compared((0.6, 0.3), drafts=20).causes == []
    assert compared((0.6, 0.3), drafts=2000).causes != []


def test_other_models_heads_are_not_judged():
    report = compared((0.0, 0.0), "other")
    assert report.causes == [] and report.served is not None


def test_counters_are_read_from_the_text_of_several_engines():
    text = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a b"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a b"} 2.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 3.6e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0
vllm:iteration_tokens_total_count{engine="0"} 7.0
vllm:generation_tokens_total 21.0
"""
    found = read_counters(text)
    assert found == Counters(True, 12.0, 36.0, (6.0, 3.0), 21.0, 7.0)
    assert found.acceptance_length == 1.75
    assert found.since(Counters(True, 2.0, 6.0, (1.0, 1.0), 1.0, 2.0)) == Counters(
        True, 10.0, 30.0, (5.0, 2.0), 20.0, 5.0
    )
    assert read_counters("") == Counters(False, 0.0, 0.0, (), 0.0, 0.0) and read_counters("").acceptance_length is None
