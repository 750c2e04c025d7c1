"""Ways to damage a file: by its structure, where it is JSON, and by its bytes. All choices are Hypothesis' own, so it shrinks them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Raw(NamedTuple):
    """Text that stands in JSON as it is."""

    text: str


class Members(list[tuple[str, Any]]):
    """Members of an object, where a key may come twice."""


HUGE = (2**31, 2**63, 2**64, 10**9, 10**12, 10**30, -(10**18))
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 65, 1.5, -0.5, math.nan, math.inf, *HUGE)
TEXTS = (
    "",
    "x",
    ".",
    "..",
    "../outside.safetensors",
    "/etc/passwd",
    "link.safetensors",
    "a/b",
    "~nobody/x",
    "\0",
    "a\nb",
    "\x1b[31mred",
    "\ud800",
    "é😀" * 40,
    "9" * 30,
    "x" * 5000,
    "true",
    "NaN",
    "F32",
    "F64",
    "BOOL",
    "role",
    "assistant",
    "(a+)+$",
    "(?:",
    "a*a*a*a*a*b",
    "medusa-1",
    "medusa-2",
    "chain",
    "{{ 1 }}",
)
VALUES = (
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    Raw("[]"),
    Raw("{}"),
    Raw("[[]]"),
    Raw('{"a": 1}'),
    Raw("[0]"),
    Raw("[-1]"),
    Raw("[0, 0]"),
    Raw("[1, 2, 3]"),
    Raw('[null, true, "x", 1.5, {}]'),
    Raw("9" * 5000),
    Raw("1e999"),
    Raw("-1e-999"),
    Raw("Infinity"),
    Raw("[" * 70 + "]" * 70),
    Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 1500 + "1" + "}" * 1500),
    Raw("[" + ",".join(["[]"] * 3000) + "]"),
    Raw("[" + ",".join(["0"] * 3000) + "]"),
    Raw("'single'"),
    Raw("{"),
    Raw(""),
)


def opened(value: Any) -> Any:
    """A JSON value whose objects are lists of members."""
    if isinstance(value, dict):
        return Members((key, opened(child)) for key, child in value.items())
    return [opened(child) for child in value] if isinstance(value, list) else value


def written(value: Any) -> str:
    """The text of an opened value."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Members):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(child)}" for key, child in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def places(value: Any) -> Iterator[tuple[list[Any], int]]:
    """Every member of every list and object inside an opened value, as its container and its number in it."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        for number, child in enumerate(container):
            yield container, number
            inner = child[1] if isinstance(container, Members) else child
            if isinstance(inner, list):
                waiting.append(inner)


def put(container: list[Any], number: int, value: Any) -> None:
    """Replaces a value where it stands."""
    container[number] = (container[number][0], value) if isinstance(container, Members) else value


def get(container: list[Any], number: int) -> Any:
    """The value that stands there."""
    return container[number][1] if isinstance(container, Members) else container[number]


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> str:
    """JSON that differs from a valid value in one to three places."""
    content = [opened(value)]
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        container, number = found[draw(st.integers(0, len(found) - 1))]
        action = draw(st.integers(0, 9))
        if action <= 4 or len(found) == 1:
            put(container, number, draw(st.sampled_from(VALUES)))
        elif action == 5 and container is not content:
            del container[number]
        elif action == 6:
            other, place = found[draw(st.integers(0, len(found) - 1))]
            put(container, number, copy.deepcopy(get(other, place)))  # by itself it might hold what holds it
        elif action == 7 and isinstance(container, Members):
            container[number] = (draw(st.sampled_from(TEXTS)), container[number][1])
        elif action == 8 and container is not content:
            copies = [container[number]] * draw(st.sampled_from((1, 2, 70)))
            container += copies
        else:
            put(container, number, [get(container, number)])
    return written(content[0])


PIECES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        (
            b"\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\0" * 8,
            b"[" * 3000,
            b"\n",
            b"\r",
            b'"',
            b"{}",
            b"\xef\xbb\xbf",
            b"1" * 5000,
        )
    ),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that differ from valid ones in one to four places."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        action = draw(st.integers(0, 5))
        if action == 0:
            content = content[:start]
        elif action == 1:
            content = content[:start] + bytes([draw(st.integers(0, 255))]) + content[start + 1 :]
        elif action == 2:
            content = content[:start] + draw(PIECES) + content[start:]
        elif action == 3:
            piece = draw(PIECES)
            content = content[:start] + piece + content[start + len(piece) :]
        elif action == 4:
            content = content[:start] + content[start + draw(st.integers(1, 40)) :]
        else:
            content += content[start : start + draw(st.integers(1, 400))]
    return content


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file, damaged in its structure, in its bytes, in both, or replaced by anything."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=64))
    if kind <= 6:
        text = draw(damaged_value(value)).encode("utf-8", "surrogatepass")
        return draw(damaged_bytes(text)) if kind == 6 else text
    return draw(damaged_bytes(json.dumps(value).encode()))


@st.composite
def damaged_lines(draw: st.DrawFn, rows: tuple[Any, ...]) -> bytes:
    """A file of JSON lines with one damaged row."""
    lines = [json.dumps(row).encode() for row in rows]
    number = draw(st.integers(0, len(rows) - 1))
    lines[number] = draw(damaged_json(rows[number]))
    return b"\n".join(lines) + draw(st.sampled_from((b"\n", b"", b"\r\n", b"\n\n", b"\0")))
