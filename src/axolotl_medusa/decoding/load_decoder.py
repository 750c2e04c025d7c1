"""Loads heads, their model and its tokenizer as the commands name them.

Contract: knows files and loaders; nothing about decoding.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from axolotl_medusa.decoding.default_dtype import dtype_here
from axolotl_medusa.decoding.library_errors import OwnCodeError, one_line_for
from axolotl_medusa.decoding.load_target import NO_MODEL, load_model
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.sources import Source, find_source, text_value, yaml_value

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Types to load a model in, `auto` for the one that it is stored in, or as `dtype_here` says."""


def load_decoder(
    heads: str | Path,
    base_model: str | None = None,
    *,
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[MedusaModel, Any]:
    """Loads a model with its heads, on the GPU if there is one, and the tokenizer.

    Args:
        heads: A heads directory, an output_dir or a checkpoint.
        base_model: Directory or Hub name of the base model; by default what training wrote down.
        dtype: One of `DTYPES`; of a quantized model what is not quantized.
        load_in_8bit: Whether bitsandbytes holds the model in 8-bit, without its outlier threshold.
        load_in_4bit: Whether bitsandbytes holds the model in 4-bit (NF4).
        trust_remote_code: Whether code that the model or its tokenizer brings is run.

    Raises:
        ValueError: There are no heads, model or tokenizer, they do not belong together, or both options are set.
        RuntimeError: A package that the model, the tokenizer or the quantization needs is missing.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    device = "cuda" if torch.cuda.is_available() else None
    if load_in_8bit or load_in_4bit:
        options["quantization_config"] = _quantization(load_in_8bit, load_in_4bit)
        options["device_map"], device = device and {"": 0}, None
    tokenizer = load_tokenizer(heads, base_model, trust_remote_code=trust_remote_code)
    return MedusaModel.from_pretrained(heads, base_model, DTYPES[dtype], device, **options), tokenizer


def load_tokenizer(heads: str | Path, base_model: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer that lies beside the heads, the run or the model.

    Args:
        heads: A heads directory, an output_dir or a checkpoint.
        base_model: Directory or Hub name of the base model; by default what training wrote down.
        trust_remote_code: Whether code that it or the model brings is run.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = find_source(heads, base_model)
    files = source.tokenizer_files()
    directory = files[0].parent if files else source.model_dir()
    # The heads' own config.json says nothing about the tokenizer, and makes transformers warn.
    with one_line_for(source.model_dir(), NO_MODEL):
        config = AutoConfig.from_pretrained(source.model_dir(), trust_remote_code=trust_remote_code)
    with one_line_for(directory, "has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=trust_remote_code)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some settings are only read here
    return tokenizer


def find_original(heads: str | Path, base_model: str | None, original: str | None) -> Source | None:
    """Finds the model that training started from, in the revision that training used; from the Hub it is downloaded.

    Args:
        heads: A heads directory, an output_dir or a checkpoint.
        base_model: What the command was given as base model.
        original: Directory or Hub name of the original; by default what training wrote down.

    Returns:
        The model, for Medusa-1 the one that the heads are for; None where it is the trained one with its adapter off.

    Raises:
        ValueError: Nothing names it, or it is missing.
    """
    source = find_source(heads, base_model)
    start = _start_of_training(source) if original is None else replace(source, meta={}, base_model=original)
    if start is None:
        return None
    if original is not None:
        start = replace(start, adapter_dir=None, full_model_dir=None)
    if start.base_model is None:
        raise ValueError(f"{source.heads_dir} does not say which model training started from: name it with --original")
    try:
        directory = start.base_model_dir()
    except ValueError as error:
        raise ValueError(
            f"the original model {start.base_model} is neither a directory here nor can it be downloaded: name its directory "
            "with --original"
        ) from error
    read_json(directory / CONFIG_FILE)
    if start.adapter_dir is not None:
        read_json(start.adapter_dir / ADAPTER_CONFIG_FILE)
    return start


def _start_of_training(source: Source) -> Source | None:
    """The model that training started from, None where it is the trained one with its adapter off."""
    if source.meta.get("recipe") == "medusa-1":
        return source  # it is trained no further
    adapter = yaml_value(source.meta, "lora_model_dir")
    if source.adapter_dir is not None:
        return None if adapter is None else replace(source, adapter_dir=Path(adapter).expanduser())
    # The config of an export names the model that it is served with.
    exported = source.meta.get("export")
    config = exported.get("config") if isinstance(exported, dict) else None
    where = source.heads_dir / CONFIG_FILE
    named = text_value(config if isinstance(config, dict) else source.config, "base_model_name_or_path", where)
    adapter_dir = None if adapter is None else Path(adapter).expanduser()
    return replace(source, base_model=named, adapter_dir=adapter_dir, full_model_dir=None)


def load_original(
    heads: str | Path,
    base_model: str | None,
    original: str | None,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> Any | None:
    """Loads the model that training started from, as `find_original` finds it.

    Args:
        heads: A heads directory, an output_dir or a checkpoint.
        base_model: What the command was given as base model.
        original: Directory or Hub name of the original; by default what training wrote down.
        device: Where to put it.
        trust_remote_code: Whether code that it brings is run.

    Returns:
        The model; None where it is the trained one with its adapter switched off.

    Raises:
        ValueError: Nothing names it, or it cannot be loaded.
        RuntimeError: A package that it needs is missing.
    """
    source = find_original(heads, base_model, original)
    if source is None:
        return None
    directory = source.model_dir()
    try:
        with one_line_for(directory, NO_MODEL):
            dtype = dtype_here("auto", directory, device)
        options = {"trust_remote_code": trust_remote_code}
        return load_model(source, directory, dtype, device, options).eval()
    except OwnCodeError:
        raise
    except ValueError as error:
        raise ValueError(
            f"the original model {source.base_model} cannot be loaded: {error}; or name another with --original"
        ) from error


def _quantization(load_in_8bit: bool, load_in_4bit: bool) -> Any:
    if load_in_8bit and load_in_4bit:
        raise ValueError("both 8-bit and 4-bit are asked for, expected one: leave --load-in-8bit or --load-in-4bit out")
    for package in ("bitsandbytes", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RuntimeError(f"8-bit and 4-bit models need {package}: pip install {package}") from error
    from transformers import BitsAndBytesConfig

    if load_in_8bit:
        # Columns above the threshold are looked for in the whole batch: a token would depend on what else is forwarded with it,
        # so that a tree's text would not be that of plain decoding.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
