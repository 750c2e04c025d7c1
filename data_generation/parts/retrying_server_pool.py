"""Several servers of one model as one: least-loaded dispatch, setting aside what fails, trying again.

A server that cannot be reached, or that fails FAILURES_TO_SET_ASIDE times in a row with more than one request (a single
one may be what it cannot answer), gets no requests until it lists its models again; one that asks for a pause
(Retry-After) gets it. Knows nothing about files or conversations.
"""

import asyncio
import random
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from parts.chat_answer import Answer
from parts.chat_server import ChatServer
from parts.server_errors import NotListedError, PassingError, RowError, ServerError

FAILURES_TO_SET_ASIDE = 5
MAX_BACKOFF_S = 60.0
CONNECT_TIMEOUT_S = 10.0


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """A request given up because the run is to end; it is as if it had never been made."""


def backoff_wait_s(attempt: int, backoff_s: float) -> float:
    """Returns the wait before another try: exponential backoff with jitter.

    Args:
        attempt: Number of tries so far, less one.
        backoff_s: Longest wait after the first try; doubled after each further one, up to MAX_BACKOFF_S.
    """
    longest_s = min(backoff_s * 2.0 ** min(attempt, 32), MAX_BACKOFF_S)
    return random.uniform(longest_s / 2, longest_s)


@dataclass
class Member:
    """A server and what the pool knows of it."""

    server: ChatServer
    in_flight: int = 0
    answers: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    failing_requests: set[int] = field(default_factory=set)
    reached: bool = False
    set_aside: bool = True
    paused_until: float = 0.0

    def usable(self) -> bool:
        """Tells whether the server may be asked now."""
        return not self.set_aside and self.paused_until <= time.monotonic()

    def forget_failures(self) -> None:
        """Starts counting failures in a row anew, since the server is there."""
        self.failures_in_a_row = 0
        self.failing_requests.clear()


