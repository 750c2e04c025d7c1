"""The vLLM command that serves a model with its heads: which model, which method, and what has to be said before.

Contract: checks and merges what has to be merged; starts nothing. Speculation in vLLM: our drafter through the method
`custom_class`, which drafts as many tokens as pay, or the method `medusa` of vLLM 0.32 and older, which always drafts all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, META_FILE
from axolotl_medusa.model.json_files import parse_json, read_json
from axolotl_medusa.model.sources import Source, find_source, text_value
from axolotl_medusa.model.stored_embeddings import stored_output_embedding
from axolotl_medusa.model.trained_with import check_output_layer, check_shape
from axolotl_medusa.serving.chat_templates import tokenizer_notes
from axolotl_medusa.serving.export_files import MERGED_FOLDER, read_marker
from axolotl_medusa.serving.format_rules import VLLM_METHODS
from axolotl_medusa.serving.merged_cache import is_merged, merge_once, merged_dir, merged_model_dir
from axolotl_medusa.serving.vllm_install import Vllm

Method = Literal["auto", "drafter", "built-in", "none"]
METHODS: tuple[Method, ...] = ("auto", "drafter", "built-in", "none")
"""What `--method` takes; `none` serves the model without its heads."""

DRAFTER = "axolotl_medusa.vllm_drafter.MedusaDrafter"
_OURS = ("-sc", "--model", "--speculative-config", "--spec-method", "--spec-model", "--spec-tokens")
"""Options of vLLM that are set here."""
_ADDITIONAL = "--additional-config"
_SECRET = ("--api-key", "--hf-token")
"""Options of vLLM whose values are not printed."""


@dataclass(frozen=True)
class ServeOptions:
    """How heads are to be served.

    Attributes:
        method: See `METHODS`.
        draft_tokens: Tokens that are drafted at most, None for as many as there are heads.
        adaptive: Whether our drafter drafts only what pays; it drafts all of them otherwise.
        vllm_options: vLLM's own options, as they were given.
        record: Where our drafter writes what it learns of acceptance and step times, None for nowhere.
    """

    method: Method = "auto"
    draft_tokens: int | None = None
    adaptive: bool = True
    vllm_options: tuple[str, ...] = ()
    record: Path | None = None


@dataclass(frozen=True)
class VllmCommand:
    """A command that starts a server.

    Attributes:
        arguments: The command, its interpreter first.
        environment: What has to be set beside the environment that is there.
        notes: What the user should know before, a line each.
        needs_merge: Whether an adapter has to be merged before it can run.
    """

    arguments: list[str]
    environment: dict[str, str]
    notes: tuple[str, ...]
    needs_merge: bool

    def shell(self) -> str:
        """The command as a shell takes it, without the secrets in it: it is printed, and kept in logs."""
        words = [*(f"{name}={value}" for name, value in self.environment.items()), *self.arguments]
        return shlex.join(
            "***" if _is_secret(before) else _shown(word) for before, word in zip(["", *words], words, strict=False)
        )


def find_served(path: str | Path, base_model: str | None = None) -> Source:
    """Finds heads and their model: what training wrote, or what `export --to vllm` did.

    Raises:
        ValueError: As `find_source`.
    """
    directory = Path(path).expanduser()
    exported = read_marker(directory) if directory.is_dir() else None
    if exported is None or exported.get("target") != "vllm" or (directory / HEADS_FILE).is_file():
        return find_source(directory, base_model)
    file = directory / CONFIG_FILE
    config, own = exported.get("config"), read_json(file)
    if not isinstance(config, dict) or any(config.get(key) != own.get(key) for key in ("hidden_size", "vocab_size")):
        raise ValueError(f"{directory / META_FILE} does not fit {file}, expected what one export wrote: export again")
    merged = directory / MERGED_FOLDER
    named = base_model or text_value(own, "base_model_name_or_path", file)
    if base_model is None and merged.is_dir():
        named = str(merged)
    return Source(directory, config, read_json(directory / META_FILE), named)


def vllm_command(source: Source, vllm: Vllm, options: ServeOptions) -> VllmCommand:
    """The command that serves heads with the vLLM that is there.

    Args:
        source: The heads and their model, from `find_served`.
        vllm: From `find_vllm`.
        options: How to serve them.

    Raises:
        ValueError: The model is another than the one that the heads were trained with, or options contradict each other.
        RuntimeError: vLLM has no method that takes heads.
    """
    tokens = most_draft_tokens(source, options.draft_tokens)
    method = _method(vllm, options.method)
    given, additional = _without_additional(options.vllm_options)
    check_model(source)
    model, names = _model(source, given)
    speculation = [] if method == "none" else _speculation(source, method, tokens, additional, options)
    if additional and method != "drafter":
        speculation += ["--additional-config", json.dumps(additional)]
    program = [str(vllm.python), *vllm.program, model]
    environment = vllm.environment() if method == "drafter" else {}
    needs_merge = source.model_kind == "adapter" and not is_merged(source)
    notes = tuple(_notes(source))
    return VllmCommand([*program, *names, *speculation, *given], environment, notes, needs_merge)


def most_draft_tokens(source: Source, asked: int | None) -> int:
    """Tokens to draft at most: what was asked for, else as many as there are heads.

    Raises:
        ValueError: There are fewer heads.
    """
    heads: int = source.config["medusa_num_heads"]
    if asked is not None and not 1 <= asked <= heads:
        raise ValueError(f"{asked} draft tokens were asked for, expected 1 to {heads}: there are {heads} heads")
    return heads if asked is None else asked


def prepare(source: Source) -> None:
    """Merges the adapter that the served model needs, unless that is done already.

    Raises:
        ValueError: It cannot be merged.
    """
    if source.adapter_dir is not None:
        merge_once(source, source.adapter_dir)


def check_model(source: Source) -> None:
    """Checks that the model is the one that the heads were trained with, by its vocabulary and its output embedding.

    Raises:
        ValueError: It is another, or missing.
    """
    directory = source.model_dir()
    stored = stored_output_embedding(directory)
    check_shape(stored.shape, (source.config["vocab_size"], source.config["hidden_size"]), str(directory))
    check_output_layer(source, stored.load, str(directory))


def _notes(source: Source) -> Iterator[str]:
    files = source.tokenizer_files()
    if source.model_kind != "adapter" and files:  # with an adapter the tokenizer beside the heads is merged in too
        yield from tokenizer_notes(files[0].parent, source.model_dir())


def _method(vllm: Vllm, wanted: Method) -> Method:
    """The method that is used; our drafter where both are there, since it drafts no more than pays."""
    where = f"vLLM {vllm.version} in {vllm.python}"
    if wanted == "none":
        return wanted
    if wanted == "built-in" and not vllm.has_medusa:
        raise RuntimeError(
            f"{where} has no Medusa of its own, expected vllm<0.33: leave --method out to use our drafter"
        )
    if vllm.takes_classes and wanted != "built-in":
        return "drafter"
    if vllm.has_medusa and wanted != "drafter":
        return "built-in"
    raise RuntimeError(
        f"{where} has not the method custom_class that loads our drafter, expected vLLM 0.32 or newer: update it, or name another "
        "--vllm-python"
    )


def _model(source: Source, given: Sequence[str]) -> tuple[str, list[str]]:
    """The served model's directory, and the option that gives it its name on the Hub where it has one."""
    if source.model_kind == "adapter":
        return str(merged_model_dir(source)), []
    directory = source.model_dir()
    name = source.base_model
    is_named = any(option.split("=")[0].replace("_", "-") == "--served-model-name" for option in given)
    if source.full_model_dir is not None or name is None or is_named or Path(name).expanduser().is_dir():
        return str(directory.resolve()), []
    return str(directory), ["--served-model-name", name]


