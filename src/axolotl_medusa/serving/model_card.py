"""The README.md of an export: what the heads are, what was measured, and the command that serves them.

Contract: pure text from what training wrote down; a figure that nobody measured is not in it. The commands are those of
the servers' own documentation.
"""

from __future__ import annotations

import filecmp
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_medusa.model.checkpoints import checkpoint_step, checkpoints
from axolotl_medusa.model.file_names import HEADS_FILE, HEADS_FOLDER, STATE_FILE
from axolotl_medusa.model.head_form import HeadForm, form_of
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.serving.format_rules import SERVED_BY

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_RTP_MODEL_TYPES = {"qwen2": "qwen_2", "qwen3": "qwen_3"}
"""Model types that rtp-llm spells otherwise than transformers."""

_RECIPES = {
    "medusa-1": "Medusa-1: the heads were trained on the frozen base model",
    "medusa-2": "Medusa-2: the heads were trained together with the model",
}
_LARGEST_METRIC = 1e15
"""Anything beyond, and what is no number, was not measured."""
_OUTPUT_LAYERS: dict[HeadForm, str] = {
    "shared": "the served model's output layer",
    "separate": "an output layer of their own",
    "trained": "one output layer for all of them",
}

_SERVED = {
    "base": "the base model as it is",
    "adapter": "the base model with the LoRA adapter that was trained with the heads",
    "full": "the model that was trained with the heads, all of its weights",
}


def serve_command(target: str, directory: str, served_model: str, num_heads: int, model_type: str = "llama") -> str:
    """The shell command that serves an export.

    Args:
        target: The export's format.
        directory: Where the export is.
        served_model: Directory or Hub name of the model that is served, for the servers that are told both.
        num_heads: Number of heads N.
        model_type: The model's `model_type`.

    Returns:
        One command, or several, a line each.

    Raises:
        ValueError: No server reads this target.
    """
    where, model = shlex.quote(directory), shlex.quote(served_model)
    if target == "vllm":
        options = json.dumps({"method": "medusa", "model": directory, "num_speculative_tokens": num_heads})
        return f"vllm serve {model} --speculative-config {shlex.quote(options)}"
    if target == "tgi":  # the export's config.json names the model
        return f"text-generation-launcher --model-id {where} --speculate {num_heads}"
    if target == "lorax":
        return f"lorax-launcher --model-id {model} --adapter-id {where} --adapter-source local"
    if target.startswith("fasterdecoding"):
        return f"python -m medusa.inference.cli --model {where}"
    if target == "tensorrt-llm":
        return _tensorrt_llm(where, model, num_heads)
    if target == "rtp-llm":
        own_type = _RTP_MODEL_TYPES.get(model_type, model_type)
        return (
            f"python -m rtp_llm.start_server --checkpoint_path {where} --tokenizer_path {where} "
            f"--model_type {shlex.quote(own_type)} --start_port 8088"
        )
    if target == "modelopt":
        return _modelopt(directory, num_heads)
    raise ValueError(f"found the target {target!r}, expected one that a server reads")


def _chain(num_heads: int) -> str:
    """The candidate tree that has only each head's first guess: `[[0], [0, 0], ...]`."""
    return str([[0] * depth for depth in range(1, num_heads + 1)])


def _tensorrt_llm(where: str, model: str, num_heads: int) -> str:
    """The three steps, run in examples/medusa of TensorRT-LLM's repository."""
    convert = (
        f"python convert_checkpoint.py --model_dir {model} --medusa_model_dir {where} --output_dir medusa_checkpoint "
        f"--dtype bfloat16 --num_medusa_heads {num_heads}"
    )
    build = (
        "trtllm-build --checkpoint_dir medusa_checkpoint --output_dir medusa_engine --gemm_plugin bfloat16 "
        "--speculative_decoding_mode medusa --max_batch_size 4"
    )
    run = (
        f"python ../run.py --engine_dir medusa_engine --tokenizer_dir {model} --max_output_len 100 --temperature 1.0 "
        f'--medusa_choices="{_chain(num_heads)}" --input_text "Once upon"'
    )
    return "\n".join((convert, build, run))


