"""A real HTTP server on the loopback interface that answers or fails as a test plans it, and a directory to run in."""

import contextlib
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import generate

WAIT_S = 10.0  # no test comes near it; it only ends a test that would hang
DROP = "drop the connection"
HANG = "keep the client waiting, then drop the connection"
SLOW = "answer when the test says so"

# What the fake server does instead of answering: (status, headers, body), DROP, HANG or SLOW.
Fault = tuple[int, dict[str, str], str] | str


def completion(text: str | None, finish_reason: str | None = "stop", **extra: Any) -> str:
    """Returns the body of a chat completion; every answer costs 7 prompt and 3 completion tokens."""
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
    return json.dumps(body | extra)


def fault(status: int, body: str = "no", **headers: str) -> Fault:
    """Returns a response to send instead of the ordinary answer."""
    return (status, headers, body)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLE_IDS = {"system": 300, "user": 301, "assistant": 302}
END_ID = 303


def prompt_ids(messages: list[dict[str, str]]) -> list[int]:
    """Tokenises turns for an answer: a role's id, the bytes of the text, END_ID; then the assistant's id."""
    ids: list[int] = []
    for turn in messages:
        ids += [ROLE_IDS[turn["role"]], *turn["content"].encode(), END_ID]
    return [*ids, ROLE_IDS["assistant"]]


class FakeServer(ThreadingHTTPServer):
    """Answers "re: <last user turn>", after the faults planned for that turn; keeps all requests.

    Completions of plain text give `user_turns`, one after the other, then nothing but the end of the text.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Fault = fault(200, json.dumps({"data": [{"id": "fake-model"}]}))
        self.faults: dict[str, list[Fault]] = {}
        self.user_turns: list[str] = []
        self.rejected_fields: set[str] = set()
        self.has_completions = True
        self.has_token_ids = False
        self.requests: list[dict[str, Any]] = []
        self.completions: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.arrived = threading.Condition()
        self.released = threading.Event()
        self.barrier: threading.Barrier | None = None
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        """Ends the server and every connection to it, as if its process had died."""
        if not self.thread.is_alive():
            return
        self.released.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Notes a connection."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forgets a connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def asked(self) -> Counter[str]:
        """Counts the chat requests by their last user turn."""
        return Counter(request["messages"][-1]["content"] for request in self.requests)

    def wait_for(self, requests: int) -> None:
        """Blocks until that many chat requests have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= requests, WAIT_S)

    def handle_error(self, *_: object) -> None:
        """Keeps quiet about clients that went away."""

    def chat(self, request: dict[str, Any]) -> Fault:
        """Returns what is to be sent for a chat request."""
        if request["max_tokens"] == 1:  # only asked to see what the server understands
            return fault(200, self.answer(request, "x"))
        text = request["messages"][-1]["content"]
        with self.arrived:
            self.requests.append(request)
            planned = self.faults.get(text)
            todo = planned.pop(0) if planned else fault(200, self.answer(request, f"re: {text}"))
            self.arrived.notify_all()
        if self.barrier:
            self.barrier.wait(WAIT_S)
        if todo == SLOW:
            assert self.released.wait(WAIT_S)
            return fault(200, self.answer(request, f"re: {text}"))
        return todo

    def answer(self, request: dict[str, Any], text: str) -> str:
        """Returns the body of an ordinary answer."""
        body = json.loads(completion(text))
        if self.has_token_ids and request.get("return_token_ids"):
            body["prompt_token_ids"] = prompt_ids(request["messages"])
            body["choices"][0]["token_ids"] = [*text.encode(), END_ID]
        return json.dumps(body)

    def complete(self, request: dict[str, Any]) -> Fault:
        """Returns what is to be sent for a completion of plain text."""
        if not self.has_completions:
            return fault(404)
        if rejected := self.rejected_fields & set(request):
            return fault(422, f"unexpected fields {rejected}")
        text = ""
        with self.arrived:
            if request["max_tokens"] > 1:
                self.completions.append(request)
                text = self.user_turns.pop(0) if self.user_turns else ""
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        return fault(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}))


class Handler(BaseHTTPRequestHandler):
    """One connection to the fake server."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""

    def do_GET(self) -> None:
        self.send(self.server.models if self.path == "/v1/models" else fault(404))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.authorizations.append(self.headers["Authorization"])
        ways = {"/v1/chat/completions": self.server.chat, "/v1/completions": self.server.complete}
        self.send(ways[self.path](request) if self.path in ways else fault(404))

    def send(self, todo: Fault) -> None:
        if todo == HANG:
            self.server.released.wait(WAIT_S)
        if isinstance(todo, str):
            self.close_connection = True
            return
        status, headers, body = todo
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


class Workdir:
    """A directory with a prompts file, in which the command is run against a server."""

    def __init__(self, path: Path, url: str) -> None:
        self.data, self.output, self.url = path / "prompts.jsonl", path / "out" / "answers.jsonl", url
        self.failed = Path(f"{self.output}.failed.jsonl")
        self.report_file = Path(f"{self.output}.report.json")

    def argv(self, *flags: str) -> list[str]:
        paths = ["--data_path", str(self.data), "--output_path", str(self.output)]
        return [*paths, "--server", self.url, "--backoff_s", "0", *flags]

    def write_template(self) -> str:
        """Writes a chat template and returns its directory, for --tokenizer."""
        directory = self.data.parent / "model"
        directory.mkdir(exist_ok=True)
        (directory / "chat_template.jinja").write_text(CHATML)
        return str(directory)

    def write(self, *rows: Any) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *flags: str) -> int:
        return generate.main(self.argv("--chat", *flags))

    def run_without_chat(self, *flags: str) -> int:
        return generate.main(self.argv(*flags))

    def run_mode(self, *flags: str) -> int:
        """Runs the command with nothing but an output, a server, a chat template and these flags."""
        paths = ["--output_path", str(self.output), "--tokenizer", self.write_template()]
        return generate.main([*paths, "--server", self.url, "--backoff_s", "0", *flags])

    def rows(self) -> dict[str, dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({line["id"] for line in lines}) == len(lines), "a conversation was written twice"
        return {line["id"]: line for line in lines}

    def failures(self) -> dict[str, str]:
        return {line["id"]: line["reason"] for line in map(json.loads, self.failed.read_text().splitlines())}

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report_file.read_text())
        assert report["succeeded"] + report["failed"] + report["skipped"] + report["left"] == report["input_rows"]
        return report


def turns(*texts: str) -> list[dict[str, str]]:
    """Returns alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
