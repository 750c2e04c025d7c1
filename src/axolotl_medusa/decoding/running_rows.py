"""Rows of a batch that is being decoded: their tokens, where they stop, and what it took.

Contract: pure Python, no model and no tensors; the decoders of torch and of ONNX Runtime are made on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from axolotl_medusa.decoding.tree import Choice


@dataclass
class GenerationStats:
    """What decoding took. A row's forwards are those until it stopped; the one over its prompt is among them.

    Attributes:
        emitted_tokens: New tokens, without padding.
        forward_passes: Forwards of the target, counted for every row that was in them.
        batch_forwards: Forwards of the target.
        acceptance_lengths: How often a row's forward over a tree emitted 1, 2, 3, ... tokens; prompts' are left out.
    """

    emitted_tokens: int = 0
    forward_passes: int = 0
    batch_forwards: int = 0
    acceptance_lengths: Counter[int] = field(default_factory=Counter)

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens / target forward passes: 1.0 is what plain decoding has."""
        return self.emitted_tokens / self.forward_passes


class Streamer(Protocol):
    """What transformers' streamers have; arrays are those of the decoder, torch's or numpy's."""

    def put(self, value: Any) -> None:
        """Takes the prompt, `[1, prompt]`, then the new tokens of every step, `[tokens]`, the target's own one last."""

    def end(self) -> None:
        """Is called after the last token."""


class RunningRows(ABC):
    """The rows of a batch.

    Args:
        prompts: Number of prompts.
        max_new_tokens: Tokens that a row gets at most, at least 1.
        eos_token_ids: Tokens after which a row stops.

    Attributes:
        tokens: New tokens of every prompt.
        rows: Prompts that still run, in the order of the cache's rows.
        stats: What it has taken so far.
        accepted: What the last step accepted of its tree in every row: a choice of it, empty for the root.
    """

    def __init__(self, prompts: int, max_new_tokens: int, eos_token_ids: Collection[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self.rows = list(range(prompts))
        self.stats = GenerationStats()
        self.accepted: list[Choice] = []
        self._max_new_tokens, self._eos_token_ids = max_new_tokens, frozenset(eos_token_ids)

    def _emit(self, new: Sequence[Sequence[int]], prompts_forward: bool) -> list[list[int]]:
        """Cuts new tokens where rows stop, counts them, and lets stopped rows leave.

        Args:
            new: New tokens of the rows that were in the forward.
            prompts_forward: Whether it was the one over the prompts.

        Returns:
            What is left of them.
        """
        self.stats.batch_forwards += 1
        self.stats.forward_passes += len(self.rows)
        emitted: list[list[int]] = []
        running: list[int] = []
        for index, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            cut = list(tokens[: self._max_new_tokens - len(self.tokens[row])])
            end = next((i for i, token in enumerate(cut, 1) if token in self._eos_token_ids), None)
            cut = cut[:end]
            self.tokens[row] += cut
            emitted.append(cut)
            self.stats.emitted_tokens += len(cut)
            if not prompts_forward:
                self.stats.acceptance_lengths[len(cut)] += 1
            if end is None and len(self.tokens[row]) < self._max_new_tokens:
                running.append(index)
        if running and len(running) < len(self.rows):
            self._leave(running)
        self.rows = [self.rows[index] for index in running]
        return emitted

    def run(self, streamer: Streamer | None, prompts: Any, array: Callable[[list[int]], Any]) -> None:
        """Steps until every row has stopped.

        Args:
            streamer: Gets the prompts and then the first row's new tokens of every step.
            prompts: As the streamer takes them.
            array: Makes of new tokens what it takes.
        """
        if streamer is not None:
            streamer.put(prompts)
        while self.rows:
            new = self.step()
            if streamer is not None:
                streamer.put(array(new[0]))
        if streamer is not None:
            streamer.end()

    @abstractmethod
    def step(self) -> list[list[int]]:
        """One forward of the target; returns the new tokens of the rows that were in it."""

    @abstractmethod
    def _leave(self, running: list[int]) -> None:
        """Lets all rows but those at the indices `running` leave."""


def check_streamer(streamer: Streamer | None, prompts: int) -> None:
    """Refuses a streamer for more than one prompt.

    Raises:
        ValueError: There are more.
    """
    if streamer is not None and prompts > 1:
        raise ValueError(f"a streamer takes one prompt, the batch has {prompts}: leave the streamer out")


def check_lengths(lengths: Sequence[int], max_new_tokens: int, context: int | None) -> None:
    """Checks the lengths of prompts before the first forward.

    Args:
        lengths: Tokens of every prompt.
        max_new_tokens: Tokens to generate.
        context: Positions that the model has, None for no limit.

    Raises:
        ValueError: A prompt is empty or too long, or there is nothing to generate.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if not lengths or not all(lengths):
        where = f"prompt {list(lengths).index(0)}" if lengths else "the batch"
        raise ValueError(f"{where} is empty, expected at least one token per prompt: begin with the BOS token")
    longest = int(max(lengths))
    if context is not None and longest >= context:
        raise ValueError(f"a prompt has {longest} tokens, but the model's context has {context}: shorten it")
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but the model's context has {context}: "
            f"set max_new_tokens to at most {context - longest}"
        )
