"""Which head guessed which piece of an answer."""

from __future__ import annotations

import torch
from example_tokenizers import make_tokenizer

from axolotl_medusa.reporting.coloured_text import Example, PieceCollector
from axolotl_medusa.reporting.found_files import Found
from axolotl_medusa.reporting.page import page


def collected(steps):
    tokenizer = make_tokenizer("zephyr")
    collector = PieceCollector(tokenizer)
    collector.put(torch.tensor([[1, 2]]))
    for text in steps:
        collector.put(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
    collector.end()
    return collector.pieces


def test_drafts_are_those_of_the_heads_in_turn_and_the_last_token_the_models_own():
    assert collected(["a", "bcd", "e"]) == [("a", None), ("b", 0), ("c", 1), ("d", None), ("e", None)]


def test_character_of_several_tokens_is_shown_when_it_is_whole():
    assert collected(["aé"]) == [("a", 0), ("é", None)]  # é is two tokens; the first alone is no character


def test_page_marks_drafts_by_more_than_a_colour(tmp_path):
    text = page(Found(tmp_path), [Example("Why?", [("Be", None), ("cause <", 1)], 1.5)])
    assert '<p class="said">Be<span class="draft c1" title="head 1">cause &lt;<sub>1</sub></span></p>' in text
    assert ".draft { text-decoration: underline }" in text and "1.50 tokens a pass" in text
