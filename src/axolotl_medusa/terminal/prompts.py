"""Prompts from a JSONL file, and their tokens as the model sees them in a chat.

Contract: no model and no tensors; a tokenizer is whatever transformers loads. A row is `{"id", "prompt"}` or
`{"id", "messages": [{"role", "content"}, ...]}`, each with an optional `category`; other keys are left alone, so that what
`data_generation` reads and writes can be used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, TextIO

from axolotl_medusa.decoding.library_errors import one_line_for
from axolotl_medusa.model.json_files import parse_json
from axolotl_medusa.terminal.default_prompts import DEFAULT_PROMPTS

MAX_PROMPTS = 100_000
"""Rows that are read where nothing says how many: they are all kept in memory."""
MAX_LINE = 16_000_000
"""Characters of a row."""

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One row.

    Attributes:
        id: The row's id, else its line number.
        messages: A conversation; a plain prompt is one user turn.
        category: What the row says it is about, None if it does not.
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None = None


def read_prompts(file: str | Path, limit: int | None = None) -> list[Prompt]:
    """Reads prompts.

    Args:
        file: A JSONL file.
        limit: Rows to read at most.

    Raises:
        ValueError: The file cannot be read, is empty, or a row is none; the line is named.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    try:
        with Path(file).expanduser().open(encoding="utf-8") as lines:
            prompts = list(islice(_rows(file, lines), MAX_PROMPTS + 1 if limit is None else limit))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): expected a JSONL file of prompts") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: expected a JSONL file of prompts") from error
    if limit is None and len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{file} holds more than {MAX_PROMPTS:,} prompts: name how many to take with --limit")
    if not prompts:
        raise ValueError(f'{file} holds no prompts, expected lines such as {{"id": "1", "prompt": "Hello"}}')
    return prompts


def default_prompts(limit: int | None = None) -> list[Prompt]:
    """The prompts that a server is asked where nobody names any.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    texts = enumerate(DEFAULT_PROMPTS[:limit], 1)
    return [Prompt(str(number), ({"role": "user", "content": text},)) for number, text in texts]


def prompt_tokens(tokenizer: Any, prompt: Prompt, settings: Mapping[str, Any] | None = None) -> list[int]:
    """Tokens up to where the model answers the last user turn; answers after it are left out.

    With a chat template the conversation is rendered by it. Without one, a single turn is text to be continued.

    Args:
        tokenizer: The model's.
        prompt: What to answer.
        settings: What the template knows beside the turns, such as `enable_thinking`.

    Raises:
        ValueError: There is no user turn, several turns and no chat template, or the template refuses them.
        RuntimeError: The template needs jinja2, which is missing.
    """
    return _tokens(tokenizer, prompt.id, turns_to_answer(prompt), add_generation_prompt=True, settings=settings)


def turns_to_answer(prompt: Prompt) -> list[Message]:
    """The conversation up to its last user turn.

    Raises:
        ValueError: There is no user turn.
    """
    turns = list(prompt.messages)
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise ValueError(f"prompt {prompt.id} has no user turn, expected one to answer: add it or delete the row")
    return turns


def conversation_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of the whole conversation, answers included.

    Raises:
        ValueError: There are several turns and no chat template, or the template refuses them.
        RuntimeError: The template needs jinja2, which is missing.
    """
    return _tokens(tokenizer, prompt.id, list(prompt.messages), add_generation_prompt=False)


def _tokens(
    tokenizer: Any,
    name: str,
    turns: list[Message],
    *,
    add_generation_prompt: bool,
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    if tokenizer.chat_template is None:
        if len(turns) > 1:
            raise ValueError(
                f"prompt {name} has {len(turns)} turns, but the tokenizer has no chat template to join them: "
                "give single prompts, or save a chat_template.jinja beside the tokenizer"
            )
        return list(tokenizer(turns[0]["content"])["input_ids"])
    with one_line_for(f"prompt {name}", "cannot be rendered by the chat template", "correct either of them"):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **(settings or {})
        )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written the special ones


def _rows(file: str | Path, lines: TextIO) -> Iterator[Prompt]:
    number = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        if not line.strip():
            continue
        where = f"{file} line {number}"
        if len(line) > MAX_LINE:
            raise ValueError(f"{where} is longer than {MAX_LINE:,} characters: correct or delete the line")
        row = parse_json(line, where)
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise ValueError(f'{where} is no prompt, expected an object with either "prompt" or "messages"')
        messages = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else row["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ValueError(f'{where}: expected "prompt" to be text, or "messages" a list of {{"role", "content"}}')
        names = row.get("id", number), row.get("category")
        if not all(isinstance(name, str | int | float | None) for name in names):
            raise ValueError(f'{where}: found {shorten(names)}, expected "id" and "category" to be texts or numbers')
        yield Prompt(str(names[0]), tuple(messages), None if names[1] is None else str(names[1]))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
