"""Several servers as one: dispatch, setting aside, pauses and retries, against real HTTP servers on the loopback."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from planned_server import DROP, SLOW, FakeServer, completion, fault

from parts import retrying_server_pool
from parts.chat_server import CHAT, ChatServer, RowError, ServerError
from parts.retrying_server_pool import ServerPool, Stopped


async def nothing_to_prepare(server: ChatServer) -> None:
    """Takes every server as it is."""


def with_pool(urls: list[str], use: Callable[[ServerPool], Awaitable[Any]], **options: Any) -> Any:
    """Runs `use` with a connected pool."""

    async def run() -> Any:
        settings = {"prepare": nothing_to_prepare, "say": lambda _: None, "backoff_s": 0.001} | options
        async with ServerPool(urls, None, **settings) as pool:
            return await use(pool)

    return asyncio.run(run())


def ask(pool: ServerPool, text: str) -> Any:
    """Sends one prompt."""
    return pool.ask(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 9})


def unused_url() -> str:
    """Returns an address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@pytest.fixture
def second(start_server: Callable[[], FakeServer]) -> FakeServer:
    """Another running fake server."""
    return start_server()


def test_requests_go_to_the_server_with_the_fewest_in_flight(server: FakeServer, second: FakeServer) -> None:
    server.faults["slow"] = [SLOW]

    async def use(pool: ServerPool) -> None:
        slow = asyncio.create_task(ask(pool, "slow"))
        await asyncio.to_thread(server.wait_for, 1)
        for index in range(6):
            await ask(pool, f"p{index}")  # the first server has one in flight all the time
        server.released.set()
        await slow

    with_pool([server.url, second.url], use, max_retries=0)
    assert (len(second.requests), len(server.requests)) == (6, 1)


def test_requests_are_spread_evenly_over_equal_servers(server: FakeServer, second: FakeServer) -> None:
    async def use(pool: ServerPool) -> None:
        server.barrier = second.barrier = threading.Barrier(4)  # four are in flight at a time, or none goes on
        for _ in range(3):
            await asyncio.gather(*(ask(pool, f"p{index}") for index in range(4)))

    with_pool([server.url, second.url], use, max_retries=0)
    assert (len(server.requests), len(second.requests)) == (6, 6)


def test_server_that_goes_away_loses_no_request_and_comes_back(server: FakeServer, start_server: Any) -> None:
    said: list[str] = []
    gone = start_server()
    port = gone.server_port

    async def use(pool: ServerPool) -> None:
        await asyncio.gather(ask(pool, "a"), ask(pool, "b"))
        gone.stop()
        answers = await asyncio.gather(*(ask(pool, f"p{index}") for index in range(8)))
        assert [answer.text for answer in answers] == [f"re: p{index}" for index in range(8)]
        back = start_server(port)
        while pool.members[1].set_aside:
            await pool.changed.wait()
        server.faults["slow"] = [SLOW]
        slow = asyncio.create_task(ask(pool, "slow"))
        await asyncio.to_thread(server.wait_for, len(server.requests) + 1)
        await ask(pool, "again")
        assert back.asked()["again"] == 1
        server.released.set()
        await slow

    with_pool([server.url, gone.url], use, max_retries=1, say=said.append)
    assert any("is set aside" in line for line in said)
    assert said[-1] == f"{gone.url} is back"


def test_server_that_fails_again_and_again_is_set_aside(server: FakeServer, second: FakeServer) -> None:
    said: list[str] = []
    second.faults = {f"{name}{index}": [fault(500)] * 9 for index in range(30) for name in "pq"}

    async def use(pool: ServerPool) -> None:
        pool.prepare = lambda _: asyncio.sleep(3600)  # it does not come back during the test
        for index in range(30):
            await asyncio.gather(ask(pool, f"p{index}"), ask(pool, f"q{index}"))

    with_pool([server.url, second.url], use, say=said.append)
    assert len(second.requests) == retrying_server_pool.FAILURES_TO_SET_ASIDE
    assert len(said) == 1


def test_pool_starts_with_the_servers_that_are_up(server: FakeServer) -> None:
    said: list[str] = []
    down = unused_url()
    answer = with_pool([down, server.url], lambda pool: ask(pool, "one"), say=said.append)
    assert answer.text == "re: one"
    assert down in said[0]


def test_pool_without_any_server_is_an_error() -> None:
    down = unused_url()
    with pytest.raises(ServerError, match=f"cannot reach {down}/models"):
        with_pool([down], lambda pool: ask(pool, "one"))


