"""Code that goes with a model: what its configurations name, what that imports, and nothing that merely lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axolotl_medusa.serving.model_code import model_code


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        file = directory / (name.replace("__slash__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


def configure(directory: Path, auto_map: object, file: str = "config.json") -> Path:
    (directory / file).write_text(json.dumps({"auto_map": auto_map}))
    return directory


def names(directory: Path) -> list[str]:
    return [str(path) for path in model_code(directory)]


def test_files_that_configurations_name_are_found_with_their_relative_imports(tmp_path):
    write(
        tmp_path,
        configuration_own="import os\n",
        modeling_own="from .configuration_own import A\nfrom .layers.attention import B\nfrom . import helpers, missing\n",
        helpers="import torch\nfrom transformers import x\nif True:\n    from .deep import *\n",
        deep="from .helpers import again\n",
        tokenization_own="from pathlib import Path\n",
        layers__slash____init__="",
        layers__slash__attention="from ..shared import s\nfrom .mlp import m\nfrom ...above import a\n",
        layers__slash__mlp="",
        shared="",
        train="import secret_of_the_user",
        setup="",
    )
    configure(tmp_path, {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"})
    configure(tmp_path, {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_config.json")
    assert names(tmp_path) == [
        "configuration_own.py",
        "deep.py",
        "helpers.py",
        "layers/__init__.py",
        "layers/attention.py",
        "layers/mlp.py",
        "modeling_own.py",
        "shared.py",
        "tokenization_own.py",
    ]


@pytest.mark.parametrize(
    "auto_map",
    [None, {}, [], 5, "", {"AutoModel": 5}, {"AutoModel": "modeling_own"}, {"AutoModel": "org/name--modeling_own.Own"},
     {"AutoModel": "../outside.Own"}, {"AutoModel": "/etc/outside.Own"}, {"AutoModel": "..outside.Own"},
     {"AutoModel": ".Own"}, {"AutoModel": "gone.Own"}],
    ids=repr,
)  # fmt: skip
def test_nothing_is_taken_where_nothing_inside_is_named(auto_map, tmp_path):
    write(tmp_path, outside="")
    inside = configure(write(tmp_path / "model", modeling_own=""), auto_map)
    assert names(inside) == []


def test_links_to_files_elsewhere_are_no_code_of_the_model(tmp_path):
    """An export would copy what they lead to."""
    (tmp_path / "private").write_text("key")
    inside = configure(
        write(tmp_path / "model", modeling_own="from . import layers, linked"), {"AutoModel": "modeling_own.Own"}
    )
    for name in ("layers.py", "linked.py"):
        (inside / name).symlink_to(tmp_path / "private" if name == "layers.py" else inside / "modeling_own.py")
    assert names(inside) == ["linked.py", "modeling_own.py"]


def test_directory_without_configurations_has_no_code(tmp_path):
    assert names(write(tmp_path, modeling_own="")) == []


def test_code_is_read_and_never_run(tmp_path):
    write(tmp_path, modeling_own=f"open({str(tmp_path / 'was-run')!r}, 'w')\nfrom .other import x\n", other="")
    configure(tmp_path, {"AutoModel": "modeling_own.Own"})
    assert names(tmp_path) == ["modeling_own.py", "other.py"]
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "text", ["def (", "\0", "x = " + "(" * 10_000, "\udcff"], ids=["syntax", "null", "deep", "bytes"]
)
def test_code_that_is_no_python_is_taken_as_it_is(text, tmp_path):
    (tmp_path / "modeling_own.py").write_bytes(text.encode(errors="surrogateescape"))
    configure(tmp_path, {"AutoModel": "modeling_own.Own"})
    assert names(tmp_path) == ["modeling_own.py"]
