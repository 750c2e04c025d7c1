"""Whether heads fit the model that they will be used with: output embedding, vocabulary, tokenizer, chat template.

Contract: reads files that are here; loads no model and downloads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from axolotl_medusa.model.file_names import CONFIG_FILE
from axolotl_medusa.model.sources import Source, find_source
from axolotl_medusa.serving.chat_templates import tokenizer_notes

_CHECKS = "axolotl_medusa.model.trained_with"
"""Its logger says what a check cannot tell."""


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        kind: `ok`, `note` for what may be as it is, or `problem`.
        text: What was found, and what to do.
    """

    kind: Literal["ok", "note", "problem"]
    text: str


def examine(heads: str | Path, base_model: str | None = None) -> list[Finding]:
    """Everything that is right and wrong with heads and their model.

    Args:
        heads: A heads directory, an output_dir, a checkpoint, or an export with canonical heads.
        base_model: Directory or Hub name; by default what training wrote down.
    """
    from axolotl_medusa.model.heads_directory import read_heads

    try:
        source = find_source(heads, base_model)
        file = read_heads(source.heads_dir)
    except ValueError as error:
        return [Finding("problem", str(error))]
    found = [
        Finding(
            "ok",
            f"{source.heads_dir} holds {file.config['medusa_num_heads']} whole {source.form} heads, trained by "
            f"{source.meta.get('recipe', 'an unknown recipe')}",
        ),
        *_versions(source),
    ]
    try:
        local = _local(source)
    except ValueError as error:
        return [*found, Finding("problem", str(error))]
    return [*found, *_model(local, file), *_tokenizer(local)]


def _versions(source: Source) -> Iterator[Finding]:
    from axolotl_medusa.doctor.versions import installed_versions

    trained = source.meta.get("versions")
    now = {each.name: each.version for each in installed_versions()}
    for name, version in trained.items() if isinstance(trained, dict) else ():
        if now.get(name) and version and now[name] != version:
            yield Finding("note", f"trained with {name} {version}, here is {now[name]}")


def _local(source: Source) -> Source:
    """The source with its model as a directory that is here.

    Raises:
        ValueError: It is not here.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = source.base_model
    if source.full_model_dir is not None or name is None or Path(name).expanduser().is_dir():
        source.model_dir()
        return source
    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE)
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise ValueError(
            f"the base model {name} is neither a directory nor in the Hub's cache, so the heads were not compared with it: "
            "get it, or name it with --base-model"
        )
    return replace(source, base_model=str(Path(cached).parent))


def _model(source: Source, file: Any) -> Iterator[Finding]:
    from axolotl_medusa.model.stored_embeddings import stored_output_embedding
    from axolotl_medusa.model.trained_with import check_output_layer, check_shape

    directory, notes = source.model_dir(), _Notes()
    logger = logging.getLogger(_CHECKS)
    logger.addHandler(notes)
    propagates, logger.propagate = logger.propagate, False
    try:
        stored = stored_output_embedding(directory)
        check_shape(stored.shape, (file.config["vocab_size"], file.config["hidden_size"]), str(directory))
        check_output_layer(source, stored.load, str(directory))
    except ValueError as error:
        yield Finding("problem", str(error))
        return
    finally:
        logger.removeHandler(notes)
        logger.propagate = propagates
    yield from (Finding("note", line) for line in notes.lines)
    shape = f"{file.config['vocab_size']:,} x {file.config['hidden_size']:,}"
    has_hash = source.meta.get("lm_head_sha256") is not None and not notes.lines
    same = f"the output embedding of {directory} is the one that the heads were trained with ({shape})"
    unknown = f"the output embedding of {directory} has the heads' sizes ({shape}); no hash says more"
    yield Finding("ok", same) if has_hash else Finding("note", unknown)


def _tokenizer(source: Source) -> Iterator[Finding]:
    served = source.model_dir()
    files = source.tokenizer_files()
    trained = files[0].parent if files else served
    if trained.resolve() == served.resolve():
        yield Finding(
            "note",
            f"{source.heads_dir} has no tokenizer files of its own, so tokens and chat template were not compared",
        )
        return
    try:
        notes = list(tokenizer_notes(trained, served))
    except (ValueError, OSError) as error:
        yield Finding("problem", f"the tokenizers' files cannot be compared: {error}")
        return
    yield from (Finding("problem", line) for line in notes)
    if not notes:
        yield Finding("ok", "tokens and chat template of heads and model are the same")


class _Notes(logging.Handler):
    """Keeps what a check says without refusing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
