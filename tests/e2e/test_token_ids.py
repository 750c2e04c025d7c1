"""What `generate.py --token_ids` writes is what axolotl trains on: the same ids, the same labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import load_from_disk
from planned_server import FakeServer, Workdir, turns

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = pytest.mark.e2e

ALREADY_TOKENIZED = {"ds_type": "json", "type": None}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.has_token_ids = True
    yield fake
    fake.stop()


@pytest.fixture
def work(tmp_path: Path, server: FakeServer) -> Workdir:
    """Rows with token ids of one and of two answers, of many lengths."""
    work = Workdir(tmp_path, server.url)
    work.write(
        *({"id": f"r{index}", "messages": turns("word " * (index + 1), "old", f"and {index}?")} for index in range(8)),
        *({"id": f"s{index}", "prompt": f"Say {index}."} for index in range(8)),
    )
    assert work.run("--token_ids") == 0
    return work


def columns(rows) -> list[tuple[list[int], list[int], list[int]]]:
    return sorted((list(row["input_ids"]), list(row["attention_mask"]), list(row["labels"])) for row in rows)


def test_axolotl_loads_exactly_the_ids_and_labels_that_the_server_returned(work, make_yaml, axolotl, tmp_path):
    datasets = [{"path": str(work.output), **ALREADY_TOKENIZED}]
    axolotl("preprocess", make_yaml(datasets=datasets, sample_packing=False))
    (prepared,) = (path.parent for path in (tmp_path / "prepared").rglob("dataset_info.json"))
    assert columns(load_from_disk(str(prepared))) == columns(work.rows().values())


def test_axolotl_trains_on_token_ids(work, make_yaml, axolotl, tmp_path):
    datasets = [{"path": str(work.output), **ALREADY_TOKENIZED}]
    axolotl("train", make_yaml(datasets=datasets, max_steps=2))
    tensors = read_heads(tmp_path / "out" / "medusa_heads").head_tensors()
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".linear." in name)