def _modelopt(directory: str, num_heads: int) -> str:
    return f"""python - <<'END'
from tensorrt_llm._tensorrt_engine import LLM
from tensorrt_llm.llmapi import BuildConfig, MedusaDecodingConfig

medusa = MedusaDecodingConfig(
    max_draft_len={num_heads}, num_medusa_heads={num_heads}, medusa_choices={_chain(num_heads)}
)
llm = LLM(model={directory!r}, build_config=BuildConfig(max_batch_size=1), speculative_config=medusa)
print(llm.generate("Once upon").outputs[0].text)
END"""


def measured_in_training(output_dir: Path | None) -> dict[str, float]:
    """What training measured of a run's heads, by metric: `medusa0_top1`, `medusa_acceptance_length`, ... and the `step`.

    A checkpoint's heads were measured at its own step. Those of an output_dir are the best checkpoint's where they are equal to
    them (`load_best_model_at_end`), else the last.

    Args:
        output_dir: An output_dir or a checkpoint.

    Returns:
        The numbers; none where the run evaluated nothing or left no trainer_state.json, or where its best checkpoint is gone, so
        that it cannot be told which heads these are.

    Raises:
        ValueError: The trainer_state.json is damaged.
    """
    if output_dir is None:
        return {}
    step = checkpoint_step(output_dir)
    directory = output_dir if step is not None or (output_dir / STATE_FILE).is_file() else None
    if directory is None and (found := checkpoints(output_dir, STATE_FILE)):
        directory = found[-1]
    if directory is None or not (directory / STATE_FILE).is_file():
        return {}
    best, evaluations = _evaluations(directory / STATE_FILE)
    if step is None and best is not None and directory.name != best:
        heads, best_heads = (where / HEADS_FOLDER / HEADS_FILE for where in (output_dir, output_dir / best))
        if not (heads.is_file() and best_heads.is_file()):
            return {}
        if filecmp.cmp(heads, best_heads, shallow=False):
            step = checkpoint_step(best)
    entry: Mapping[str, Any] = next(
        (entry for entry in reversed(evaluations) if step is None or entry.get("step", 0) <= step), {}
    )
    return {
        key.removeprefix("eval_"): value
        for key, value in entry.items()
        if (key == "step" or "medusa" in key) and _is_metric(value)
    }


def _evaluations(state: Path) -> tuple[str | None, list[Mapping[str, Any]]]:
    """The name of a run's best checkpoint, None where none is known, and what its evaluations logged of the heads."""
    try:
        content = read_json(state)
        best, history = content.get("best_model_checkpoint"), content.get("log_history", [])
        if not (isinstance(history, list) and isinstance(best, str | None)):
            raise TypeError("log_history is no list, or best_model_checkpoint no path")
        entries = [entry for entry in history if any(key.startswith("eval_medusa") for key, _ in entry.items())]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{state} is not what a Trainer writes ({error!r}): get it again, or remove it") from error
    return best and Path(best).name, [entry for entry in entries if _is_metric(entry.get("step", 0))]


def _is_metric(value: object) -> bool:
    return isinstance(value, int | float) and -_LARGEST_METRIC < value < _LARGEST_METRIC


