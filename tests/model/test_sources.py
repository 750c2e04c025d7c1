"""What `find_source` makes of every layout that training leaves, and the one line it says of any other."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, VOCAB, add_lora, make_model
from safetensors.torch import load_file, save_file
from training_outputs import as_torch_files, save_base, save_tokenizer, write_run

from axolotl_medusa.model import tensor_files
from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, META_FILE
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.model.tensor_files import TensorFiles, write_sharded


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base", make_model())


@pytest.fixture
def runs(tmp_path, base):
    """Output directories by the model that they need."""
    return {
        "base": write_run(tmp_path / "medusa-1", make_model(), "medusa-1", base),
        "adapter": write_run(tmp_path / "lora", add_lora(make_model()), "medusa-2", base, form="separate"),
        "full": write_run(tmp_path / "full", make_model(seed=3), "medusa-2", base, num_layers=2),
    }


KINDS = ("base", "adapter", "full")


@pytest.mark.parametrize("inside", ["", "checkpoint-4"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_dir_and_checkpoint_of_every_recipe_are_found(kind, inside, runs, base):
    run = runs[kind] / inside
    source = find_source(run)
    assert source.model_kind == kind
    assert source.heads_dir == run / "medusa_heads" and source.output_dir == run
    assert source.adapter_dir == (run if kind == "adapter" else None)
    assert source.full_model_dir == (run if kind == "full" else None)
    assert source.base_model == str(base) and source.base_model_dir() == base
    assert source.model_dir() == (run if kind == "full" else base)
    written = read_heads(run / "medusa_heads")
    assert source.config == written.config and source.meta == written.meta and source.form == written.form
    assert {name: tensor.shape for name, tensor in source.heads().items()} == {
        name: tuple(tensor.shape) for name, tensor in written.tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_heads_inside_a_run_are_read_with_their_model(kind, runs, monkeypatch):
    source = find_source(runs[kind] / "medusa_heads")
    assert source.model_kind == kind
    monkeypatch.chdir(runs[kind] / "medusa_heads")
    assert find_source(".").model_kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_directory_with_a_base_model_is_served_with_exactly_that(kind, runs, tmp_path):
    merged = save_base(tmp_path / "merged", make_model(seed=5))
    for heads in (runs[kind] / "medusa_heads", shutil.copytree(runs[kind] / "medusa_heads", tmp_path / "alone")):
        source = find_source(heads, str(merged))
        assert source.model_kind == "base" and source.model_dir() == merged
        assert source.output_dir is None


def test_base_model_of_a_run_can_be_elsewhere_now(runs, base, tmp_path):
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"base model .*/base is neither a directory here.*--base-model"):
        find_source(runs["adapter"]).base_model_dir()
    source = find_source(runs["adapter"], str(moved))
    assert source.model_kind == "adapter" and source.base_model_dir() == moved


def change(file: Path, **settings):
    content = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_base_model_is_taken_from_the_adapter_where_the_heads_name_none(runs, base):
    heads = runs["adapter"] / "medusa_heads"
    change(heads / CONFIG_FILE, base_model_name_or_path=None)
    change(runs["adapter"] / "adapter_config.json", base_model_name_or_path="org/other")
    assert find_source(runs["adapter"]).base_model == "org/other"
    change(runs["base"] / "medusa_heads" / CONFIG_FILE, base_model_name_or_path=None)
    source = find_source(runs["base"])
    assert source.base_model is None
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path: name the base model with --base-model"):
        source.base_model_dir()


def test_medusa1_ignores_what_another_run_left_in_its_directory(runs):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs["adapter"] / file, runs["base"])
    assert find_source(runs["base"]).model_kind == "base"


def test_medusa1_on_top_of_an_adapter_is_served_with_that_adapter(runs, base, tmp_path):
    run = write_run(
        tmp_path / "second",
        make_model(),
        "medusa-1",
        base,
        yaml={"lora_model_dir": str(runs["adapter"]), "adapter": "lora"},
    )
    source = find_source(run)
    assert source.model_kind == "adapter" and source.adapter_dir == runs["adapter"]


def test_heads_alone_of_a_run_on_an_adapter_are_used_with_it(runs, tmp_path):
    yaml = {"lora_model_dir": str(runs["adapter"]), "adapter": "lora"}
    run = write_run(tmp_path / "on-adapter", make_model(), "medusa-1", tmp_path / "base", yaml=yaml)
    assert find_source(run / "medusa_heads").adapter_dir == runs["adapter"]
    assert find_source(run / "medusa_heads", "org/merged").adapter_dir is None


@pytest.mark.parametrize("base_model", [None, "org/base"])
def test_adapter_beside_exported_heads_belongs_to_them(base_model, runs, tmp_path):
    exported = shutil.copytree(runs["adapter"] / "medusa_heads", tmp_path / "exported")
    change(exported / META_FILE, export={"target": "lorax", "adapter": True})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(runs["adapter"] / name, exported / name)
    source = find_source(exported, base_model)
    assert source.model_kind == "adapter" and source.adapter_dir == exported
    (exported / "adapter_config.json").unlink()
    if base_model is None:
        with pytest.raises(ValueError, match=r"exported has no adapter_config\.json, but was exported with an adapter"):
            find_source(exported)
    else:
        assert find_source(exported, base_model).model_kind == "base"


def test_runs_without_meta_are_told_apart_by_their_files(runs):
    for kind in KINDS:
        (runs[kind] / "medusa_heads" / META_FILE).unlink()
        source = find_source(runs[kind])
        assert source.model_kind == kind and source.meta == {}


def test_export_of_medusa2_names_the_model_it_is_served_with(runs, tmp_path):
    exported = shutil.copytree(runs["adapter"] / "medusa_heads", tmp_path / "exported")
    change(exported / CONFIG_FILE, base_model_name_or_path="org/merged")
    change(exported / META_FILE, export={"target": "tgi"})
    source = find_source(exported)
    assert source.model_kind == "base" and source.base_model == "org/merged"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: run.rename(run.with_name("gone")), "is not a directory: expected an output_dir"),
        (
            lambda run: shutil.rmtree(run / "medusa_heads"),
            r"training did not reach its end; give a checkpoint, e\.g\. .*/checkpoint-4$",
        ),
        (
            lambda run: [shutil.rmtree(run / part) for part in ("medusa_heads", "checkpoint-4")],
            r"has neither medusa_heads nor medusa_lm_head\.safetensors.*`axolotl-medusa import`",
        ),
        (lambda run: (run / "adapter_config.json").unlink(), "has neither an adapter nor a full model, but Medusa-2"),
        (
            lambda run: shutil.copy(run / "adapter_model.safetensors", run / "model.safetensors"),
            "holds both an adapter and a full model, expected one",
        ),
        (lambda run: (run / "medusa_heads" / CONFIG_FILE).write_text("{"), r"config\.json is not JSON"),
        (
            lambda run: (run / "medusa_heads" / CONFIG_FILE).write_text("[]"),
            r"config\.json holds a list, expected an object",
        ),
        (lambda run: (run / "medusa_heads" / CONFIG_FILE).unlink(), r"config\.json is missing"),
        (lambda run: (run / "medusa_heads" / HEADS_FILE).unlink(), "does not exist"),
        (
            lambda run: change(run / "medusa_heads" / CONFIG_FILE, hidden_size=HIDDEN + 1),
            r"expected \(33,.* by config\.json$",
        ),
        (
            lambda run: change(run / "medusa_heads" / CONFIG_FILE, model_type=None, hidden_size=None),
            r"lacks hidden_size.*`axolotl-medusa import`",
        ),
    ],
    ids=["gone", "unfinished", "no-heads", "no-adapter", "both", "json", "list", "config", "weights", "shape", "tgi"],
)
def test_other_directories_are_refused_in_one_line(break_it, message, runs):
    break_it(runs["adapter"])
    with pytest.raises(ValueError, match=message) as error:
        find_source(runs["adapter"])
    assert "\n" not in str(error.value)


def test_checkpoint_that_an_unfinished_run_names_is_the_last_by_its_step(runs):
    run = runs["base"]
    for age, step in enumerate((100, 9, 20)):
        heads = shutil.copytree(run / "checkpoint-4", run / f"checkpoint-{step}") / "medusa_heads"
        os.utime(heads, (2e9 + age, 2e9 + age))
    shutil.rmtree(run / "medusa_heads")
    with pytest.raises(ValueError, match=r"give a checkpoint, e\.g\. .*/checkpoint-100$"):
        find_source(run)


def test_fsdp_shards_are_refused_with_the_command_that_joins_them(runs):
    (runs["full"] / "model.safetensors").unlink()
    (runs["full"] / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="`axolotl merge-sharded-fsdp-weights`"):
        find_source(runs["full"])


def test_medusa2_heads_alone_need_a_base_model(runs, tmp_path):
    alone = shutil.copytree(runs["full"] / "medusa_heads", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"Medusa-2 heads go with the model trained with them.*--base-model"):
        find_source(alone)
    assert find_source(shutil.copytree(runs["base"] / "medusa_heads", tmp_path / "alone-1")).model_kind == "base"


def test_find_source_loads_no_tensor(runs, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensor_files, "_bytes", refuse)
    with pytest.raises(AssertionError, match="a tensor was read"):
        find_source(runs["adapter"]).heads().load("0.0.linear.bias")
    find_source(runs["adapter"])


def test_tokenizer_files_are_the_heads_own_then_the_runs_then_the_base_models(runs, base):
    def names(directory):
        return [directory / name for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")]

    run = runs["adapter"]
    assert find_source(run).tokenizer_files() == names(run / "medusa_heads")
    for file in names(run / "medusa_heads"):
        file.unlink()
    assert find_source(run).tokenizer_files() == names(run)
    for file in names(run):
        file.unlink()
    (base / "spiece.model").touch()  # a sentencepiece model counts, weights and checkpoints' own states do not
    (base / "tokens_state.json").touch()
    assert find_source(run).tokenizer_files() == sorted([*names(base), base / "spiece.model"])
    shutil.rmtree(base)
    assert find_source(run).tokenizer_files() == []


class HubStandIn:
    """Stands in for `snapshot_download`: copies the files of a repository that match, and lists what it copied."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.asked: list[tuple] = []

    def __call__(self, name, revision=None, allow_patterns=()):
        self.asked.append((name, revision))
        if name != "org/model":
            raise OSError("not cached, and offline\nsecond line")
        self.cache.mkdir(exist_ok=True)
        for file in self.repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, self.cache / file.name)
        return str(self.cache)

    @property
    def files(self) -> set[str]:
        return {file.name for file in self.cache.iterdir()}


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    stand_in = HubStandIn(base, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    return stand_in


def test_base_model_on_the_hub_is_downloaded_in_the_runs_revision(hub, tmp_path):
    run = write_run(tmp_path / "out", make_model(), "medusa-1", "org/model", yaml={"revision_of_model": "v2"})
    source = find_source(run)
    assert source.model_dir() == source.model_dir() == hub.cache
    assert hub.asked == [("org/model", "v2")], "once for each source"
    with pytest.raises(ValueError, match=r"base model org/none is neither.*\(OSError\): name its directory") as error:
        find_source(run, "org/none").model_dir()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "both"])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_a_hub_model_are_downloaded_in_one_form(sharded, kind, base, hub, tmp_path):
    expected = {tensor.name: tensor.load() for tensor in TensorFiles.open(base).values()}
    if kind != "safetensors":
        as_torch_files(base, 3 if sharded else 1, keep=kind == "both")
    if kind != "bin" and sharded:
        write_sharded(base, [*TensorFiles.open(base).values()], max_shard_bytes=20_000)
        (base / "model.safetensors").unlink()
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth"):
        (base / name).write_bytes(b"not wanted")
    found = find_source(write_run(tmp_path / "out", make_model(), "medusa-1", "org/model")).model_dir()
    assert all(torch.equal(TensorFiles.open(found).load(name), tensor) for name, tensor in expected.items())
    weights = {name for name in hub.files if name.endswith((".bin", ".safetensors", ".pth"))}
    if kind == "bin":
        assert weights == {file.name for file in base.glob("pytorch_model*.bin")}
    else:
        assert weights == {file.name for file in base.glob("*.safetensors")}
    assert {"config.json", "tokenizer.json"} <= hub.files


