"""Two torchrun agents that meet on the loopback stand for two machines, with disks that they share or of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_distributed import COMMON, assert_same
from two_processes import torchrun, two_nodes

from axolotl_medusa.model.heads_directory import read_heads

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

PLUGINS = ["named_nodes.NamedNodesPlugin", *COMMON["plugins"], "watch_backbone.WatchBackbonePlugin"]
MEDUSA_1 = {**COMMON, "medusa_only_heads": True, "plugins": PLUGINS, "save_steps": 1}


def train(configs: tuple[Path, Path], runs: Path, ok: bool = True) -> tuple[str, str]:
    """Trains on both nodes and returns what each printed."""
    environment = {"BACKBONE_RUNS": str(runs), "HEADS_WRITTEN": f"{runs}.heads"}
    with two_nodes(configs, ACCELERATE_USE_CPU="true", **environment) as nodes:
        outputs = tuple(node.end() for node in nodes)
    assert [node.process.exitcode == 0 for node in nodes] == [ok, ok], "\n".join(outputs)[-20000:]
    return outputs


def test_two_machines_with_shared_disks_equal_one_process(make_yaml, axolotl, tmp_path, two_chats):
    """The one that does not write leaves the files of the other alone, and each has its own hidden states."""
    two, one, cache = tmp_path / "two", tmp_path / "one", tmp_path / "cache"
    keys = {**MEDUSA_1, "datasets": two_chats}
    config = make_yaml(**keys, output_dir=str(two), medusa_hidden_cache=str(cache))
    outputs = train((config, config), tmp_path / "runs")
    assert sorted(path.name for path in cache.iterdir()) == ["node0", "node1"]
    writes = [line.split() for line in Path(f"{tmp_path / 'runs'}.heads").read_text().splitlines()]
    assert len({node for node, _ in writes}) == 1
    assert [directory for _, directory in writes].count(str(two / "medusa_heads")) == 1
    assert not any("is not on a disk" in output for output in outputs)
    assert not list(two.glob(".seen-by-all-*"))
    single = {**keys, "plugins": ["axolotl_medusa.MedusaPlugin"], "micro_batch_size": 2, "output_dir": str(one)}
    axolotl("train", make_yaml(**single, medusa_hidden_cache=str(tmp_path / "own")))
    assert_same(one, two, ("loss", "grad_norm", "medusa0_loss", "medusa2_loss", "medusa0_top1"))


@pytest.mark.long
def test_two_machines_with_their_own_disks_train_and_resume_from_copies_alone(make_yaml, tmp_path, two_chats):
    def on(node: int, **changes) -> Path:
        disk = tmp_path / f"disk{node}"
        paths = {"output_dir": str(disk / "out"), "dataset_prepared_path": str(disk / "prepared")}
        return make_yaml(
            **{**MEDUSA_1, **paths, **changes}, datasets=two_chats, medusa_hidden_cache=str(disk / "cache")
        )

    outputs = train((on(0), on(1)), tmp_path / "runs")
    heads = [tmp_path / f"disk{node}" / "out" / "medusa_heads" for node in (0, 1)]
    (writer,) = [node for node in (0, 1) if heads[node].is_dir()]
    other = 1 - writer
    assert read_heads(heads[writer]).tensors
    assert (
        f"heads are written on the first machine alone, not on node{other}; to go on from a checkpoint, copy it"
        in outputs[writer]
    )

    goes_on = {"auto_resume_from_checkpoints": True, "max_steps": 3, "num_epochs": 3}
    outputs = train((on(0, **goes_on), on(1, **goes_on)), tmp_path / "runs", ok=False)
    line = "axolotl-medusa: node{} goes on from checkpoint-2, node{} from a part of checkpoint-2: copy the checkpoint"
    assert any(line.format(writer, other) in output for output in outputs), "\n".join(outputs)[-20000:]

    shutil.copytree(heads[writer].parent / "checkpoint-2", heads[other].parent / "checkpoint-2", dirs_exist_ok=True)
    outputs = train((on(0, **goes_on), on(1, **goes_on)), tmp_path / "runs")
    (last,) = tmp_path.glob("disk*/out/checkpoint-3/trainer_state.json")
    steps = [entry["step"] for entry in json.loads(last.read_text())["log_history"] if "loss" in entry]
    assert steps == [1, 2, 3], "the third step alone was trained"


def test_workers_of_ray_register_again_and_leave_heads(make_yaml, axolotl, tmp_path, two_chats):
    """The driver validates the YAML and hands over a dictionary; each worker registers the plugins and validates that."""
    plugins = ["ray_stand_in.RayStandInPlugin", *COMMON["plugins"]]
    keys = {**COMMON, "datasets": two_chats, "medusa_lr_multiplier": 2.0}
    ray = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"CPU": 1}, "plugins": plugins}
    work, two, one = tmp_path / "work", tmp_path / "two", tmp_path / "one"
    axolotl("train", make_yaml(**{**keys, **ray}, output_dir=str(two)), env={"RAY_WORK": str(work)})
    torchrun(work, "ray_stand_in", package="", ACCELERATE_USE_CPU="true")
    single = {**keys, "plugins": ["axolotl_medusa.MedusaPlugin"], "micro_batch_size": 2}
    axolotl("train", make_yaml(**single, output_dir=str(one)))
    assert_same(one, two)
