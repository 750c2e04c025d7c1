"""Make one conversation with a model: which turns come from the input, which the model writes, what the row keeps.

Answers always come from the server's chat completions, so that they are what the server says to its users. The user
turns that the model writes come from plain completions of the model's own chat template, cut where a user would start
to write (arXiv 2406.08464, section 2: the aligned model fills in the user's turn). Knows nothing about files.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from parts.chat_server import CHAT, COMPLETIONS, Answer, ChatServer, RowError, ServerError
from parts.chat_template import ChatTemplate
from parts.command_line import flag, number
from parts.conversation_rows import IGNORED_LABEL, format_turns
from parts.prompt_files import Row, Turn
from parts.retrying_server_pool import ServerPool

USER_MAX_TOKENS = 512  # a longer user turn is no prompt; those cut here are not used
THINK, END_THINK = "<think>", "</think>"


class Skipped(Exception):  # noqa: N818 - not an error: the row is left out as it was asked for
    """A row that gives no conversation, and why."""


@dataclass(frozen=True)
class Recipe:
    """How conversations are made; max_tokens and temperature default to the first Medusa generator's values."""

    max_tokens: int = field(metadata=flag("longest answer, in tokens", 2048, type=number(int, 1)))
    temperature: float = field(metadata=flag("sampling temperature of answers", 0.3, type=number(float, 0)))
    top_p: float | None = field(metadata=flag("nucleus sampling (default: the server's)", type=number(float, 0, 1)))
    seed: int = field(metadata=flag("mixed into the seed of every request (default: 0)", 0, type=number(int, 0)))
    chat: bool = field(metadata=flag("answer the user turns of the input, and no others", False, action="store_true"))
    max_turns: int = field(metadata=flag("answers in a conversation without --chat", 3, type=number(int, 1)))
    user_temperature: float = field(
        metadata=flag("sampling temperature of user turns that the model writes", 1.0, type=number(float, 0))
    )
    thinking: str | None = field(
        metadata=flag(
            "reasoning models: think and keep it, do not think, or think and drop it",
            choices=["on", "off", "strip"],
        )
    )
    token_ids: bool = field(metadata=flag("keep the server's token ids", False, action="store_true"))
    format: str = field(metadata=flag("layout of a row", "messages", choices=["messages", "sharegpt"]))
    cut: str = field(
        metadata=flag("what to do with answers cut by max_tokens", "keep", choices=["keep", "mark", "drop"])
    )

    def sampling(self, row: Row, request: int, temperature: float, max_tokens: int) -> dict[str, Any]:
        """Returns the sampling fields of the row's `request`-th request, the same in every run."""
        digest = hashlib.sha256(f"{self.seed}/{row.id}/{request}".encode()).hexdigest()
        fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        fields["seed"] = int(digest[:8], 16) >> 1  # 31 bits fit every server's integer
        if self.top_p is not None:
            fields["top_p"] = self.top_p
        return fields

    def template_kwargs(self) -> dict[str, Any]:
        """Returns what the chat template is told about thinking, in the word of Qwen3's template."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking != "off"}


def turns_to_send(turns: Sequence[Turn], chat: bool) -> list[Turn]:
    """Returns the system and user turns up to the first user turn; with `chat`, up to the last."""
    sent = [turn for turn in turns if turn["role"] != "assistant"]
    users = [index for index, turn in enumerate(sent) if turn["role"] == "user"]
    return sent[: users[-1 if chat else 0] + 1]


def split_reasoning(answer: Answer) -> tuple[str, str]:
    """Returns the reasoning of an answer, "" if there is none, and what is said after it.

    Servers with a reasoning parser report it apart; others leave it in the text, where the opening tag is missing if
    the chat template has it in the prompt.
    """
    if answer.reasoning:
        return answer.reasoning.strip(), answer.text.strip()
    reasoning, end, spoken = answer.text.partition(END_THINK)
    if end:
        return reasoning.replace(THINK, "", 1).strip(), spoken.strip()
    if answer.text.lstrip().startswith(THINK):
        raise RowError("found an answer cut while the model was reasoning, expected a larger --max_tokens")
    return "", answer.text


async def returns_token_ids(server: ChatServer) -> bool:
    """Asks a server for the token ids of its answers, from now on; returns whether it sends them."""
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = await server.understands(CHAT, request, {"return_token_ids": True})
    if isinstance(answer, Answer) and answer.prompt_ids and answer.answer_ids:
        return True
    server.extra_fields[CHAT] = {}
    return False


async def settle_user_turns(server: ChatServer, template: ChatTemplate) -> None:
    """Finds out how a server can be asked for user turns: stop strings and special tokens are not known to all.

    Raises:
        ServerError: If the server has no completions of plain text.
    """
    request = {"prompt": template.user_prompt([])}
    stop = {"stop": [template.user_stop]} if template.user_stop else {}
    for fields in ({**stop, "skip_special_tokens": False}, stop, {}):
        answer = await server.understands(COMPLETIONS, request, fields)
        if isinstance(answer, Answer):
            return
    expected = "expected /completions, with which the model writes user turns; use --chat"
    raise ServerError(f"{server.url}/{COMPLETIONS}: found {answer}, {expected}")


class TokenIds:
    """What the server saw and said, as the columns that axolotl trains on without tokenising."""

    def __init__(self) -> None:
        """Starts with no tokens."""
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.answers = self.masked_answers = 0

    def extend(self, answer: Answer) -> None:
        """Appends a prompt and its answer.

        A prompt usually begins with the tokens of the turns before it. Where the template renders those differently
        now (it drops earlier reasoning, say), their answers are no longer what the model said there: they are masked
        and counted.
        """
        if answer.prompt_ids is None or answer.answer_ids is None:
            raise ServerError("the server stopped returning token ids, expected them in every answer")
        if answer.prompt_ids[: len(self.ids)] == self.ids:
            self.labels += [IGNORED_LABEL] * (len(answer.prompt_ids) - len(self.ids))
        else:
            self.masked_answers = self.answers
            self.labels = [IGNORED_LABEL] * len(answer.prompt_ids)
        self.ids = answer.prompt_ids + answer.answer_ids
        self.labels += answer.answer_ids
        self.answers += 1

    def columns(self) -> dict[str, Any]:
        """Returns the columns of the row."""
        return {
            "input_ids": self.ids,
            "attention_mask": [1] * len(self.ids),
            "labels": self.labels,
            "masked_answers": self.masked_answers,
        }


class Conversation:
    """One conversation in the making."""

    def __init__(self, row: Row, pool: ServerPool, recipe: Recipe, template: ChatTemplate | None) -> None:
        """Starts with no turns.

        Args:
            row: Where it comes from; without turns, the model writes the first user turn too.
            pool: The servers.
            recipe: How to make it.
            template: The model's chat template; None if the model writes no user turns.
        """
        self.row, self.pool, self.recipe, self.template = row, pool, recipe, template
        self.history: list[Turn] = []  # what the model is shown
        self.messages: list[Turn] = []  # what the row keeps
        self.answers: list[Answer] = []  # those that the row keeps
        self.asked: list[Answer] = []  # everything that was paid for
        self.cut_answers = 0
        self.tokens = TokenIds() if recipe.token_ids else None

    def add(self, role: str, text: str, kept_text: str | None = None) -> None:
        """Appends a turn; `kept_text` is what the row keeps of it, if not the same."""
        self.history.append({"role": role, "content": text})
        self.messages.append({"role": role, "content": text if kept_text is None else kept_text})

    async def add_answer(self) -> bool:
        """Asks for the assistant's next turn; returns whether there is one, and not one to be dropped as cut."""
        recipe = self.recipe
        request: dict[str, Any] = {"messages": self.history}
        request |= recipe.sampling(self.row, len(self.asked), recipe.temperature, recipe.max_tokens)
        if kwargs := recipe.template_kwargs():
            request["chat_template_kwargs"] = kwargs
        answer = await self.pool.ask(CHAT, request)
        self.asked.append(answer)
        if answer.finish_reason == "length":
            self.cut_answers += 1
            if recipe.cut == "drop":
                return False
        spoken = kept = answer.text
        if recipe.thinking is not None:
            reasoning, spoken = split_reasoning(answer)
            keeps_it = reasoning and recipe.thinking == "on"
            kept = f"{THINK}\n{reasoning}\n{END_THINK}\n\n{spoken}" if keeps_it else spoken
        self.add("assistant", spoken, kept)
        self.answers.append(answer)
        if self.tokens:
            self.tokens.extend(answer)
        return True

    async def write_user_turn(self) -> bool:
        """Lets the model write the next user turn; returns whether it wrote one that can be used."""
        assert self.template
        recipe = self.recipe
        request = {"prompt": self.template.user_prompt(self.history)}
        request |= recipe.sampling(self.row, len(self.asked), recipe.user_temperature, USER_MAX_TOKENS)
        answer = await self.pool.ask(COMPLETIONS, request, may_be_empty=True)
        self.asked.append(answer)
        text, stop = answer.text, self.template.user_stop
        ended = answer.finish_reason != "length" or bool(stop and stop in text)
        text = text.partition(stop)[0].strip() if stop else text.strip()
        if not text or not ended or any(turn["content"] == text for turn in self.history):
            return False
        self.add("user", text)
        return True

    def record(self) -> dict[str, Any]:
        """Returns the output row; raises Skipped if nothing is left of the conversation."""
        recipe = self.recipe
        if not self.answers:
            raise Skipped("cut")
        while self.messages[-1]["role"] != "assistant":
            self.messages.pop()  # what an answer that was dropped had been asked
        return {
            "id": self.row.id,
            **format_turns(self.messages, recipe.format),
            "finish_reasons": [answer.finish_reason for answer in self.answers],
            **({"cut": self.cut_answers > 0} if recipe.cut == "mark" else {}),
            "usage": {
                "prompt_tokens": sum(answer.prompt_tokens for answer in self.asked),
                "completion_tokens": sum(answer.completion_tokens for answer in self.asked),
            },
            "model": self.answers[-1].model,
            **(self.tokens.columns() if self.tokens else {}),
        }


