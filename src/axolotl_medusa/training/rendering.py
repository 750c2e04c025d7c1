"""Renders the conversations of a data set as axolotl will, before anything is loaded: which rows does the template refuse?

Contract: axolotl's own strategy turns a row into text; this module runs it over the rows, in parallel and with bounded
memory, and says which rows fail and why. `renderable_chats` leaves such rows out.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl.prompt_strategies import load as load_strategy
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault, remove_none_values
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from jinja2 import TemplateError

from axolotl_medusa.errors import first_line
from axolotl_medusa.training.datasets import local_json_file, rows_of

LOG = get_logger(__name__)

LEAVES_BAD_ROWS_OUT = "axolotl_medusa.training.renderable_chats"
"""What `medusa_skip_bad_rows` writes in place of `type: chat_template`."""

LONGEST_LOOK = 200_000
"""Rows of one data set that are rendered beforehand; axolotl meets the others when it tokenises them."""

_CHUNK = 64
"""Rows that a process renders at a time."""

_INLINE = 16
"""Chunks that are rendered without other processes, which take longer to start."""

_NAMED = 3
"""Bad rows that a line names."""

REFUSALS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What templates and axolotl's strategy raise at a row that they cannot use."""


@dataclass
class Rendered:
    """What came of the rows of a file or data set.

    Attributes:
        name: Its path.
        count: Rows that were rendered.
        is_whole: Whether these are all rows of the file.
        bad: How many of them failed.
        named: Number, counted from 1, and reason of the first that failed.
    """

    name: str
    count: int = 0
    is_whole: bool = True
    bad: int = 0
    named: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """One line that names the first bad rows."""
        rows = f"{self.count} rows" if self.is_whole else f"the first {self.count} rows"
        named = "; ".join(f"{self.name}:{number}: {reason}" for number, reason in self.named)
        return f"{self.bad} of {rows} cannot be rendered by the chat template, {named}" + (
            "; ..." if self.bad > len(self.named) else ""
        )


def check_rendering(cfg: DictDefault, tokenizer: Any) -> None:
    """Refuses data with rows that the chat template cannot render; with `medusa_skip_bad_rows` has them left out, and counts them.

    Args:
        cfg: The validated YAML; with `medusa_skip_bad_rows` the type of its datasets is changed in place.
        tokenizer: The tokenizer with the YAML's own tokens.

    Raises:
        ValueError: There are such rows, or no others.
    """
    problems = []
    for entry, found in render_datasets(cfg, tokenizer) if is_main_process() else ():
        if found.bad and cfg.medusa_skip_bad_rows and found.bad < found.count:
            LOG.warning(f"medusa_skip_bad_rows: {found}; they are left out")
        elif found.bad:
            problems.append(f"datasets path {entry.path}: {found}")
    if problems:
        advice = "" if cfg.medusa_skip_bad_rows else ", or set medusa_skip_bad_rows: true to leave them out"
        raise ValueError(f"{'; '.join(problems)}; repair or remove them{advice}")
    if cfg.medusa_skip_bad_rows:
        for entry in itertools.chain(cfg.datasets or [], cfg.test_datasets or []):
            if entry.get("type") == "chat_template":
                entry.type = LEAVES_BAD_ROWS_OUT


def render_datasets(cfg: DictDefault, tokenizer: Any) -> Iterator[tuple[DictDefault, Rendered]]:
    """Renders all conversations that the YAML trains or evaluates on.

    JSON files are read row by row. Other data is loaded as axolotl does; what cannot be loaded is left to it.

    Args:
        cfg: The validated YAML.
        tokenizer: The tokenizer with the YAML's own tokens.

    Yields:
        The entry under `datasets` or `test_datasets`, and what came of its rows.

    Raises:
        ValueError: A file is damaged, or the chat template is.
    """
    for entry in itertools.chain(cfg.datasets or [], cfg.test_datasets or []):
        if entry.get("type") != "chat_template" or cfg.processor_type or cfg.is_multimodal:
            continue
        file = local_json_file(entry)
        rows = rows_of(file) if file and "[" not in str(entry.get("split") or "") else loaded_rows(cfg, entry)
        if rows is None:
            continue
        try:
            strategy = load_strategy("chat_template", tokenizer, cfg, entry)
        except TemplateError as error:
            raise ValueError(
                f"the chat template for {entry.path} is not Jinja that axolotl reads ({first_line(error)}): mend or replace it"
            ) from error
        yield entry, render_rows(str(file or entry.path), rows, strategy, int(cfg.dataset_num_proc or 1))


