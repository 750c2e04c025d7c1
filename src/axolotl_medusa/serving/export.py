"""Trained heads written in a server's format, and read back the way that server reads them.

Contract: refuses what the server cannot express before anything is written; writes tensor by tensor; deletes nothing but
the files of an earlier export in the same directory.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from axolotl_medusa.model.file_names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    META_FILE,
    SHARED_OUTPUT_LAYER,
)
from axolotl_medusa.model.head_form import TOKEN_MAP
from axolotl_medusa.model.json_files import read_json
from axolotl_medusa.model.secrets import without_secrets
from axolotl_medusa.model.sources import Source
from axolotl_medusa.model.tensor_files import (
    LazyTensor,
    write_json,
    write_sharded,
    write_tensors,
    write_torch_file,
)
from axolotl_medusa.serving.export_files import MERGED_FOLDER, read_marker, replaced_files
from axolotl_medusa.serving.format_rules import TARGETS, Target, plan, refusal, target_config
from axolotl_medusa.serving.lora import PEFT_PREFIX, adapter_tensors
from axolotl_medusa.serving.model_card import measured_in_training, model_card, serve_command
from axolotl_medusa.serving.served_model import (
    lm_head,
    lm_head_bias,
    merged_tensors,
    model_files,
    served_config,
)
from axolotl_medusa.serving.verify import verify_export

LOG = logging.getLogger(__name__)

_LORA_NAME = re.compile(r"\.lora_[AB]\.weight$")
_ROWS = 8192
"""Rows of lm_head that are compared at once."""


def export(
    source: Source, target: str, out: str | Path, model: Literal["none", "merged"] = "none", verify: bool = True
) -> None:
    """Writes heads for a server.

    Args:
        source: The heads and their model, from `find_source`.
        target: A name in `format_rules.TARGETS`.
        out: The directory to write; new, empty, or with an earlier export, whose files are replaced.
        model: `merged` writes the model that Medusa-2 trained into `out/merged_model`. Formats that keep the heads
            among the model's tensors hold it in any case.
        verify: Whether the files are read back through an independent loader and their logits compared.

    Raises:
        ValueError: The target cannot express the heads, and nothing was written; or what was written serves other logits,
            and stays for inspection.
    """
    out, format_ = Path(out).expanduser(), _target(target)
    served = served_config(source)
    merged = model == "merged" and format_.file is not None
    _check(source, format_, served, out, merged=merged)
    adapter = _unmerged_adapter(source, format_, merged=merged)
    copies = _copies(source, format_, merged=merged)
    _prepare(source, format_, out, copies, with_adapter=adapter is not None)
    base_model = _served_model(source, format_, out, merged=merged)
    if merged:
        _write_model(source, out / MERGED_FOLDER)
    _write_heads(source, format_, served, out, base_model)
    if adapter is not None:
        _copy_adapter(adapter, out)
    for name, origin in copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, out / name)
    num_heads = source.config["medusa_num_heads"]
    card = model_card(
        target=target,
        config=source.config,
        meta=source.meta,
        base_model=source.base_model,
        model="base" if source.model_kind == "base" else "adapter" if adapter else "full",
        serve=serve_command(target, str(out), base_model, num_heads, served.get("model_type", "")),
        measured=measured_in_training(source.output_dir),
        directory=str(out),
    )
    (out / CARD_FILE).write_text(without_secrets(card), encoding="utf-8")
    if verify:
        written = Source(source.heads_dir, source.config, {}, str(out / MERGED_FOLDER)) if merged else source
        output, dtype = lm_head(written), _heads_dtype(source)
        not_of_a_head = (SHARED_OUTPUT_LAYER, TOKEN_MAP)
        trained = {name: tensor.load for name, tensor in source.heads().items() if name not in not_of_a_head}
        verify_export(target, out, trained, lambda: output.load().to(dtype))
        LOG.info("%s was read back as %s does: its logits are the trained heads'", out, target)


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"found the target {name}, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _check(source: Source, target: Target, served: dict[str, Any], out: Path, *, merged: bool) -> None:
    reason = refusal(target, source.config, served, str(out.absolute()), head_has_bias=lm_head_bias(source))
    if reason:
        raise ValueError(reason)
    if merged and source.model_kind == "base":
        raise ValueError(
            f"found heads of {source.base_model} as it is, expected a model trained with them for --model merged; "
            "leave it out and serve that model"
        )
    if adapter := _unmerged_adapter(source, target, merged=merged):
        _check_adapter(adapter, target)
    if source.form == "shared":
        _check_shared_output_layer(source)


def _unmerged_adapter(source: Source, target: Target, *, merged: bool) -> Path | None:
    """The adapter that the server has to apply by itself, None where there is none or it is merged."""
    return None if merged or target.file is None else source.adapter_dir


def _check_adapter(adapter: Path, target: Target) -> None:
    """Refuses an adapter beside the heads where the server would not apply it, or only a part of it."""
    if not target.adapters:
        raise ValueError(
            f"found heads trained with the adapter in {adapter}, expected a merged model: {target.name} does not serve "
            "both; add --model merged, or export to lorax"
        )
    other = [tensor.name for name, tensor in adapter_tensors(adapter).items() if not _LORA_NAME.search(name)]
    if other:
        raise ValueError(
            f"found {other[0]} in {adapter}, expected nothing but LoRA matrices: {target.name} would leave it out; "
            "add --model merged"
        )


def _check_shared_output_layer(source: Source) -> None:
    """Refuses heads that were trained to share another lm_head than the one that will be served.

    Training may have loaded a model of fp32 files in half precision: what it wrote is then lm_head in that type.
    """
    trained, served = source.heads().load(SHARED_OUTPUT_LAYER), lm_head(source).load()
    if not any(_match(trained, served, dtype, source) for dtype in (trained.dtype, torch.bfloat16, torch.float16)):
        raise ValueError(
            f"found heads that share another lm_head than that of {source.base_model}, expected the one they were trained "
            "with; give the model that was trained as --base-model"
        )


def _match(trained: Tensor, served: Tensor, dtype: torch.dtype, source: Source) -> bool:
    """Whether `trained` is `served` in `dtype`."""
    # Training merges an adapter on lm_head in the model's own type, the export in fp32.
    tolerance = 2 * torch.finfo(dtype).eps if source.model_kind == "adapter" else 0.0
    for start in range(0, len(trained), _ROWS):
        rows = slice(start, start + _ROWS)
        own, other = trained[rows].float(), served[rows].to(dtype).float()
        if not torch.equal(own, own.to(dtype).float()):
            return False
        if not ((own - other).abs() <= tolerance * own.abs().amax(1, keepdim=True)).all():
            return False
    return True


def _copies(source: Source, target: Target, *, merged: bool) -> dict[Path, Path]:
    """What is copied as it is: by its path in the export, the file."""
    tokenizer = {Path(file.name): file for file in source.tokenizer_files()}
    if target.file is None:
        return {**model_files(source), **tokenizer}
    model = {**model_files(source), **tokenizer} if merged else {}
    return {**tokenizer, **{MERGED_FOLDER / name: file for name, file in model.items()}}


def _prepare(source: Source, target: Target, out: Path, copies: Collection[Path], *, with_adapter: bool) -> None:
    """Makes the directory, or takes an earlier export's files out of it, and marks it as an export."""
    prepared_directory(source, out)
    exported = {"target": target.name, "config": source.config, "adapter": with_adapter}
    exported["files"] = sorted(path.as_posix() for path in copies)
    write_json(out / META_FILE, {**without_secrets(source.meta), "export": exported})


