"""`make docs`: writes the tables of docs/*.md that come from the code, between their marks.

    python -m docs.write_pages

A page keeps its prose. What stands between `<!-- table NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.renamed_keys import RENAMED_BY_AXOLOTL

FOLDER = Path(__file__).parent
MARKED = re.compile(r"(?s)(?<=<!-- table )(\w+) -->\n.*?(?=<!-- end -->)")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
TYPES = {int: "whole number", float: "number", str: "text"}


def yaml_value(value: Any) -> str:
    """A value as a YAML has it; – for none."""
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def default(key: str, field: FieldInfo) -> str:
    """What a key is when the YAML leaves it out, in a plain run and in one with self-distillation."""
    if field.is_required():
        return "required"
    plain, distilled = (
        getattr(MedusaArgs(medusa_num_heads=1, medusa_self_distillation=on), key) for on in (False, True)
    )
    if plain == distilled or key == "medusa_self_distillation":
        return yaml_value(plain)
    return f"{yaml_value(plain)}; {yaml_value(distilled)} with self-distillation"


def values(field: FieldInfo) -> str:
    """What a key may be: its type with its bounds, or the words that it takes."""
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):  # `X | None`, where no value means the default
        (annotation,) = (each for each in typing.get_args(annotation) if each is not types.NoneType)
    if typing.get_origin(annotation) is Literal:
        return ", ".join(yaml_value(each) for each in typing.get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    bounds = (
        f"{words} {getattr(each, name):g}"
        for each in field.metadata
        for name, words in BOUNDS.items()
        if hasattr(each, name)
    )
    return ", ".join([TYPES[typing.cast(type, annotation)], *bounds])


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def yaml_keys() -> str:
    """Every `medusa_*` key of a YAML."""
    rows = (
        (f"`{key}`", default(key, field), values(field), field.description or "")
        for key, field in MedusaArgs.model_fields.items()
    )
    return table(("key", "default", "values", "meaning"), rows)


def renamed_keys() -> str:
    """Keys of axolotl that old YAMLs have."""
    return table(("key", "today"), ((f"`{key}`", hint) for key, hint in RENAMED_BY_AXOLOTL.items()))


TABLES: dict[str, Callable[[], str]] = {"yaml_keys": yaml_keys, "renamed_keys": renamed_keys}


def with_tables(text: str) -> str:
    """The text of a page with its marked tables as the code has them today."""
    return MARKED.sub(lambda mark: f"{mark[1]} -->\n{TABLES[mark[1]]()}", text)


def main() -> None:
    """Writes the pages whose tables have changed."""
    for page in sorted(FOLDER.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page}")


if __name__ == "__main__":
    main()
