"""Reads an export back as its consumer does, and compares its logits with those of the training module.

Contract: every loader is written from what its consumer's code does, with safetensors' and torch's own readers; none
shares a name with the writers, so that one mistake cannot be on both sides. Heads are compared one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear, silu

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.file_names import ADAPTER_CONFIG_FILE
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.model.torch_files import DAMAGE, check_torch_file

_ROWS = 16
"""Hidden states that are compared."""
_TOLERANCE = 1e-5
"""Largest accepted difference relative to the largest logit: both sides compute in fp32, in one order or another."""
_VOCABULARY_CHUNK = 8192
"""Rows of an output layer that are in memory in fp32 at once."""


@dataclass
class _Head:
    """A head as a consumer builds it.

    Attributes:
        blocks: Name and value of the weight and the bias of each residual block; no bias where none is built.
        output: Name and value of the output layer, None where the consumer uses the model's.
    """

    blocks: list[dict[str, tuple[str, Tensor]]] = field(default_factory=list)
    output: tuple[str, Tensor] | None = None


class _Files:
    """Tensors of the files that a consumer opens, under the names that it gives them; none is in memory."""

    def __init__(self, files: list[Path], rename: Callable[[str], str] = str) -> None:
        if not files:
            raise ValueError("found no file of weights that the consumer would open, expected the exported heads")
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            if file.suffix == ".pt":
                check_torch_file(file)
                content: dict[str, Tensor] = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
                self._readers |= {rename(name): tensor.detach for name, tensor in content.items()}
            else:
                with safe_open(file, "pt") as opened:
                    self._readers |= {rename(name): functools.partial(_read, file, name) for name in opened.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def names(self) -> list[str]:
        return list(self._readers)

    def tensor(self, name: str, *shape: int | None) -> tuple[str, Tensor]:
        """Name and value of a tensor.

        Raises:
            ValueError: It is missing, or its shape is not `shape`, where None stands for any size.
        """
        if name not in self._readers:
            raise ValueError(f"{name} is missing")
        tensor = self._readers[name]()
        if len(shape) != tensor.dim() or any(b not in (None, a) for a, b in zip(tensor.shape, shape, strict=True)):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        return name, tensor


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _config(directory: Path) -> dict[str, Any]:
    return read_json(directory / "config.json")


def _vllm(directory: Path) -> Iterator[_Head]:
    """vLLM: a key with `num` and `heads` or `layers` in it is a count, biases and sharing are asked for by keys.

    It opens safetensors and, without any, `.pt`; both its own names and FasterDecoding's are known. A tensor that it
    does not find stays as it was initialised, without a word: here that is an error.
    """
    config = _config(directory)
    for key in [key for key in config if "num" in key]:
        for part, name in (("heads", "num_heads"), ("layers", "num_hidden_layers")):
            if part in key:
                config[name] = config[key]
                break
    if "architectures" in config and config["architectures"] != ["MedusaModel"]:
        raise ValueError(f"config.json: architectures is {config['architectures']}, expected no such key")
    if config.get("model_type") != "medusa":
        raise ValueError(f"config.json: model_type is {config.get('model_type')}, expected medusa")

    def rename(name: str) -> str:
        parts = name.replace("medusa_heads.", "").split(".")
        if parts[0].isdigit() and "linear" in parts:
            return f"blocks.{parts[0]}.layers.{parts[1]}.{parts[-1]}"
        return f"lm_heads.{parts[0]}.weight" if parts[0].isdigit() else ".".join(parts)

    files = _Files(sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.pt")), rename)
    hidden, vocab = config.get("hidden_size", 4096), config.get("vocab_size", 32001)
    for i in range(config.get("num_heads", 5)):
        head = _Head()
        for j in range(config.get("num_hidden_layers", 1)):
            layer = {"weight": files.tensor(f"blocks.{i}.layers.{j}.weight", hidden, hidden)}
            if config.get("medusa_fc_bias", False):
                layer["bias"] = files.tensor(f"blocks.{i}.layers.{j}.bias", hidden)
            head.blocks.append(layer)
        output = 0 if config.get("original_lm_head", False) else i
        head.output = files.tensor(f"lm_heads.{output}.weight", vocab, hidden)
        yield head


def _numbered(files: _Files, i: int, num_layers: int, prefix: str = "", *, output: bool = True) -> _Head:
    """Head i of a `Sequential` of blocks and an output layer, as most consumers number them."""
    head = _Head()
    for j in range(num_layers):
        name, weight = files.tensor(f"{prefix}{i}.{j}.linear.weight", None, None)
        bias = files.tensor(f"{prefix}{i}.{j}.linear.bias", weight.shape[0])
        head.blocks.append({"weight": (name, weight), "bias": bias})
    if output:
        head.output = files.tensor(f"{prefix}{i}.{num_layers}.weight", None, weight.shape[1])
    return head


def _tgi(directory: Path) -> Iterator[_Head]:
    """TGI: one file of a fixed name; its first version of the heads is tried, then the second, of one block."""
    config = _config(directory)
    if "architectures" in config:
        raise ValueError(f"config.json: architectures is {config['architectures']}, expected no such key")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ValueError("config.json: base_model_name_or_path is missing, expected the served model")
    files = _Files([directory / "medusa_lm_head.safetensors"])
    if "lm_head.weight" in files:
        raise ValueError("lm_head.weight is also a tensor of the model, expected no such name")
    num_heads, num_layers = config["medusa_num_heads"], config["medusa_num_layers"]
    first = all(f"{i}.{num_layers}.weight" in files for i in range(num_heads))
    if not first and num_layers != 1:
        raise ValueError(f"0.{num_layers}.weight is missing, expected it with {num_layers} blocks per head")
    for i in range(num_heads):
        yield _numbered(files, i, num_layers, output=first)


def _lorax(directory: Path) -> Iterator[_Head]:
    """LoRAX: every safetensors file at once, the second version alone; an adapter beside the heads is served with them."""
    config = _config(directory)
    if not config["base_model_name_or_path"] or float(config.get("version", 1)) < 2:
        raise ValueError(f"config.json: version is {config.get('version')}, expected 2 and a base_model_name_or_path")
    files = _Files(sorted(directory.glob("*.safetensors")))
    num_layers = config["medusa_num_layers"]
    if num_layers > 1 or f"0.{num_layers}.weight" in files:
        raise ValueError(f"0.{num_layers}.weight makes it the first version, which fails at its first batch")
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        _lorax_adapter(directory, files)
    for i in range(config["medusa_num_heads"]):
        yield _numbered(files, i, num_layers, output=False)


def _lorax_adapter(directory: Path, files: _Files) -> None:
    rank = read_json(directory / ADAPTER_CONFIG_FILE)["r"]
    first = [name for name in files.names() if name.endswith(".lora_A.weight")]
    if not first:
        raise ValueError("base_model.model.*.lora_A.weight is missing, expected it beside adapter_config.json")
    for name in first:
        files.tensor(name, rank, None)
        files.tensor(name.replace(".lora_A.", ".lora_B."), None, rank)


def _fasterdecoding(directory: Path) -> Iterator[_Head]:
    """FasterDecoding: the `.pt` file, five heads whatever the config says, and tensors that are missing stay random."""
    files = _Files([directory / "medusa_lm_head.pt"])
    num_layers = _config(directory)["medusa_num_layers"]
    for i in range(5):
        yield _numbered(files, i, num_layers)


def _fasterdecoding_legacy(directory: Path) -> Iterator[_Head]:
    """FasterDecoding's first loader: blocks alone, after which comes the model's lm_head."""
    config = _config(directory)
    files = _Files([directory / "medusa_lm_head.pt"])
    for i in range(config["medusa_num_heads"]):
        yield _numbered(files, i, config["medusa_num_layers"], output=False)


def _tensorrt_llm(directory: Path) -> Iterator[_Head]:
    """TensorRT-LLM's conversion: a `.pt` or the safetensors file; the number of heads has two spellings."""
    config = _config(directory)
    file = directory / "medusa_lm_head.pt"
    files = _Files([file if file.is_file() else directory / "medusa_lm_head.safetensors"])
    counts = {config["num_medusa_heads"], config["medusa_num_heads"]}
    if len(counts) != 1:
        raise ValueError(f"config.json: the two spellings of the number of heads differ: {sorted(counts)}")
    for i in range(counts.pop()):
        yield _numbered(files, i, config["medusa_num_layers"])


