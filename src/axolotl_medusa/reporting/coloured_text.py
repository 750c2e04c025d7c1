"""Answers with each piece of text marked by who wrote it: the model itself, or one of its heads.

Contract: a streamer for the decoding loop, and what it collects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes a character to whose bytes have not all come yet."""


@dataclass(frozen=True)
class Example:
    """An answer.

    Attributes:
        prompt: The last question.
        pieces: Texts, each with the head that guessed it, or None for the model's own.
        acceptance_length: Tokens for each pass of the model.
    """

    prompt: str
    pieces: Sequence[tuple[str, int | None]]
    acceptance_length: float


class PieceCollector:
    """Collects an answer's pieces while it is written.

    A step emits the drafts that it accepted, the first of head 0, and then a token of the model's own.

    Args:
        tokenizer: Decodes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""
        self._prompt_seen = False
        self.pieces: list[tuple[str, int | None]] = []

    def put(self, value: Tensor) -> None:
        """Takes the new tokens of a step; the first value is the prompt and is left out."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        *drafts, own = value.tolist()
        for head, token in enumerate(drafts):
            self._take(token, head)
        self._take(own, None)

    def end(self) -> None:
        """Takes what was held back."""
        self._add(self._text(), None)

    def _take(self, token: int, head: int | None) -> None:
        self._tokens.append(token)
        text = self._text()
        if not text.endswith(_UNFINISHED):
            self._add(text, head)

    def _add(self, text: str, head: int | None) -> None:
        if new := text[len(self._shown) :]:
            self.pieces.append((new, head))
        self._shown = text

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
