"""The token ids that a server saw and said, as the columns that axolotl trains on without tokenising."""

from typing import Any

from parts.chat_answer import Answer
from parts.chat_server import CHAT, ChatServer
from parts.conversation_rows import IGNORED_LABEL
from parts.server_errors import PassingError, RowError


async def returns_token_ids(server: ChatServer) -> bool:
    """Asks a server for the token ids of its answers, from now on; returns whether it sends them.

    Raises:
        PassingError: If it answers neither with them nor without.
    """
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    try:
        answer = await server.understands(CHAT, request, {"return_token_ids": True})
    except PassingError:
        answer = await server.understands(CHAT, request, {})  # some answer 500 to a field that they do not know
    if isinstance(answer, Answer) and answer.prompt_ids and answer.answer_ids:
        return True
    server.extra_fields[CHAT] = {}
    return False


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

        Raises:
            RowError: If there are none.
        """
        if answer.prompt_ids is None or answer.answer_ids is None:
            raise RowError("found an answer without token ids, expected them as in the answers before")
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
