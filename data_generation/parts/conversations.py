"""Make one conversation with a model: which turns come from the input, which the model writes, what the row keeps.

Answers always come from the server's chat completions, so that they are what the server says to its users. The user
turns that the model writes come from plain completions of the model's own chat template, cut where a user would start
to write (arXiv 2406.08464, section 2: the aligned model fills in the user's turn). Knows nothing about files.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from parts.chat_answer import Answer
from parts.chat_server import CHAT, COMPLETIONS, ChatServer
from parts.chat_template import ChatTemplate
from parts.command_line import flag, number
from parts.context_room import DEFAULT_MAX_TOKENS
from parts.conversation_rows import format_turns
from parts.input_turns import TOOL_ROLES, Turn, sent_form
from parts.prompt_files import Row
from parts.reasoning import END_THINK, THINK, is_cut_reasoning, lacks_answer, split_reasoning
from parts.retrying_server_pool import ServerPool
from parts.server_errors import ContextOverflowError, PassingError, RowError, ServerError
from parts.token_ids import TokenIds

USER_MAX_TOKENS = 512  # a longer user turn is no prompt; those cut here are not used
CUT_REASONING, CONTEXT_FULL = "cut_reasoning", "context_full"
"""Last of the finish reasons of a conversation that ends before its end: the length limit cut the thoughts before an
answer, or the server's context could not hold the next one."""


class Skipped(Exception):  # noqa: N818 - not an error: the row is left out as it was asked for
    """A row that gives no conversation, and why."""


