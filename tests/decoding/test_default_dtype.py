"""The type that a model is loaded in where none is named, on CPUs with and without instructions for bf16."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model
from transformers import BitsAndBytesConfig

from axolotl_medusa.decoding import default_dtype
from axolotl_medusa.decoding.default_dtype import dtype_here

SAID = "is stored in bf16, which this CPU has no fast matmuls for: loaded in fp32"


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def is_fast(request, monkeypatch):
    monkeypatch.setattr(default_dtype, "multiplies_bf16", lambda: request.param)
    return request.param


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(default_dtype, "multiplies_bf16", lambda: False)


@pytest.fixture
def model(tmp_path):
    """A directory with a model in bf16."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def change(directory, **keys):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_bf16_is_turned_into_fp32_on_a_slow_cpu_alone_and_said(is_fast, model, caplog):
    assert dtype_here("auto", model, "cpu") == ("auto" if is_fast else torch.float32)
    assert (f"{model} {SAID}" in caplog.text) is not is_fast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_user_says_is_done(dtype, slow, model, caplog):
    assert dtype_here(dtype, model, "cpu") == dtype
    assert not caplog.records


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0), "mps"])
def test_models_for_other_devices_are_left(device, slow, model):
    assert dtype_here("auto", model, device) == "auto"


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [({"": 0}, "auto"), ("auto", "auto"), ({"": "cpu"}, torch.float32), ("cpu", torch.float32)],
)
def test_device_map_says_where_a_model_goes(device_map, expected, slow, model):
    assert dtype_here("auto", model, None, device_map=device_map) == expected


def test_quantized_models_are_left(slow, model):
    assert dtype_here("auto", model, "cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True)) == "auto"
    change(model, quantization_config={"quant_method": "awq"})
    assert dtype_here("auto", model, "cpu") == "auto"


@pytest.mark.parametrize(
    ("keys", "stored", "expected"),
    [
        ({"dtype": "float32"}, torch.bfloat16, "auto"),
        ({"dtype": "float16"}, torch.bfloat16, "auto"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, None, torch.float32),  # as older versions wrote it
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, None, torch.float32),
        ({"dtype": None}, torch.bfloat16, torch.float32),
        ({"dtype": None}, torch.float32, "auto"),
        ({"dtype": None}, None, "auto"),
    ],
)
def test_stored_type_is_the_configurations_else_the_weights(keys, stored, expected, slow, model):
    change(model, **keys)
    assert dtype_here("auto", model, "cpu", stored) == expected


def test_model_that_is_not_there_is_left_to_who_loads_it(slow, tmp_path):
    assert dtype_here("auto", tmp_path / "nothing", "cpu") == "auto"
