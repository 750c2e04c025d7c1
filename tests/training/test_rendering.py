"""Rows that a chat template cannot render: named before anything is loaded, or left out and counted."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path

import pytest
from axolotl.utils.dict import DictDefault
from conftest import AXOLOTL_YAML, make_model
from datasets import Dataset
from example_tokenizers import make_tokenizer

from axolotl_medusa.training import rendering
from axolotl_medusa.training.plugin import MedusaPlugin
from axolotl_medusa.training.rendering import render_datasets

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
"""What Gemma's and Mistral's templates refuse."""


def turns(*texts: str | None, first: str = "user") -> list[dict[str, str | None]]:
    roles = ["user", "assistant"] if first == "user" else [first, "user"]
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


GOOD = {"messages": turns("Name a fruit.", "An apple.")}
BAD = {
    "messages is empty": {"messages": []},
    "messages is missing": {"conversation": turns("Hi", "Hello")},
    "turn 2 has no content": {"messages": turns("Name a tree.", None)},
    "System role not supported": {"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]},
    "Roles must alternate": {"messages": [GOOD["messages"][0], *GOOD["messages"]]},
    "it is list, expected an object": [1, 2],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = STRICT
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(validated, base, tmp_path):
    """The validated YAML for rows that are written to a file."""

    def make(rows, suffix=".jsonl", **keys) -> DictDefault:
        file = tmp_path / f"rows{suffix}"
        lines = map(json.dumps, rows)
        file.write_text("[" + ",\n".join(lines) + "]" if suffix == ".json" else "\n".join(lines) + "\n")
        own = {"base_model": str(base), "datasets": [{"path": str(file), "type": "chat_template"}]}
        own |= {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared")}
        cfg = validated({**AXOLOTL_YAML, **own, "medusa_num_heads": 3, "dataset_num_proc": 1, **keys})
        cfg.tokenizer_config, cfg.base_model_config = str(base), str(base)
        return cfg

    return make


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("reason", BAD)
def test_row_that_cannot_be_rendered_ends_with_file_row_and_reason(reason, suffix, config, tmp_path):
    cfg = config([GOOD, BAD[reason], GOOD], suffix)
    with pytest.raises(SystemExit) as stopped:
        MedusaPlugin().load_datasets(cfg)
    line = str(stopped.value)
    assert f"1 of 3 rows cannot be rendered by the chat template, {tmp_path / 'rows'}{suffix}:2: {reason};" in line
    assert "medusa_skip_bad_rows: true" in line and "\n" not in line


def test_every_bad_row_is_counted_and_the_first_are_named(config):
    (_, found) = next(iter(render_datasets(*with_tokenizer(config([GOOD, *BAD.values(), GOOD])))))
    assert (found.count, found.bad, found.is_whole) == (8, 6, True)
    assert [number for number, _ in found.named] == [2, 3, 4] and str(found).endswith("; ...")


def with_tokenizer(cfg: DictDefault):
    from axolotl.loaders import load_tokenizer

    return cfg, load_tokenizer(cfg)


def test_bad_row_of_the_evaluation_data_is_found_too(config, tmp_path):
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps(BAD["messages is empty"]) + "\n" + json.dumps(GOOD) + "\n")
    cfg = config([GOOD], test_datasets=[{"path": str(evaluation), "type": "chat_template", "split": "train"}])
    with pytest.raises(SystemExit, match=rf"{evaluation}:1: messages is empty"):
        MedusaPlugin().load_datasets(cfg)


def prepared_texts(cfg: DictDefault) -> list[str]:
    """What axolotl trains on with this YAML."""
    from axolotl.common.datasets import load_datasets
    from axolotl.utils.config import normalize_config

    normalize_config(cfg)
    MedusaPlugin().load_datasets(cfg)
    _, tokenizer = with_tokenizer(cfg)
    return [tokenizer.decode(ids) for ids in load_datasets(cfg=cfg).train_dataset["input_ids"]]


def test_skip_bad_rows_trains_on_the_others_and_counts(config, caplog):
    rows = [row for row in BAD.values() if isinstance(row, dict) and "messages" in row]
    logger = logging.getLogger("axolotl_medusa.training.rendering")
    logger.addHandler(caplog.handler)
    keys = {"sample_packing": False, "val_set_size": 0.0}
    texts = prepared_texts(config([GOOD, *rows, GOOD], medusa_skip_bad_rows=True, **keys))
    logger.removeHandler(caplog.handler)
    assert len(texts) == 2 and all("An apple." in text for text in texts)
    lines = {record.getMessage() for record in caplog.records if "left out" in record.getMessage()}
    assert len(lines) == 1 and "4 of 6 rows" in lines.pop()
    assert prepared_texts(config([GOOD, GOOD], **keys)) == texts, "the same rows as with a file that has no others"


def test_skip_bad_rows_with_nothing_left_stops(config):
    row = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(SystemExit, match=r"2 of 2 rows cannot be rendered.*repair or remove them$"):
        MedusaPlugin().load_datasets(config([row, row], medusa_skip_bad_rows=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_large_file_is_rendered_in_parallel_up_to_a_limit(processes, config, monkeypatch):
    monkeypatch.setattr(rendering, "LONGEST_LOOK", 4000)
    rows = [BAD["messages is empty"] if number in (2999, 4500) else GOOD for number in range(5000)]
    ((_, found),) = render_datasets(*with_tokenizer(config(rows, dataset_num_proc=processes)))
    assert (found.count, found.bad, found.named) == (4000, 1, [(3000, "messages is empty")])
    assert not found.is_whole and "of the first 4000 rows" in str(found)


def test_memory_does_not_grow_with_the_file(config):
    cfg, tokenizer = with_tokenizer(config([GOOD]))
    strategy = rendering.load_strategy("chat_template", tokenizer, cfg, cfg.datasets[0])
    row = {"messages": turns("x" * 20_000, "y" * 20_000)}
    peaks = []
    for count in (200, 2000):
        tracemalloc.start()
        rendering.render_rows("rows", (json.loads(json.dumps(row)) for _ in range(count)), strategy, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_other_kinds_are_left_to_axolotl(config):
    cfg, tokenizer = with_tokenizer(config([BAD["messages is empty"]]))
    cfg.datasets[0].type = "alpaca"
    assert list(render_datasets(cfg, tokenizer)) == []


def as_parquet(rows: Dataset, folder: Path) -> dict[str, object]:
    rows.to_parquet(folder / "rows.parquet")
    return {"path": str(folder / "rows.parquet")}


def as_saved_dataset(rows: Dataset, folder: Path) -> dict[str, object]:
    rows.save_to_disk(folder / "saved")
    return {"path": str(folder / "saved")}


def as_data_files(rows: Dataset, folder: Path) -> dict[str, object]:
    (folder / "hub").mkdir()
    rows.to_json(folder / "hub" / "a.jsonl")
    return {
        "path": str(folder / "hub"),
        "data_files": [str(folder / "hub" / "a.jsonl")],
        "ds_type": "json",
        "split": "train",
    }


def as_part_of_a_file(rows: Dataset, folder: Path) -> dict[str, object]:
    rows.to_json(folder / "part.jsonl")
    return {"path": str(folder / "part.jsonl"), "split": "train[:2]"}


@pytest.mark.parametrize("kind", [as_parquet, as_saved_dataset, as_data_files, as_part_of_a_file])
def test_rows_of_whatever_axolotl_loads_are_rendered(kind, config, tmp_path):
    rows = Dataset.from_list([GOOD, BAD["turn 2 has no content"], GOOD])
    entry = kind(rows, tmp_path)
    cfg = config([GOOD])
    cfg.datasets[0] |= entry
    count = 2 if "[" in str(entry.get("split")) else 3
    with pytest.raises(
        SystemExit, match=rf"1 of {count} rows cannot be rendered .*{entry['path']}:2: turn 2 has no content"
    ):
        MedusaPlugin().load_datasets(cfg)


def test_data_that_cannot_be_loaded_is_left_to_axolotl(config):
    cfg, tokenizer = with_tokenizer(config([GOOD], ".json"))
    Path(cfg.datasets[0].path).rename(Path(cfg.datasets[0].path).with_suffix(".parquet"))
    cfg.datasets[0].path = str(Path(cfg.datasets[0].path).with_suffix(".parquet"))
    assert list(render_datasets(cfg, tokenizer)) == []


def test_data_out_of_reach_is_not_asked_for_once_it_was_prepared(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rendering, "load_dataset_with_config", lambda entry, token: asked.append(entry.path))
    cfg, tokenizer = with_tokenizer(config([GOOD]))
    cfg.datasets[0].path = "org/data"
    assert list(render_datasets(cfg, tokenizer)) == [] and asked == ["org/data"]
    (tmp_path / "prepared" / "hash").mkdir(parents=True)
    assert list(render_datasets(cfg, tokenizer)) == [] and asked == ["org/data"]


def test_template_that_is_no_jinja_is_one_line(config):
    cfg = config([GOOD], chat_template="jinja", chat_template_jinja="{% for m in messages %}{{ m.content }}")
    with pytest.raises(SystemExit, match=r"chat template for .*rows.jsonl is not Jinja that axolotl reads \("):
        MedusaPlugin().load_datasets(cfg)
