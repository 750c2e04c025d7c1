"""The heads directory of trained heads: write, read, verify.

Contract: knows the heads and the files; nothing about training or servers' own formats. The directory holds
`medusa_lm_head.safetensors`, `config.json`, `medusa_meta.json` and the tokenizer's files; vLLM (shared form), TGI v2 and
LoRAX v2 load it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from axolotl_medusa.model.anatomy import causal_lm, frozen_output_embedding, output_embedding
from axolotl_medusa.model.divided_parameters import fill, gathered, host_copy, is_divided, whole, whole_shape
from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, META_FILE, SHARED_OUTPUT_LAYER
from axolotl_medusa.model.head_form import DRAFT_VOCAB_KEY, FORM_KEY, TOKEN_MAP, HeadForm, form_of
from axolotl_medusa.model.heads import HEADS_NAME, MedusaHeads, attached_heads, check_token_map
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.secrets import without_secrets
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles, whole_or_nothing, write_json

_HASHED_AT_ONCE = 1 << 20
"""Elements of a weight that are hashed at a time."""

_VERSIONS_OF = ("axolotl-medusa", "axolotl", "torch", "transformers", "peft")
_LARGEST_SIZE = 2**24
"""Of a hidden state or a vocabulary: far beyond any, and bytes of a matrix of both are still a number for torch."""


@dataclass(frozen=True)
class HeadsFile:
    """A heads directory in memory.

    Attributes:
        tensors: Heads under their canonical names, and in the shared form the output layer they reuse.
        config: What `config.json` says.
        meta: What `medusa_meta.json` says.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> HeadForm:
        """`shared`, `separate` or `trained`."""
        return form_of(self.config)

    def build(self, device: torch.device | str | None = None) -> MedusaHeads:
        """Builds the heads with these weights, in the type they were saved in."""
        heads = self._empty(device)
        heads.load_state_dict(self.head_tensors())
        return heads

    def as_heads(self) -> MedusaHeads:
        """The heads made of these very tensors: nothing is copied, nor first filled with random numbers."""
        heads = self._empty("meta")
        heads.load_state_dict(self.head_tensors(), assign=True)
        return heads

    def _empty(self, device: torch.device | str | None) -> MedusaHeads:
        return MedusaHeads(
            self.config["hidden_size"],
            self.config["vocab_size"],
            self.config["medusa_num_heads"],
            self.config["medusa_num_layers"],
            self.form,
            dtype=next(tensor.dtype for name, tensor in self.tensors.items() if name != TOKEN_MAP),
            device=device,
            draft_vocab=self.config.get(DRAFT_VOCAB_KEY),
        )

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors that are the heads' own."""
        return {name: tensor for name, tensor in self.tensors.items() if name != SHARED_OUTPUT_LAYER}


def heads_config(heads: MedusaHeads, base_model: str) -> dict[str, Any]:
    """The canonical `config.json`: every key that a server reads, and no `architectures`, which crashes them."""
    named: dict[str, Any] = {FORM_KEY: heads.form} if heads.form == "trained" else {}
    if heads.draft_vocab is not None:
        named[DRAFT_VOCAB_KEY] = heads.draft_vocab
    return {
        "model_type": "medusa",
        "base_model_name_or_path": base_model,
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "num_medusa_heads": heads.num_heads,
        "num_medusa_layers": heads.num_layers,
        "version": "2" if heads.form == "shared" else "1",
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "medusa_fc_bias": True,
        "original_lm_head": heads.form != "separate",
        **named,
    }


def heads_meta(
    model: nn.Module, recipe: str, resolved_yaml: Mapping[str, Any], lm_head_sha256: str | None = None
) -> dict[str, Any]:
    """What the heads were made by and from, for `medusa_meta.json`; secrets of the YAML are left out.

    Args:
        model: The model with heads attached.
        recipe: `medusa-1` or `medusa-2`.
        resolved_yaml: The validated YAML.
        lm_head_sha256: The model's `lm_head_hash` where it is known already.
    """
    return {
        "recipe": recipe,
        "lm_head_sha256": lm_head_sha256 or lm_head_hash(model),
        "dtype": str(attached_heads(model).dtype).removeprefix("torch."),
        "versions": {name: package_version(name) for name in _VERSIONS_OF} | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "yaml": without_secrets(json.loads(json.dumps(dict(resolved_yaml), default=str))),
    }


def lm_head_hash(model: nn.Module) -> str:
    """SHA-256 of the output embedding's weight, without adapters, as it is now: `sha256` of its bytes."""
    return parameter_hash(frozen_output_embedding(output_embedding(model)).weight)


def parameter_hash(parameter: Tensor, keep: bool = True) -> str:
    """`weight_hash` of a parameter wherever it is; of one that ZeRO-3 or FSDP divides, every rank must ask.

    Args:
        parameter: The parameter.
        keep: Whether this rank wants the hash; without, it only takes part in the gathering and gets an empty one.
    """
    if not keep and not is_divided(parameter):
        return ""
    with torch.no_grad(), gathered([parameter]):
        values = whole(parameter).detach()
        return weight_hash(values.cpu()) if keep else ""


