"""What every server reads of Medusa heads: tensor names, file names, `config.json`, and what it cannot express.

Contract: pure functions of names, sizes and configs; opens no file and holds no tensor. Canonical names are those of
`MedusaHeads.state_dict()` and, in the shared form, `lm_heads.0.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from axolotl_medusa.model.file_names import HEADS_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.head_form import DRAFT_VOCAB_KEY, FORM_KEY, form_of
from axolotl_medusa.serving.head_names import HeadTensor

TORCH_HEADS_FILE = "medusa_lm_head.pt"

OutputLayers = Literal["own", "one", "copies", "none"]
"""Output layers of a file: each head's own, one that all share, a copy of lm_head per head, or the served lm_head."""

VLLM_METHODS = ("eagle-", "eagle3", "dflash", "dspark")
"""A draft path that holds one of these makes vLLM take the heads for another kind of draft model."""


@dataclass(frozen=True)
class Target:
    """One server's format.

    Attributes:
        name: What `--to` takes.
        file: The weights' file, None where the heads lie among the model's tensors.
        block: Name of a block's linear layer, of head `{i}` and block `{j}`.
        output: Name of an output layer, of head `{i}`; `{j}` is the number of blocks.
        shared: How heads that share lm_head are written.
        separate: Whether heads can have output layers of their own, be it the same one in copies.
        max_layers: Most blocks per head, None for any number.
        num_heads: The only number of heads that is read, None for any.
        model_types: The `model_type`s that the consumer has, None for any.
        adapters: Whether the consumer serves heads together with a LoRA adapter.
    """

    name: str
    file: str | None
    block: str = "{i}.{j}.linear"
    output: str = "{i}.{j}"
    shared: OutputLayers = "copies"
    separate: bool = True
    max_layers: int | None = None
    num_heads: int | None = None
    model_types: tuple[str, ...] | None = None
    adapters: bool = False

    def output_layers(self, form: str, num_layers: int) -> OutputLayers:
        """How the output layers of heads of this form are written."""
        if form == "separate":
            return "own"
        if form == "trained":
            return "one" if self.name == "vllm" else "copies"
        if self.name == "tgi" and num_layers > 1:  # its v2 has one block, its v1 reads any number
            return "copies"
        return self.shared

    def name_of(self, tensor: HeadTensor) -> str:
        """The consumer's name of a tensor."""
        pattern = self.output if tensor.kind == "weight" else self.block
        return f"{pattern.format(i=tensor.head, j=tensor.layer)}.{tensor.kind.removeprefix('linear.')}"


class ServedBy(NamedTuple):
    """What loads a format today.

    Attributes:
        versions: The server, and which of its versions load it.
        state: What became of it, and since when.
    """

    versions: str
    state: str


