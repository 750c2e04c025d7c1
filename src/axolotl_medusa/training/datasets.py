"""Looks at training files before anything is loaded: is there an answer to learn from? And at what is then trained on.

Contract: knows axolotl's `datasets` entries and plain local files; knows nothing about models. Axolotl masks and drops
rows itself; this only turns "nothing left" into a line that names the file, and drops columns that are not tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ASSISTANT_ROLES = ("assistant", "gpt")
_JSON_SUFFIXES = (".json", ".jsonl")
_TOKEN_COLUMNS = frozenset({"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "length"})


def dataset_problems(cfg: Mapping[str, Any]) -> list[str]:
    """One line for each local dataset in which no row has a turn to train on.

    Checked are JSON and JSONL files with `type: chat_template` (an assistant turn) or an empty type (a label). A file
    is read only as far as its first good row.

    Args:
        cfg: The YAML as a mapping.
    """
    problems = []
    for entry in [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]:
        path = Path(str(entry.get("path") or "")).expanduser()
        if not path.is_file() or path.suffix not in _JSON_SUFFIXES:
            continue
        kind = entry.get("type") or ""
        if kind == "chat_template" and _trains_by_other_rules(cfg, entry):
            continue
        if kind == "chat_template":
            problem = _count_bad_rows(
                path, lambda row, entry=entry: _has_assistant_turn(row, entry), "an assistant turn"
            )
        elif kind == "":
            problem = _count_bad_rows(path, _has_label, "a label other than -100")
        else:
            continue
        if problem:
            problems.append(f"datasets path {path}: {problem}")
    return problems


def _trains_by_other_rules(cfg: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    marks = ("message_field_training", "message_field_training_detail")
    return bool(cfg.get("train_on_inputs")) or any(entry.get(mark) for mark in marks)


def _count_bad_rows(path: Path, is_good: Any, wanted: str) -> str | None:
    count = 0
    for row in _rows(path):
        count += 1
        if is_good(row):
            return None
    return (
        f"none of its {count} rows has {wanted}; expected at least one (are field_messages and roles_to_train right?)"
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        start = ""
        while path.suffix == ".json" and not start and (line := file.readline()):
            start = line.strip()
        file.seek(0)
        if start.startswith("["):
            try:
                yield from json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): expected a list of objects") from None
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number} is not JSON ({error.msg}): expected one object a line") from None


def _has_assistant_turn(row: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    mapping = entry.get("message_property_mappings") or {}
    role_key = mapping.get("role") or "role"
    wanted = {str(role) for role in entry.get("roles_to_train") or _ASSISTANT_ROLES}
    for role, spellings in (entry.get("roles") or {}).items():
        if role in wanted:
            wanted |= {str(spelling) for spelling in spellings}
    if wanted & set(_ASSISTANT_ROLES):
        wanted |= set(_ASSISTANT_ROLES)
    turns = row.get(entry.get("field_messages") or "messages") if isinstance(row, Mapping) else None
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return any(str(turn.get(role_key, turn.get("from"))) in wanted for turn in turns)


def _has_label(row: Mapping[str, Any]) -> bool:
    return isinstance(row, Mapping) and any(label != -100 for label in row.get("labels") or [])


def token_columns_only(dataset: Any) -> Any:
    """Returns a prepared dataset without columns such as ids and texts.

    Axolotl keeps all columns of rows that are already tokenised, and its collators for packed samples fail on them.
    Whatever does not name its columns (None, a streamed dataset) is returned as it is.
    """
    extra = [name for name in getattr(dataset, "column_names", None) or () if name not in _TOKEN_COLUMNS]
    return dataset.remove_columns(extra) if extra else dataset
