"""The sizes of a model, from its `config.json` alone: parameters and the matrices of its decoder layers.

Contract: reads one small file, local or already in the Hub's cache, and never the network. The model is built without
memory (torch's `meta` device), so that every family that transformers knows is counted as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.file_names import CONFIG_FILE
from axolotl_medusa.model.json_files import read_json


@dataclass(frozen=True)
class Matrix:
    """A linear layer.

    Attributes:
        name: The last part of its module's name, as LoRA's targets name it.
        inputs: Columns of its weight.
        outputs: Rows.
    """

    name: str
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Elements of its weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a causal LM.

    Attributes:
        name: As the YAML names it.
        hidden: Size H of the hidden state.
        vocab: Rows V of the output embedding.
        layers: Decoder layers L.
        intermediate: Inner size I of the MLP.
        queries: Query heads times their size.
        keys: Key heads times their size; values have the same.
        attention_heads: Query heads.
        matrices: Linear layers of all decoder layers.
        normed: Elements that the norms of one decoder layer take in for one token.
        decoder: Parameters of all decoder layers.
        embeddings: Parameters of the input embedding, and of lm_head where it is not tied to it.
        others: All other parameters.
    """

    name: str
    hidden: int
    vocab: int
    layers: int
    intermediate: int
    queries: int
    keys: int
    attention_heads: int
    matrices: tuple[Matrix, ...]
    normed: int
    decoder: int
    embeddings: int
    others: int

    @property
    def parameters(self) -> int:
        """All of the model's."""
        return self.decoder + self.embeddings + self.others

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer, on average."""
        return self.decoder // self.layers

    @property
    def output(self) -> int:
        """Parameters of an output layer."""
        return self.vocab * self.hidden

    def adapter(self, rank: int, targets: Collection[str], *, every: bool) -> int:
        """Parameters of LoRA.

        Args:
            rank: Its rank.
            targets: Names of layers that get one; `lm_head` may be among them.
            every: Whether every linear layer of the decoder gets one too.
        """
        adapted = [matrix for matrix in self.matrices if every or matrix.name in targets]
        if "lm_head" in targets:
            adapted.append(Matrix("lm_head", self.hidden, self.vocab))
        return rank * sum(matrix.inputs + matrix.outputs for matrix in adapted)


def find_config(name: str, revision: str | None = None) -> Path:
    """The `config.json` of a model in a directory, or of one whose config is in the Hub's cache.

    Raises:
        ValueError: It is neither.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / CONFIG_FILE).is_file():
            raise ValueError(f"base_model {name} has no {CONFIG_FILE}: expected a Hugging Face model directory")
        return directory / CONFIG_FILE
    if name.startswith(("/", ".", "~")):
        raise ValueError(f"base_model {name} does not exist: expected a model directory or a hub name")
    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    except HFValidationError:
        raise ValueError(f"base_model {name} does not exist: expected a model directory or a hub name") from None
    if not isinstance(cached, str):
        at = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"base_model {name} is not a directory and its config is not in the Hub's cache: get that one small file with "
            f"`hf download {name} {CONFIG_FILE}{at}`"
        )
    return Path(cached)


def read_sizes(name: str, revision: str | None = None) -> ModelSizes:
    """The sizes of the model that a YAML names.

    Raises:
        ValueError: Its config is not there, is damaged, or only the model's own code can read it.
    """
    file = find_config(name, revision)
    return sizes_of(name, read_json(file), str(file))


def sizes_of(name: str, content: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelSizes:
    """The sizes of the model that a `config.json` describes.

    Args:
        name: What the model is called.
        content: What the file holds.
        where: The file, for messages.

    Raises:
        ValueError: Transformers does not know it, or it describes no decoder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        key: value for key, value in content.items() if key not in ("model_type", "quantization_config", "auto_map")
    }
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{where} names no model_type: expected the config of a causal language model")
    noise = logging.getLogger("transformers")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        config = AutoConfig.for_model(model_type, **options).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return _measured(name, config, model)
    except Exception as error:  # configs are strangers' files; the libraries raise whatever a value leads to
        raise ValueError(
            f"{where} describes no causal language model that transformers can build ({first_line(error)}): "
            "expected a model that needs no code of its own"
        ) from error
    finally:
        noise.setLevel(level)


def _measured(name: str, config: Any, model: Any) -> ModelSizes:
    from torch import nn

    from axolotl_medusa.model.anatomy import decoder_layers, output_embedding

    layers, _ = decoder_layers(model)
    matrices = [
        Matrix(path.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for path, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * size
    widths = {"q": heads * size, "k": keys}
    normed = sum(
        widths.get(path.rsplit(".", 1)[-1][:1], 0) or parameter.numel()
        for path, module in layers[0].named_modules()
        if "norm" in type(module).__name__.lower()
        for parameter in list(module.parameters())[:1]
    )
    total = {id(parameter): parameter.numel() for parameter in model.parameters()}
    decoder = sum(parameter.numel() for parameter in layers.parameters())
    inner = {
        id(p): p for module in (model.get_input_embeddings(), output_embedding(model)) for p in module.parameters()
    }
    embeddings = sum(parameter.numel() for parameter in inner.values())
    return ModelSizes(
        name=name,
        hidden=config.hidden_size,
        vocab=output_embedding(model).weight.shape[0],
        layers=len(layers),
        intermediate=_intermediate(config, matrices),
        queries=heads * size,
        keys=keys,
        attention_heads=heads,
        matrices=tuple(matrices),
        normed=normed,
        decoder=decoder,
        embeddings=embeddings,
        others=sum(total.values()) - decoder - embeddings,
    )


def _intermediate(config: Any, matrices: Sequence[Matrix]) -> int:
    """Inner size of the MLP: of all experts that a token goes through, where there are several."""
    experts = getattr(config, "num_experts_per_tok", None) or 1
    of_expert = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
    size = of_expert or getattr(config, "intermediate_size", None)
    if not size:  # GPT-2 calls it otherwise
        size = max(
            (matrix.outputs for matrix in matrices if matrix.inputs == config.hidden_size),
            default=4 * config.hidden_size,
        )
    return int(experts * size)