def prepared_directory(source: Source, out: Path) -> None:
    """Makes a directory to export to, or takes an earlier export's files out of it.

    Raises:
        ValueError: It holds anything else, or what is to be read.
    """
    own = (source.heads_dir, source.output_dir, source.adapter_dir, source.model_dir())
    for directory in (directory.resolve() for directory in own if directory is not None):
        if out.resolve() in (directory, *directory.parents):
            raise ValueError(
                f"found {directory} in {out}, expected another directory: it is read; choose another --out"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not out.is_dir() or read_marker(out) is None:
            raise ValueError(f"{out} is not empty, expected a new directory or an earlier export; choose another --out")
        for file in replaced_files(out):
            file.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _served_model(source: Source, target: Target, out: Path, *, merged: bool) -> str:
    """Name or path of the model that goes with the export."""
    if target.file is None:
        return str(out)
    if merged:
        return str((out / MERGED_FOLDER).resolve())
    return str(source.full_model_dir.resolve() if source.full_model_dir else source.base_model)


def _write_heads(source: Source, target: Target, served: dict[str, Any], out: Path, base_model: str) -> None:
    config = target_config(target, source.config, base_model)
    tensors = list(_head_tensors(source, target))
    if target.file is None:
        write_sharded(out, [*merged_tensors(source), *tensors])
        config = {**served, **config}
    elif target.file.endswith(".pt"):
        write_torch_file(out / target.file, tensors)
    else:
        write_tensors(out / target.file, tensors)
    write_json(out / CONFIG_FILE, config)


def _head_tensors(source: Source, target: Target) -> Iterator[LazyTensor]:
    """The heads under the target's names; a shared output layer is the lm_head that will be served."""
    heads, output = source.heads(), lm_head(source)
    dtype = _heads_dtype(source)
    for planned in plan(target, source.config):
        if planned.source == SHARED_OUTPUT_LAYER:
            yield LazyTensor(planned.name, dtype, output.shape, lambda: output.load().to(dtype))
        else:
            yield heads[planned.source]._replace(name=planned.name)


def _heads_dtype(source: Source) -> torch.dtype:
    return source.heads().dtype("0.0.linear.weight")


def _write_model(source: Source, directory: Path) -> None:
    """Writes the model as plain transformers loads it; its config has no Medusa key, which TGI would stumble over."""
    directory.mkdir(exist_ok=True)
    write_sharded(directory, merged_tensors(source))
    write_json(directory / CONFIG_FILE, served_config(source))


def _copy_adapter(adapter: Path, out: Path) -> None:
    write_json(out / ADAPTER_CONFIG_FILE, without_secrets(read_json(adapter / ADAPTER_CONFIG_FILE)))
    tensors = (tensor._replace(name=PEFT_PREFIX + name) for name, tensor in adapter_tensors(adapter).items())
    write_tensors(out / ADAPTER_FILE, tensors)
