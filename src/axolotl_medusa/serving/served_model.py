"""The model that is served with the heads, one tensor at a time: the base model, with its adapter merged, or a full one.

Contract: knows models by their Hugging Face files, without the model's class, and nothing about heads or servers.
Nothing is loaded before it is written, and a merge works in the memory of the tensor that it changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.model.sources import Source
from axolotl_medusa.model.stored_embeddings import StoredEmbeddings, module_of, stored_embeddings, text_config
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles
from axolotl_medusa.serving.lora import HOW_ELSE, Change, changed, read_adapter
from axolotl_medusa.serving.model_code import model_code

_CONV1D = {
    "gpt2": ("c_attn", "c_fc", "c_proj", "q_attn"),
    "openai-gpt": ("c_attn", "c_fc", "c_proj"),
}
"""By `model_type`, the modules that hold `[in, out]` where a linear layer holds `[out, in]`."""


class _Served(NamedTuple):
    """The served model: its tensors by name, its `config.json`, and which tensors are its embeddings."""

    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    embeddings: StoredEmbeddings


def lm_head(source: Source) -> LazyTensor:
    """The served model's output embedding, `[vocab_size, hidden_size]`: with tied embeddings the input embedding.

    Raises:
        ValueError: As `merged_tensors`.
    """
    tensors, _, embeddings = _served(source)
    return tensors[embeddings.tokens if embeddings.tied else embeddings.head]._replace(name="lm_head.weight")


def lm_head_bias(source: Source) -> bool:
    """Whether the served model adds a bias to its logits, which no head has."""
    served = _served(source)
    return served.embeddings.head.removesuffix("weight") + "bias" in served.tensors


def merged_tensors(source: Source) -> list[LazyTensor]:
    """The served model's tensors under the base model's names, in its files' order and in its types.

    A matrix with LoRA becomes `W + scaling · B A`, added in fp32 and rounded once. That is what peft's `merge_and_unload`
    gives on the unquantized base model, with one exception: where the base model ties its embeddings and the adapter
    changes only one of them, peft's merge changes both, but training had them apart. Here they stay apart: both matrices
    are listed, and `served_config` says that they are not tied.

    Raises:
        ValueError: The adapter does not fit the base model, or is of a kind that is not merged here.
    """
    return list(_served(source).tensors.values())


def served_config(source: Source) -> dict[str, Any]:
    """The served model's `config.json`, with the sizes and ties that the merge leaves and without any Medusa key.

    Raises:
        ValueError: As `merged_tensors`.
    """
    return _served(source).config


def model_files(source: Source) -> dict[Path, Path]:
    """The model's `generation_config.json`, and the code that its configurations name, by their path in its directory.

    Raises:
        ValueError: A configuration is damaged.
    """
    origin = source.model_dir()
    configs = [path for path in origin.glob("generation_config.json") if stays_inside(path, origin)]
    return {file: origin / file for file in [*(path.relative_to(origin) for path in configs), *model_code(origin)]}


def _served(source: Source) -> _Served:
    origin = source.model_dir()
    config = {key: value for key, value in read_json(origin / "config.json").items() if "medusa" not in key.lower()}
    tensors = {tensor.name: tensor for tensor in TensorFiles.open(origin).values()}
    base = _Served(tensors, config, stored_embeddings(tensors, config, origin))
    if source.adapter_dir is None:
        return base
    if "quantization_config" in config:
        raise ValueError(
            f"{origin} is quantized, but an adapter is merged into full weights: name the unquantized model as --base-model"
        )
    return _merge(base, source.adapter_dir)


def _merge(base: _Served, adapter_dir: Path) -> _Served:
    """The base model, changed to what it is with the adapter on it."""
    tensors, config, (tokens, head, tied) = base
    adapter_config, by_parameter = read_adapter(adapter_dir)
    changes = {_stored(parameter, base, adapter_dir): change for parameter, change in by_parameter.items()}
    embeddings = {tokens, head} & changes.keys()
    if tied and embeddings:
        tensors.pop(head, None)  # a copy, which some files of tied models hold
        tied = _stay_tied(adapter_config, changes.get(tokens))
        if tied:
            changes.pop(head, None)
        else:
            tensors[head] = tensors[tokens]._replace(name=head)
    transposed = _CONV1D.get(str(config.get("model_type")), ())
    for name, change in changes.items():
        tensors[name] = changed(
            tensors[name],
            change,
            transposed=change.is_embedding or module_of(name) in transposed,
            resizable=name in embeddings,
            adapter_dir=adapter_dir,
        )
    if embeddings:
        for part in (config, text_config(config)):
            part["tie_word_embeddings"] = tied
        sizes = {name: tensors[name].shape[0] for name in ((tokens,) if tied else (tokens, head))}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"{adapter_dir} leaves embeddings of different sizes ({sizes}), expected one vocabulary: give the model that it "
                f"was trained on as --base-model; if this is it, {HOW_ELSE}"
            )
        text_config(config)["vocab_size"] = sizes[tokens]
    return _Served(tensors, config, StoredEmbeddings(tokens, head, tied))


def _stored(parameter: str, base: _Served, adapter_dir: Path) -> str:
    """The name that a model's parameter has in its files, which may lack the first part (`transformer.` of GPT-2)."""
    for name in (parameter, parameter.partition(".")[2]):
        if name in base.tensors or name == base.embeddings.head:
            return name
    raise ValueError(
        f"{adapter_dir} changes {parameter}, which the base model does not have: give the model that it was trained on as "
        f"--base-model; if this is it, {HOW_ELSE}"
    )


def _stay_tied(adapter_config: dict[str, Any], change: Change | None) -> bool:
    """Whether tied embeddings are still one matrix after training: peft ties trained token rows, the rest on request."""
    if change is None:
        return False
    only_rows = change.rows is not None and change.whole is None and not change.low_rank
    return only_rows or bool(adapter_config.get("ensure_weight_tying"))
