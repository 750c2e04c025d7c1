"""Streaming text to a terminal, one answer or a chat.

Contract: a model with heads, a tokenizer, and functions that read and write lines; knows nothing about files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from axolotl_medusa.decoding.running_rows import GenerationStats
from axolotl_medusa.decoding.tree import Tree
from axolotl_medusa.decoding.tree_chooser import AUTO
from axolotl_medusa.terminal.prompts import Message, Prompt, prompt_tokens

if TYPE_CHECKING:
    from axolotl_medusa.decoding.medusa_model import MedusaModel
    from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa

_GREEN, _PLAIN = "\033[32m", "\033[0m"
_UNFINISHED = "\ufffd"
"""What a tokenizer decodes a character to whose bytes have not all come yet."""


class TextPrinter:
    """A streamer that prints text as it comes, accepted draft tokens in green if asked to.

    Args:
        tokenizer: Decodes the tokens.
        out: Where to print.
        colour: Whether to colour.
    """

    def __init__(self, tokenizer: Any, out: TextIO, colour: bool = False) -> None:
        self._tokenizer, self._out, self._colour = tokenizer, out, colour
        self._tokens: list[int] = []
        self._printed = ""
        self._line_start = 0
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Prints the new tokens of a step; the first value is the prompt and is left out."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        *drafts, own = value.tolist()
        for token in drafts:
            self._print(token, _GREEN if self._colour else "")
        self._print(own)

    def end(self) -> None:
        """Prints what was held back, and ends the line."""
        self._out.write(self._text()[len(self._printed) :] + "\n")
        self._out.flush()

    def _print(self, token: int, colour: str = "") -> None:
        self._tokens.append(token)
        text = self._text()
        new = text[len(self._printed) :]
        if not new or text.endswith(_UNFINISHED):
            return
        self._out.write(f"{colour}{new}{_PLAIN}" if colour else new)
        self._out.flush()
        self._printed = text
        if text.endswith("\n"):
            self._begin_line()

    def _begin_line(self) -> None:
        """Keeps the line that ended as context: decoders of SentencePiece leave out a blank at the beginning of all text.

        Lines do not depend on those before: keeping only one spares long answers from being decoded over and over.
        """
        self._tokens = self._tokens[self._line_start :]
        self._printed, self._line_start = self._text(), len(self._tokens)

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


@dataclass
class Answerer:
    """Answers prompts with fixed settings.

    Attributes:
        model: The model with its heads.
        tokenizer: Its tokenizer.
        tree: The candidate tree, or `auto`.
        temperature: 0 for greedy decoding, else exact sampling at this temperature.
        max_new_tokens: Tokens per answer at most; fewer where the model's context ends.
        out: Where answers are printed.
        colour: Whether accepted draft tokens are coloured.
        compile: Whether the forward that verifies a tree is compiled.
    """

    model: MedusaModel | OnnxMedusa
    tokenizer: Any
    tree: Tree | Literal["auto"]
    temperature: float
    max_new_tokens: int
    out: TextIO
    colour: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or above")

    def answer(self, messages: list[Message]) -> tuple[str, str]:
        """Prints the answer to the last user turn while it is written.

        Returns:
            Its text, and a line on speed and acceptance length and, if the tree was chosen, why.

        Raises:
            ValueError: The prompt does not fit the model's context, or has several turns and there is no chat template.
        """
        tokens = prompt_tokens(self.tokenizer, Prompt("given", tuple(messages)))
        room = self.max_new_tokens
        if self.model.context is not None and len(tokens) < self.model.context:
            room = min(room, self.model.context - len(tokens))
        printer = TextPrinter(self.tokenizer, self.out, self.colour)
        begin = time.perf_counter()
        new, stats = self.model.answer(
            tokens, room, tree=self.tree, temperature=self.temperature, streamer=printer, compile=self.compile
        )
        seconds = time.perf_counter() - begin
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        reason = f"; {self.model.chooser().reason()}" if self.tree == AUTO else ""
        return text, speed_line(stats, seconds) + reason


def speed_line(stats: GenerationStats, seconds: float) -> str:
    """Tokens, tokens/s and acceptance length of one answer."""
    return (
        f"{stats.emitted_tokens} tokens, {stats.emitted_tokens / seconds:.1f} tokens/s, "
        f"acceptance length {stats.acceptance_length:.2f}"
    )


@dataclass
class Chat:
    """A conversation in a terminal.

    Attributes:
        answerer: Writes the answers.
        read: Shows a prompt and returns the user's line; EOFError ends the chat.
        history: Turns so far.
    """

    answerer: Answerer
    read: Callable[[str], str]
    history: list[Message] = field(default_factory=list)

    def run(self) -> None:
        """Talks until `/exit` or the end of input; `/reset` forgets the history.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if self.answerer.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, which a chat needs: save a chat_template.jinja beside the tokenizer, "
                "or use `axolotl-medusa generate`"
            )
        self._say("/reset forgets what was said, /exit ends the chat")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                return
            if line == "/exit":
                return
            if line == "/reset":
                self.history.clear()
                self._say("nothing was said yet")
            elif line.startswith("/"):
                self._say(f"unknown command {line.split()[0]}: expected /reset or /exit")
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        turns = [*self.history, {"role": "user", "content": line}]
        try:
            text, speed = self.answerer.answer(turns)
        except ValueError as error:
            self._say(f"not answered: {error}; /reset begins anew")
            return
        self.history = [*turns, {"role": "assistant", "content": text}]
        self._say(speed)

    def _say(self, line: str) -> None:
        self.answerer.out.write(f"[{line}]\n")
        self.answerer.out.flush()
