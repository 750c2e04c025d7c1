"""The heads' metrics reach TensorBoard's and wandb's own files, with their steps, and nothing reaches for a network."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axolotl_process import TIMEOUT_S, log_history
from example_files import ROOT

pytestmark = pytest.mark.e2e

METRICS = (
    "loss",
    "base_loss",
    "medusa0_loss",
    "medusa0_top1",
    "medusa2_loss",
    "medusa_scheduler_coefficient",
    "medusa_acceptance_length",
)
WANDB_BLOCK_BYTES = 32768
Points = dict[str, dict[int, float]]
"""Metric -> step -> value."""


@pytest.fixture
def outside() -> Iterator[socket.socket]:
    """Where a process that is given `environment_without_network` ends up when it wants to leave this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def environment_without_network(outside: socket.socket, folder: Path) -> dict[str, str]:
    address = f"http://127.0.0.1:{outside.getsockname()[1]}"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL"), address)
    folders = {f"WANDB_{name}": str(folder) for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    return {**os.environ, **proxies, **folders, "NO_PROXY": "", "WANDB_MODE": "offline"}


def tensorboard_points(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of an offline run: a header of 7 bytes, then LevelDB's log format."""
    data, position, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if WANDB_BLOCK_BYTES - position % WANDB_BLOCK_BYTES < 7:  # no space for a record's head: the block is padded
            position += WANDB_BLOCK_BYTES - position % WANDB_BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_points(folder: Path) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    points: Points = {}
    for data in wandb_records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for key in row.keys() - {"train/global_step"}:
                points.setdefault(key, {})[row["train/global_step"]] = row[key]
    return points


def test_metrics_reach_tensorboard_and_wandb_offline(make_yaml, tmp_path, outside):
    config = make_yaml(
        use_tensorboard=True,
        wandb_project="medusa",
        medusa_scheduler="linear",
        val_set_size=0.2,
        eval_sample_packing=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    result = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(config)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=environment_without_network(outside, tmp_path / "wandb"),
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    with pytest.raises(BlockingIOError):
        outside.accept()
    history = log_history(tmp_path / "out")
    train = {entry["step"]: entry for entry in history if "loss" in entry}
    evaluation = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    assert list(train) == [1, 2, 3, 4] and {2, 4} <= set(evaluation)
    for points in (tensorboard_points(tmp_path / "out"), wandb_points(tmp_path / "wandb")):
        for name in METRICS:
            expected = {step: entry[name] for step, entry in train.items()}
            assert points[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name
        for name in ("medusa0_top1", "medusa_acceptance_length"):
            expected = {step: entry[f"eval_{name}"] for step, entry in evaluation.items()}
            assert points[f"eval/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert [train[step]["medusa_scheduler_coefficient"] for step in train] == [0.0, 0.25, 0.5, 0.75]
