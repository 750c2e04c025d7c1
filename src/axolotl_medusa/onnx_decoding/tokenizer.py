"""A tokenizer and its chat template, without transformers.

Contract: reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; needs the packages tokenizers and jinja2.
It has what commands ask of transformers' tokenizers: calling it, `decode`, `chat_template` and `apply_chat_template`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from axolotl_medusa.decoding.library_errors import one_line_for
from axolotl_medusa.model.json_files import read_json

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class LightTokenizer:
    """A tokenizer of an exported model.

    Args:
        directory: Where its files are.

    Attributes:
        chat_template: The template's text, None without one.

    Raises:
        ValueError: A file is missing or damaged.
        RuntimeError: A package is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory).expanduser()
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{directory} has no tokenizer.json: expected the tokenizer that the export wrote there")
        with one_line_for(file, "is no tokenizer that can be loaded"):
            self._tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = directory / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        self._special = {name: _content(config.get(name)) for name in _SPECIAL if _content(config.get(name))}
        self.chat_template = _template(directory, config)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Its tokens, as `{"input_ids": [...]}`."""
        return {"input_ids": list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, turns: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation as transformers does: a sandboxed template with its special tokens.

        Args:
            turns: `{"role", "content"}` each.
            tokenize: Must be False: the text is what is asked for here.
            add_generation_prompt: Whether the text ends where the model answers.
        """
        if tokenize or self.chat_template is None:
            raise ValueError("a chat template renders text, and there must be one: save chat_template.jinja")
        sandbox = importlib.import_module("jinja2.sandbox")
        errors = importlib.import_module("jinja2.exceptions")

        def raise_exception(message: str) -> None:
            raise errors.TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        template = environment.from_string(self.chat_template)
        return str(template.render(messages=list(turns), add_generation_prompt=add_generation_prompt, **self._special))


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: export the model again") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