async def answer_input(conversation: Conversation) -> None:
    """--chat: answers every user turn of the input in order, each with the new answers as history."""
    for turn in turns_to_send(conversation.row.turns, chat=True):
        conversation.add(turn["role"], turn["content"])
        if turn["role"] == "user" and not await conversation.add_answer():
            return


async def continue_input(conversation: Conversation) -> None:
    """The default: answers the first prompt, then lets the model play both roles."""
    for turn in turns_to_send(conversation.row.turns, chat=False):
        conversation.add(turn["role"], turn["content"])
    await play_on(conversation)


async def write_from_scratch(conversation: Conversation, is_new: Callable[[str], bool]) -> None:
    """--from_scratch: the model writes the first user turn too; raises Skipped if that is nothing new."""
    if not await conversation.write_user_turn():
        raise Skipped("no user turn")
    if not is_new(conversation.history[-1]["content"]):
        raise Skipped("duplicate")
    await play_on(conversation)


async def play_on(conversation: Conversation) -> None:
    """Answers, and lets the model ask again, until it has no more to ask or there are enough answers."""
    while await conversation.add_answer():
        enough = len(conversation.answers) == conversation.recipe.max_turns
        if enough or conversation.answers[-1].finish_reason == "length" or not await conversation.write_user_turn():
            return
