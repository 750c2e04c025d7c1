"""Which links lead out of a directory: those into the Hub's cache do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from axolotl_medusa.model.safe_paths import stays_inside
from axolotl_medusa.model.tensor_files import SAFETENSORS_INDEX, TensorFiles


def cached(cache: Path, commit: str = "c0ffee") -> Path:
    """A model as the Hub's cache keeps it: every file of the snapshot is a link into the blobs beside it."""
    blobs, snapshot = cache / "models--org--model" / "blobs", cache / "models--org--model" / "snapshots" / commit
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"x": torch.ones(2)}, blobs / "0a")
    save_file({"y": torch.ones(3)}, blobs / "0b")
    index = {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
    (blobs / "0c").write_text(json.dumps(index))
    for name, blob in (("one.safetensors", "0a"), ("two.safetensors", "0b"), (SAFETENSORS_INDEX, "0c")):
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return snapshot


def linked_to(place: Path, snapshot: Path) -> Path:
    """A directory of links into the cache's blobs, as earlier versions of huggingface_hub made it for `local_dir`."""
    place.mkdir()
    for file in snapshot.iterdir():
        (place / file.name).symlink_to(file.resolve())
    return place


@pytest.mark.parametrize("kind", ["snapshot", "link-to-snapshot", "local-dir"])
def test_model_in_the_hubs_cache_is_read_through_its_links(kind, tmp_path):
    directory = cached(tmp_path / "hub")
    if kind == "link-to-snapshot":
        (tmp_path / "model").symlink_to(directory)
        directory = tmp_path / "model"
    elif kind == "local-dir":
        directory = linked_to(tmp_path / "model", directory)
    assert all(stays_inside(file, directory) for file in directory.iterdir())
    assert sorted(TensorFiles.open(directory)) == ["x", "y"]


@pytest.mark.parametrize("elsewhere", ["file", "other/blobs/file"])
def test_other_links_lead_out_and_are_refused(elsewhere, tmp_path):
    target = tmp_path / elsewhere
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.ones(2)}, target)
    model = tmp_path / "model"
    model.mkdir()
    (model / "one.safetensors").symlink_to(target)
    (model / SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    assert not stays_inside(model / "one.safetensors", model)
    with pytest.raises(
        ValueError, match=r"names one\.safetensors, a link to a file elsewhere: put the file itself there"
    ):
        TensorFiles.open(model)


def test_paths_are_compared_by_their_parts(tmp_path):
    (tmp_path / "model").mkdir()
    assert stays_inside(tmp_path / "model" / "a" / ".." / "b", tmp_path / "model")
    assert not stays_inside(tmp_path / "model" / ".." / "b", tmp_path / "model")
    assert not stays_inside(tmp_path / "model-2" / "b", tmp_path / "model")
