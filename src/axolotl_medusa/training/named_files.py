"""Looks at the files that a YAML names, before anything is loaded: are they there, and can they be read?

Contract: reads JSON files only (`model.json_files`), and imports neither axolotl nor torch. Data sets are
`datasets`'s to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, HEADS_FILE, HEADS_FOLDER, STATE_FILE
from axolotl_medusa.model.head_form import DRAFT_VOCAB_KEY, form_of
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.training.args import MedusaArgs

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")


def named_path(name: object) -> Path:
    """A path as a YAML names it; the home of a user who does not exist stays as it is written."""
    try:
        return Path(str(name)).expanduser()
    except RuntimeError:
        return Path(str(name))


def is_file(path: Path) -> bool:
    """Whether a file is there; not where no file can have that name, as it is too long."""
    return _answers(path.is_file)


def is_directory(path: Path) -> bool:
    """Whether a directory is there; not where none can have that name."""
    return _answers(path.is_dir)


def _answers(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:
        return False


def heads_directory(path: str | Path) -> Path:
    """The heads directory at `path`, which is one itself or an output_dir that holds one as `medusa_heads`."""
    path = named_path(path)
    return path / HEADS_FOLDER if is_directory(path / HEADS_FOLDER) else path


def deepspeed_config(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The DeepSpeed configuration that the YAML names or holds; empty without one.

    Raises:
        ValueError: Its file is missing or damaged.
    """
    value = cfg.get("deepspeed")
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str) or not value:
        return {}
    path = Path(value)
    if is_file(path):
        return read_json(path)
    if path.suffix == ".json":
        raise ValueError(f"{path} does not exist: expected a DeepSpeed configuration")
    return {}  # accelerate takes the encoded text of one too


def divides_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether the YAML asks for an engine that divides weights among ranks; not where its file cannot be read."""
    try:
        zero = deepspeed_config(cfg).get("zero_optimization")
    except ValueError:
        return False  # reported with the other files
    return bool(cfg.get("fsdp_config") or cfg.get("fsdp")) or (isinstance(zero, Mapping) and zero.get("stage") == 3)


def file_problems(args: MedusaArgs, cfg: Mapping[str, Any], bad: set[Any]) -> list[str]:
    """One line for each file or directory that a key names and that is missing or damaged.

    Args:
        args: The Medusa part of the YAML.
        cfg: The whole YAML.
        bad: Keys whose value has been reported already.
    """
    problems = _base_model_problems(cfg)
    if args.medusa_init_from is not None:
        problems += _init_from_problems(args, bad)
    try:
        zero = deepspeed_config(cfg).get("zero_optimization")
    except ValueError as error:
        zero = None
        problems.append(f"deepspeed {error}")
    if cfg.get("fix_untrained_tokens") and isinstance(zero, Mapping) and zero.get("stage") == 3:
        problems.append(
            "fix_untrained_tokens with ZeRO-3: axolotl saves the model on one rank then, which has a part of the weights; remove one"
        )
    problems += _directory_problems(cfg, "lora_model_dir", ADAPTER_CONFIG_FILE)
    problems += _directory_problems(cfg, "resume_from_checkpoint", STATE_FILE)
    return problems + _chat_template_problems(cfg)


def _is_local(name: str) -> bool:
    """Whether a name can only be a path, and not a model on the hub."""
    return name.startswith(("/", ".", "~"))


def _base_model_problems(cfg: Mapping[str, Any]) -> list[str]:
    name = str(cfg.get("base_model") or "")
    if not name:
        return []  # axolotl says so itself
    path = named_path(name)
    if is_directory(path):
        if not is_file(path / CONFIG_FILE):
            return [f"base_model {name} has no config.json: expected a Hugging Face model directory"]
        if not any(any(path.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
            return [f"base_model {name} has no weights ({', '.join(_WEIGHT_PATTERNS)}): is the download complete?"]
        try:
            read_json(path / CONFIG_FILE)
        except ValueError as error:
            return [f"base_model {error}"]
    elif _is_local(name):
        return [f"base_model {name} does not exist: expected a model directory or a hub name"]
    return []


def _import_first(args: MedusaArgs) -> str:
    return (
        f"or make heads in another format ours with `axolotl-medusa import {args.medusa_init_from} --to canonical --out DIR` "
        "and name DIR"
    )


def _init_from_problems(args: MedusaArgs, bad: set[Any]) -> list[str]:
    directory = heads_directory(str(args.medusa_init_from))
    config_file = directory / CONFIG_FILE
    if not is_file(config_file) or not is_file(directory / HEADS_FILE):
        return [
            f"medusa_init_from {args.medusa_init_from} holds no heads: expected {CONFIG_FILE} and {HEADS_FILE} there or "
            f"in its {HEADS_FOLDER} folder; run stage 1 first, {_import_first(args)}"
        ]
    try:
        config = read_json(config_file)
    except ValueError as error:
        return [f"medusa_init_from {error}"]
    if "original_lm_head" not in config:
        return [
            f"medusa_init_from {args.medusa_init_from} holds no heads as training writes them: run stage 1 first, {_import_first(args)}"
        ]
    found = {
        "medusa_num_heads": config.get("medusa_num_heads"),
        "medusa_num_layers": config.get("medusa_num_layers"),
        "medusa_lm_head": form_of(config),
        "medusa_draft_vocab": config.get(DRAFT_VOCAB_KEY),
    }
    return [
        f"{key} is {getattr(args, key)!r} but the heads in medusa_init_from {args.medusa_init_from} have {value!r}: use the same value"
        for key, value in found.items()
        if key not in bad and value != getattr(args, key)
    ]


def _directory_problems(cfg: Mapping[str, Any], key: str, file: str) -> list[str]:
    name = cfg.get(key)
    if not isinstance(name, str) or not (_is_local(name) or is_directory(Path(name))):
        return []  # on the hub, or axolotl's to look for
    path = named_path(name) / file
    if not is_file(path):
        more = " as an adapter; a full model is named as base_model" if file == ADAPTER_CONFIG_FILE else ""
        return [f"{key} {name} has no {file}: expected a directory that training wrote{more}"]
    try:
        read_json(path)
    except ValueError as error:
        return [f"{key} {error}"]
    return []


def _chat_template_problems(cfg: Mapping[str, Any]) -> list[str]:
    """Axolotl takes the name of a file that is missing for the template itself, and trains on that."""
    problems = []
    for key, template in _chat_templates(cfg):
        is_text = "{{" in template or "{%" in template or "\n" in template
        if is_text or not template:
            continue
        try:
            Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            problems.append(
                f"{key} {template} cannot be read ({first_line(error)}): expected a file, or a Jinja template"
            )
    return problems


def _chat_templates(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every `chat_template_jinja` of the YAML, once."""
    own = cfg.get("chat_template_jinja")
    if isinstance(own, str):
        yield "chat_template_jinja", own
    for name in ("datasets", "test_datasets"):
        entries = cfg.get(name)
        for entry in entries if isinstance(entries, list) else []:
            template = entry.get("chat_template_jinja") if isinstance(entry, Mapping) else None
            if isinstance(template, str) and template != own:
                yield f"{name} chat_template_jinja", template
