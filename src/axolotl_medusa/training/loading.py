"""Loads what a run left on disk into the model that axolotl built from the same YAML: heads, adapter, full weights.

Contract: knows the layout of an output_dir (`model.sources`) and the names of a model's parameters. Heads and full weights
are read tensor by tensor, with ZeRO-3 by rank 0 alone; an adapter, which is small, is read whole by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from torch import nn

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.divided_parameters import fill, gathered, whole_shape
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, HEADS_FOLDER
from axolotl_medusa.model.heads import HEADS_NAME
from axolotl_medusa.model.heads_directory import load_into, open_heads
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.sources import (
    NoHeadsError,
    Source,
    adapter_file,
    find_source,
    trained_model,
    yaml_value,
)
from axolotl_medusa.model.tensor_files import TensorFiles

LOG = get_logger(__name__)

_ADAPTER_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform")
"""What an adapter computes with beside its tensors."""


def load_heads(model: nn.Module, directory: str | Path) -> None:
    """Loads the heads of an output_dir or a checkpoint.

    Raises:
        ValueError: There are none, or they are not like the model's.
    """
    load_into(model, open_heads(Path(directory) / HEADS_FOLDER))
    LOG.info(f"Medusa heads loaded from {directory}")


def accept_what_trains(model: nn.Module) -> None:
    """Lets `model.load_state_dict` take a checkpoint of the parameters that train alone, which DeepSpeed asks it to load strictly."""
    load_state_dict = model.load_state_dict

    def load(state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = sorted(trained.intersection(found.missing_keys))
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(
                f"the checkpoint does not fit the model: it lacks {missing}, and has {found.unexpected_keys}"
            )
        return found

    model.load_state_dict = load  # type: ignore[method-assign]


def load_trained_model(model: nn.Module, cfg: DictDefault) -> None:
    """For `axolotl evaluate`: makes `model` the one that training left in output_dir, its heads included.

    Where output_dir holds nothing, the heads stay as they are: those of medusa_init_from, or untrained ones.

    Args:
        model: The model as axolotl loads it for training, heads attached.
        cfg: The validated YAML.

    Raises:
        ValueError: What output_dir holds is not whole, or does not fit the YAML.
    """
    try:
        source = find_source(cfg.output_dir)
    except NoHeadsError:
        _check_nothing_is_passed_over(cfg)
        return
    except ValueError as error:
        raise ValueError(f"evaluate measures what output_dir holds, and {error}") from error
    if source.meta.get("recipe") == "medusa-1":
        _check_earlier_adapter(source, cfg)
        what = "heads"
    elif source.adapter_dir is not None:
        _load_adapter(model, source.adapter_dir, cfg)
        what = "heads and adapter"
    elif source.full_model_dir is not None:
        _load_full_model(model, source.full_model_dir, cfg)
        what = "heads and full model"
    else:
        what = "heads"
    load_into(model, open_heads(source.heads_dir))
    LOG.info(f"Medusa heads loaded from {cfg.output_dir}; evaluating all that it holds: {what}")


def _check_nothing_is_passed_over(cfg: DictDefault) -> None:
    """Without heads in output_dir: says which are evaluated, if there is no trained model either."""
    adapter_dir, full_model_dir = trained_model(Path(cfg.output_dir), {})
    if adapter_dir is not None or (full_model_dir is not None and not _same(cfg.base_model, full_model_dir)):
        raise ValueError(
            f"evaluate measures what output_dir holds, and {cfg.output_dir} holds {'an adapter' if adapter_dir else 'a full model'} "
            f"and no {HEADS_FOLDER}: expected both of one run; name that run's output_dir"
        )
    if cfg.medusa_init_from:
        what = f"the heads of medusa_init_from {cfg.medusa_init_from}: {cfg.output_dir} holds no {HEADS_FOLDER}"
    else:
        what = f"untrained heads: {cfg.output_dir} holds no {HEADS_FOLDER} and medusa_init_from is not set"
    LOG.warning(f"evaluating {what}")


def _check_earlier_adapter(source: Source, cfg: DictDefault) -> None:
    """Medusa-1 on top of an adapter: axolotl loads that adapter, if the YAML still names it."""
    trained_on, found = yaml_value(source.meta, "lora_model_dir"), cfg.lora_model_dir
    if (trained_on or None) != (found or None):
        raise ValueError(
            f"the heads in {source.heads_dir} were trained with lora_model_dir: {trained_on or 'unset'}, the YAML has "
            f"{found or 'unset'}: use the same value"
        )


def _load_adapter(model: Any, directory: Path, cfg: DictDefault) -> None:
    from peft import set_peft_model_state_dict

    if not hasattr(model, "peft_config"):
        raise ValueError(f"{directory} holds an adapter and the YAML builds none: set adapter as in training")
    if cfg.lora_model_dir and not _same(cfg.lora_model_dir, directory):
        LOG.warning(f"evaluating the adapter that {directory} holds, not that of lora_model_dir {cfg.lora_model_dir}")
    (adapter,) = model.active_adapters
    saved, own = read_json(directory / ADAPTER_CONFIG_FILE), model.peft_config[adapter]
    unset = type(own)()
    for key in _ADAPTER_KEYS:
        there, here = saved.get(key, getattr(unset, key, None)), getattr(own, key, None)
        if there != here:
            raise ValueError(
                f"the adapter in {directory} has {key} {there!r} and the YAML {here!r}: use the lora_* and peft_* keys of "
                "training, or set lora_model_dir to it"
            )
    files = TensorFiles.open(adapter_file(directory))
    parameters = [parameter for name, parameter in model.named_parameters() if adapter in name.split(".")]
    try:
        with gathered(parameters, write=True):
            found = set_peft_model_state_dict(model, {name: files.load(name) for name in files}, adapter)
    except RuntimeError as error:  # torch's, with a line for each tensor of another shape
        raise ValueError(_other_adapter(directory, first_line(error))) from error
    if found.unexpected_keys:
        raise ValueError(_other_adapter(directory, f"{found.unexpected_keys[0]} has no place in it"))


def _other_adapter(directory: Path, reason: str) -> str:
    return (
        f"the adapter in {directory} does not fit the one that the YAML builds ({reason}): use the lora_* and peft_* keys "
        "of training, or set lora_model_dir to it"
    )


def _load_full_model(model: nn.Module, directory: Path, cfg: DictDefault) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError(f"{directory} holds a full model and the YAML puts an adapter on it: remove adapter")
    if _same(cfg.base_model, directory):
        return
    files = TensorFiles.open(directory)
    own: dict[str, Any] = {
        name: values for name, values in model.state_dict(keep_vars=True).items() if HEADS_NAME not in name.split(".")
    }
    filled = {id(own[name]) for name in files if name in own}  # tied weights stand in the file once
    strange = [name for name in files if name not in own or files.shape(name) != whole_shape(own[name])]
    strange += [name for name, values in own.items() if id(values) not in filled]
    if strange:
        raise ValueError(
            f"the weights in {directory} are not named or shaped as those of base_model {cfg.base_model}, e.g. {strange[0]}: "
            f"set base_model: {directory} to evaluate"
        )
    for name in files:
        fill(own[name], files[name])


def _same(path: str, directory: Path) -> bool:
    return Path(path).expanduser().resolve() == directory.resolve()
