"""Everything in data_generation that reads files of others, and servers' answers, each with what it reads as it should."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from damage import damaged_bytes, damaged_json, damaged_lines
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from package_readers import put
from reader import Reader, one_error_line

import combine
import convert_to_sharegpt
import split
from parts import chat_answer
from parts.chat_server import ChatServer, PassingError, RowError, ServerError, asked_wait_s
from parts.chat_template import ChatTemplate
from parts.conversation_files import OutputFiles
from parts.conversation_rows import dump_row, parse_conversation
from parts.prompt_files import InputError, check_rows, read_rows

REFUSALS = (InputError, OSError)
ARCHIVE_BYTES = 120_000_000
"""A row of 16 MB in the making, and what 1 KiB of zstandard unpacks to, as pieces and joined."""

ROWS = (
    {"id": "1", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt_id": 7, "prompt": "Hello"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"data": ["a", "b", "c"]},
    "text",
)
CONVERSATIONS = tuple(
    {
        "id": f"{number}",
        "messages": [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": "Hello"}],
        "finish_reasons": ["stop"],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "model": "m",
    }
    for number in range(3)
)
TOKEN_ROW = {"id": "t", "input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, -100, 3]}


def lines(rows: tuple[Any, ...]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# ---- rows ----


def read_prompts(name: str) -> Callable[[Path], None]:
    def read(directory: Path) -> None:
        path = str(directory / name)
        size = check_rows(path)
        rows = list(read_rows(path))
        assert size.rows == len(rows) >= size.distinct > 0
        assert all(row.id and (row.turns or row.reason) for row in rows)

    return read


def prompts_reader(
    name: str, content: bytes, damage: SearchStrategy[bytes], inputs: int, free_bytes: int = 12_000_000
) -> Reader:
    make = lambda directory: put(directory, **{name.replace(".", "__"): content})  # noqa: E731
    return Reader(f"rows-{name}", make, read_prompts(name), {name: damage}, inputs, free_bytes, refusals=REFUSALS)


def packed(damage: SearchStrategy[bytes], pack: Callable[[bytes], bytes]) -> SearchStrategy[bytes]:
    """A whole archive of damaged rows, or a damaged archive."""
    return st.one_of(damage.map(pack), damage.flatmap(lambda content: damaged_bytes(pack(content))))


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def parquet(rows: tuple[Any, ...]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if "messages" in row]), stream)
    return stream.getvalue()


def read_conversations(directory: Path) -> None:
    for count, line in enumerate((directory / "a.jsonl").read_bytes().splitlines(keepends=True), 1):
        if not line.isspace():
            row = parse_conversation(line, f"a.jsonl:{count}")
            assert json.loads(dump_row(row.record)) is not None


def make_output(directory: Path) -> None:
    put(directory, out__jsonl=lines(CONVERSATIONS))
    (directory / "out.jsonl.failed.jsonl").write_bytes(lines(({"id": "8", "reason": "x"},)))
    (directory / "out.jsonl.skipped.jsonl").write_bytes(lines(({"id": "9", "reason": "y"},)))


def resume(directory: Path) -> None:
    """What a run does with the files of an earlier one; nothing that can be read gets lost."""
    output = directory / "out.jsonl"
    said: list[str] = []
    with OutputFiles(output, with_prompts=True, say=said.append) as files:
        assert all("\n" not in line for line in said)
        files.append_conversation(CONVERSATIONS[0] | {"id": "new"})
    with OutputFiles(output, say=said.append) as files:
        assert len(files.done) >= 1


# ---- commands ----


def command(main: Callable[[list[str]], int], *arguments: str) -> Callable[[Path], None]:
    """Runs a command in this process; its one line of an error becomes an InputError."""

    def read(directory: Path) -> None:
        out = directory.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        errors, output = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            status = main([part.format(directory=directory, out=out) for part in arguments])
        one_error_line(status, errors.getvalue())
        if status == 2:
            raise InputError(errors.getvalue().strip())

    return read


# ---- chat templates ----

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATED = "{{ 'Today: ' ~ strftime_now('%d %b %Y') ~ '\\n' }}" + TEMPLATE
CONFIG = {
    "bos_token": {"content": "<s>", "lstrip": False},
    "eos_token": "<|im_end|>",
    "add_bos_token": None,
    "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
}
TOKENIZER = {"version": "1.0", "post_processor": {"type": "TemplateProcessing", "single": ["<s>"]}, "decoder": None}
PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "user\n",
    "assistant\n",
    "system\n",
    "Hi",
    "\n",
    " ",
    "Today: 01 Feb 2003\n",
    "<think>\n\n</think>",
    "\ud800",
)


def make_tokenizer(directory: Path) -> None:
    put(
        directory,
        tokenizer_config__json=CONFIG,
        tokenizer__json=TOKENIZER,
        special_tokens_map__json={"unk_token": "<unk>"},
        text__txt=b"<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    )


def read_template(directory: Path) -> None:
    template = ChatTemplate.load(str(directory))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert isinstance(template.render(turns, add_generation_prompt=True), str)
    assert isinstance(template.user_prompt([]), str)
    read = template.split_turns((directory / "text.txt").read_bytes().decode("utf-8", "surrogatepass"))
    assert all(turn["role"] in ("system", "user", "assistant") for turn in read.turns)
    assert "\n" not in read.problem


TEXT = st.lists(st.sampled_from(PIECES), max_size=40).map(
    lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")
)
JINJA = st.one_of(
    damaged_bytes(TEMPLATE.encode()),
    damaged_bytes(DATED.encode()),
    st.lists(
        st.sampled_from(
            (
                "{{ ",
                " }}",
                "{% for m in messages %}",
                "{% endfor %}",
                "{% if ",
                " %}",
                "{% endif %}",
                "{% set x = ",
                "{% macro f(a) %}",
                "{% endmacro %}",
                "{% generation %}",
                "{% endgeneration %}",
                "{% break %}",
                "m['content']",
                "m.role",
                "messages",
                "strftime_now('%d')",
                "strftime_now('')",
                "raise_exception('no\\nline')",
                "namespace(a=1)",
                "range(99999)",
                "f(1)",
                "x",
                " ~ ",
                " + ",
                " * ",
                " ** ",
                " | ",
                "tojson",
                "join",
                "length",
                "'a'",
                "9",
                "[0]",
                ".__class__",
                "(",
                ")",
                "\n",
                "<|im_end|>",
            )
        ),
        max_size=14,
    ).map(lambda pieces: "".join(pieces).encode()),
)

# ---- servers ----

ANSWER = {
    "choices": [
        {"message": {"content": "Hello", "reasoning_content": "Hm."}, "finish_reason": "stop", "token_ids": [1, 2]}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "prompt_token_ids": [5, 6],
}
MODELS = {"object": "list", "data": [{"id": "m", "root": "org/m"}]}
HEADER = b"Fri, 27 Nov 2026 06:00:00 GMT"


def read_answer(directory: Path) -> None:
    server = ChatServer(None, "http://127.0.0.1:1/v1", None)  # type: ignore[arg-type]
    answer = chat_answer.read_answer((directory / "answer.json").read_bytes(), "m", 9, server.quote, may_be_empty=True)
    assert isinstance(answer.text, str) and isinstance(answer.reasoning, str)
    json.dumps([answer.text, answer.finish_reason, answer.prompt_ids, answer.answer_ids], ensure_ascii=False).encode()
    assert all(
        ids is None or all(type(index) is int for index in ids) for ids in (answer.prompt_ids, answer.answer_ids)
    )


def read_models(directory: Path) -> None:
    server = ChatServer(None, "http://127.0.0.1:1/v1", None)  # type: ignore[arg-type]

    async def exchange(*_: Any) -> tuple[int, bytes, None]:
        return 200, (directory / "models.json").read_bytes(), None

    server.exchange = exchange  # type: ignore[method-assign]
    asyncio.run(server.find_model())
    assert isinstance(server.model, str) and isinstance(server.model_root, str)


def read_header(directory: Path) -> None:
    assert 0 <= asked_wait_s((directory / "header.txt").read_bytes().decode(errors="replace")) <= 3600


SERVER_REFUSALS = (PassingError, RowError, ServerError)
EVAL = ("--eval_fraction", "0.5", "--train_path", "{out}/train.jsonl", "--eval_path", "{out}/eval.jsonl")

DATA_READERS = [
    prompts_reader("p.jsonl", lines(ROWS), damaged_lines(ROWS), 500),
    prompts_reader("p.json", json.dumps(ROWS).encode(), damaged_json(list(ROWS)), 400),
    prompts_reader("p.txt", b"Hello\nHow are you?\n", damaged_bytes(b"Hello\nHow are you?\n"), 100),
    prompts_reader(
        "p.jsonl.gz", gzip.compress(lines(ROWS)), packed(damaged_lines(ROWS), gzip.compress), 250, ARCHIVE_BYTES
    ),
    prompts_reader("p.jsonl.zst", zstd(lines(ROWS)), packed(damaged_lines(ROWS), zstd), 250, ARCHIVE_BYTES),
    prompts_reader(
        "p.json.zst", zstd(json.dumps(ROWS).encode()), packed(damaged_json(list(ROWS)), zstd), 150, ARCHIVE_BYTES
    ),
    Reader(
        "parquet",
        lambda directory: put(directory, p__parquet=parquet(ROWS[:1])),
        read_prompts("p.parquet"),
        {"p.parquet": damaged_bytes(parquet(ROWS[:1]))},
        150,
        ARCHIVE_BYTES,
        free_address_space=True,
        refusals=REFUSALS,
    ),
    Reader(
        "conversations",
        lambda directory: put(directory, a__jsonl=lines((*CONVERSATIONS, TOKEN_ROW))),
        read_conversations,
        {"a.jsonl": damaged_lines((*CONVERSATIONS, TOKEN_ROW))},
        400,
        refusals=REFUSALS,
    ),
    Reader(
        "resumed-run",
        make_output,
        resume,
        {
            "out.jsonl": damaged_lines(CONVERSATIONS),
            "out.jsonl.failed.jsonl": damaged_lines(({"id": "8", "reason": "x"},)),
            "out.jsonl.skipped.jsonl": damaged_lines(({"id": "9", "reason": "y"},)),
        },
        400,
        refusals=REFUSALS,
    ),
    Reader(
        "combine-command",
        lambda directory: put(directory, a__jsonl=lines(CONVERSATIONS), b__jsonl=lines(CONVERSATIONS[1:])),
        command(
            combine.main,
            "--data_path",
            "{directory}/a.jsonl",
            "{directory}/b.jsonl",
            "--output_path",
            "{out}/c.jsonl",
            "--common_keys",
        ),
        {"a.jsonl": damaged_lines(CONVERSATIONS), "b.jsonl": damaged_lines(CONVERSATIONS[1:])},
        150,
        refusals=REFUSALS,
    ),
    Reader(
        "split-command",
        lambda directory: put(directory, a__jsonl=lines(CONVERSATIONS)),
        command(split.main, "--data_path", "{directory}/a.jsonl", *EVAL),
        {"a.jsonl": damaged_lines(CONVERSATIONS)},
        150,
        refusals=REFUSALS,
    ),
    Reader(
        "convert-command",
        lambda directory: (
            make_tokenizer(directory),
            put(directory, a__jsonl=lines(({"id": 1, "text": (directory / "text.txt").read_text()},))),
        )[-1],
        command(
            convert_to_sharegpt.main,
            *("--data_path", "{directory}/a.jsonl", "--output_path", "{out}/c.jsonl", "--tokenizer", "{directory}"),
        ),
        {
            "a.jsonl": damaged_lines(({"id": 1, "text": "<s><|im_start|>user\nHi<|im_end|>\n"},)),
            "tokenizer_config.json": damaged_json(CONFIG),
        },
        100,
        refusals=REFUSALS,
    ),
    Reader(
        "chat-template",
        make_tokenizer,
        read_template,
        {
            "tokenizer_config.json": damaged_json(CONFIG),
            "tokenizer.json": damaged_json(TOKENIZER),
            "special_tokens_map.json": damaged_json({"unk_token": "<unk>"}),
            "chat_template.jinja": JINJA,
            "text.txt": TEXT,
        },
        600,
        refusals=REFUSALS,
    ),
    Reader(
        "answer",
        lambda directory: put(directory, answer__json=ANSWER),
        read_answer,
        {"answer.json": damaged_json(ANSWER)},
        400,
        refusals=SERVER_REFUSALS,
    ),
    Reader(
        "models",
        lambda directory: put(directory, models__json=MODELS),
        read_models,
        {"models.json": damaged_json(MODELS)},
        150,
        refusals=SERVER_REFUSALS,
    ),
    Reader(
        "retry-after",
        lambda directory: put(directory, header__txt=HEADER),
        read_header,
        {
            "header.txt": st.one_of(
                damaged_bytes(HEADER), damaged_bytes(b"120"), st.sampled_from((b"1e308", b"nan", b"-1", b"inf"))
            )
        },
        100,
        refusals=(),
    ),
]
"""All of them."""
