"""A fake OpenAI-compatible server in a process of its own, that misbehaves as it is told.

    python fake_server.py --latency_s 0.1 --fault status_500=0.05 --fault stall=0.01

prints its base URL as the first line and serves until it is killed. What it answers is a function of the request
(`answer_text`, `question_text`), so that every row a client writes can be checked; what it does wrong is a function of
the seed, the request's last text and how often that text came before. Texts should therefore be distinct.
GET /stats tells what came; GET /wait?requests=N answers once N requests for text have come since the start.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL = "fake-model"
AWKWARD = 'line\nbreak \u2028 "quotes" \\ \u00e9\u4e16 \U0001f600'
"""Part of every answer: what breaks careless writers and readers of JSON lines."""
TIMER_S = 0.0005
"""Mean lateness of the event loop's timers, which it rounds up to whole milliseconds; taken off every wait."""
FAULTS = {
    "status_500": (500, b"internal error"),
    "status_503": (503, b"overloaded"),
    "rate_limit": (429, b"slow down"),
    "cut_before": "closes the connection without a byte",
    "cut_body": "closes the connection in the middle of the body",
    "stall": "never answers",
    "stall_body": "stops in the middle of the body",
    "garbage_text": (200, b"\x00\xff not JSON"),
    "garbage_html": (200, b"<html><body>502 Bad Gateway</body></html>"),
    "garbage_json": "sends the first half of the JSON as if it were the whole",
}


def digest(*parts: Any) -> str:
    """Returns 12 hexadecimal digits that stand for the parts."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


def share_of(*parts: Any) -> float:
    """Returns a number from 0 to 1 that stands for the parts."""
    return int(digest(*parts), 16) / 16**12


def answer_text(messages: list[dict[str, str]]) -> str:
    """Returns what the server answers to a conversation."""
    return f"{digest(messages)} {AWKWARD} re: {messages[-1]['content']}"


def question_text(prompt: str, seed: int | None, distinct: int) -> str:
    """Returns the user turn that the server writes after a prompt, one of `distinct` (0: of any number)."""
    name = digest(prompt, seed)
    return f"What is {int(name, 16) % distinct if distinct else name}?"


def token_ids(text: str) -> list[int]:
    """Returns the ids of a text: its bytes."""
    return list(text.encode())


def chat_prompt(messages: list[dict[str, str]]) -> str:
    """Returns the messages as the fake model's template writes them."""
    return "".join(f"<{turn['role']}>{turn['content']}</>" for turn in messages) + "<assistant>"


