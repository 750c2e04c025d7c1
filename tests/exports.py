"""Trained runs on a 2-layer model, exported; used by the tests of exporting, importing and verifying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import add_lora, make_model
from safetensors.torch import load_file
from torch import Tensor
from training_outputs import as_if_trained, save_base, write_run

from axolotl_medusa.model.sources import Source, find_source
from axolotl_medusa.serving.export import export

FORMS = {
    "vllm": ("shared", "separate", "trained"),
    "tgi": ("shared", "separate", "trained"),
    "lorax": ("shared",),
    "fasterdecoding": ("shared", "separate", "trained"),
    "fasterdecoding-legacy": ("shared",),
    "fasterdecoding-merged": ("shared", "separate"),
    "tensorrt-llm": ("shared", "separate", "trained"),
    "rtp-llm": ("shared", "separate", "trained"),
    "modelopt": ("shared", "separate"),
}
"""The forms that each target expresses."""

CASES = [(target, form) for target, forms in FORMS.items() for form in forms]
IN_MODEL_FILES = {"fasterdecoding-merged", "rtp-llm", "modelopt"}
HEADS = {"fasterdecoding": 5}
"""Number of heads where it is not 3."""


def trained(
    directory: Path,
    recipe: str = "medusa-1",
    form: str = "shared",
    num_heads: int = 3,
    num_layers: int = 1,
    family: str = "llama",
    adapter: dict[str, Any] | None = None,
) -> Source:
    """A run in `directory/run`, of a base model in `directory/base`; `adapter` makes Medusa-2 a LoRA."""
    base = save_base(directory / "base", make_model(family))
    model = make_model(family)
    if adapter is not None:
        model = add_lora(model, **adapter)
    if recipe == "medusa-2":
        as_if_trained(model)
    run = write_run(directory / "run", model, recipe, base, form, num_heads, num_layers)
    return find_source(run)


def exported(directory: Path, target: str, form: str = "shared", **options: Any) -> tuple[Source, Path]:
    """The source and the export in `directory/out`; not verified, so that tests can do it."""
    source = trained(directory, form=form, num_heads=HEADS.get(target, 3), **options)
    export(source, target, directory / "out", verify=False)
    return source, directory / "out"


def canonical(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and meta of a heads directory, read with safetensors."""
    content = [json.loads((directory / name).read_text()) for name in ("config.json", "medusa_meta.json")]
    return load_file(directory / "medusa_lm_head.safetensors"), content[0], content[1]


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