def loaded_rows(cfg: DictDefault, entry: DictDefault) -> Iterable[Any] | None:
    """The rows of a data set as axolotl loads it, with its caches; None where it streams, or cannot be loaded.

    Data that is not on this disk is only looked at before it was prepared once: a run may go on where it is out of reach.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    is_here = Path(str(entry.get("path"))).exists()
    prepared = Path(cfg.dataset_prepared_path) if cfg.dataset_prepared_path else None
    if cfg.streaming or not (is_here or prepared is None or not prepared.is_dir() or not any(prepared.iterdir())):
        return None
    try:
        found = load_dataset_with_config(entry, cfg.hf_use_auth_token)
    except (DatasetsError, OSError, ValueError) as error:
        LOG.warning(
            f"rows of {entry.get('path')} are not rendered beforehand, it cannot be loaded: {first_line(error)}"
        )
        return None
    if isinstance(found, Mapping):
        found = found.get(entry.get("split") or "train")
    return found if isinstance(found, Dataset) else None


def render_rows(name: str, rows: Iterable[Any], strategy: Any, processes: int) -> Rendered:
    """Renders rows of a file or data set, the first `LONGEST_LOOK`, in up to `processes` processes."""
    numbered = enumerate(rows, start=1)
    found = Rendered(name)
    looked_at = itertools.islice(numbered, LONGEST_LOOK)
    chunks = iter(lambda: list(itertools.islice(looked_at, _CHUNK)), [])
    inline = itertools.islice(chunks, None if processes < 2 else _INLINE)
    for chunk in inline:
        _add(found, chunk, bad_rows(chunk, strategy))
    if processes > 1:
        for chunk, bad in _in_processes(chunks, strategy, processes):
            _add(found, chunk, bad)
    found.is_whole = next(numbered, None) is None
    return found


def _add(found: Rendered, chunk: list[tuple[int, Any]], bad: list[tuple[int, str]]) -> None:
    found.count += len(chunk)
    found.bad += len(bad)
    found.named += bad[: _NAMED - len(found.named)]


_strategy: Any = None
"""The strategy of a process that renders; set before the process is forked."""


def _in_processes(
    chunks: Iterator[list[tuple[int, Any]]], strategy: Any, processes: int
) -> Iterator[tuple[list[tuple[int, Any]], list[tuple[int, str]]]]:
    """Chunks and their bad rows, in order; no more chunks are held than the processes have before them."""
    global _strategy
    chunk = next(chunks, None)
    if chunk is None:
        return
    _strategy = strategy
    waiting: deque[tuple[list[tuple[int, Any]], Future[list[tuple[int, str]]]]] = deque()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        while chunk is not None or waiting:
            if chunk is not None and len(waiting) < 2 * processes:
                waiting.append((chunk, pool.submit(_bad_rows, chunk)))
                chunk = next(chunks, None)
            else:
                rows, bad = waiting.popleft()
                yield rows, bad.result()


def _bad_rows(chunk: list[tuple[int, Any]]) -> list[tuple[int, str]]:
    return bad_rows(chunk, _strategy)


def bad_rows(chunk: Iterable[tuple[int, Any]], strategy: Any) -> list[tuple[int, str]]:
    """Numbers and reasons of the rows that cannot be rendered."""
    reasons = ((number, why_not(row, strategy)) for number, row in chunk)
    return [(number, reason) for number, reason in reasons if reason is not None]


def why_not(row: Any, strategy: Any) -> str | None:
    """Why a row cannot be rendered, None where it can."""
    if not isinstance(row, Mapping):
        return f"it is {type(row).__name__}, expected an object"
    key = strategy.prompter.field_messages
    turns = row.get(key)
    if not turns:
        return f"{key} is {'empty' if key in row and turns is not None else 'missing'}"
    try:
        row = remove_none_values(row)
        strategy.prompter.build_prompt_text(strategy.get_conversation_thread(row), tools=strategy._get_tools(row))
    except REFUSALS as error:
        return _without_content(turns, strategy) or first_line(error) or type(error).__name__
    return None


def _without_content(turns: Any, strategy: Any) -> str | None:
    """The turn that most likely made the template fail: one without a text."""
    key = strategy.prompter.message_property_mappings.get("content", "content")
    for number, turn in enumerate(turns if isinstance(turns, list) else [], start=1):
        if isinstance(turn, Mapping) and turn.get(key) is None and not turn.get("tool_calls"):
            return f"turn {number} has no {key}"
    return None