def _speculation(
    source: Source, method: Method, tokens: int, additional: dict[str, Any], options: ServeOptions
) -> list[str]:
    if method == "drafter":
        config = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": tokens}
        ours: dict[str, Any] = {"medusa_heads": str(source.heads_dir.resolve())}
        if not options.adaptive:
            ours["medusa_adaptive"] = False
        if options.record is not None:
            ours["medusa_record"] = str(options.record)
        return ["--speculative-config", json.dumps(config), "--additional-config", json.dumps({**additional, **ours})]
    # vLLM takes the output layer beside the heads, so it has to be the merged model's.
    directory = merged_dir(source) if source.model_kind == "adapter" else source.heads_dir.resolve()
    kind = next((kind for kind in VLLM_METHODS if kind in str(directory).lower()), None)
    if kind is not None:
        raise ValueError(
            f"found '{kind}' in the path {directory}, expected a path without it: vLLM would take the heads for another kind of "
            "draft model; rename the directory, or add --method drafter"
        )
    config = {"method": "medusa", "model": str(directory), "num_speculative_tokens": tokens}
    return ["--speculative-config", json.dumps(config)]


def _without_additional(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """VLLM's options without `--additional-config`, and what that says.

    Raises:
        ValueError: An option is there that `serve` sets itself.
    """
    rest: list[str] = []
    additional: dict[str, Any] = {}
    words = iter(given)
    for word in words:
        given_name, has_value, value = word.partition("=")
        name = given_name.replace("_", "-")  # vLLM takes both
        if name in _OURS or name.startswith(tuple(f"{option}." for option in (*_OURS, _ADDITIONAL))):
            raise ValueError(
                f"found {name} among vLLM's options, expected none that is set here (OUTPUT_DIR says it; --draft-tokens and "
                "--method change it; --additional-config is given as JSON): leave it out"
            )
        if name != _ADDITIONAL:
            rest.append(word)
            continue
        content = parse_json(value if has_value else next(words, ""), name)
        if not isinstance(content, dict):
            raise ValueError(f"{name} is a {type(content).__name__}, expected a JSON object")
        additional |= content
    return rest, additional


def _shown(word: str) -> str:
    name, has_value, _ = word.partition("=")
    return f"{name}=***" if has_value and _is_secret(name) else word


def _is_secret(option: str) -> bool:
    return option.replace("_", "-") in _SECRET
