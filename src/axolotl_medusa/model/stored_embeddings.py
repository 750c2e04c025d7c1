"""Which tensors of a model's files are its embeddings, found by their names alone.

Contract: knows Hugging Face model files without the model's class; reads no tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from axolotl_medusa.model.file_names import CONFIG_FILE
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles
from axolotl_medusa.model.wrapped_names import check_bare

_HEAD_OF = {
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "word_embeddings": "lm_head",
    "embed_in": "embed_out",
    "tok_embeddings": "output",
}
"""The modules that embed tokens, and the language-model heads of the same families of models."""


class StoredEmbeddings(NamedTuple):
    """Names of the embeddings' weights in a model's files, which hold no `head` where they are `tied`."""

    tokens: str
    head: str
    tied: bool


def stored_output_embedding(directory: Path) -> LazyTensor:
    """The output embedding in a model's directory, `[vocab_size, hidden_size]`: with tied embeddings the input embedding.

    Raises:
        ValueError: The directory holds no causal language model, or one that transformers would not load.
    """
    tensors = {tensor.name: tensor for tensor in TensorFiles.open(directory).values()}
    check_bare(tensors, directory)
    embeddings = stored_embeddings(tensors, read_json(directory / CONFIG_FILE), directory)
    return tensors[embeddings.tokens if embeddings.tied else embeddings.head]


def stored_embeddings(tensors: dict[str, LazyTensor], config: dict[str, Any], origin: Path) -> StoredEmbeddings:
    """Finds the embeddings by their modules' names; those nearest to the top, as further layers may bring their own."""

    def nearest(modules: Collection[str]) -> str | None:
        return min(
            (name for name in tensors if module_of(name) in modules), key=lambda name: name.count("."), default=None
        )

    tokens = nearest(_HEAD_OF)
    if tokens is None:
        raise ValueError(
            f"{origin} has no token embedding ({', '.join(_HEAD_OF)}), expected the files of a causal language model"
        )
    own_head = _HEAD_OF[module_of(tokens)]
    head = nearest([own_head])
    for name in (tokens, head or tokens):
        if len(tensors[name].shape) != 2:
            raise ValueError(f"{origin}: {name} is {tensors[name].shape}, expected a matrix [vocab_size, hidden_size]")
    says_tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if head is None and says_tied is False:
        raise ValueError(
            f"{origin} has no {own_head}.weight and its config.json does not tie the embeddings: get the missing files"
        )
    return StoredEmbeddings(tokens, head or f"{own_head}.weight", tied=head is None or says_tied is True)


def module_of(parameter: str) -> str:
    """The last module in a weight's name, empty for other parameters: `lm_head` of `model.lm_head.weight`."""
    *_, module, kind = ("", *parameter.split("."))
    return module if kind == "weight" else ""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is about the language model."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config
