"""Plain and Medusa decoding of one prompt beside each other in a terminal, each as far as its own time has brought it.

Contract: a model with heads and a tokenizer in, text out; knows nothing about files. The decoder that has used less time makes
the next step, so that both columns show the same moment, and only steps are timed.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TextIO

import torch

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.decoding.tree_chooser import AUTO
from axolotl_medusa.measuring.step_times import timed
from axolotl_medusa.model.anatomy import causal_lm

_WARM_UP_TOKENS = 4
_GAP = " | "


@dataclass
class _Runner:
    """A decoder in the race.

    Attributes:
        name: What its column is called.
        step: Makes one step.
        done: Whether there is none left to make.
        tokens: New tokens so far.
        acceptance_length: Tokens per forward so far.
        reason: Why it decodes as it does, empty where a user said so.
        seconds: Time that its steps took.
    """

    name: str
    step: Callable[[], object]
    done: Callable[[], bool]
    tokens: list[int]
    acceptance_length: Callable[[], float]
    reason: Callable[[], str] = str
    seconds: float = 0.0

    def line(self) -> str:
        """Its result."""
        return (
            f"{self.name}: {len(self.tokens)} tokens, {len(self.tokens) / self.seconds:.1f} tokens/s, "
            f"acceptance length {self.acceptance_length():.2f}" + (f"; {reason}" if (reason := self.reason()) else "")
        )


@torch.no_grad()
def race(
    model: MedusaModel,
    tokenizer: Any,
    prompt: list[int],
    tree: Tree | Literal["auto"],
    max_new_tokens: int,
    out: TextIO,
    compile: bool = False,
) -> None:
    """Decodes a prompt greedily both ways and prints both texts and what they took.

    Args:
        model: The model with its heads.
        tokenizer: Its tokenizer.
        prompt: The prompt's tokens.
        tree: The candidate tree, or `auto`.
        max_new_tokens: Tokens to write at most.
        out: Where to print; texts grow in place if it is a terminal, else they are printed once.
        compile: Whether the tree's forward is compiled.
    """
    ids = torch.tensor([prompt], device=causal_lm(model.base_model).get_input_embeddings().weight.device)

    def runners() -> tuple[_Runner, _Runner]:
        plain = PlainDecoding(model.base_model, ids, max_new_tokens, model.eos_token_ids)
        medusa = model.greedy_decoding(ids, tree, max_new_tokens, model.eos_token_ids, compile)
        reason = model.chooser().reason if tree == AUTO else str
        return (
            _Runner("plain", plain.step, lambda: plain.done, plain.tokens, lambda: 1.0),
            _Runner(
                "Medusa",
                medusa.step,
                lambda: not medusa.rows,
                medusa.tokens[0],
                lambda: medusa.stats.acceptance_length,
                reason,
            ),
        )

    _warm_up(runners())
    plain, medusa = runners()
    screen = _Screen(tokenizer, out)
    while running := [runner for runner in (plain, medusa) if not runner.done()]:
        runner = min(running, key=lambda one: one.seconds)
        runner.seconds += timed(runner.step, ids)
        if out.isatty():
            screen.show(plain, medusa)
    screen.show(plain, medusa)
    out.write(f"{plain.line()}\n{medusa.line()}\n{_verdict(plain, medusa)}\n")


def _warm_up(runners: Sequence[_Runner]) -> None:
    for runner in runners:
        while not runner.done() and len(runner.tokens) < _WARM_UP_TOKENS:
            runner.step()


def _verdict(plain: _Runner, medusa: _Runner) -> str:
    ratio = (len(medusa.tokens) / medusa.seconds) / (len(plain.tokens) / plain.seconds)
    same = (
        "the same text"
        if plain.tokens == medusa.tokens
        else "texts differ, as rounding in half precision can make them"
    )
    return f"speed-up: {ratio:.2f} x plain decoding, {same}"


class _Screen:
    """Two columns that are drawn over what was drawn before.

    Args:
        tokenizer: Decodes tokens.
        out: Where to draw.
    """

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._drawn = 0

    def show(self, left: _Runner, right: _Runner) -> None:
        """Draws both texts, on a terminal the last lines that fit on it."""
        columns, lines = shutil.get_terminal_size()
        width = max(1, (columns - len(_GAP)) // 2)
        texts = [self._wrapped(runner, width) for runner in (left, right)]
        rows = [f"{one:{width}}{_GAP}{other}".rstrip() for one, other in zip_longest(*texts, fillvalue="")]
        header = f"{left.name:{width}}{_GAP}{right.name}"
        if self._out.isatty():
            rows = rows[-max(1, lines - 5) :]
            self._out.write(f"\033[{self._drawn}F\033[J" if self._drawn else "")
            self._drawn = 1 + len(rows)
        self._out.write("\n".join([header, *rows]) + "\n")
        self._out.flush()

    def _wrapped(self, runner: _Runner, width: int) -> list[str]:
        text = self._tokenizer.decode(runner.tokens, skip_special_tokens=True)
        return [row for line in text.splitlines() for row in textwrap.wrap(line, width) or [""]]