class ServerPool:
    """Servers of one model; use as `async with`."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        api_key: str = "",
        *,
        prepare: Callable[[ChatServer], Awaitable[None]],
        say: Callable[[str], None],
        max_connections: int = 256,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        backoff_s: float = 1.0,
        give_up_s: float = 600.0,
    ) -> None:
        """Opens no connection yet.

        Args:
            urls: Base URLs of the servers.
            model: Name of the model to ask for; None for the only one that the servers list.
            api_key: Sent as a bearer token unless empty.
            prepare: Called with each server when it is first reached; settles what it understands.
            say: Called with a line of text when a server is set aside or comes back.
            max_connections: Requests that may be in flight at a time, on all servers together.
            timeout_s: Longest wait for one answer.
            max_retries: Further tries after a failure that may pass.
            backoff_s: See backoff_wait_s.
            give_up_s: Time without any usable server after which the run ends.
        """
        self.name, self.prepare, self.say = model or "", prepare, say
        self.max_retries, self.backoff_s, self.give_up_s = max_retries, backoff_s, give_up_s
        self.retries = self.requests = 0
        self.changed, self.stopping = asyncio.Event(), asyncio.Event()
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            trust_env=bool(urllib.request.getproxies()),  # looked up for each request, which costs
        )
        self.members = [Member(ChatServer(self.session, url, model, api_key)) for url in dict.fromkeys(urls)]
        self.revivals: set[asyncio.Task[None]] = set()
        self.fatal: ServerError | None = None

    async def __aenter__(self) -> "ServerPool":
        """Connects to all servers; those out of reach are set aside.

        Raises:
            ServerError: If none can be reached, or one is misconfigured, or they have different models.
        """
        try:
            results = await self.connect_all()
            for attempt in range(self.max_retries):
                is_there = any(isinstance(error, PassingError) and not error.unreachable for error in results)
                if not is_there or not all(member.set_aside for member in self.members):
                    break
                await asyncio.sleep(backoff_wait_s(attempt, self.backoff_s))
                results = await self.connect_all()
            if all(member.set_aside for member in self.members):
                url = f"{self.members[0].server.url}/models"
                raise ServerError(f"cannot reach {url} ({results[0]}); is the server up?")
            for member, error in zip(self.members, results, strict=True):
                if error:
                    self.set_aside(member, str(error))
        except BaseException:
            await self.close()
            raise
        return self

    async def connect_all(self) -> list[PassingError | None]:
        """Tries to take all servers in; returns why each is out of reach, or raises what cannot be used."""
        results = await asyncio.gather(*map(self.connect, self.members), return_exceptions=True)
        reasons: list[PassingError | None] = []
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, PassingError):
                raise error
            reasons.append(error)
        return reasons

    async def __aexit__(self, *_: object) -> None:
        """Closes the connections."""
        await self.close()

    async def close(self) -> None:
        """Ends what waits in the background and closes the connections."""
        for task in self.revivals:
            task.cancel()
        await asyncio.gather(*self.revivals, return_exceptions=True)
        await self.session.close()

    async def connect(self, member: Member) -> None:
        """Takes a server in; raises PassingError if it is out of reach, ServerError if it cannot be used."""
        await member.server.find_model()
        await self.prepare(member.server)
        models = {other.server.model for other in self.members if not other.set_aside} | {member.server.model}
        if len(models) > 1:
            listed = ", ".join(sorted(models))
            raise ServerError(f"found servers with different models ({listed}), expected one; choose with --model")
        self.name = member.server.model
        member.set_aside, member.reached = False, True
        member.forget_failures()
        self.notify()

    @property
    def context_tokens(self) -> int:
        """Returns the shortest context that a server lists, 0 if none does."""
        return min((member.server.context_tokens for member in self.members if member.server.context_tokens), default=0)

    def notify(self) -> None:
        """Wakes everything that waits for a usable server."""
        self.changed.set()
        self.changed = asyncio.Event()

    def stop(self) -> None:
        """Lets requests in flight end, and everything that waits give up with Stopped."""
        self.stopping.set()
        self.notify()

    def set_aside(self, member: Member, reason: str) -> None:
        """Gives a server no more requests until it lists its models again."""
        member.set_aside = True
        self.say(f"{member.server.url} is set aside ({reason})")
        task = asyncio.create_task(self.revive(member))
        self.revivals.add(task)
        task.add_done_callback(self.revivals.discard)

    async def revive(self, member: Member) -> None:
        """Tries a server that was set aside until it can be used again."""
        attempt = 0
        while member.set_aside:
            await asyncio.sleep(backoff_wait_s(attempt, self.backoff_s))
            attempt += 1
            try:
                await self.connect(member)
            except PassingError:
                continue
            except ServerError as error:
                if isinstance(error, NotListedError) and member.reached:
                    continue  # it listed its models before: something else answers while it starts
                self.fatal = error
                self.notify()
                return
        self.say(f"{member.server.url} is back")

    async def acquire(self) -> Member:
        """Returns the usable server with the fewest requests in flight, when there is one.

        Raises:
            ServerError: If there is none for give_up_s, or one came back misconfigured.
            Stopped: If the run is to end.
        """
        give_up_at = time.monotonic() + self.give_up_s
        while True:
            if self.fatal:
                raise self.fatal
            usable = [member for member in self.members if member.usable()]
            if usable:
                return min(usable, key=lambda member: member.in_flight)
            if self.stopping.is_set():
                raise Stopped
            now = time.monotonic()
            pauses = [member.paused_until - now for member in self.members if not member.set_aside]
            if not pauses and now >= give_up_at:
                raise ServerError(f"found no server that answers for {self.give_up_s:.0f} s; start one and go on")
            try:
                wait_s = min(pauses, default=give_up_at - now)
                await asyncio.wait_for(self.changed.wait(), max(wait_s, 0.001))
            except TimeoutError:
                continue

    async def ask(self, path: str, body: Mapping[str, Any], *, may_be_empty: bool = False) -> Answer:
        """Asks one of the servers, again after failures that may pass.

        Args:
            path: chat_server.CHAT or chat_server.COMPLETIONS.
            body: The request without the model.
            may_be_empty: Whether an answer without text is an answer.

        Raises:
            RowError: If no try gives a whole answer; ContextOverflowError if it would not fit into the context.
            ServerError: If no server can be used any more.
            Stopped: If the run is to end before another try.
        """
        tries = 0
        self.requests += 1
        request = self.requests
        while True:
            member = await self.acquire()
            try:
                return await self.ask_member(member, path, body, may_be_empty)
            except PassingError as error:
                self.record_failure(member, error, request)
                if error.unreachable:
                    continue  # the request never reached a server: no try of this row
                tries += 1
                if tries > self.max_retries:
                    raise RowError(f"{error} (tries: {tries})") from error
            self.retries += 1
            await self.wait(backoff_wait_s(tries - 1, self.backoff_s))

    async def ask_member(self, member: Member, path: str, body: Mapping[str, Any], may_be_empty: bool) -> Answer:
        """Asks one server once, and notes that it is busy with it."""
        member.in_flight += 1
        try:
            answer = await member.server.ask(path, body, may_be_empty=may_be_empty)
        except RowError:
            member.forget_failures()  # it is not the server that is at fault
            raise
        finally:
            member.in_flight -= 1
        member.answers += 1
        member.forget_failures()
        return answer

    def record_failure(self, member: Member, error: PassingError, request: int) -> None:
        """Notes a failure that may pass of a request, and keeps others away from the server if it has to be."""
        member.failures += 1
        if error.retry_after_s:
            member.paused_until = max(member.paused_until, time.monotonic() + error.retry_after_s)
            return
        member.failures_in_a_row += 1
        member.failing_requests.add(request)
        failed_often = member.failures_in_a_row >= FAILURES_TO_SET_ASIDE and len(member.failing_requests) > 1
        if not member.set_aside and (error.unreachable or failed_often):
            self.set_aside(member, str(error))

    async def wait(self, wait_s: float) -> None:
        """Sleeps before another try; raises Stopped as soon as the run is to end."""
        try:
            await asyncio.wait_for(self.stopping.wait(), wait_s)
        except TimeoutError:
            return
        raise Stopped
