"""The fields of servers' answers that data_generation/ relies on, and what becomes of each that is not as it should be.

The forms are those that the servers named send or have sent, by their own code and by public reports; "any" is a form that
nobody is known to send. test_odd_answers.py sends each through generate.py.
"""

import json
from dataclasses import dataclass, field
from typing import Any

REMOVE = object()


@dataclass(frozen=True)
class Odd:
    """One form of one field.

    Args:
        name: The field, from the body's top, and what is odd about it.
        by: Who sends it.
        changes: What differs from an ordinary answer, by paths such as "choices.0.message.content".
        text: The answer that the row then holds; None if the row fails.
        reason: A part of the reason of a row that fails.
        finish_reason: What the row then says about the answer's end.
        usage: Tokens of prompt and answer that are then counted.
        raw: The whole body, in place of changes.
        asked: How often the answer is asked for, with two further tries.
        flags: Further flags of the command.
    """

    name: str
    by: str
    changes: dict[str, Any] = field(default_factory=dict)
    text: str | None = "So."
    reason: str = ""
    finish_reason: str | None = "stop"
    usage: tuple[int, int] = (7, 3)
    raw: str = ""
    asked: int = 1
    flags: tuple[str, ...] = ()

    def body(self) -> str:
        """Returns the answer as the server sends it."""
        return self.raw or json.dumps(changed(self.changes))


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns an ordinary answer with changes."""
    body: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "So."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
    for path, value in changes.items():
        *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
        place: Any = body
        for name in parents:
            place = place[name]
        if value is REMOVE:
            del place[last]
        else:
            place[last] = value
    return body


REFUSED = {"text": None, "reason": "expected a completion", "asked": 3}
CONTENT, FINISH, REASONING = "choices.0.message.content", "choices.0.finish_reason", "choices.0.message.reasoning"
PART = {"type": "text", "text": "So."}
THOUGHTS = "<think>\nHm.\n</think>\n\nSo."
THINK = ("--thinking", "on")
ODD_ANSWERS = [
    # choices
    Odd("choices absent", "any", {"choices": REMOVE}, **REFUSED),
    Odd("choices null", "vLLM, OpenRouter", {"choices": None}, **REFUSED),
    Odd("choices empty", "LiteLLM, Azure", {"choices": []}, **REFUSED),
    Odd("choices an object", "any", {"choices": {"message": {"content": "So."}}}, **REFUSED),
    Odd("choices.0 null", "any", {"choices": [None]}, **REFUSED),
    # errors with the status of an answer
    Odd(
        "error, passing",
        "OpenRouter",
        raw='{"choices": null, "error": {"code": 429}}',
        text=None,
        reason="429",
        asked=3,
    ),
    Odd("error, text", "LiteLLM", raw='{"error": "upstream is gone"}', text=None, reason="upstream is gone", asked=3),
    Odd("error, lasting", "OpenRouter", raw='{"error": {"code": 403, "message": "no"}}', text=None, reason="403"),
    Odd("error, old form", "vLLM", raw='{"object": "error", "code": 400, "message": "bad"}', text=None, reason="bad"),
    Odd("error, code a text", "SGLang", raw='{"error": {"code": "400", "message": "bad"}}', text=None, reason="bad"),
    Odd("error null beside an answer", "LiteLLM", {"error": None}),
    # the body
    Odd("body with the end of a stream", "9router", raw=json.dumps(changed({})) + "\n\ndata: [DONE]\n\n"),
    Odd("body after blank lines", "DeepSeek", raw="\n\n\n" + json.dumps(changed({}))),
    Odd("body after a byte order mark", "any", raw="\ufeff" + json.dumps(changed({}))),
    Odd("body a stream", "any", raw=f"data: {json.dumps(changed({}))}\n\ndata: [DONE]\n\n", **REFUSED),
    Odd("body a page", "any proxy", raw="<html>502 Bad Gateway</html>", **REFUSED),
    Odd("body null", "any", raw="null", **REFUSED),
    Odd("body empty", "any proxy", raw=" ", **REFUSED),
    # message
    Odd("message absent", "any", {"choices.0.message": REMOVE}, **REFUSED),
    Odd("message null, text beside it", "LoRAX", {"choices.0.message": None, "choices.0.text": "So."}),
    Odd("message renamed text", "llama-cpp-python", {"choices.0.message": REMOVE, "choices.0.text": "So."}),
    Odd(
        "message renamed delta", "any", {"choices.0": {"delta": {"content": "So."}, "finish_reason": "stop"}}, **REFUSED
    ),
    Odd("message a text", "any", {"choices.0.message": "So."}, **REFUSED),
    # content
    Odd("content absent", "vLLM", {CONTENT: REMOVE}, text=None, reason="an empty answer"),
    Odd("content null", "vLLM, SGLang", {CONTENT: None}, text=None, reason="an empty answer"),
    Odd("content empty", "llama.cpp", {CONTENT: ""}, text=None, reason="an empty answer"),
    Odd("content empty, cut", "Ollama", {CONTENT: "", FINISH: "length"}, text=None, reason="an empty answer"),
    Odd("content a list of parts", "Mistral, LiteLLM", {CONTENT: [{**PART, "text": "S"}, {**PART, "text": "o."}]}),
    Odd("content with an image", "any", {CONTENT: [PART, {"type": "image_url"}]}, **REFUSED),
    Odd("content a number", "any", {CONTENT: 7}, **REFUSED),
    Odd("content an object", "any", {CONTENT: {"text": "So."}}, **REFUSED),
    Odd("content with half a surrogate pair", "SGLang, TGI", {CONTENT: "\ud83d"}, **REFUSED),
    # tool calls
    Odd("tool_calls null", "SGLang", {"choices.0.message.tool_calls": None}),
    Odd("tool_calls empty", "vLLM", {"choices.0.message.tool_calls": []}),
    Odd("tool_calls there", "vLLM", {"choices.0.message.tool_calls": [{"id": "x"}]}, text=None, reason="a tool call"),
    Odd("function_call null", "LiteLLM", {"choices.0.message.function_call": None}),
    # finish_reason
    Odd("finish_reason absent", "any", {FINISH: REMOVE}, finish_reason=None),
    Odd("finish_reason null", "Azure", {FINISH: None}, finish_reason=None),
    Odd("finish_reason empty", "SGLang, Ollama", {FINISH: ""}, finish_reason=None),
    Odd("finish_reason 'null'", "ai00", {FINISH: "null"}, finish_reason=None),
    Odd(
        "finish_reason null, longest answer", "any", {FINISH: None}, finish_reason="length", flags=("--max_tokens", "3")
    ),
    Odd("finish_reason stop, longest answer", "LiteLLM", finish_reason="length", flags=("--max_tokens", "3")),
    Odd("finish_reason eos_token", "TGI, LoRAX", {FINISH: "eos_token"}),
    Odd("finish_reason stop_sequence", "TGI", {FINISH: "stop_sequence"}),
    Odd("finish_reason eos", "Together", {FINISH: "eos"}),
    Odd("finish_reason STOP", "LiteLLM", {FINISH: "STOP"}),
    Odd("finish_reason MAX_TOKENS", "LiteLLM", {FINISH: "MAX_TOKENS"}, finish_reason="length"),
    Odd("finish_reason max_tokens", "LiteLLM", {FINISH: "max_tokens"}, finish_reason="length"),
    Odd("finish_reason model_length", "Mistral", {FINISH: "model_length"}, finish_reason="length"),
    Odd("finish_reason an object", "SGLang", {FINISH: {"type": "length", "length": 3}}, finish_reason="length"),
    Odd("finish_reason of its own", "any", {FINISH: "repetition"}, finish_reason="repetition"),
    Odd("finish_reason abort", "vLLM, SGLang", {FINISH: "abort"}, text=None, reason="expected a whole answer"),
    Odd("finish_reason a number", "any", {FINISH: 1}, **REFUSED),
    # usage
    Odd("usage absent", "any", {"usage": REMOVE}, usage=(0, 0)),
    Odd("usage null", "LiteLLM, SGLang", {"usage": None}, usage=(0, 0)),
    Odd("usage empty", "LM Studio", {"usage": {}}, usage=(0, 0)),
    Odd("usage a list", "any", {"usage": [7, 3]}, usage=(0, 0)),
    Odd("usage.completion_tokens null", "vLLM", {"usage.completion_tokens": None}, usage=(7, 0)),
    Odd("usage.completion_tokens a text", "any", {"usage.completion_tokens": "many"}, usage=(7, 0)),
    Odd("usage.completion_tokens a fraction", "any", {"usage.completion_tokens": 3.0}),
    Odd("usage renamed", "LiteLLM", {"usage": {"input_tokens": 7, "output_tokens": 3}}),
    # reasoning
    Odd("reasoning absent", "all", flags=THINK),
    Odd("reasoning null", "vLLM", {REASONING: None}, flags=THINK),
    Odd("reasoning a text", "vLLM, Ollama", {REASONING: "Hm."}, text=THOUGHTS, flags=THINK),
    Odd(
        "reasoning renamed reasoning_content",
        "SGLang, llama.cpp",
        {f"{REASONING}_content": "Hm."},
        text=THOUGHTS,
        flags=THINK,
    ),
    Odd(
        "reasoning under both names",
        "vLLM",
        {REASONING: "Hm.", f"{REASONING}_content": "Hm."},
        text=THOUGHTS,
        flags=THINK,
    ),
    Odd(
        "reasoning null, renamed there",
        "LiteLLM",
        {REASONING: None, f"{REASONING}_content": "Hm."},
        text=THOUGHTS,
        flags=THINK,
    ),
    Odd("reasoning renamed thinking", "Ollama", {"choices.0.message.thinking": "Hm."}, text=THOUGHTS, flags=THINK),
    Odd(
        "reasoning as a part of content",
        "Mistral",
        {CONTENT: [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, PART]},
        text=THOUGHTS,
        flags=THINK,
    ),
    Odd(
        "reasoning in the text too",
        "LiteLLM",
        {REASONING: "Hm.", CONTENT: "<think>Hm.</think>So."},
        text=THOUGHTS,
        flags=THINK,
    ),
    Odd("reasoning an object", "any", {REASONING: {"text": "Hm."}}, flags=THINK, **REFUSED),
    Odd(
        "reasoning without content",
        "SGLang",
        {REASONING: "So.", CONTENT: ""},
        text=None,
        reason="thoughts without an answer",
    ),
    # what is not asked for
    Odd("token ids that are none", "any", {"prompt_token_ids": "x", "choices.0.token_ids": [-1, 1.5]}),
    Odd("model null", "OpenRouter", {"model": None}),
]

LISTS_OF_MODELS: list[tuple[str, str, str]] = [
    ("ordinary", "vLLM, SGLang, TGI", '{"object": "list", "data": [{"id": "m", "object": "model"}]}'),
    ("both lists", "llama.cpp", '{"models": [{"name": "m", "model": "m"}], "object": "list", "data": [{"id": "m"}]}'),
    ("data renamed models", "Ollama", '{"models": [{"name": "m", "model": "m"}]}'),
    ("no object around it", "Together", '[{"id": "m", "type": "chat"}]'),
    ("names in place of objects", "any proxy", '{"data": ["m"]}'),
    ("an entry without a name", "hajimi", '{"data": [{"id": ""}, {"id": "m"}]}'),
    ("root and length null", "vLLM", '{"data": [{"id": "m", "root": null, "max_model_len": null}]}'),
]
NO_MODEL: list[tuple[str, str, str, str]] = [
    ("data null", "Ollama", '{"object": "list", "data": null}', "found 0 models"),
    ("data absent", "any", '{"object": "list"}', "expected a list of models"),
    ("data a text", "any", '{"data": "m"}', "expected a list of models"),
    ("a page", "any proxy", "<html>", "expected a list of models"),
]
