"""Stacked heads against the training module's, and what ranks find in their parts against the whole."""

from __future__ import annotations

import pytest
import torch
from conftest import randomize
from drafter_heads import HEADS, HIDDEN, VOCAB, stacked

from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.serving import draft_heads
from axolotl_medusa.serving.draft_heads import (
    Guesses,
    best_guesses,
    in_turns,
    joined_guesses,
    part_of_guesses,
)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("count", [1, HEADS])
def test_hidden_states_equal_the_training_modules(layers, count):
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, HEADS, layers, "shared"))
    states = torch.randn(5, HIDDEN)
    expected = torch.stack([heads.hidden(index, states) for index in range(count)], 1)
    torch.testing.assert_close(stacked(heads).hidden(states, count), expected)


@pytest.mark.parametrize("count", [1, HEADS])
def test_own_logits_equal_the_training_modules(count):
    heads = randomize(MedusaHeads(HIDDEN, VOCAB, HEADS, 1, "separate"))
    states, own = torch.randn(5, HIDDEN), stacked(heads)
    expected = torch.stack([heads.output_layer(index)(heads.hidden(index, states)) for index in range(count)], 1)
    torch.testing.assert_close(own.own_logits(own.hidden(states, count)), expected)


def test_heads_that_share_have_no_logits_of_their_own():
    with pytest.raises(RuntimeError, match="share the model's output layer"):
        stacked(randomize(MedusaHeads(HIDDEN, VOCAB, 1, 1, "shared"))).own_logits(torch.randn(2, 1, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_tokens_and_their_probabilities_equal_softmax(dtype):
    logits = (torch.randn(6, HEADS, VOCAB) * 3).to(dtype)
    tokens, probabilities = best_guesses(logits, with_probabilities=True)
    expected = logits.float().softmax(-1)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(probabilities, expected.amax(-1), rtol=1e-5, atol=1e-6)
    assert best_guesses(logits, with_probabilities=False).probabilities is None
    assert torch.equal(best_guesses(logits, with_probabilities=False).tokens, tokens)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_a_vocabulary_join_to_the_whole(ranks):
    logits = torch.randn(6, HEADS, VOCAB) * 3
    size = -(-VOCAB // ranks)
    parts = torch.stack([part_of_guesses(part) for part in logits.split(size, -1)])
    found = joined_guesses(parts, torch.arange(ranks) * size)
    expected = best_guesses(logits, with_probabilities=True)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.probabilities, expected.probabilities)


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_requests_take_turns_where_their_logits_are_too_many(monkeypatch, with_probabilities):
    monkeypatch.setattr(draft_heads, "_LOGITS_AT_ONCE", 2 * VOCAB)
    logits, sizes = torch.randn(7, 1, VOCAB), []

    def guess(rows: torch.Tensor) -> Guesses:
        sizes.append(len(rows))
        return best_guesses(rows, with_probabilities=with_probabilities)

    found = in_turns(logits, VOCAB, guess)
    expected = best_guesses(logits, with_probabilities=with_probabilities)
    assert sizes == [2, 2, 2, 1]
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.probabilities is None) == (not with_probabilities)
    assert in_turns(logits, VOCAB, lambda rows: None) is None