def weight_hash(weight: Tensor, *dtypes: torch.dtype) -> str:
    """SHA-256 of the bytes of a weight, read by few rows at a time, so that no copy of it is made.

    Args:
        weight: The weight, `[rows, ...]`.
        *dtypes: Types that it is turned into before, one after the other; without any it is hashed in its own.
    """
    digest = hashlib.sha256()
    rows_at_once = max(1, _HASHED_AT_ONCE * len(weight) // max(1, weight.numel()))
    for rows in torch.split(weight.detach(), rows_at_once):
        for dtype in dtypes:
            rows = rows.to(dtype)
        digest.update(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def acting_output_layer(model: nn.Module) -> Iterator[Tensor]:
    """The output embedding's weight as it acts now, adapters merged in, where it is; it may be the parameter itself.

    Raises:
        ValueError: An adapter on lm_head cannot be merged into one matrix.
    """
    layer = output_embedding(model)
    frozen = frozen_output_embedding(layer)
    with torch.no_grad(), gathered(list(layer.parameters())):
        if hasattr(layer, "get_delta_weight"):
            weight = whole(frozen.weight).detach()
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    if getattr(layer, "use_dora", {}).get(adapter):
                        raise ValueError(
                            "DoRA on lm_head is not supported with Medusa heads: "
                            "take lm_head out of the LoRA targets or set peft_use_dora: false"
                        )
                    weight = (weight + whole(layer.get_delta_weight(adapter))).to(weight.dtype)
        elif hasattr(layer, "token_adapter"):
            weight = layer.token_adapter.get_merged_weights(layer.token_adapter.active_adapters).detach()
        else:
            active = layer.modules_to_save[layer.active_adapters[0]] if hasattr(layer, "modules_to_save") else frozen
            weight = whole(active.weight).detach()
        yield weight


def heads_file(model: nn.Module, config: dict[str, Any], meta: dict[str, Any]) -> HeadsFile:
    """Copies the attached heads of `model` to the CPU; with ZeRO-3 or FSDP every rank must call it."""
    return HeadsFile(heads_tensors(model), config, meta)


def heads_tensors(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Copies the attached heads of `model` to the CPU, tensor by tensor; with ZeRO-3 or FSDP every rank must call it.

    Args:
        model: The model with heads attached.
        keep: Whether this rank wants the copies; without, it only takes part in the gathering.

    Returns:
        `HeadsFile.tensors`; empty without `keep`.
    """
    heads = attached_heads(model)
    copies = {name: host_copy(parameter, keep) for name, parameter in heads.named_parameters()}
    tensors = {name: tensor for name, tensor in copies.items() if tensor is not None}
    if keep and heads.token_map is not None:
        tensors[TOKEN_MAP] = heads.token_map.to("cpu", copy=True)
    if heads.form == "shared" and (keep or any(map(is_divided, output_embedding(model).parameters()))):
        with acting_output_layer(model) as weight:
            if keep:
                tensors[SHARED_OUTPUT_LAYER] = weight.to("cpu", heads.dtype, copy=True)
    return tensors


def write_heads(directory: str | Path, file: HeadsFile) -> None:
    """Writes a heads directory, each file whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(directory / HEADS_FILE) as part:
        save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, part, metadata={"format": "pt"})
    write_json(directory / CONFIG_FILE, file.config)
    write_json(directory / META_FILE, file.meta)


def read_heads(directory: str | Path) -> HeadsFile:
    """Reads and verifies a heads directory.

    Raises:
        ValueError: A file or tensor is missing or damaged, or a shape differs from what `config.json` says.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, HEADS_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}: expected a directory that training wrote as medusa_heads")
    files = open_heads(directory)
    meta_file = directory / META_FILE
    meta = read_json(meta_file) if meta_file.is_file() else {}
    file = HeadsFile({name: files.load(name) for name in files}, read_json(directory / CONFIG_FILE), meta)
    if TOKEN_MAP in file.tensors:
        size = (file.config[DRAFT_VOCAB_KEY],)
        try:
            check_token_map(file.tensors[TOKEN_MAP], file.config["vocab_size"], size)
        except ValueError as error:
            raise ValueError(f"{directory / HEADS_FILE}: {error}") from None
    return file


def open_heads(directory: str | Path) -> TensorFiles:
    """The tensors of a heads directory, verified by their names and shapes; none of them is read yet.

    Raises:
        ValueError: As `read_heads`.
    """
    directory = Path(directory)
    files = TensorFiles.open(directory / HEADS_FILE)
    verify_heads(HeadsFile(files.sketch(), read_json(directory / CONFIG_FILE)), str(directory))
    return files


def verify_heads(file: HeadsFile, where: str) -> None:
    """Compares names and shapes of a file with what its config says.

    Raises:
        ValueError: Names or shapes differ; the line gives both.
    """
    config = file.config
    missing_keys = [
        key
        for key in ("hidden_size", "vocab_size", "medusa_num_heads", "medusa_num_layers", "original_lm_head")
        if key not in config
    ]
    if missing_keys:
        raise ValueError(
            f"{where}/{CONFIG_FILE} lacks {', '.join(missing_keys)}: expected the config of a heads directory"
        )
    _verify_numbers(file, where)
    by_config = MedusaHeads(
        config["hidden_size"],
        config["vocab_size"],
        config["medusa_num_heads"],
        config["medusa_num_layers"],
        file.form,
        device="meta",
        draft_vocab=config.get(DRAFT_VOCAB_KEY),
    )
    expected = {name: tuple(tensor.shape) for name, tensor in by_config.state_dict().items()}
    if file.form == "shared":
        expected[SHARED_OUTPUT_LAYER] = (config["vocab_size"], config["hidden_size"])
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{where}/{HEADS_FILE}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')} "
                f"by {CONFIG_FILE}"
            )


def _verify_numbers(file: HeadsFile, where: str) -> None:
    """Checks the sizes in a config before anything is built from them: no more heads and blocks than there are tensors."""
    config = file.config
    limits = {
        "hidden_size": _LARGEST_SIZE,
        "vocab_size": _LARGEST_SIZE,
        "medusa_num_heads": len(file.tensors),
        "medusa_num_layers": len(file.tensors),
    }
    for key, most in limits.items():
        if type(config[key]) is not int or not 1 <= config[key] <= most:
            raise ValueError(
                f"{where}/{CONFIG_FILE}: {key} is {shorten(config[key])}, expected a whole number from 1 to {most:,} with "
                f"{len(file.tensors)} tensors in {HEADS_FILE}: get the directory again"
            )
    draft_vocab = config.get(DRAFT_VOCAB_KEY)
    if draft_vocab is not None and (type(draft_vocab) is not int or not 1 <= draft_vocab <= config["vocab_size"]):
        raise ValueError(
            f"{where}/{CONFIG_FILE}: {DRAFT_VOCAB_KEY} is {shorten(draft_vocab)}, expected a whole number from 1 to "
            f"{config['vocab_size']:,}: get the directory again"
        )
    if not isinstance(config["original_lm_head"], bool):
        found = shorten(config["original_lm_head"])
        raise ValueError(f"{where}/{CONFIG_FILE}: original_lm_head is {found}, expected true or false")
    if config["medusa_num_heads"] * config["medusa_num_layers"] > len(file.tensors):
        raise ValueError(
            f"{where}/{CONFIG_FILE}: medusa_num_heads is {config['medusa_num_heads']} with {config['medusa_num_layers']} blocks "
            f"each, more than the {len(file.tensors)} tensors in {HEADS_FILE}: get the directory again"
        )
    whole = next(
        (name for name, tensor in file.tensors.items() if not tensor.is_floating_point() and name != TOKEN_MAP), None
    )
    if whole is not None:
        raise ValueError(
            f"{where}/{HEADS_FILE}: {whole} is {file.tensors[whole].dtype}, expected floating-point numbers"
        )


def without_heads(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict without the tensors of the attached heads, so that plain transformers loads it."""
    return {name: tensor for name, tensor in state_dict.items() if HEADS_NAME not in name.split(".")}


def load_into(model: nn.Module, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
    """Copies saved heads into the attached ones, tensor by tensor; with ZeRO-3 every rank must call it.

    Args:
        model: The model with heads attached.
        tensors: `HeadsFile.tensors`, or what `open_heads` found, which is read one tensor at a time.

    Raises:
        ValueError: Names or shapes differ from the attached heads'.
    """
    heads = attached_heads(model)
    kind = type(causal_lm(model)).__name__
    surplus = sorted(tensors.keys() - heads.state_dict().keys() - {SHARED_OUTPUT_LAYER})
    if surplus:
        raise ValueError(
            f"saved heads do not fit {kind}: {surplus[0]} has no place in the model's heads; "
            "use the medusa_* keys that they were trained with"
        )
    for name, parameter in heads.named_parameters():
        shape = whole_shape(parameter)
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"saved heads do not fit {kind}: {name} is {found}, the model's heads have {shape}")
        fill(parameter, tensors[name])
    if heads.token_map is not None:
        saved = tensors.get(TOKEN_MAP)
        if saved is None:
            raise ValueError(f"saved heads do not fit {kind}: they choose among all tokens; remove medusa_draft_vocab")
        heads.choose_tokens(saved.load() if isinstance(saved, LazyTensor) else saved)


def package_version(package: str) -> str | None:
    """Version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, None where it is installed without one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
