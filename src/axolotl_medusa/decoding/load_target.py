"""Loads a causal LM for decoding with its heads, and checks that the heads were trained with this very model.

Contract: knows what training leaves on disk (`model.sources`) and transformers' and peft's loaders; nothing about
decoding.
"""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_medusa.decoding.default_dtype import dtype_here
from axolotl_medusa.decoding.library_errors import one_line_for
from axolotl_medusa.model.anatomy import causal_lm, embedding_shape, frozen_output_embedding, output_embedding
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import HeadsFile, read_heads
from axolotl_medusa.model.sources import Source, adapter_file, find_source
from axolotl_medusa.model.stored_embeddings import stored_output_embedding
from axolotl_medusa.model.tensor_files import TensorFiles
from axolotl_medusa.model.trained_with import check_output_layer, check_shape
from axolotl_medusa.model.wrapped_names import check_bare

NO_MODEL = "cannot be loaded as a causal language model"


def load_target(
    heads: str | Path,
    base_model: str | Path | nn.Module | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **load_options: Any,
) -> tuple[nn.Module, HeadsFile]:
    """Loads the model that heads belong to, its adapter unmerged on it if it was trained with one, and the heads' file.

    Args:
        heads: A heads directory, an output_dir or a checkpoint.
        base_model: The base model as the heads need it, or its directory or Hub name; by default what training wrote.
        dtype: Type to load the model in, `auto` for the one it is stored in, or as `dtype_here` says.
        device: Where to put it.
        **load_options: Given to transformers' `from_pretrained`; without `trust_remote_code=True` no code of a model is run.

    Raises:
        ValueError: There are no heads or no model, their files are damaged, or the heads belong to another model.
        RuntimeError: A package that the model or its adapter needs is missing.
    """
    source = find_source(heads, None if isinstance(base_model, nn.Module) else _text(base_model))
    file = read_heads(source.heads_dir)
    if isinstance(base_model, nn.Module):
        check_sizes(base_model, file.as_heads())
        weight: Tensor = frozen_output_embedding(output_embedding(base_model)).weight
        check_output_layer(source, lambda: weight, type(causal_lm(base_model)).__name__)
        return base_model, file
    directory = source.model_dir()
    if source.adapter_dir is not None:
        check_bare(TensorFiles.open(adapter_file(source.adapter_dir)), source.adapter_dir, prefix="base_model.model.")
    stored = stored_output_embedding(directory)
    check_shape(stored.shape, (file.config["vocab_size"], file.config["hidden_size"]), str(directory))
    check_output_layer(source, stored.load, str(directory))
    with one_line_for(directory, NO_MODEL):
        dtype = dtype_here(dtype, directory, device, stored.dtype, **load_options)
    return load_model(source, directory, dtype, device, load_options), file


def check_sizes(model: nn.Module, heads: MedusaHeads) -> None:
    """Checks that heads have the model's hidden size and vocabulary.

    Raises:
        ValueError: They differ.
    """
    shape = embedding_shape(output_embedding(model))
    check_shape(shape, (heads.vocab_size, heads.hidden_size), type(causal_lm(model)).__name__)


def load_model(
    source: Source,
    directory: Path,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    load_options: dict[str, Any],
) -> nn.Module:
    """Loads a model from its directory, and the source's adapter unmerged on it if there is one.

    Raises:
        ValueError: Files are damaged.
        RuntimeError: A package is missing.
    """
    from transformers import AutoModelForCausalLM

    load_options.setdefault("trust_remote_code", False)
    with one_line_for(directory, NO_MODEL):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **load_options)
        check_generation_config(model)
    if source.adapter_dir is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise RuntimeError(f"{source.adapter_dir} is an adapter, which needs peft: pip install peft") from error
        advice = "get its files again, or name the model that it was trained on with --base-model"
        with one_line_for(source.adapter_dir, f"is no adapter that can be loaded on {directory}", advice):
            model = PeftModel.from_pretrained(model, source.adapter_dir)
    return model if device is None else model.to(device)


def check_generation_config(model: Any) -> None:
    """Refuses a generation config whose ends of a text are no token ids.

    Raises:
        ValueError: They are anything else.
    """
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = eos if isinstance(eos, list | tuple) else [eos] if eos is not None else []
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id is {shorten(eos)}, expected a token id or a list of them")


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
