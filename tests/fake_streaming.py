"""A server that streams answers as vLLM does, and can be told to answer wrongly; also run by the fake interpreter.

It imports nothing but the standard library, since it runs where nothing else is installed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("status", "error", "garbage", "cut", "no usage")


class Streaming(ThreadingHTTPServer):
    """Answers `tokens` tokens, `token_s` apart, unless `fault` says otherwise.

    `drafts` is None for a server that does not speculate; otherwise every second token counts as an accepted draft.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0, tokens=6, token_s=0.0, fault=None, drafts=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.tokens, self.token_s, self.fault, self.drafts = tokens, token_s, fault, drafts
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = self.generated = 0
        self.requests = []
        self.together = None
        """A barrier that requests wait at, so that a test sees how many come at a time."""

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def count(self, change):
        with self.lock:
            self.in_flight += change
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def metrics(self):
        lines = [f"vllm:generation_tokens_total {self.generated}.0"]
        if self.drafts:
            steps = self.generated / 2
            lines += [
                f"vllm:spec_decode_num_drafts_total {steps}",
                f"vllm:spec_decode_num_draft_tokens_total {steps * self.drafts}",
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {steps}',
            ]
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        pages = {"/health": "", "/metrics": self.server.metrics(), "/v1/models": json.dumps({"data": [{"id": "fake"}]})}
        self.reply(200 if self.path in pages else 404, pages.get(self.path, "{}"))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.count(1)
        try:
            if server.together is not None:
                server.together.wait(10)
            server.requests.append((self.path, body))
            if server.fault == "status":
                self.reply(503, "overloaded")
                return
            self.stream(body)
        finally:
            server.count(-1)

    def stream(self, body):
        server = self.server
        count = min(server.tokens, body["max_tokens"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chat = self.path.endswith("chat/completions")
        if chat:
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        question = body["messages"][-1]["content"] if chat else body["prompt"]
        for number in range(count):
            time.sleep(server.token_s)
            if server.fault == "error":
                self.event({"error": {"message": "the engine died"}})
                return
            if server.fault == "garbage":
                self.wfile.write(b"data: <html>\n\n")
                return
            if server.fault == "cut" and number == 1:
                self.connection.close()
                return
            piece = f"{question[:1]}{number} "
            self.event({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
        server.generated += count
        if server.fault != "no usage":
            self.event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def reply(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@contextmanager
def streaming(**options) -> Iterator[Streaming]:
    """Serves on a free port; `url` of what is yielded is its address."""
    with Streaming(**options) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