@dataclass(frozen=True)
class Recipe:
    """How conversations are made; max_tokens and temperature default to the first Medusa generator's values."""

    max_tokens: int | None = field(
        metadata=flag(
            f"longest answer, in tokens (default: {DEFAULT_MAX_TOKENS}, or half of the context that the server lists)",
            type=number(int, 1),
        )
    )
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
    split_turns: bool = field(
        metadata=flag("write one row for each answer, with what was before it", False, action="store_true")
    )
    tool_turns: str = field(
        metadata=flag(
            "tool calls and their results in the input: leave them out, keep them, or keep and mark them as not to be trained on",
            "skip",
            choices=["skip", "keep", "mask"],
        )
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


def first_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the system and user turns up to the first user turn."""
    sent = [turn for turn in turns if turn["role"] in ("system", "user")]
    return sent[: next(index for index, turn in enumerate(sent) if turn["role"] == "user") + 1]


def turns_to_answer(turns: Sequence[Turn], with_tools: bool) -> list[tuple[Turn, bool]]:
    """Returns the turns of the input that are sent, each with whether an answer is asked for after it.

    Args:
        turns: All turns of the input.
        with_tools: Whether tool calls and results are sent. The answer then comes after the last result of a round; a
            call without a result would leave nothing to answer, and is left out.
    """
    roles = ("system", "user", *(TOOL_ROLES if with_tools else ()))
    following = [turn["role"] for turn in turns[1:]] + [""]
    sent = [
        turn
        for turn, after in zip(turns, following, strict=True)
        if turn["role"] in roles and (turn["role"] != "call" or after == "tool")
    ]
    following = [turn["role"] for turn in sent[1:]] + [""]
    steps = [
        (turn, turn["role"] in ("user", "tool") and after not in TOOL_ROLES)
        for turn, after in zip(sent, following, strict=True)
    ]
    return steps[: max(index for index, (_, asks) in enumerate(steps) if asks) + 1]


async def settle_user_turns(server: ChatServer, template: ChatTemplate) -> None:
    """Finds out how a server can be asked for user turns: stop strings and special tokens are not known to all.

    Raises:
        ServerError: If the server has no completions of plain text.
        PassingError: If it does not say.
    """
    request = {"prompt": template.user_prompt([])}
    stop = {"stop": [template.user_stop]} if template.user_stop else {}
    for fields in ({**stop, "skip_special_tokens": False}, stop, {}):
        passing: PassingError | None = None
        try:
            answer = await server.understands(COMPLETIONS, request, fields)
        except PassingError as error:
            passing = error
            continue  # some servers answer 500 to a field that they do not know
        if isinstance(answer, Answer):
            return
    if passing:
        raise passing
    expected = "expected /completions, with which the model writes user turns; use --chat"
    raise ServerError(f"{server.url}/{COMPLETIONS}: found {answer}, {expected}")


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
        self.answered_at: list[tuple[int, int]] = []  # turns before each answer, requests up to it
        self.cut_answers = 0
        self.tool_turns_left_out = 0
        self.ended_by = ""  # why there is no further answer, if that is to be known
        self.tokens = TokenIds() if recipe.token_ids else None

    def add(self, turn: Turn) -> None:
        """Appends a turn of the input."""
        self.history.append(sent_form(turn))
        self.messages.append(turn)

    async def ask(self, path: str, request: dict[str, Any], *, may_be_empty: bool = False) -> Answer | None:
        """Asks one of the servers.

        Returns:
            The answer; None where the context cannot hold it, after answers that are worth keeping.

        Raises:
            RowError: If no whole answer came.
        """
        try:
            self.asked.append(await self.pool.ask(path, request, may_be_empty=may_be_empty))
        except ContextOverflowError:
            if not self.answers:
                raise
            self.ended_by = CONTEXT_FULL
            return None
        return self.asked[-1]

    async def add_answer(self) -> bool:
        """Asks for the assistant's next turn; returns whether there is one, and not one to be dropped as cut.

        Raises:
            RowError: If no whole answer came.
        """
        recipe = self.recipe
        request: dict[str, Any] = {"messages": self.history}
        most = recipe.max_tokens or DEFAULT_MAX_TOKENS
        request |= recipe.sampling(self.row, len(self.asked), recipe.temperature, most)
        if kwargs := recipe.template_kwargs():
            request["chat_template_kwargs"] = kwargs
        answer = await self.ask(CHAT, request)
        if answer is None:
            return False
        told_to_think = recipe.thinking in ("on", "strip")
        cut_reasoning = is_cut_reasoning(answer, told_to_think)
        self.ended_by = CUT_REASONING if cut_reasoning else ""
        if answer.finish_reason == "length":
            self.cut_answers += 1
            if cut_reasoning or recipe.cut == "drop":
                return False
        if told_to_think and lacks_answer(answer):
            found = f"found thoughts without an answer (finish_reason {answer.finish_reason!r})"
            raise RowError(f"{found}, expected one after them")
        spoken = kept = answer.text
        if recipe.thinking is not None:
            reasoning, spoken = split_reasoning(answer)
            keeps_it = reasoning and recipe.thinking == "on"
            kept = f"{THINK}\n{reasoning}\n{END_THINK}\n\n{spoken}" if keeps_it else spoken
        self.answered_at.append((len(self.history), len(self.asked)))
        self.history.append({"role": "assistant", "content": spoken})
        self.messages.append({"role": "assistant", "content": kept})
        self.answers.append(answer)
        if self.tokens:
            self.tokens.extend(answer)
        return True

    async def write_user_turn(self) -> bool:
        """Lets the model write the next user turn; returns whether it wrote one that can be used."""
        assert self.template
        recipe = self.recipe
        request = {"prompt": self.template.user_prompt(self.history)}
        most = min(USER_MAX_TOKENS, self.pool.context_tokens // 2 or USER_MAX_TOKENS)
        request |= recipe.sampling(self.row, len(self.asked), recipe.user_temperature, most)
        answer = await self.ask(COMPLETIONS, request, may_be_empty=True)
        if answer is None:
            return False
        text, stop = answer.text, self.template.user_stop
        ended = answer.finish_reason != "length" or bool(stop and stop in text)
        text = text.partition(stop)[0].strip() if stop else text.strip()
        if not text or not ended or any(turn["content"] == text for turn in self.history):
            return False
        self.add({"role": "user", "content": text})
        return True

    def records(self) -> list[dict[str, Any]]:
        """Returns the output rows: one, or one for each answer.

        Raises:
            Skipped: If nothing is left of the conversation, as it was asked for.
            RowError: If nothing is left because the first answer was never begun.
        """
        recipe = self.recipe
        if not self.answers and self.ended_by == CUT_REASONING and recipe.cut != "drop":
            raise RowError("found an answer cut while the model was reasoning, expected a larger --max_tokens")
        if not self.answers:
            raise Skipped("cut")
        was_dropped = self.ended_by == CUT_REASONING and recipe.cut == "drop"
        ends = [self.ended_by] if self.ended_by and not was_dropped else []
        if recipe.split_turns:
            return [self.answer_record(number, ends) for number in range(len(self.answers))]
        while self.messages[-1]["role"] != "assistant":
            self.messages.pop()  # what an answer that was dropped had been asked
        masks = [turn["role"] == "assistant" for turn in self.messages] if recipe.tool_turns == "mask" else None
        return [
            {
                "id": self.row.id,
                **format_turns(self.messages, recipe.format, masks),
                **self.columns(self.answers, self.asked, ends, self.cut_answers > 0 or bool(self.ended_by)),
                **(self.tokens.columns() if self.tokens else {}),
            }
        ]

    def answer_record(self, number: int, ends: list[str]) -> dict[str, Any]:
        """Returns the row of one answer: what the model was shown before it, and what it said, the only turn to train on."""
        answer, is_last = self.answers[number], number == len(self.answers) - 1
        place, until = self.answered_at[number]
        since = self.answered_at[number - 1][1] if number else 0
        turns = [*self.history[:place], self.messages[place]]
        tokens = TokenIds()
        if self.tokens:
            tokens.extend(answer)
        was_cut = answer.finish_reason == "length" or (is_last and bool(self.ended_by))
        return {
            "id": f"{self.row.id}#{number + 1}",
            "row": self.row.id,
            "turn": number + 1,
            "turns": len(self.answers),
            **format_turns(turns, self.recipe.format, [False] * place + [True]),
            **self.columns([answer], self.asked[since : None if is_last else until], ends if is_last else [], was_cut),
            **(tokens.columns() if self.tokens else {}),
        }

    def columns(
        self, answers: Sequence[Answer], asked: Sequence[Answer], ends: Sequence[str], was_cut: bool
    ) -> dict[str, Any]:
        """Returns what a row says of its answers and of all that was paid for."""
        return {
            "finish_reasons": [*(answer.finish_reason for answer in answers), *ends],
            **({"cut": was_cut} if self.recipe.cut == "mark" else {}),
            "usage": {
                "prompt_tokens": sum(answer.prompt_tokens for answer in asked),
                "completion_tokens": sum(answer.completion_tokens for answer in asked),
            },
            "model": answers[-1].model,
        }


async def answer_input(conversation: Conversation) -> None:
    """--chat: answers every user turn of the input in order, each with the new answers as history."""
    turns, with_tools = conversation.row.turns, conversation.recipe.tool_turns != "skip"
    steps = turns_to_answer(turns, with_tools)
    tools = [turn for turn in turns if turn["role"] in TOOL_ROLES]
    conversation.tool_turns_left_out = len(tools) - sum(turn["role"] in TOOL_ROLES for turn, _ in steps)
    for turn, asks in steps:
        conversation.add(turn)
        if asks and not await conversation.add_answer():
            return


async def continue_input(conversation: Conversation) -> None:
    """The default: answers the first prompt, then lets the model play both roles."""
    for turn in first_turns(conversation.row.turns):
        conversation.add(turn)
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
