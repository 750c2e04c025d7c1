"""Imports: every target's round trip is bitwise, and published heads of every layout become a heads directory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, VOCAB, make_model, randomize
from exports import CASES, canonical, edit_json, exported, trained
from safetensors.torch import save_file
from training_outputs import save_base

from axolotl_medusa.model.file_names import SHARED_OUTPUT_LAYER
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import read_heads
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.serving.export import export
from axolotl_medusa.serving.import_heads import import_heads

TRIPS = {
    **{f"{target}-{form}": (target, {"form": form}) for target, form in CASES},
    "tgi-shared-2-blocks": ("tgi", {"num_layers": 2}),
    "tensorrt-llm-separate-2-blocks": ("tensorrt-llm", {"form": "separate", "num_layers": 2}),
    "vllm-separate-1-head": ("vllm", {"form": "separate", "num_heads": 1}),
    "vllm-shared-1-head": ("vllm", {"num_heads": 1}),
    "tensorrt-llm-shared-1-head": ("tensorrt-llm", {"num_heads": 1}),
    "lorax-unmerged": ("lorax", {"recipe": "medusa-2", "adapter": {"targets": ["q_proj"]}}),
    "vllm-tied": ("vllm", {"family": "llama-tied"}),
}


def same(first: Path, second: Path) -> None:
    (tensors, *rest), (expected, *expected_rest) = canonical(first), canonical(second)
    assert rest == expected_rest and tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", TRIPS)
def test_round_trip_is_bitwise(name, tmp_path):
    target, options = TRIPS[name]
    if "num_heads" in options:
        source, out = trained(tmp_path, **options), tmp_path / "out"
        export(source, target, out)
    else:
        source, out = exported(tmp_path, target, **options)
    import_heads(out, tmp_path / "back")
    same(tmp_path / "back", source.heads_dir)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.mark.parametrize("adapter", [None, {"targets": ["q_proj"]}], ids=["full", "lora"])
@pytest.mark.parametrize("target", ["vllm", "fasterdecoding-legacy", "modelopt"])
def test_round_trip_of_merged_medusa_2_is_bitwise(target, adapter, tmp_path):
    source = trained(tmp_path, "medusa-2", adapter=adapter)
    export(source, target, tmp_path / "out", model="merged")
    import_heads(tmp_path / "out", tmp_path / "back")
    same(tmp_path / "back", source.heads_dir)


@pytest.mark.parametrize("form", ["shared", "separate", "trained"])
def test_canonical_directory_is_imported_as_it_is(form, tmp_path):
    source = trained(tmp_path, form=form)
    import_heads(source.heads_dir, tmp_path / "out")
    same(tmp_path / "out", source.heads_dir)
    import_heads(tmp_path / "out", tmp_path / "out")
    same(tmp_path / "out", source.heads_dir)


def test_imported_heads_can_be_exported_again(tmp_path):
    source, out = exported(tmp_path, "fasterdecoding-legacy")
    import_heads(out, tmp_path / "back")
    export(find_source(tmp_path / "back", source.base_model), "vllm", tmp_path / "vllm")


def test_copies_that_somebody_trained_since_are_separate_heads(tmp_path):
    _, out = exported(tmp_path, "tensorrt-llm")
    file = out / "medusa_lm_head.safetensors"
    tensors = canonical(out)[0]
    tensors["2.1.weight"][0, 0] += 1
    save_file(tensors, file)
    import_heads(out, tmp_path / "back")
    assert read_heads(tmp_path / "back").form == "separate"


# Published heads: no medusa_meta.json of ours, often a wrong config


def heads_of(form="separate", num_heads=2, num_layers=1, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return dict(randomize(MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, form, dtype=dtype)).state_dict())


def publish(directory: Path, tensors, config=None, file="medusa_lm_head.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    if file.endswith((".pt", ".bin")):
        torch.save(tensors, directory / file)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / file)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def native(name: str) -> str:
    head, layer, *rest = name.split(".")
    return f"blocks.{head}.layers.{layer}.{rest[-1]}" if "linear" in rest else f"lm_heads.{head}.weight"


def in_peft(name: str) -> str:
    return f"base_model.model.medusa_head.modules_to_save.{name}"


BASE_KEY = {"base_model_name_or_path": "org/base"}
LAYOUTS = {
    "fasterdecoding": ({**BASE_KEY, "medusa_num_heads": 5, "medusa_num_layers": 1}, "medusa_lm_head.pt", str),
    "tgi": ({**BASE_KEY, "medusa_num_heads": 2, "medusa_num_layers": 1}, "medusa_lm_head.safetensors", str),
    "vllm": ({**BASE_KEY, "num_heads": 2, "num_hidden_layers": 1, "medusa_fc_bias": True}, "model.safetensors", native),
    "tensorrt-llm": ({**BASE_KEY, "num_medusa_heads": 2}, "medusa_lm_head.pt", str),
    "merged": (
        {**BASE_KEY, "model_type": "llama", "medusa_num_heads": 2},
        "model.safetensors",
        lambda name: f"medusa_head.{name}",
    ),
    "modelopt": ({**BASE_KEY, "medusa": {}}, "model.safetensors", lambda name: f"medusa_heads.{name}"),
    "peft": (None, "adapter_model.safetensors", in_peft),
    "peft-bin": (None, "adapter_model.bin", in_peft),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_heads_become_canonical(layout, dtype, tmp_path):
    config, file, rename = LAYOUTS[layout]
    tensors = heads_of(dtype=dtype)
    published = {rename(name): tensor for name, tensor in tensors.items()}
    if file in {"model.safetensors", "adapter_model.safetensors", "adapter_model.bin"} and layout != "vllm":
        published["model.layers.0.mlp.up_proj.weight"] = torch.ones(2)  # the model's, or the adapter's
    directory = publish(tmp_path / "published", published, config, file)
    if config is None:
        (directory / "adapter_config.json").write_text(json.dumps(BASE_KEY))
    notes = import_heads(directory, tmp_path / "out")
    read = read_heads(tmp_path / "out")
    assert read.form == "separate" and read.config["base_model_name_or_path"] == "org/base"
    assert read.tensors.keys() == tensors.keys() and read.config["medusa_num_heads"] == 2
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.tensors.items())
    assert {tensor.dtype for tensor in read.tensors.values()} == {dtype}
    assert notes == ["2 heads of 1 residual blocks, separate"]
    assert read.meta == {"imported": {"from": "published", "notes": notes}}


def test_file_is_imported_with_the_config_beside_it(tmp_path):
    publish(tmp_path / "published", heads_of(), BASE_KEY, "any_name.pt")
    import_heads(tmp_path / "published" / "any_name.pt", tmp_path / "out")
    assert read_heads(tmp_path / "out").config["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("given", ["config", "argument"])
def test_heads_without_output_layers_share_the_base_models(given, family, tmp_path):
    model = make_model(family)
    base = str(save_base(tmp_path / "base", model))
    tensors = heads_of("shared", dtype=torch.float16)
    name = base if given == "config" else "org/elsewhere"
    publish(tmp_path / "published", tensors, {"base_model_name_or_path": name}, "medusa_lm_head.pt")
    import_heads(tmp_path / "published", tmp_path / "out", None if given == "config" else base)
    read = read_heads(tmp_path / "out")
    assert read.form == "shared" and read.config["base_model_name_or_path"] == base
    assert torch.equal(read.tensors[SHARED_OUTPUT_LAYER], model.get_output_embeddings().weight.half())


def test_native_heads_that_share_one_output_layer_are_shared(tmp_path):
    shared = torch.randn(VOCAB, HIDDEN)
    tensors = {native(name): tensor for name, tensor in heads_of("shared").items()} | {SHARED_OUTPUT_LAYER: shared}
    publish(tmp_path / "published", tensors, {**BASE_KEY, "original_lm_head": True}, "model.safetensors")
    import_heads(tmp_path / "published", tmp_path / "out")
    read = read_heads(tmp_path / "out")
    assert read.form == "shared" and torch.equal(read.tensors[SHARED_OUTPUT_LAYER], shared)
    edit_json(tmp_path / "published" / "config.json", original_lm_head=None)
    import_heads(tmp_path / "published", tmp_path / "unsaid")
    assert read_heads(tmp_path / "unsaid").form == "shared"
    edit_json(tmp_path / "published" / "config.json", original_lm_head=False)
    with pytest.raises(ValueError, match=r"1\.1\.weight is missing"):
        import_heads(tmp_path / "published", tmp_path / "other")


def test_published_output_layers_that_happen_to_be_equal_stay_separate(tmp_path):
    tensors = heads_of()
    tensors["1.1.weight"] = tensors["0.1.weight"]
    import_heads(publish(tmp_path / "published", tensors, BASE_KEY), tmp_path / "out")
    assert read_heads(tmp_path / "out").form == "separate"


def test_blocks_without_biases_get_zeros(tmp_path):
    tensors = {name: tensor for name, tensor in heads_of().items() if "bias" not in name}
    publish(tmp_path / "published", tensors, BASE_KEY)
    notes = import_heads(tmp_path / "published", tmp_path / "out")
    read = read_heads(tmp_path / "out").tensors
    assert "the blocks have no biases: zeros were added" in notes[1]
    assert all(read[f"{i}.0.linear.bias"].tolist() == [0.0] * HIDDEN for i in range(2))


def test_copies_of_one_block_are_recognised_and_kept(tmp_path):
    tensors = heads_of(num_layers=3)
    for head in range(2):
        for layer in (1, 2):
            for kind in ("weight", "bias"):
                tensors[f"{head}.{layer}.linear.{kind}"] = tensors[f"{head}.0.linear.{kind}"].clone()
    publish(tmp_path / "published", tensors, BASE_KEY)
    notes = import_heads(tmp_path / "published", tmp_path / "out")
    assert "the 3 blocks of every head are equal" in notes[1]
    read = read_heads(tmp_path / "out")
    assert read.config["medusa_num_layers"] == 3
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.tensors.items())
    tensors["1.2.linear.bias"][0] += 1
    publish(tmp_path / "published", tensors, BASE_KEY)
    assert len(import_heads(tmp_path / "published", tmp_path / "out")) == 1


def test_heads_inside_a_model_that_names_no_base_model_belong_to_it(tmp_path):
    tensors = {f"medusa_head.{name}": tensor for name, tensor in heads_of().items()}
    directory = publish(tmp_path / "published", tensors, {"model_type": "llama"}, "model.safetensors")
    import_heads(directory, tmp_path / "out")
    assert read_heads(tmp_path / "out").config["base_model_name_or_path"] == str(directory)


def test_peft_original_modules_are_left_out(tmp_path):
    tensors = heads_of()
    published = {in_peft(name): tensor for name, tensor in tensors.items()}
    published |= {
        f"base_model.model.medusa_head.original_module.{name}": torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    directory = publish(tmp_path / "published", published, None, "adapter_model.safetensors")
    import_heads(directory, tmp_path / "out", "org/base")
    read = read_heads(tmp_path / "out").tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())


# Where it may write


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


NOT_OURS = {
    "a-model": lambda out: save_base(out, make_model()),
    "anything": lambda out: (out.mkdir(), (out / "notes.txt").write_text("mine")),
    "the-heads-themselves": lambda out: publish(out, heads_of(), BASE_KEY),
    "an-export": lambda out: publish_ours(out, {"recipe": "medusa-1", "export": {"target": "tgi"}}),
    "a-model-with-our-marker": lambda out: (
        save_base(out, make_model()),
        (out / "medusa_meta.json").write_text('{"recipe": "medusa-1"}'),
    ),
    "a-marker-of-something-else": lambda out: publish_ours(out, {"made_by": "another program"}),
    "a-damaged-marker": lambda out: (publish_ours(out, {}), (out / "medusa_meta.json").write_text("{")),
    "a-file": lambda out: out.write_text("mine"),
}


def publish_ours(out: Path, meta) -> None:
    publish(out, heads_of(), {**BASE_KEY, "model_type": "medusa"})
    (out / "medusa_meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("case", NOT_OURS)
def test_directory_that_is_not_ours_is_refused_and_left_as_it_is(case, tmp_path):
    publish(tmp_path / "published", heads_of(), BASE_KEY)
    (tmp_path / "published" / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    NOT_OURS[case](out)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"out is .*, expected a new or an empty directory.*--out") as error:
        import_heads(tmp_path / "published", out)
    assert "\n" not in str(error.value) and files_of(tmp_path) == before


def test_directory_of_the_heads_is_refused_where_it_is_not_what_training_wrote(tmp_path):
    published = publish(tmp_path / "published", heads_of(), BASE_KEY)
    before = files_of(published)
    with pytest.raises(ValueError, match="published is not empty"):
        import_heads(published, published)
    assert files_of(published) == before


@pytest.mark.parametrize("earlier", ["import", "trained-heads", "empty"])
def test_earlier_heads_of_ours_are_written_over(earlier, tmp_path):
    out = tmp_path / "out"
    if earlier == "import":
        import_heads(publish(tmp_path / "first", heads_of(num_heads=1), BASE_KEY), out)
    elif earlier == "trained-heads":
        trained(tmp_path).heads_dir.rename(out)
    else:
        out.mkdir()
    tensors = heads_of(num_heads=2)
    import_heads(publish(tmp_path / "published", tensors, BASE_KEY), out)
    assert read_heads(out).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("written", ["weights", "tokenizer"])
def test_import_that_was_interrupted_can_be_run_again(written, tmp_path, monkeypatch):
    published = publish(tmp_path / "published", heads_of(), BASE_KEY)
    (published / "tokenizer_config.json").write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    part = "write_tensors" if written == "weights" else "shutil.copyfile"
    with monkeypatch.context() as patched:
        patched.setattr(f"axolotl_medusa.serving.import_heads.{part}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_heads(published, tmp_path / "out")
    import_heads(published, tmp_path / "out")
    assert read_heads(tmp_path / "out").form == "separate"


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


REFUSED = {
    "no-heads": ({"lm_head.weight": torch.ones(2, 2)}, BASE_KEY, "found no Medusa heads in .*the first is lm_head"),
    "no-blocks": ({"0.0.weight": torch.ones(VOCAB, HIDDEN)}, BASE_KEY, "found no Medusa heads"),
    "surplus": (
        {**heads_of(), "lm_head.weight": torch.ones(2, 2)},
        BASE_KEY,
        r"has the tensor lm_head\.weight, expected nothing but Medusa heads",
    ),
    "token-map": ({**heads_of(), "token_map": torch.arange(3)}, BASE_KEY, "has a token_map.*a part of the vocabulary"),
    "no-base": (heads_of(), {}, r"names no base model .*pass it as --base-model"),
    "missing-bias": (without(heads_of(), "1.0.linear.bias"), BASE_KEY, r"1\.0\.linear\.bias is missing"),
    "missing-output": (without(heads_of(), "1.1.weight"), BASE_KEY, r"1\.1\.weight is missing"),
    "missing-first-output": (without(heads_of(), "0.1.weight"), BASE_KEY, "head 0 has no output layer"),
    "missing-first-block": (without(heads_of(), "0.0.linear.weight"), BASE_KEY, "head 0 has no residual block"),
    "twice": (
        {**heads_of(), "blocks.0.layers.0.bias": torch.ones(HIDDEN)},
        BASE_KEY,
        r"are the same tensor, expected one of them",
    ),
    "shape": (
        {**heads_of(), "1.0.linear.bias": torch.ones(HIDDEN + 1)},
        BASE_KEY,
        r"1\.0\.linear\.bias is \(33,\), expected \(32,\)",
    ),
    "no-json": (heads_of(), "nonsense", r"config\.json holds a str, expected an object"),
    "no-such-base": (heads_of("shared"), BASE_KEY, "org/base is neither a directory here nor can it be downloaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_heads_is_refused_and_nothing_written(case, tmp_path, no_network):
    tensors, config, message = REFUSED[case]
    publish(tmp_path / "published", tensors, config)
    with pytest.raises(ValueError, match=message) as error:
        import_heads(tmp_path / "published", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


MEGABYTE = 2**20
ROWS, WIDTH = 16384, 512
"""Of an output layer of 32 MB, 20 times what the other tensors of a head have."""


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_import_holds_one_tensor_at_a_time(file, tmp_path):
    """Copies of lm_head are compared with each other, which makes it the import that reads the most."""
    small = publish(tmp_path / "small", heads_of(), BASE_KEY, file)
    torch.manual_seed(0)
    tensors = dict(MedusaHeads(WIDTH, ROWS, 3).state_dict())
    for head in range(1, 3):
        tensors[f"{head}.1.weight"] = tensors["0.1.weight"].clone()
    large = publish(tmp_path / "large", tensors, BASE_KEY, file)
    meta = {
        "recipe": "medusa-1",
        "export": {"target": "tensorrt-llm", "config": {**BASE_KEY, "original_lm_head": True}},
    }
    (large / "medusa_meta.json").write_text(json.dumps(meta))
    code = f"""
        from pathlib import Path
        from axolotl_medusa.serving.import_heads import import_heads

        def kilobytes(key):
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            return int(lines[key].split()[0])

        import_heads({str(small)!r}, {str(tmp_path / "first")!r})  # what torch imports for such a file is not counted
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        import_heads({str(large)!r}, {str(tmp_path / "out")!r})
        print((kilobytes("VmHWM") - before) * 1024)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert read_heads(tmp_path / "out").form == "shared"
    tensor = 4 * ROWS * WIDTH
    assert int(run.stdout) < 1.4 * tensor, (
        f"{int(run.stdout) / MEGABYTE:.0f} MB for tensors of {tensor / MEGABYTE:.0f} MB"
    )
