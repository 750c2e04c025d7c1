"""Fixtures for the commands of data_generation/."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planned_server import FakeServer, Workdir


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the developer's own key and proxies out."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture
def start_server() -> Iterator[Callable[..., FakeServer]]:
    """A function that starts fake servers, at any port or a given one; all end with the test."""
    running: list[FakeServer] = []

    def start(port: int = 0) -> FakeServer:
        running.append(FakeServer(port))
        return running[-1]

    yield start
    for fake in running:
        fake.stop()


@pytest.fixture
def server(start_server: Callable[..., FakeServer]) -> FakeServer:
    """A running fake server."""
    return start_server()


@pytest.fixture
def work(tmp_path: Path, server: FakeServer) -> Workdir:
    """A directory to run in against the fake server."""
    return Workdir(tmp_path, server.url)
