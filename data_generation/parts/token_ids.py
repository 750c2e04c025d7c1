"""The token ids that a server saw and said, as the columns that axolotl trains on without tokenising."""

from typing import Any

from parts.chat_server import CHAT, Answer, ChatServer, ServerError
from parts.conversation_rows import IGNORED_LABEL


async def returns_token_ids(server: ChatServer) -> bool:
    """Asks a server for the token ids of its answers, from now on; returns whether it sends them."""
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = await server.understands(CHAT, request, {"return_token_ids": True})
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