def test_servers_with_different_models_are_an_error(server: FakeServer, second: FakeServer) -> None:
    second.models = fault(200, '{"data": [{"id": "other-model"}]}')
    with pytest.raises(ServerError, match="different models"):
        with_pool([server.url, second.url], lambda pool: ask(pool, "one"))


def test_pool_gives_up_when_no_server_is_left(start_server: Any) -> None:
    gone = start_server()

    async def use(pool: ServerPool) -> None:
        gone.stop()
        await ask(pool, "one")

    with pytest.raises(ServerError, match="found no server that answers"):
        with_pool([gone.url], use, give_up_s=0.05)


def test_unreachable_server_costs_a_row_no_try(start_server: Any) -> None:
    gone = start_server()
    port = gone.server_port

    async def use(pool: ServerPool) -> Any:
        gone.stop()
        waiting = asyncio.create_task(ask(pool, "one"))
        while not pool.members[0].set_aside:
            await asyncio.sleep(0)
        start_server(port)
        return await waiting

    # The one retry is for the connection that was open when the server went away.
    assert with_pool([gone.url], use, max_retries=1).text == "re: one"


def test_retry_after_keeps_requests_away_from_that_server_only(server: FakeServer, second: FakeServer) -> None:
    server.faults["first"] = [fault(429, Retry_After="3600")]

    async def use(pool: ServerPool) -> None:
        await asyncio.gather(*(ask(pool, name) for name in ("first", "other")))
        for index in range(4):
            await ask(pool, f"p{index}")

    with_pool([server.url, second.url], use)
    assert server.asked() == {"first": 1}
    assert second.asked().total() == 6


def test_retry_after_is_waited_for(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    really_wait_for = asyncio.wait_for
    now = retrying_server_pool.time.monotonic()
    monkeypatch.setattr(retrying_server_pool.time, "monotonic", lambda: now)

    async def wait_for(awaitable: Any, timeout: float) -> Any:
        nonlocal now
        waits.append(timeout)
        now += timeout
        return await really_wait_for(awaitable, 0)

    async def use(pool: ServerPool) -> None:
        monkeypatch.setattr(retrying_server_pool.asyncio, "wait_for", wait_for)
        await ask(pool, "one")

    server.faults["one"] = [fault(429, Retry_After="77"), DROP, fault(429, Retry_After="soon")]
    with_pool([server.url], use, backoff_s=0.0)
    assert [round(wait, 6) for wait in waits if wait] == [77.0]  # the backoff itself is 0 here


def test_retries_end_with_the_last_reason(server: FakeServer) -> None:
    server.faults["one"] = [fault(503, "overloaded")] * 9
    with pytest.raises(RowError, match=r"HTTP 503: overloaded \(tries: 3\)"):
        with_pool([server.url], lambda pool: ask(pool, "one"), max_retries=2)
    assert server.asked() == {"one": 3}


def test_stop_ends_what_waits_and_not_what_is_in_flight(server: FakeServer) -> None:
    server.faults = {"retried": [fault(500)]}

    async def use(pool: ServerPool) -> Any:
        retried = asyncio.create_task(ask(pool, "retried"))
        while not pool.retries:
            await asyncio.sleep(0)
        server.barrier = threading.Barrier(2)
        in_flight = asyncio.create_task(ask(pool, "slow"))
        await asyncio.to_thread(server.wait_for, 2)
        pool.stop()
        with pytest.raises(Stopped):
            await retried
        await asyncio.to_thread(server.barrier.wait, 10)  # only now the server answers
        return await in_flight

    assert with_pool([server.url], use, backoff_s=3600.0).text == "re: slow"


def test_backoff_doubles_with_jitter_up_to_its_cap() -> None:
    for attempt, longest_s in [(0, 2.0), (1, 4.0), (3, 16.0), (50, retrying_server_pool.MAX_BACKOFF_S)]:
        waits = [retrying_server_pool.backoff_wait_s(attempt, 2.0) for _ in range(100)]
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s
        # 100 uniform draws all fall into one half with a chance of 2 in 2**100.
        assert min(waits) < longest_s * 0.75 < max(waits)


def test_passing_failures_do_not_hide_an_answer(server: FakeServer) -> None:
    server.faults["one"] = [fault(200, "<html>"), DROP, fault(500), fault(200, completion("fine"))]
    assert with_pool([server.url], lambda pool: ask(pool, "one")).text == "fine"
