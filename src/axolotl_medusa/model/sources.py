"""Where trained heads are and which model they were trained with: a heads directory, an output_dir, a checkpoint.

Contract: knows the layout that training leaves on disk; reads small JSON files and the names and shapes of tensors,
never a tensor. What the model's weights are is `serving.served_model`'s to say.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, Literal

from axolotl_medusa.model.checkpoints import checkpoints
from axolotl_medusa.model.file_names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    HEADS_FILE,
    HEADS_FOLDER,
    META_FILE,
    TOKENIZER_FILES,
    TORCH_FILE,
    TORCH_INDEX,
)
from axolotl_medusa.model.head_form import HeadForm, form_of
from axolotl_medusa.model.heads_directory import open_heads
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.model.tensor_files import SAFETENSORS_FILE, SAFETENSORS_INDEX, TensorFiles

_FULL_MODEL_FILES = (SAFETENSORS_INDEX, SAFETENSORS_FILE, TORCH_INDEX, TORCH_FILE)
_LONGEST_TEXT = 1000
"""Characters of a name or path."""
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")
_TORCH_WEIGHTS = "pytorch_model*.bin"
"""Downloaded only where a model has no safetensors: many have both."""


class NoHeadsError(ValueError):
    """A path holds nothing that training wrote."""


@dataclass(frozen=True)
class Source:
    """Trained heads and the model that they belong to.

    Attributes:
        heads_dir: The heads directory.
        config: Its `config.json`.
        meta: Its `medusa_meta.json`, empty if it has none.
        base_model: Directory or Hub name of the base model, None where nothing names one.
        adapter_dir: Where the adapter is that belongs on the base model, None without one.
        full_model_dir: Where Medusa-2 wrote a full model, None if it did not.
        output_dir: The output_dir or checkpoint that was read, None for a heads directory that stands alone.
    """

    heads_dir: Path
    config: dict[str, Any]
    meta: dict[str, Any]
    base_model: str | None
    adapter_dir: Path | None = None
    full_model_dir: Path | None = None
    output_dir: Path | None = None

    @property
    def model_kind(self) -> Literal["base", "adapter", "full"]:
        """What has to be served: the base model as it is, with an adapter, or a model of its own."""
        if self.full_model_dir is not None:
            return "full"
        return "base" if self.adapter_dir is None else "adapter"

    @property
    def form(self) -> HeadForm:
        """`shared`, `separate` or `trained`."""
        return form_of(self.config)

    def heads(self) -> TensorFiles:
        """The heads' tensors, none of them read yet."""
        return TensorFiles.open(self.heads_dir / HEADS_FILE)

    def model_dir(self) -> Path:
        """The directory with the model's weights, before any adapter; a base model on the Hub is downloaded.

        Raises:
            ValueError: Nothing names a base model, or it is neither a directory nor on the Hub.
        """
        return self.full_model_dir or self.base_model_dir()

    def base_model_dir(self) -> Path:
        """The base model's directory, downloaded from the Hub where it is not a local one.

        Raises:
            ValueError: Nothing names a base model, or it is neither a directory nor on the Hub.
        """
        if self.base_model is None:
            raise ValueError(
                f"{self.heads_dir / CONFIG_FILE} names no base_model_name_or_path: name the base model with --base-model"
            )
        path = Path(self.base_model).expanduser()
        return path if path.is_dir() else self._downloaded

    @functools.cached_property
    def _downloaded(self) -> Path:
        """The base model's files from the Hub, its weights in one form; looked up once."""
        from huggingface_hub import snapshot_download

        trained_on = yaml_value(self.meta, "base_model") in (None, self.base_model)
        revision = yaml_value(self.meta, "revision_of_model") if trained_on else None
        directory = Path()
        try:
            for patterns in (_DOWNLOADED, (*_DOWNLOADED, _TORCH_WEIGHTS)):
                directory = Path(
                    snapshot_download(str(self.base_model), revision=revision, allow_patterns=list(patterns))
                )
                if any(directory.glob("*.safetensors")):
                    break
        except (OSError, ValueError) as error:  # offline, unknown, gated, or a path of another machine
            raise ValueError(
                f"base model {self.base_model} is neither a directory here nor can it be downloaded "
                f"({type(error).__name__}): name its directory with --base-model"
            ) from error
        return directory

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files: those beside the heads, else of the run, else of a model that is on this disk.

        Links out of their directory are left out: an export copies these files, and may be published.
        """
        base = Path(self.base_model).expanduser() if self.base_model else None
        for directory in (self.heads_dir, self.output_dir, self.full_model_dir, base):
            if directory is not None and directory.is_dir():
                named = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}
                if found := sorted(path for path in named if path.suffix != ".py" and stays_inside(path, directory)):
                    return found
        return []


def find_source(path: str | Path, base_model: str | None = None) -> Source:
    """Finds the heads and their model.

    With an output_dir or a checkpoint, `base_model` is the model that the run started from: what its adapter is merged
    into. With a heads directory, `base_model` is the model that the heads will be served with, as it is; an adapter
    that lies beside the heads, as in an export for LoRAX, belongs on it. Without `base_model`, the `medusa_heads` of a
    Medusa-2 run are read together with the run's directory around them.

    Args:
        path: A heads directory, an output_dir of any recipe, a checkpoint in one, or an export with canonical heads.
        base_model: Directory or Hub name of the base model; by default what training wrote down.

    Returns:
        What was found; tensors are not read yet.

    Raises:
        ValueError: There are no heads, they are damaged, or the model that they were trained with is missing.
    """
    heads_dir, output_dir = _directories(Path(path).expanduser())
    config, meta = read_json(heads_dir / CONFIG_FILE), {}
    if (heads_dir / META_FILE).is_file():
        meta = read_json(heads_dir / META_FILE)
    _verify(heads_dir, config)
    alone, is_export = output_dir is None, "export" in meta
    # An export names the model that it is served with; what training wrote names the one that it started from.
    has_trained_model = meta.get("recipe") == "medusa-2" and not is_export
    adapter_dir = _adapter_beside(heads_dir, meta, base_model) if alone else None
    full_model_dir = None
    if alone and base_model is None and adapter_dir is None and not is_export:
        if meta.get("recipe") == "medusa-1":
            adapter_dir, _ = trained_model(heads_dir, meta)
        elif has_trained_model and heads_dir.resolve().name == HEADS_FOLDER:
            output_dir = heads_dir.resolve().parent
    if output_dir is not None:
        adapter_dir, full_model_dir = trained_model(output_dir, meta)
    if has_trained_model and adapter_dir is None and full_model_dir is None and not (alone and base_model):
        raise ValueError(_missing_model(output_dir or heads_dir))
    named = base_model or text_value(config, "base_model_name_or_path", heads_dir / CONFIG_FILE)
    if named is None and adapter_dir is not None:
        file = adapter_dir / ADAPTER_CONFIG_FILE
        named = text_value(read_json(file), "base_model_name_or_path", file)
    return Source(heads_dir, config, meta, named, adapter_dir, full_model_dir, output_dir)


def _adapter_beside(heads_dir: Path, meta: Mapping[str, Any], base_model: str | None) -> Path | None:
    """The directory of heads that stand alone, where an adapter lies in it too.

    Raises:
        ValueError: They were exported with an adapter, which is gone, and nobody says which model has it merged.
    """
    if (heads_dir / ADAPTER_CONFIG_FILE).is_file():
        return heads_dir
    exported = meta.get("export")
    if base_model is None and isinstance(exported, dict) and exported.get("adapter"):
        raise ValueError(
            f"{heads_dir} has no {ADAPTER_CONFIG_FILE}, but was exported with an adapter: complete the directory, or name the "
            "model with the adapter merged as --base-model"
        )
    return None


def adapter_file(adapter_dir: Path) -> Path:
    """The file with an adapter's tensors, as peft wrote it.

    Raises:
        ValueError: It is missing.
    """
    for name in (ADAPTER_FILE, "adapter_model.bin"):
        if (adapter_dir / name).is_file():
            return adapter_dir / name
    raise ValueError(f"{adapter_dir} has no {ADAPTER_FILE} beside its {ADAPTER_CONFIG_FILE}: complete the directory")


def text_value(config: Mapping[str, Any], key: str, where: object) -> str | None:
    """A text in a config, None where it is not there.

    Raises:
        ValueError: It is no text of one line, as names and paths are.
    """
    value = config.get(key)
    if value is None or (isinstance(value, str) and value.isprintable() and len(value) < _LONGEST_TEXT):
        return value
    raise ValueError(f"{where}: {key} is {shorten(value)}, expected a name or path, or no such key")


def yaml_value(meta: Mapping[str, Any], key: str) -> str | None:
    """A text in the YAML that training wrote into `medusa_meta.json`, None where it is not there.

    Raises:
        ValueError: It is no text of one line.
    """
    yaml = meta.get("yaml")
    return text_value(yaml, key, f"the yaml in {META_FILE}") if isinstance(yaml, Mapping) else None


def _directories(path: Path) -> tuple[Path, Path | None]:
    """The heads directory at `path`, and the run's directory around it if `path` is one."""
    if (path / HEADS_FOLDER).is_dir():
        return path / HEADS_FOLDER, path
    if (path / HEADS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        return path, None
    if not path.is_dir():
        raise NoHeadsError(f"{path} is not a directory: expected an output_dir, a checkpoint in it, or a medusa_heads")
    if found := checkpoints(path, HEADS_FOLDER):
        raise ValueError(
            f"{path} has no {HEADS_FOLDER}: training did not reach its end; give a checkpoint, e.g. {found[-1]}"
        )
    raise NoHeadsError(
        f"{path} has neither {HEADS_FOLDER} nor {HEADS_FILE} with {CONFIG_FILE}: expected what training wrote; "
        "heads in another format go through `axolotl-medusa import` first"
    )


def _verify(heads_dir: Path, config: dict[str, Any]) -> None:
    try:
        open_heads(heads_dir)
    except ValueError as error:
        if config.get("model_type") == "medusa":
            raise
        raise ValueError(f"{error}; heads in another format go through `axolotl-medusa import` first") from error


def trained_model(output_dir: Path, meta: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Directories of the adapter and of the full model that a run's heads need, each None if they need none."""
    if meta.get("recipe") == "medusa-1":
        # Medusa-1 writes no model; it may have trained on top of an adapter that was there before.
        adapter = yaml_value(meta, "lora_model_dir")
        return (None if adapter is None else Path(adapter).expanduser()), None
    has_adapter = (output_dir / ADAPTER_CONFIG_FILE).is_file()
    has_full_model = any((output_dir / name).is_file() for name in _FULL_MODEL_FILES)
    if has_adapter and has_full_model:
        raise ValueError(
            f"{output_dir} holds both an adapter and a full model, expected one: move away the one that is not of this run"
        )
    return output_dir if has_adapter else None, output_dir if has_full_model else None


def _missing_model(directory: Path) -> str:
    if next(directory.glob("pytorch_model_fsdp*"), None) is not None:
        return (
            f"{directory} holds the model as FSDP shards, expected safetensors: "
            "join them with `axolotl merge-sharded-fsdp-weights`"
        )
    return (
        f"{directory} has neither an adapter nor a full model, but Medusa-2 heads go with the model trained with them: "
        "give the run's output_dir, or this medusa_heads and the merged model as --base-model"
    )
