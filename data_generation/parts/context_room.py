"""Whether a server's context has room for the longest answer: fitted before the first request, or seen at a refusal.

Knows nothing about rows or files.
"""

import asyncio
from collections.abc import Callable

from parts.chat_server import CHAT
from parts.retrying_server_pool import ServerPool
from parts.server_errors import ContextOverflowError, RowError, ServerError

DEFAULT_MAX_TOKENS = 2048


def fit_max_tokens(wanted: int | None, context_tokens: int, say: Callable[[str], None]) -> int:
    """Returns the longest answer to ask for.

    Args:
        wanted: What the user chose; None for DEFAULT_MAX_TOKENS, or half of the context if that is less.
        context_tokens: The context that the servers list, 0 if they do not.
        say: Is told where the default does not fit.

    Raises:
        ServerError: If the user asks for answers that no prompt leaves room for.
    """
    if not context_tokens:
        return wanted or DEFAULT_MAX_TOKENS
    half = max(context_tokens // 2, 1)
    if wanted and wanted >= context_tokens:
        found = f"found --max_tokens {wanted} and a server whose context holds {context_tokens} tokens"
        raise ServerError(f"{found}, expected room for a prompt beside the answer; choose --max_tokens {half}, say")
    if not wanted and half < DEFAULT_MAX_TOKENS:
        say(f"--max_tokens is {half}: half of the server's context of {context_tokens} tokens")
    return wanted or min(DEFAULT_MAX_TOKENS, half)


class ContextRoom:
    """Tells a prompt that is too long from a server that has no room for any."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.is_known = False
        self.lock = asyncio.Lock()

    async def expect(self, pool: ServerPool, max_tokens: int | None) -> None:
        """Finds out, once, whether a short prompt leaves room for the longest answer.

        Raises:
            ServerError: If it leaves none, so that every row would fail.
        """
        async with self.lock:
            if self.is_known:
                return
            request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}
            try:
                await pool.ask(CHAT, request, may_be_empty=True)
            except ContextOverflowError as error:
                found = f"found a server that cannot hold --max_tokens {max_tokens} after the shortest prompt ({error})"
                raise ServerError(f"{found}, expected room for prompts; choose a smaller --max_tokens") from error
            except RowError:
                pass  # says nothing about room
            self.is_known = True