class Fake:
    """What all connections share: settings, counts, faults."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loop = asyncio.get_running_loop()
        self.asked: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.requests = self.answered = self.in_flight = self.most_in_flight = 0
        self.first_request_s = self.last_answer_s = self.latency_sum_s = 0.0
        self.waiting: list[tuple[int, Connection]] = []

    def stats(self) -> dict[str, Any]:
        names = ("requests", "answered", "in_flight", "most_in_flight", "first_request_s", "last_answer_s")
        counts = {name: getattr(self, name) for name in names}
        latency_s = self.latency_sum_s / max(self.answered, 1)
        return {**counts, "mean_latency_s": latency_s, "asked": self.asked, "faults": self.faults}

    def came(self, text: str) -> None:
        """Counts a request and wakes those who waited for it."""
        if not self.requests:
            self.first_request_s = self.loop.time()
        self.requests += 1
        self.asked[text] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for entry in [entry for entry in self.waiting if entry[0] <= self.requests]:
            self.waiting.remove(entry)
            entry[1].send(200, b"{}")

    def fault(self, text: str) -> str | None:
        """Returns what goes wrong with this request, at most `max_faults` times in a row for one text."""
        earlier = self.asked[text] - 1
        planned = self.args.plan.get(text)
        if planned is not None:
            return planned[earlier] if earlier < len(planned) else None
        if earlier % (self.args.max_faults + 1) == self.args.max_faults:
            return None
        draw = share_of(self.args.seed, text, earlier)
        for name, share in self.args.fault:
            if draw < share:
                return str(name)
            draw -= share
        return None

    def chat(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the body of a chat completion."""
        messages = request["messages"]
        text = answer_text(messages) + "." * self.args.padding_chars
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return self.body(request, "chat.completion", choice, chat_prompt(messages), text)

    def completion(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the body of a completion."""
        text = question_text(request["prompt"], request.get("seed"), self.args.questions)
        return self.body(request, "text_completion", {"index": 0, "text": text}, request["prompt"], text)

    def body(
        self, request: dict[str, Any], kind: str, choice: dict[str, Any], prompt: str, text: str
    ) -> dict[str, Any]:
        too_long = self.args.length and share_of("length", prompt) < self.args.length
        choice["finish_reason"] = "length" if too_long else "stop"
        tokens = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        usage = {**tokens, "total_tokens": sum(tokens.values())}
        found = {"id": "x", "object": kind, "model": MODEL, "choices": [choice], "usage": usage}
        if self.args.token_ids and request.get("return_token_ids"):
            found["prompt_token_ids"] = token_ids(prompt)
            choice["token_ids"] = token_ids(text + "</>")
        return found


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests on it are handled one after the other."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end])
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        whole = end + 4 + (int(found[1]) if found else 0)
        if len(self.buffer) < whole:
            return
        body = bytes(self.buffer[end + 4 : whole])
        del self.buffer[:whole]
        method, path, _ = head.decode("latin-1").split(" ", 2)
        if method == "POST":
            self.post(path, body)
        else:
            self.get(path)

    def get(self, path: str) -> None:
        fake = self.fake
        waited_for = re.fullmatch(r"/wait\?requests=(\d+)", path)
        if path == "/v1/models":
            self.send(200, json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        elif path == "/stats":
            self.send(200, json.dumps(fake.stats()).encode())
        elif waited_for and int(waited_for[1]) > fake.requests:
            fake.waiting.append((int(waited_for[1]), self))
        elif waited_for or path == "/health":
            self.send(200, b"{}")
        else:
            self.send(404, b"no such page")

    def post(self, path: str, body: bytes) -> None:
        """Answers or misbehaves, as late as it is told."""
        fake = self.fake
        request = json.loads(body)
        if path == "/v1/chat/completions":
            text, answer = request["messages"][-1]["content"], fake.chat
        elif path == "/v1/completions":
            text, answer = request["prompt"], fake.completion
        else:
            self.send(404, b"no such page")
            return
        fake.came(text)
        now = fake.loop.time()
        fault = fake.fault(text) if fake.args.fault or fake.args.plan else None
        if fake.args.refuse and share_of("refuse", text) < fake.args.refuse:
            fault = "refuse"
        content = b"" if fault == "refuse" else json.dumps(answer(request), ensure_ascii=False).encode()
        delay_s = fake.args.latency_s
        if fake.args.jitter_s:
            delay_s += fake.args.jitter_s * share_of("jitter", text, fake.asked[text])
        fake.loop.call_at(now + delay_s - TIMER_S, self.finish, fault, content, now)

    def finish(self, fault: str | None, content: bytes, came_s: float) -> None:
        """Sends the answer, or does what is wrong instead."""
        fake = self.fake
        fake.in_flight -= 1
        if fault is None:
            fake.answered += 1
            fake.last_answer_s = fake.loop.time()
            fake.latency_sum_s += fake.last_answer_s - came_s
            self.send(200, content)
            return
        fake.faults[fault] += 1
        how = FAULTS.get(fault)
        if fault == "refuse":
            self.send(400, b"this request is refused")
        elif isinstance(how, tuple):
            self.send(*how)
        elif fault == "garbage_json":
            self.send(200, content[: len(content) // 2])
        elif fault in ("cut_body", "stall_body"):
            self.transport.write(self.headers(200, len(content)) + content[: len(content) // 2])
        if fault in ("cut_before", "cut_body"):
            self.transport.close()

    def send(self, status: int, content: bytes) -> None:
        self.transport.write(self.headers(status, len(content)) + content)

    def headers(self, status: int, length: int) -> bytes:
        extra = f"Retry-After: {self.fake.args.retry_after_s:g}\r\n" if status == 429 else ""
        kind = "Content-Type: application/json\r\n"
        return f"HTTP/1.1 {status} X\r\n{kind}{extra}Content-Length: {length}\r\n\r\n".encode()


def named_share(text: str) -> tuple[str, float]:
    """Parses `NAME=SHARE`."""
    name, _, share = text.partition("=")
    if name not in FAULTS:
        raise argparse.ArgumentTypeError(f"found {name}, expected one of {', '.join(FAULTS)}")
    return name, float(share)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency_s", type=float, default=0.0, help="wait before every answer")
    parser.add_argument("--jitter_s", type=float, default=0.0, help="longest further wait")
    parser.add_argument("--fault", type=named_share, action="append", default=[], help="NAME=SHARE of the requests")
    parser.add_argument("--plan", type=json.loads, default={}, help='JSON: {"text": [fault, fault, ...]}, then answers')
    parser.add_argument("--max_faults", type=int, default=3, help="faults in a row for one text")
    parser.add_argument("--retry_after_s", type=float, default=0.0)
    parser.add_argument("--refuse", type=float, default=0.0, help="share of the texts that always get HTTP 400")
    parser.add_argument("--length", type=float, default=0.0, help="share of the prompts whose answer ends by length")
    parser.add_argument("--questions", type=int, default=0, help="number of user turns it can write, 0 for any")
    parser.add_argument("--padding_chars", type=int, default=0, help="dots at the end of every answer")
    parser.add_argument("--token_ids", action="store_true", help="return token ids to those who ask for them")
    return parser.parse_args()


async def serve(args: argparse.Namespace) -> None:
    fake = Fake(args)
    server = await fake.loop.create_server(lambda: Connection(fake), "127.0.0.1", args.port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


class FakeServer:
    """A running fake server, seen from a test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.root = url.removesuffix("/v1")

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/stats", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def wait_for(self, requests: int, timeout_s: float = 10) -> None:
        """Blocks until that many requests for text have come since the start.

        Raises:
            TimeoutError: They did not.
        """
        with urllib.request.urlopen(f"{self.root}/wait?requests={requests}", timeout=timeout_s) as answer:
            answer.read()


@contextmanager
def fake_server(*flags: str) -> Iterator[FakeServer]:
    """Runs this file with flags."""
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "the fake server did not start"
            yield FakeServer(url)
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve(parse_args()))
