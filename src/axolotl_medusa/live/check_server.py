"""Why a server accepts less than the heads allow: its chats, its model and its heads, compared with ours on the same text.

Contract: asks a server and reads its counters; prints nothing. Everything is compared on the text that the server wrote, so
that one difference does not hide all that comes after it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.live.compare_heads import HeadsReport, Kind, compare_heads
from axolotl_medusa.live.guesses import Along, along
from axolotl_medusa.live.server import Completion, RefusedError, Server

SAME_MOVE, SAME_SHARE = 0.06, 0.95
"""Mean change of log-probabilities up to which, and share of our model's own first choices from which a model counts as ours:
SmolLM2-135M changes by 0.03 and keeps 97% when it computes in bf16 or in 8-bit weights."""
CHANGED_MOVE, CHANGED_SHARE = 1.2, 0.5
"""The bounds beyond which it is another model: 4-bit weights change SmolLM2-135M, a model that minds them much, by 1.0."""


@dataclass(frozen=True)
class Chat:
    """One chat: its messages, and the tokens that our tokenizer makes of them.

    Attributes:
        messages: What the server is asked as a chat, None where the tokenizer has no chat template.
        input_ids: Its tokens as the heads were trained with them.
        variants: Tokens by the name of a setting of the template, such as thinking.
    """

    messages: Sequence[dict[str, str]] | None
    input_ids: Sequence[int]
    variants: dict[str, Sequence[int]] = field(default_factory=dict)


@dataclass
class Report:
    """What was found.

    Attributes:
        same_chats: Chats of which the server makes the same tokens as we do, of all that were asked.
        own: Share of the server's tokens that are our model's own first choice.
        tokens: Tokens that this is the share of.
        moved: Mean change of their log-probabilities, None where the server gives none.
        most_moved: The largest one.
        heads: What was found of its drafts, None before that was looked at.
        causes: What is wrong, a line each; none where nothing is.
    """

    same_chats: tuple[int, int] = (0, 0)
    own: float = 0.0
    tokens: int = 0
    moved: float | None = None
    most_moved: float | None = None
    heads: HeadsReport | None = None
    causes: list[str] = field(default_factory=list)


def check_server(server: Server, model: MedusaModel, chats: Sequence[Chat], max_tokens: int) -> Report:
    """Compares a server with the heads that it should serve.

    Args:
        server: The server; nobody else should be asking it.
        model: The model that the heads were trained with, and the heads.
        chats: What to ask.
        max_tokens: Tokens per answer at most.

    Raises:
        ServerError: The server does not answer as it should.
    """
    report = Report()
    report.causes += _template_causes(server, chats, report)
    before = server.counters()
    answers = [server.complete(chat.input_ids, max_tokens) for chat in chats]
    counted = server.counters().since(before)
    generated = sum(len(answer.token_ids) for answer in answers)
    if counted.generated > generated * 1.02 + 1:
        report.causes.append(
            f"others asked the server at the same time: it generated {counted.generated:.0f} tokens, {generated} of them for this "
            "check; the figures are theirs too, so check it again while it is quiet"
        )
    prompts = [chat.input_ids for chat in chats]
    said = [along(model, prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    kind = _compare_model(said, answers, report)
    if kind != "same":
        report.causes.append(_model_cause(kind, model, prompts, answers, report, server.quantization()))
    report.heads = compare_heads(said, [answer.token_ids for answer in answers], counted, kind)
    report.causes += report.heads.causes
    return report


def _template_causes(server: Server, chats: Sequence[Chat], report: Report) -> Iterator[str]:
    asked = [chat for chat in chats if chat.messages is not None]
    same, other = 0, None
    for chat in asked:
        try:
            found = server.chat_prompt(chat.messages or ())
        except RefusedError as error:
            yield f"the server refuses chats ({error}): start it with the heads' chat template (--chat-template)"
            report.same_chats = (0, len(asked))
            return
        if list(chat.input_ids) == found:
            same += 1
        else:
            other = other or (chat, found)
    report.same_chats = (same, len(asked))
    if other is None:
        return
    chat, found = other
    setting = next((name for name, ids in chat.variants.items() if list(ids) == found), None)
    if setting is not None:
        yield (
            f"the server renders chats with {setting}, but the heads were trained without: send the other value in "
            "chat_template_kwargs, or start the server with --default-chat-template-kwargs"
        )
    else:
        place = next((i for i, (a, b) in enumerate(zip(chat.input_ids, found, strict=False)) if a != b), len(found))
        yield (
            f"the server's chat template is another than the one that the heads were trained with: {len(asked) - same} of "
            f"{len(asked)} chats have other tokens, the first from token {place} on; start it with the heads' chat template "
            "(--chat-template)"
        )


def _compare_model(said: Sequence[Along], answers: Sequence[Completion], report: Report) -> Kind:
    own, moves = _differences(said, answers)
    report.own, report.tokens = own, sum(len(answer.token_ids) for answer in answers)
    report.moved = statistics.mean(moves) if moves else None
    report.most_moved = max(moves, default=None)
    return _kind(own, report.moved)


def _differences(said: Sequence[Along], answers: Sequence[Completion]) -> tuple[float, list[float]]:
    own = [is_own for each in said for is_own in each.own]
    pairs = ((each.logprobs, answer.logprobs) for each, answer in zip(said, answers, strict=True) if answer.logprobs)
    moves = [abs(ours - theirs) for pair in pairs for ours, theirs in zip(*pair, strict=True)]
    return sum(own) / max(1, len(own)), moves


def _kind(own: float, moved: float | None) -> Kind:
    moved = 0.0 if moved is None else moved
    if own >= SAME_SHARE and moved <= SAME_MOVE:
        return "same"
    return "changed" if own >= CHANGED_SHARE and moved <= CHANGED_MOVE else "other"


def _model_cause(
    kind: Kind,
    model: MedusaModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Completion],
    report: Report,
    quantization: str | None,
) -> str:
    base: Any = model.base_model
    if hasattr(base, "disable_adapter"):
        pairs = zip(prompts, answers, strict=True)
        plain = [along(model, prompt, answer.token_ids, adapter=False) for prompt, answer in pairs]
        own, moves = _differences(plain, answers)
        if _kind(own, statistics.mean(moves) if moves else None) == "same":
            return (
                "the server runs the base model without the adapter that was trained with the heads: serve the merged model, as "
                "`axolotl-medusa serve` does"
            )
    moved = "" if report.moved is None else f", log-probabilities moved by {report.moved:.3f} on average"
    says = "" if quantization is None else f"; its config.json says {quantization}"
    measured = f"{report.own:.1%} of its tokens are our model's own first choice{moved}"
    if kind == "changed":
        return (
            f"the server's weights are near our model's, but changed, as by quantisation or further training ({measured}{says}): "
            "acceptance falls with it; serve the model as it was trained, or train heads on the changed one"
        )
    return (
        f"the server runs another model than the one that the heads were trained with ({measured}): serve that model, for Medusa-2 "
        "the one that was trained together with the heads"
    )
