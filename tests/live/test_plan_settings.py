"""Which servers a plan starts, and what is kept of what they learnt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from exports import trained
from fake_vllm_install import SERVER, fake_vllm

from axolotl_medusa.live.plan_settings import given_settings, started_settings, write_learnt
from axolotl_medusa.live.server import ServerError
from axolotl_medusa.live.server_process import running
from axolotl_medusa.serving.draft_plan import (
    Calibration,
    HeadCalibration,
    StepTimes,
    read_plan,
    uncalibrated,
    write_plan,
)
from axolotl_medusa.serving.serve import ServeOptions, vllm_command
from axolotl_medusa.serving.vllm_install import Vllm, find_vllm

V32 = Vllm(Path("/v/bin/python"), "0.32.0", takes_classes=True, has_medusa=True, import_path=None)
OLD = Vllm(Path("/v/bin/python"), "0.9.2", takes_classes=False, has_medusa=True, import_path=None)


@pytest.mark.parametrize(
    ("vllm", "names"),
    [(V32, ["plain", "k = 1", "k = 2", "k = 3", "adaptive"]), (OLD, ["plain", "k = 1", "k = 2", "k = 3"])],
)
def test_settings_are_plain_each_number_of_drafts_and_adaptive(tmp_path, vllm, names):
    assert [setting.name for setting in started_settings(trained(tmp_path), vllm, 3, (), tmp_path)] == names


def test_servers_are_started_with_what_their_setting_says(tmp_path, monkeypatch):
    started = tmp_path / "started.jsonl"
    monkeypatch.setenv("FAKE_VLLM_OUT", str(started))
    source, vllm = trained(tmp_path), find_vllm(fake_vllm(tmp_path / "vllm", main=SERVER))
    for setting in started_settings(source, vllm, 2, ("--dtype", "float32"), tmp_path):
        with setting.start() as url:
            assert url.startswith("http://127.0.0.1:")
    configs = [json.loads(line) for line in started.read_text().splitlines()]
    assert [speculative.get("num_speculative_tokens") for speculative, *_ in configs] == [None, 1, 2, 2]
    records = [
        Path(additional["medusa_record"]).name if "medusa_record" in additional else None
        for _, additional, _ in configs
    ]
    assert records == [None, "record-1", "record-2", None]
    assert [additional.get("medusa_adaptive") for _, additional, _ in configs] == [None, False, False, None]
    for *_, pid in configs:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_server_that_does_not_start_is_one_line_with_its_last_words(tmp_path):
    source, vllm = trained(tmp_path), find_vllm(fake_vllm(tmp_path / "vllm", main=SERVER))
    command = vllm_command(source, vllm, ServeOptions(vllm_options=("--fails", "no memory")))
    with pytest.raises(ServerError) as error, running(command, tmp_path / "log"):
        pass
    assert (
        f"ended with status 3 before it answered (RuntimeError: no memory): its output is in {tmp_path / 'log'}"
        in str(error.value)
    )
    assert "\n" not in str(error.value)


def test_servers_that_run_are_named(tmp_path):
    settings = given_settings(["plain=http://a:1/v1", "https://b:2/x=y"])
    assert [setting.name for setting in settings] == ["plain", "server"]
    with settings[0].start() as url, settings[1].start() as other:
        assert (url, other) == ("http://a:1", "https://b:2/x=y")
    with pytest.raises(ValueError, match="expected another for each"):
        given_settings(["http://a:1", "http://b:1"])
    with pytest.raises(ValueError, match="expected one such as"):
        given_settings(["plain=ftp://a"])


def head(share):
    return HeadCalibration((0.0, 0.5, 1.0), (share, share), (5, 5))


def test_what_servers_learnt_is_joined(tmp_path):
    heads = tmp_path / "heads"
    for directory in (heads, tmp_path / "record-1", tmp_path / "record-2"):
        directory.mkdir()
    write_plan(
        tmp_path / "record-1",
        calibration=Calibration((head(0.1),)),
        step_times=StepTimes({2: 0.1, 64: 1.0}),
        heads_times=StepTimes({1: 0.01}),
    )
    write_plan(
        tmp_path / "record-2", calibration=Calibration((head(0.2), head(0.3))), step_times=StepTimes({3: 0.2, 64: 3.0})
    )
    files = write_learnt(heads, tmp_path, 2, 3)
    assert {file.name for file in files} == {"draft_calibration.json", "plan.json"}
    found = read_plan(heads)
    assert found.calibration == Calibration((head(0.2), head(0.3), uncalibrated(1).heads[0])), (
        "served with all heads later"
    )
    assert found.step_times == StepTimes({2: 0.1, 3: 0.2, 64: 2.0}) and found.heads_times == StepTimes({1: 0.01})


@pytest.mark.parametrize(("drafts", "kept"), [(3, False), (50, True)])
def test_calibration_on_more_drafts_is_kept(tmp_path, drafts, kept):
    heads, record = tmp_path / "heads", tmp_path / "record-1"
    heads.mkdir()
    record.mkdir()
    there = Calibration((HeadCalibration((0.0, 0.5, 1.0), (0.7, 0.7), (drafts, drafts)),))
    write_plan(heads, calibration=there)
    write_plan(record, calibration=Calibration((head(0.1),)), step_times=StepTimes({2: 0.1}))
    write_learnt(heads, tmp_path, 1, 1)
    assert read_plan(heads).calibration == (there if kept else Calibration((head(0.1),)))
    assert read_plan(heads).step_times == StepTimes({2: 0.1})


def test_nothing_learnt_writes_nothing(tmp_path):
    assert write_learnt(tmp_path, tmp_path, 3, 3) == [] and list(tmp_path.iterdir()) == []
