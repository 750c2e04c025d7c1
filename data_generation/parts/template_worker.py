"""Renders chat templates in a process of its own, which template_process.py starts; reads and writes lines of JSON.

A template is a program of whoever published the tokenizer. jinja2's sandbox keeps it from files and from the rest of
Python, but not from counting forever or from writing a text of any length: here the kernel does. Knows no other module.
"""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# What an expression in a template may raise besides jinja2's own errors, such as None + "text".
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RecursionError,
    MemoryError,
    SyntaxError,
    NotImplementedError,
)
MOST_DATES, LONGEST_DATE = 16, 64


class GenerationTag(jinja2.ext.Extension):
    """Lets {% generation %} ... {% endgeneration %}, with which templates mark answers, render as what is inside."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns what is inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """Lets templates refuse messages."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON; jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Renderer:
    """Templates, and the dates that they were given."""

    def __init__(self) -> None:
        """Makes the sandbox."""
        self.dates: list[str] = []
        self.environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        self.environment.filters["tojson"] = to_json
        self.environment.globals |= {"raise_exception": raise_exception, "strftime_now": self.strftime_now}
        self.compiled = lru_cache(8)(self.environment.from_string)

    def strftime_now(self, form: str) -> str:
        """Gives templates the current date, and keeps what it gave: it is another one on another day."""
        date = datetime.now().strftime(form)
        if 0 < len(date) <= LONGEST_DATE and len(self.dates) < MOST_DATES:
            self.dates.append(date)
        return date

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compiles a template and, where there are `names`, renders it."""
        self.dates = []
        stage = "compile"
        try:
            template = self.compiled(request["template"])
            if request["names"] is None:
                return {"text": ""}
            stage = "render"
            text = template.render(**request["names"])
            if len(text) > request["most_characters"]:
                raise ValueError(f"it writes {len(text):,} characters")
            return {"text": text, "dates": self.dates}
        except TEMPLATE_ERRORS as error:
            undefined = isinstance(error, jinja2.UndefinedError)
            reason = " ".join(str(error).split())[:1000] or type(error).__name__
            return {"error": reason, "stage": stage, "undefined": undefined}


def requests() -> Iterator[dict[str, Any]]:
    """Streams what is asked, until the other process closes the pipe or ends."""
    for line in sys.stdin.buffer:
        yield json.loads(line)


def main() -> None:
    """Answers one request after the other, each within its processor time, all within one memory limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most_memory = int(sys.argv[1])
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (most_memory, most_memory))
    renderer = Renderer()
    for request in requests():
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + request["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.buffer.write(json.dumps(renderer.answer(request)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