@pytest.mark.parametrize("kind", KINDS)
def test_training_itself_writes_the_layout_that_these_tests_make(kind, runs, tmp_path, base):
    """The saver of the real trainer, on the same models."""
    from axolotl.utils.dict import DictDefault

    from axolotl_medusa.model.heads import MedusaHeads, attach_heads
    from axolotl_medusa.training.saving import HeadsSaver

    model = {"base": make_model(), "adapter": add_lora(make_model()), "full": make_model(seed=3)}[kind]
    form, num_layers = ("separate" if kind == "adapter" else "shared"), (2 if kind == "full" else 1)
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 3, num_layers, form))

    class Tokenizer:
        def save_pretrained(self, directory):
            save_tokenizer(Path(directory))

    cfg = DictDefault({"medusa_only_heads": kind == "base", "base_model": str(base)})
    HeadsSaver(model, cfg, Tokenizer())
    model.save_pretrained(tmp_path / "real")

    def files(directory):
        written = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
        return {
            name: {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
            if path.suffix == ".safetensors"
            else None
            for name, path in written.items()
            if not name.startswith(("tokenizer", "chat_template", "trainer_state"))
        }

    assert files(tmp_path / "real") == {
        name: shapes for name, shapes in files(runs[kind] / "checkpoint-4").items() if name != "trainer_state.json"
    }
    assert find_source(tmp_path / "real").model_kind == kind


def test_surplus_tensor_in_the_heads_is_named(runs):
    file = runs["base"] / "medusa_heads" / HEADS_FILE
    save_file({**load_file(file), "lm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(2,\), expected no such tensor"):
        find_source(runs["base"])
