"""Sees to it that rows of several files can be trained on together. Knows nothing about files."""

from typing import Any

from parts.conversation_rows import ConversationRow
from parts.prompt_files import InputError


class RowKinds:
    """What all rows so far have in common.

    A `prompt` is the same as `messages` with one user turn: where both are found, rows are `mixed` and all become messages.
    """

    def __init__(self, common_keys: bool) -> None:
        """Starts with no rows; `common_keys`: rows may have different keys, and keep those that all have."""
        self.common_keys = common_keys
        self.first = ""
        self.layouts: set[str] = set()
        self.has_ids = self.differ = False
        self._keys: frozenset[str] = frozenset()

    @property
    def mixed(self) -> bool:
        """Whether prompts become messages."""
        return len(self.layouts) > 1

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the rows that are written."""
        only_prompts = self.layouts == {"prompt"}
        return self._keys - {"messages"} | {"prompt"} if only_prompts else self._keys

    def check(self, row: ConversationRow, where: str) -> None:
        """Compares a row with those before it; raises InputError if it does not go with them."""
        has_ids, keys = "input_ids" in row.record, frozenset(row.record)
        if row.layout == "prompt":
            keys = keys - {"prompt"} | {"messages"}
        if not self.first:
            self.first, self.layouts, self.has_ids, self._keys = where, {row.layout}, has_ids, keys
        goes_with = row.layout in self.layouts or {row.layout, *self.layouts} == {"prompt", "messages"}
        if not goes_with or has_ids != self.has_ids:
            first = min(self.layouts)
            found, expected = (
                f"'{layout}' with{'' if ids else 'out'} token ids"
                for layout, ids in ((row.layout, has_ids), (first, self.has_ids))
            )
            raise InputError(f"{where}: found {found}, expected {expected} as in {self.first}; make all in one layout")
        self.layouts.add(row.layout)
        if keys != self._keys:
            odd = ", ".join(sorted(keys ^ self._keys))
            if not self.common_keys:
                advice = "add --common_keys to leave out what not all rows have"
                raise InputError(f"{where}: found other keys ({odd}) than in {self.first}, expected the same; {advice}")
            self._keys, self.differ = self._keys & keys, True


def as_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with its prompt, if it is one, as a user turn of messages."""
    if "prompt" not in record or "messages" in record:
        return record
    turn = {"role": "user", "content": record["prompt"]}
    return {
        ("messages" if key == "prompt" else key): ([turn] if key == "prompt" else value)
        for key, value in record.items()
    }