SERVED_BY: dict[str, ServedBy] = {
    "vllm": ServedBy(
        "vLLM from 0.32 on with the drafter of axolotl-medusa; vllm<0.33 also with its own method `medusa`",
        "vLLM 0.33 removed its own method (2026); the drafter was run on 0.32 and its interface compared with 0.33",
    ),
    "tgi": ServedBy("Text Generation Inference", "only maintained since December 2025"),
    "lorax": ServedBy("LoRAX", "dormant: its last version stays as it is"),
    "fasterdecoding": ServedBy(
        "the Medusa authors' repository", "its present loader; its last announcement is of January 2024"
    ),
    "fasterdecoding-legacy": ServedBy("the Medusa authors' repository", "its first loader, for heads of 2023"),
    "fasterdecoding-merged": ServedBy("the Medusa authors' repository", "the layout of its Medusa-2 models"),
    "tensorrt-llm": ServedBy("TensorRT-LLM 1.2 and older", "its engine backend, which ran Medusa, was removed in 2026"),
    "rtp-llm": ServedBy("rtp-llm", "was not tried"),
    "modelopt": ServedBy(
        "TensorRT-LLM 1.2 and older, through its LLM class for engines",
        "its engine backend, which ran Medusa, was removed in 2026",
    ),
}
"""By target. SGLang has no Medusa."""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("vllm", "model.safetensors", "blocks.{i}.layers.{j}", "lm_heads.{i}", shared="one"),
        Target("tgi", HEADS_FILE, shared="one"),
        Target("lorax", HEADS_FILE, shared="one", separate=False, max_layers=1, adapters=True),
        Target("fasterdecoding", TORCH_HEADS_FILE, max_layers=1, num_heads=5, model_types=("llama", "mistral")),
        Target(
            "fasterdecoding-legacy",
            TORCH_HEADS_FILE,
            shared="none",
            separate=False,
            max_layers=1,
            model_types=("llama",),
        ),
        Target(
            "fasterdecoding-merged",
            None,
            "medusa_head.{i}.{j}.linear",
            "medusa_head.{i}.{j}",
            max_layers=1,
            model_types=("llama", "mistral"),
        ),
        Target("tensorrt-llm", HEADS_FILE),
        Target("rtp-llm", None, "medusa_head.{i}.{j}.linear", "medusa_head.{i}.{j}", max_layers=1),
        Target("modelopt", None, "medusa_heads.{i}.{j}.linear", "medusa_heads.{i}.{j}", max_layers=1),
    )
}


class Planned(NamedTuple):
    """A tensor to write.

    Attributes:
        name: The consumer's name of it.
        source: The canonical tensor that it is, `lm_heads.0.weight` for the served lm_head.
    """

    name: str
    source: str


def plan(target: Target, config: Mapping[str, Any]) -> Iterator[Planned]:
    """Every tensor that `target` reads of the heads, head by head.

    Args:
        target: The format.
        config: `config.json` of the heads directory.
    """
    num_heads, num_layers = config["medusa_num_heads"], config["medusa_num_layers"]
    layers = target.output_layers(form_of(config), num_layers)
    one = HeadTensor(0, num_layers, "weight").canonical if form_of(config) == "trained" else SHARED_OUTPUT_LAYER
    for head in range(num_heads):
        for layer in range(num_layers):
            for kind in ("linear.weight", "linear.bias"):
                block = HeadTensor(head, layer, kind)
                yield Planned(target.name_of(block), block.canonical)
        if layers in ("own", "copies"):
            output = HeadTensor(head, num_layers, "weight")
            yield Planned(target.name_of(output), output.canonical if layers == "own" else one)
    if layers == "one":
        yield Planned(SHARED_OUTPUT_LAYER, one)