def _in_model_files(
    prefix: str, counts: Callable[[Mapping[str, Any]], tuple[int, int]]
) -> Callable[[Path], Iterator[_Head]]:
    """Heads among the tensors of a model."""

    def load(directory: Path) -> Iterator[_Head]:
        num_heads, num_layers = counts(_config(directory))
        files = _model_files(directory)
        for i in range(num_heads):
            yield _numbered(files, i, num_layers, prefix)

    return load


def _model_files(directory: Path) -> _Files:
    """A model as transformers opens it: the index says which files."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return _Files([directory / "model.safetensors"])
    files = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not all(stays_inside(file, directory) for file in files):
        raise ValueError(f"{index.name} names a file outside of its directory")
    return _Files(files)


_LOADERS: dict[str, Callable[[Path], Iterator[_Head]]] = {
    "vllm": _vllm,
    "tgi": _tgi,
    "lorax": _lorax,
    "fasterdecoding": _fasterdecoding,
    "fasterdecoding-legacy": _fasterdecoding_legacy,
    "fasterdecoding-merged": _in_model_files(
        "medusa_head.", lambda config: (config["medusa_num_heads"], config["medusa_num_layers"])
    ),
    "tensorrt-llm": _tensorrt_llm,
    "rtp-llm": _in_model_files(
        "medusa_head.",
        lambda config: (config["medusa_config"]["medusa_num_heads"], config["medusa_config"]["medusa_num_layers"]),
    ),
    "modelopt": _in_model_files(
        "medusa_heads.", lambda config: (config["medusa"]["num_medusa_heads"], config["medusa"]["num_medusa_layers"])
    ),
}


def verify_export(
    target: str, directory: Path, trained: Mapping[str, Callable[[], Tensor]], lm_head: Callable[[], Tensor]
) -> None:
    """Compares an export with the heads that it was made of: the same hidden states, the same logits.

    Args:
        target: The export's format.
        directory: The export.
        trained: Reads each tensor of the heads' own, by canonical name.
        lm_head: Reads the output embedding of the model that is served, `[vocab_size, hidden_size]`, in the heads' type.

    Raises:
        ValueError: A logit differs; the line names the tensor. Nothing is deleted.
    """
    num_heads = 1 + max(int(name.split(".")[0]) for name in trained)
    served = 0
    try:
        for served, head in enumerate(_LOADERS[target](directory), 1):
            if served > num_heads:
                break
            _compare(served - 1, head, trained, lm_head)
            del head  # before the loader reads the next one
    except (*DAMAGE, OSError, SafetensorError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{directory} does not serve what was trained when it is loaded as {target} does: {what}; nothing was deleted, "
            "export it again, and report it if it comes back"
        ) from error
    if served != num_heads:
        raise ValueError(f"{directory} has {served} heads when it is loaded as {target} does, expected {num_heads}")


def _compare(
    index: int, served: _Head, trained: Mapping[str, Callable[[], Tensor]], lm_head: Callable[[], Tensor]
) -> None:
    """Compares one head with the training module's.

    Raises:
        ValueError: Their logits differ.
    """
    prefix = f"{index}."
    own = {"0." + name.removeprefix(prefix): trained[name]() for name in trained if name.startswith(prefix)}
    num_layers = 1 + max(int(name.split(".")[1]) for name in own if "linear" in name)
    output_name = f"0.{num_layers}.weight"
    all_heads_or_model = trained.get(output_name, lm_head)  # head 0's output layer, where other heads have none
    output = own.pop(output_name) if output_name in own else all_heads_or_model()
    if len(served.blocks) != num_layers:
        raise ValueError(f"head {index} has {len(served.blocks)} residual blocks, expected {num_layers}")
    module = MedusaHeads(output.shape[1], output.shape[0], 1, num_layers, "shared", dtype=torch.float32)
    module.load_state_dict(own)
    states = torch.randn(_ROWS, output.shape[1], generator=torch.Generator().manual_seed(index))
    with torch.no_grad():
        expected_hidden, found_hidden = module.hidden(0, states), states
        for block in served.blocks:
            bias = block["bias"][1].float() if "bias" in block else None
            found_hidden = found_hidden + silu(linear(found_hidden, block["weight"][1].float(), bias))
        name, weight = served.output or ("the model's lm_head", lm_head())
        if weight.shape != output.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, expected {tuple(output.shape)}")
        difference = _largest_difference(found_hidden, weight, expected_hidden, output)
    if not difference <= _TOLERANCE:
        raise ValueError(f"{_culprit(served, own, output)} differs from the trained one (logits by {difference:.2g})")


def _largest_difference(found: Tensor, found_weight: Tensor, expected: Tensor, expected_weight: Tensor) -> float:
    """Largest difference of the logits relative to the largest logit; NaN if there is one."""
    largest, scale = torch.zeros(()), torch.zeros(())
    for start in range(0, expected_weight.shape[0], _VOCABULARY_CHUNK):
        rows = slice(start, start + _VOCABULARY_CHUNK)
        logits = linear(expected, expected_weight[rows].float())
        largest = torch.maximum(largest, (linear(found, found_weight[rows].float()) - logits).abs().max())
        scale = torch.maximum(scale, logits.abs().max())
    return (largest / scale.clamp_min(1e-30)).item()


def _culprit(served: _Head, own: Mapping[str, Tensor], output: Tensor) -> str:
    """The consumer's name of the first tensor that is not the trained one."""
    for j, block in enumerate(served.blocks):
        for kind in ("weight", "bias"):
            expected = own[f"0.{j}.linear.{kind}"]
            if kind not in block:
                return f"the {kind} of {block['weight'][0]} is not loaded: it"
            if not torch.equal(block[kind][1], expected):
                return block[kind][0]
    if served.output is not None and not torch.equal(served.output[1].float(), output.float()):
        return served.output[0]
    return "the head as a whole"