def model_card(
    *,
    target: str,
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    base_model: str | None,
    model: str,
    serve: str,
    measured: Mapping[str, float] | None = None,
    directory: str | None = None,
) -> str:
    """The text of an export's README.md.

    Args:
        target: The export's format.
        config: The canonical `config.json` of the heads.
        meta: Their `medusa_meta.json`, empty if unknown.
        base_model: Directory or Hub name of the base model.
        model: What has to be served with them: `base`, `adapter` or `full`.
        serve: The command that serves the export.
        measured: Metrics by the trainer's names, as `measured_in_training` gives them.
        directory: Where the export is, for the command of this package that serves it.
    """
    yaml = meta.get("yaml")
    entries = yaml.get("datasets") if isinstance(yaml, Mapping) else None
    entries = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    data = [" ".join(str(entry["path"]).split()) for entry in entries if entry.get("path")]
    name = "a language model" if base_model is None else Path(base_model).name
    facts = "\n".join(f"| {key} | {value} |" for key, value in _facts(config, meta, base_model, model, data))
    return f"""{_metadata(base_model, data)}

# Medusa heads for {name}

{config["medusa_num_heads"]} decoding heads that guess the tokens after the next one, in the format of {target}. Greedy text
is that of the served model, in fewer of its passes.

| | |
|---|---|
{facts}

## Measured
{_measured(measured or {})}

## Serve
{_serving(target, serve, directory)}
Paths are those of the machine that exported; put in where the files are now.

Written by axolotl-medusa.
"""


def _serving(target: str, serve: str, directory: str | None) -> str:
    """The commands that serve an export, and which versions of the server they are for."""
    versions, state = SERVED_BY[target]
    plain = f"```sh\n{serve}\n```"
    if target != "vllm":
        return f"With {versions} ({state}):\n\n{plain}"
    own = f"```sh\naxolotl-medusa serve {shlex.quote(directory or 'DIR')}\n```"
    return (
        f"With axolotl-medusa and vLLM 0.32 or newer. It picks the method that the installed vLLM has, and drafts only what pays:\n\n"
        f"{own}\n\nWith vLLM alone: `vllm<0.33`, the last with a method of its own for Medusa. It always drafts all tokens:\n\n{plain}"
    )


def _metadata(base_model: str | None, data: list[str]) -> str:
    """The front matter that the Hub reads; it refuses names that are not the Hub's own."""
    lines = ["---", "tags:", "- medusa", "- speculative-decoding", "- axolotl"]
    if base_model is not None and _is_hub_name(base_model):
        lines.append(f"base_model: {base_model}")
    if on_hub := [name for name in data if _is_hub_name(name)]:
        lines += ["datasets:", *(f"- {name}" for name in on_hub)]
    return "\n".join([*lines, "---"])


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _facts(
    config: Mapping[str, Any], meta: Mapping[str, Any], base_model: str | None, model: str, data: list[str]
) -> Iterator[tuple[str, str]]:
    layers = config["medusa_num_layers"]
    output_layer = _OUTPUT_LAYERS[form_of(config)]
    yield "base model", f"`{base_model}`" if base_model else "unknown"
    yield "recipe", _RECIPES.get(str(meta.get("recipe")), "unknown")
    yield "served with", _SERVED[model]
    yield (
        "heads",
        f"{config['medusa_num_heads']}, each of {layers} residual block{'s' * (layers > 1)}, with {output_layer}",
    )
    yield "trained on", ", ".join(f"`{name}`" for name in data) or "unknown"
    if isinstance(versions := meta.get("versions"), Mapping):
        yield "trained with", ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if commit := meta.get("git_commit"):
        yield "commit of axolotl-medusa", f"`{commit}`"


def _measured(measured: Mapping[str, float]) -> str:
    accuracies = {
        int(match[1]): value for key, value in measured.items() if (match := re.fullmatch(r"medusa(\d{1,3})_top1", key))
    }
    length = measured.get("medusa_acceptance_length")
    if not accuracies and length is None:
        return "Nothing was measured before this export."
    at = f" at step {measured['step']:.0f}" if "step" in measured else ""
    lines = [f"On held-out data, in training's evaluation{at}:", ""]
    if accuracies:
        lines += ["| token guessed | right at the first guess |", "|---|---|"]
        lines += [f"| {head + 2} ahead (head {head}) | {value:.1%} |" for head, value in sorted(accuracies.items())]
    if length is not None:
        lines += ["", f"Tokens per pass, each head's first guess taken while all before it are right: {length:.2f}"]
    return "\n".join(lines)
