"""What the commands `serve` and `check-server` do once their arguments are parsed.

Contract: prints for a user; what is decided lies in `serving` and `live`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axolotl_medusa.live.check_server import Chat, Report, check_server
from axolotl_medusa.live.server import Server
from axolotl_medusa.measuring.evaluate import PromptTokens, check_fits
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving.merged_cache import merged_dir
from axolotl_medusa.serving.serve import ServeOptions, find_served, prepare, vllm_command
from axolotl_medusa.serving.vllm_install import find_vllm
from axolotl_medusa.terminal.commands import load_heads
from axolotl_medusa.terminal.prompts import Prompt, default_prompts, prompt_tokens, read_prompts, turns_to_answer

_API_KEY = "OPENAI_API_KEY"
_SETTING = "enable_thinking"
"""Of Qwen3's chat template and of those that follow it."""


def run_serve(options: argparse.Namespace) -> None:
    """Prints the vLLM command that serves heads, and becomes it: signals reach vLLM, and its exit status is this one's."""
    vllm = find_vllm(options.vllm_python)
    source = find_served(options.output_dir, options.base_model)
    asked = ServeOptions(options.method, options.draft_tokens, not options.fixed, tuple(options.others))
    command = vllm_command(source, vllm, asked)
    for note in command.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.dry_run:
        if command.needs_merge:
            print(f"note: the adapter will first be merged into {merged_dir(source)}", file=sys.stderr)
        print(command.shell())
        return
    prepare(source)
    print(command.shell())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def run_check_server(options: argparse.Namespace) -> None:
    """Compares a server with the heads that it should serve, and says what it found.

    Raises:
        RuntimeError: Something is wrong with the server; the line says what.
    """
    server = Server(options.url, os.environ.get(_API_KEY))
    prompts = read_prompts(options.prompts, options.limit) if options.prompts else default_prompts(options.limit)
    model, tokenizer = load_heads(options)
    chats = list(_chats(tokenizer, prompts, _template_settings(find_source(options.heads, options.base_model).meta)))
    ids = [PromptTokens(prompt.id, list(chat.input_ids)) for prompt, chat in zip(prompts, chats, strict=True)]
    check_fits(model, ids, options.max_new_tokens)
    print(f"server: {server.url}, {server.model}, vLLM {server.version() or 'of unknown version'}")
    report = check_server(server, model, chats, options.max_new_tokens)
    for line in _lines(report, len(chats)):
        print(line)
    if report.causes:
        sys.stdout.flush()
        raise RuntimeError("; ".join(report.causes))
    print("nothing is wrong: the server accepts what the heads allow")


def _template_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What training told the chat template."""
    yaml = meta.get("yaml")
    settings = yaml.get("chat_template_kwargs") if isinstance(yaml, Mapping) else None
    return dict(settings) if isinstance(settings, Mapping) else {}


def _chats(tokenizer: Any, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> Iterator[Chat]:
    for prompt in prompts:
        input_ids = prompt_tokens(tokenizer, prompt, settings)
        if tokenizer.chat_template is None:
            yield Chat(None, input_ids)
            continue
        rendered = {
            f"{_SETTING}: {str(value).lower()}": prompt_tokens(tokenizer, prompt, {**settings, _SETTING: value})
            for value in (True, False)
        }
        yield Chat(turns_to_answer(prompt), input_ids, {k: ids for k, ids in rendered.items() if ids != input_ids})


def _lines(report: Report, asked: int) -> Iterator[str]:
    same, chats = report.same_chats
    if chats:
        yield f"chat template: the tokens of {same} of {chats} chats are those that the heads were trained with"
    moved = ""
    if report.moved is not None:
        moved = f"; log-probabilities moved by {report.moved:.4f} on average, {report.most_moved:.3f} at most"
    yield f"model: of {report.tokens} tokens in {asked} answers {report.own:.1%} are our model's own first choice{moved}"
    heads = report.heads
    if heads is None:
        return
    yield "place  predicted  accepted by the server"
    for place, share in enumerate(heads.predicted.accepted):
        served = "-" if heads.served is None else f"{heads.served.accepted[place]:.3f}"
        yield f"{place:5}  {share:9.3f}  {served:>22}"
    if heads.adaptive and heads.precision is not None:
        yield f"the server drafts only what pays; it accepted {heads.precision:.1%} of its draft tokens"
