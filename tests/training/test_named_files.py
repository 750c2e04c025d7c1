"""Files that a YAML names: what is missing or damaged is one line, never a traceback."""

from __future__ import annotations

import json

import pytest
from conftest import AXOLOTL_YAML

from axolotl_medusa.training.named_files import heads_directory
from axolotl_medusa.training.yaml_problems import config_problems


def problems(**keys) -> list[str]:
    return config_problems({**AXOLOTL_YAML, "medusa_num_heads": 3, **keys})


def test_config_problems_missing_base_model_is_not_taken_for_the_working_directory():
    cfg = {key: value for key, value in AXOLOTL_YAML.items() if key != "base_model"} | {"medusa_num_heads": 3}
    assert [line for line in config_problems(cfg) if "config.json" in line] == []


def test_config_problems_base_model_directory_is_looked_into(tmp_path):
    assert problems(base_model="./absent") == [
        "base_model ./absent does not exist: expected a model directory or a hub name"
    ]
    (no_config,) = problems(base_model=str(tmp_path))
    assert str(tmp_path) in no_config and "has no config.json" in no_config
    (tmp_path / "config.json").write_text("{}")
    (no_weights,) = problems(base_model=str(tmp_path))
    assert str(tmp_path) in no_weights and "has no weights" in no_weights
    for name in ("model.safetensors", "pytorch_model.bin", "model.gguf"):
        (tmp_path / name).touch()
        assert problems(base_model=str(tmp_path)) == []
        (tmp_path / name).unlink()


def write_stage_1(directory, **changes):
    config = {"medusa_num_heads": 3, "medusa_num_layers": 1, "original_lm_head": False, **changes}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "medusa_lm_head.safetensors").touch()
    return directory


def test_config_problems_init_from_fits_as_a_directory_and_as_an_output_dir(tmp_path):
    heads = write_stage_1(tmp_path / "medusa_heads")
    assert problems(medusa_init_from=str(heads)) == problems(medusa_init_from=str(tmp_path)) == []
    assert heads_directory(str(tmp_path)) == heads_directory(str(heads)) == heads


@pytest.mark.parametrize("removed", ["config.json", "medusa_lm_head.safetensors", None])
def test_config_problems_init_from_without_heads_is_an_error(removed, tmp_path):
    path = tmp_path / "absent"
    if removed:
        path = write_stage_1(tmp_path / "medusa_heads")
        (path / removed).unlink()
    (line,) = problems(medusa_init_from=str(path))
    assert line.startswith(
        f"medusa_init_from {path} holds no heads: expected config.json and medusa_lm_head.safetensors"
    )


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"medusa_num_heads": 4}, "medusa_num_heads is 3 but the heads in medusa_init_from {} have 4"),
        ({"medusa_num_layers": 2}, "medusa_num_layers is 1 but the heads in medusa_init_from {} have 2"),
        ({"original_lm_head": True}, "medusa_lm_head is 'separate' but the heads in medusa_init_from {} have 'shared'"),
        (
            {"original_lm_head": True, "medusa_lm_head": "trained"},
            "medusa_lm_head is 'separate' but the heads in medusa_init_from {} have 'trained'",
        ),
        ({"truncated_vocab_size": 500}, "medusa_draft_vocab is None but the heads in medusa_init_from {} have 500"),
    ],
)
def test_config_problems_init_from_other_heads_is_an_error(saved, message, tmp_path):
    (line,) = problems(medusa_init_from=str(write_stage_1(tmp_path, **saved)))
    assert line.startswith(message.format(tmp_path))


def test_config_problems_one_bad_value_causes_no_line_about_values_that_nobody_wrote(tmp_path):
    write_stage_1(tmp_path)
    init_from = problems(medusa_num_heads=0, medusa_init_from=str(tmp_path))
    assert [line for line in init_from if "medusa_num_heads is 1" in line] == []
    distillation = problems(medusa_logging_topk=0, medusa_self_distillation=True, adapter="lora")
    assert len(distillation) == 1 and distillation[0].startswith("medusa_logging_topk is 0"), distillation


DAMAGED = {
    "empty": b"",
    "cut-off": b'{"medusa_num_heads": 3, "medus',
    "not-utf-8": b'{"a": "\xff\xfe"}',
    "a-list": b"[1, 2]",
    "a-number": b"3",
    "nested-too-deeply": b'{"a": ' + b"[" * 100_000,
    "a-number-without-end": b'{"a": ' + b"1" * 5000 + b"}",
    "binary": bytes(range(256)) * 10,
    "too-many-values": b'{"a": [' + b"[]," * 100_000 + b"0]}",
}


