"""Plain and Medusa decoding beside each other: who steps when, what is shown, what is said at the end."""

from __future__ import annotations

import io
import os

import pytest
import torch
from decoding_models import counting_heads, counting_model
from example_tokenizers import make_tokenizer

from axolotl_medusa.decoding import medusa_model as generate_module
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import chain
from axolotl_medusa.terminal import race as race_module
from axolotl_medusa.terminal.race import race


class Letters:
    """Tokens 0 to 15 as words of one letter."""

    def decode(self, tokens, **_):
        return " ".join("abcdefghijklmnop"[token] for token in tokens)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replaces time: a plain step takes 1 s, a Medusa step 2 s; lists who stepped."""
    ran = []

    def timed(run, _):
        plain = isinstance(run.__self__, PlainDecoding)
        run()
        ran.append("plain" if plain else "Medusa")
        return 1.0 if plain else 2.0

    monkeypatch.setattr(race_module, "timed", timed)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((23, 8)))
    return ran


def counting(right):
    return MedusaModel(counting_model(), counting_heads(right))


def test_the_decoder_that_used_less_time_steps_next_and_results_are_said(clock):
    """Seven tokens: plain takes 7 s, Medusa with two right heads 1 + 2 forwards, 6 s."""
    out = io.StringIO()
    race(counting([True, True]), Letters(), [3], chain(2), 7, out)
    assert clock == ["plain", "Medusa", "plain", "plain", "Medusa", "plain", "plain", "Medusa", "plain", "plain"]
    assert out.getvalue().splitlines() == [
        "plain      | Medusa",
        "e f g h i  | e f g h i",
        "j k        | j k",
        "plain: 7 tokens, 1.0 tokens/s, acceptance length 1.00",
        "Medusa: 7 tokens, 1.2 tokens/s, acceptance length 2.33",
        "speed-up: 1.17 x plain decoding, the same text",
    ]


def test_a_terminal_shows_both_texts_after_every_step_within_its_height(clock):
    out = Terminal()
    race(counting([True]), Letters(), [3], chain(1), 40, out)
    frames = out.getvalue().split("\033[J")
    assert len(frames) == len(clock) + 1
    first = frames[0].split("\033")[0]
    assert first == "plain      | Medusa\ne          |\n"
    assert "e          | e\n" in frames[1]
    assert max(frame.count("\n") for frame in frames[:-1]) == 4, "the header and three lines on a terminal of eight"
    drawn = [frame.count("\n") for frame in frames[:-1]]
    up = [int(frame.rsplit("\033[", 1)[1].removesuffix("F")) for frame in frames[:-1]]
    assert up == drawn, "every frame is drawn over the one before"


def test_texts_that_differ_are_called_so(clock, monkeypatch):
    from axolotl_medusa.decoding.acceptance import Accepted

    def accept_all(logits, tokens, tree):
        return Accepted(torch.full((1,), len(tree.depths) - 1), logits[:, -1].argmax(-1))

    monkeypatch.setattr(generate_module, "accept_greedy", accept_all)
    out = io.StringIO()
    race(counting([False]), Letters(), [3], chain(1), 6, out)
    assert "plain decoding, texts differ" in out.getvalue()


def test_a_real_tokenizer_and_the_end_of_text(clock):
    model = counting([True])
    model.base_model.generation_config.eos_token_id = 9
    out = io.StringIO()
    race(model, make_tokenizer("zephyr"), [3], chain(1), 20, out)
    assert "plain: 6 tokens" in out.getvalue() and "Medusa: 6 tokens" in out.getvalue()
