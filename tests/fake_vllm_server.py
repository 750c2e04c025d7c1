"""An HTTP server that answers and counts as vLLM does, for a small model with heads, one naive forward per token.

It shares no code with what is tested: a chain of drafts is verified here token by token, as it is defined.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel

from axolotl_medusa.model.heads import MedusaHeads


@dataclass
class FakeVllm:
    """What the server is.

    Attributes:
        model: What it serves.
        heads: The heads that it has loaded, None for a server that does not speculate.
        chat_ids: Renders a chat; None where it has no chat template.
        length: How many drafts it takes of those that the heads made, given how often it drafted before.
        logprobs: Whether it gives log-probabilities.
        extra_tokens: Tokens that others made it generate per request.
        token_ids: Whether it gives token ids.
        root: Where it says that its model lies.
    """

    model: PreTrainedModel
    heads: MedusaHeads | None = None
    chat_ids: Callable[[list[dict[str, str]]], list[int]] | None = None
    length: Callable[[int], int] = field(default=lambda drafted: 99)
    logprobs: bool = True
    extra_tokens: int = 0
    token_ids: bool = True
    root: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    requests: list[dict[str, Any]] = field(default_factory=list)

    @torch.no_grad()
    def complete(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float]]:
        """Continues greedily and counts drafts."""
        tokens: list[int] = []
        logprobs: list[float] = []
        drafts: list[int] = []
        while len(tokens) < max_tokens:
            self.counts["drafts"] += bool(drafts)
            self.counts["draft_tokens"] += len(drafts)
            self.counts["steps"] += 1
            place = 0
            while len(tokens) < max_tokens:
                hidden = self.model.model(torch.tensor([[*prompt, *tokens]])).last_hidden_state[0, -1]
                values = self.model.lm_head(hidden).log_softmax(-1)
                tokens.append(int(values.argmax()))
                logprobs.append(float(values.max()))
                if place == len(drafts) or drafts[place] != tokens[-1]:
                    break
                self.accepted[place] += 1
                place += 1
            drafts = self.guess(hidden)
        self.counts["generated"] += len(tokens) + self.extra_tokens
        return tokens, logprobs

    given: Callable[[list[float]], list[Any]] = field(default=list)
    """What it gives of the log-probabilities."""

    def guess(self, hidden: torch.Tensor) -> list[int]:
        if self.heads is None:
            return []
        drafts = []
        for index in range(self.heads.num_heads):
            layer = self.heads.output_layer(index) or self.model.lm_head
            drafts.append(int(layer(self.heads.hidden(index, hidden)).argmax()))
        return drafts[: self.length(self.counts["drafts"])]

    def metrics(self) -> str:
        labels = 'engine="0",model_name="fake"'
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            f"vllm:generation_tokens_total{{{labels}}} {float(self.counts['generated'])}",
            f'vllm:iteration_tokens_total_bucket{{{labels},le="1.0"}} 3.0',
            f"vllm:iteration_tokens_total_count{{{labels}}} {float(self.counts['steps'])}",
            f"vllm:iteration_tokens_total_sum{{{labels}}} 1.0e+09",
        ]
        if self.heads is not None:
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.counts['drafts'])}",
                f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {float(self.counts['draft_tokens'])}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float(self.accepted.total())}",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{place}"}} {self.accepted[place]}.0'
                for place in range(self.heads.num_heads)
            ]
        return "\n".join(lines) + "\n"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake", "object": "model", "root": self.root}]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/metrics":
            return 200, self.metrics()
        self.requests.append(body)
        if path == "/v1/chat/completions":
            if self.chat_ids is None:
                return 400, {"error": {"message": "default chat template is no longer allowed"}}
            return 200, {"choices": [{"message": {}}], "prompt_token_ids": self.chat_ids(body["messages"])}
        if path == "/v1/completions":
            if "logprobs" in body and not self.logprobs:
                return 400, {"error": {"message": "logprobs are not supported here"}}
            tokens, logprobs = self.complete(body["prompt"], body["max_tokens"])
            choice: dict[str, Any] = {"text": "", "token_ids": tokens} if self.token_ids else {"text": ""}
            if "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": self.given(logprobs)}
            return 200, {"choices": [choice]}
        return 404, {"detail": "Not Found"}


@contextmanager
def serving(fake: FakeVllm) -> Iterator[str]:
    """Serves on a free port; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(*fake.answer(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*fake.answer(self.path, body))

        def reply(self, status: int, content: Any) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