def damaged_run(tmp_path, content):
    """A directory that could be a model, heads, an adapter or a checkpoint, but that its JSON is damaged."""
    directory = write_stage_1(tmp_path / "run")
    for name in ("config.json", "adapter_config.json", "ds.json"):
        (directory / name).write_bytes(content)
    (directory / "model.safetensors").touch()
    return directory


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("medusa_init_from", "config.json"),
        ("base_model", "config.json"),
        ("lora_model_dir", "adapter_config.json"),
        ("deepspeed", "ds.json"),
    ],
)
def test_config_problems_damaged_file_is_one_line_that_names_key_and_file(key, file, content, tmp_path):
    directory = damaged_run(tmp_path, content)
    (line,) = problems(**{key: str(directory / file if key == "deepspeed" else directory)})
    assert line.startswith(f"{key} {directory / file} ") and "\n" not in line and len(line) < 600
    assert line.endswith((": get it again", "expected an object"))


def test_config_problems_damaged_state_of_a_checkpoint_is_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (line,) = problems(resume_from_checkpoint=str(checkpoint))
    assert line == (
        f"resume_from_checkpoint {checkpoint} has no trainer_state.json: expected a directory that training wrote"
    )
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4, "log_hist')
    (line,) = problems(resume_from_checkpoint=str(checkpoint))
    assert line.startswith(f"resume_from_checkpoint {checkpoint / 'trainer_state.json'} is not JSON (")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    assert problems(resume_from_checkpoint=str(checkpoint)) == []


@pytest.mark.parametrize("key", ["lora_model_dir", "resume_from_checkpoint"])
def test_config_problems_missing_directory_is_one_line_that_names_it(key, tmp_path):
    (line,) = problems(**{key: str(tmp_path / "absent")})
    assert line.startswith(f"{key} {tmp_path / 'absent'} has no ")


@pytest.mark.parametrize("key", ["lora_model_dir", "resume_from_checkpoint"])
def test_config_problems_name_that_need_not_be_a_path_is_looked_at_where_it_is_one(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert problems(**{key: "org/name"}) == []
    (tmp_path / "org" / "name").mkdir(parents=True)
    (line,) = problems(**{key: "org/name"})
    assert line.startswith(f"{key} org/name has no ")


def test_config_problems_deepspeed_configuration_is_read_from_a_file_or_the_yaml(tmp_path):
    file = tmp_path / "zero.json"
    (line,) = problems(deepspeed=str(file))
    assert line == f"deepspeed {file} does not exist: expected a DeepSpeed configuration"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    assert problems(deepspeed=str(file)) == problems(deepspeed={"zero_optimization": {"stage": 2}}) == []
    assert problems(deepspeed=None) == problems(deepspeed="") == []


@pytest.mark.parametrize("place", ["yaml", "datasets", "test_datasets"])
def test_config_problems_missing_chat_template_is_not_taken_for_a_template(place, tmp_path):
    def keys(template):
        if place == "yaml":
            return {"chat_template_jinja": template}
        return {place: [{"path": "org/data", "type": "chat_template", "chat_template_jinja": template}]}

    file = tmp_path / "vicuna.jinja"
    (line,) = problems(**keys(str(file)))
    assert f"chat_template_jinja {file} cannot be read (" in line and "expected a file, or a Jinja template" in line
    file.write_bytes(b"\xff\xfe{{ messages }}")
    (line,) = problems(**keys(str(file)))
    assert str(file) in line
    file.write_text("{{ messages }}")
    assert problems(**keys(str(file))) == []
    assert problems(**keys("{% for m in messages %}{{ m.content }}{% endfor %}")) == []


PUBLISHED = {
    "fasterdecoding": ("medusa_lm_head.pt", {"medusa_num_heads": 3, "medusa_num_layers": 1}),
    "tgi": ("medusa_lm_head.safetensors", {"medusa_num_heads": 3, "medusa_num_layers": 1}),
    "vllm": ("model.safetensors", {"model_type": "medusa", "num_heads": 3}),
    "first-fork": ("adapter_model.safetensors", {"model_type": "llama"}),
    "merged": ("pytorch_model.bin", {"model_type": "llama", "medusa_num_heads": 3}),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_config_problems_init_from_published_heads_names_the_command_that_makes_them_ours(form, tmp_path):
    file, config = PUBLISHED[form]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).touch()
    (line,) = problems(medusa_init_from=str(tmp_path))
    assert f"axolotl-medusa import {tmp_path} --to canonical --out DIR" in line and "\n" not in line


def test_config_problems_init_from_a_file_of_heads_names_the_command_too(tmp_path):
    (tmp_path / "heads.pt").touch()
    (line,) = problems(medusa_init_from=str(tmp_path / "heads.pt"))
    assert f"axolotl-medusa import {tmp_path}/heads.pt --to canonical" in line