def target_config(target: Target, config: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """What the consumer's `config.json` says of the heads; beside the model's own keys where they lie in its files.

    `architectures` is in none of them: vLLM fills it in, and TGI crashes at every value.

    Args:
        target: The format.
        config: `config.json` of the heads directory.
        base_model: Name or path of the model that will be served.
    """
    heads, layers = config["medusa_num_heads"], config["medusa_num_layers"]
    shared = target.output_layers(form_of(config), layers) in ("one", "none")
    counts = {"medusa_num_heads": heads, "medusa_num_layers": layers}
    both_spellings = {**counts, "num_medusa_heads": heads, "num_medusa_layers": layers}
    sizes = {"hidden_size": config["hidden_size"], "vocab_size": config["vocab_size"]}
    heads_only = {"model_type": "medusa", "base_model_name_or_path": base_model}
    version = {"version": "2" if shared else "1"}
    match target.name:
        case "vllm":
            vllm = {"num_heads": heads, "num_hidden_layers": layers, "medusa_fc_bias": True, "original_lm_head": shared}
            named = {key: value for key, value in config.items() if key == FORM_KEY}  # for those who import it
            return {**heads_only, **sizes, **vllm, **named}
        case "tgi" | "lorax":
            canonical = {"medusa_fc_bias": True, "original_lm_head": shared}
            return {**heads_only, **both_spellings, **version, **sizes, **canonical}
        case "fasterdecoding" | "fasterdecoding-legacy":
            return {**heads_only, **counts, **version}
        case "fasterdecoding-merged":
            return counts
        case "tensorrt-llm":
            return {**heads_only, **both_spellings, **version, **sizes}
        case "rtp-llm":
            return {"medusa_config": counts}
        case _:
            return {"medusa": {"num_medusa_heads": heads, "num_medusa_layers": layers}}


def refusal(
    target: Target, config: Mapping[str, Any], served: Mapping[str, Any], out: str, *, head_has_bias: bool
) -> str | None:
    """Why `target` cannot express these heads, as one line for the user; None where it can.

    Args:
        target: The format.
        config: `config.json` of the heads directory.
        served: `config.json` of the model that will be served.
        out: Path of the export: vLLM guesses the kind of a draft model from it.
        head_has_bias: Whether the model's lm_head has a bias.
    """
    return (
        _refused_heads(target, config)
        or _refused_model(target, config, served, head_has_bias=head_has_bias)
        or _refused_path(target, out)
    )


def _refused_heads(target: Target, config: Mapping[str, Any]) -> str | None:
    if form_of(config) != "shared" and config.get(DRAFT_VOCAB_KEY) is not None:
        return (
            f"found heads that choose among {config[DRAFT_VOCAB_KEY]} tokens, expected the whole vocabulary: {target.name} has no "
            "other output layers; train without medusa_draft_vocab, or with medusa_lm_head: shared, whose heads are exported as "
            "choosing among all tokens"
        )
    heads, layers = config["medusa_num_heads"], config["medusa_num_layers"]
    if target.max_layers is not None and layers > target.max_layers:
        return (
            f"found {layers} residual blocks per head, expected 1: {target.name} reads no more; "
            "train with medusa_num_layers: 1, or export to vllm, tgi or tensorrt-llm"
        )
    if form_of(config) != "shared" and not target.separate:
        return (
            f"found heads with output layers of their own, expected heads that share lm_head: {target.name} would fail or "
            "ignore them; train with medusa_lm_head: shared, or export to vllm, tgi or tensorrt-llm"
        )
    if target.num_heads is not None and heads != target.num_heads:
        return (
            f"found {heads} heads, expected {target.num_heads}: {target.name} builds {target.num_heads} whatever the "
            f"config says; train with medusa_num_heads: {target.num_heads}, or export to fasterdecoding-merged"
        )
    return None


def _refused_model(
    target: Target, config: Mapping[str, Any], served: Mapping[str, Any], *, head_has_bias: bool
) -> str | None:
    if target.model_types is not None and served.get("model_type") not in target.model_types:
        return (
            f"found a {served.get('model_type')} model, expected {' or '.join(target.model_types)}: {target.name} has no "
            "other; export to vllm"
        )
    text = served.get("text_config") or served
    for key, what in (("vocab_size", "vocabulary"), ("hidden_size", "hidden size")):
        if text.get(key) != config[key]:
            return (
                f"found a {what} of {config[key]} in the heads, expected {text.get(key)} as in the config of the model that "
                "will be served; give the model that was trained as --base-model"
            )
    layers = target.output_layers(form_of(config), config["medusa_num_layers"])
    if (
        head_has_bias
        and form_of(config) == "shared"
        and (layers == "copies" or (layers == "one" and target.name == "vllm"))
    ):
        return (
            f"found heads that share an lm_head with a bias, expected none: {target.name} builds output layers without; "
            "train with medusa_lm_head: separate"
        )
    return None


def _refused_path(target: Target, out: str) -> str | None:
    method = next((method for method in VLLM_METHODS if method in out.lower()), None)
    if target.name != "vllm" or method is None:
        return None
    return (
        f"found '{method}' in the path {out}, expected a path without it: vLLM would take the heads for another kind of "
        "draft model; choose another --out"
    )
