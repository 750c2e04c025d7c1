"""Everything in the package that reads files of others, each with a small directory that it reads as it should."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from damage import damaged_bytes, damaged_json, damaged_lines, damaged_value
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from reader import Reader
from safetensors.torch import save as as_safetensors

from axolotl_medusa import cli
from axolotl_medusa.decoding.tree import named_tree
from axolotl_medusa.measuring import training_plots
from axolotl_medusa.model.file_names import CONFIG_FILE, HEADS_FILE, META_FILE
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.model.heads_directory import heads_config, read_heads
from axolotl_medusa.model.sources import find_source
from axolotl_medusa.model.stored_embeddings import stored_output_embedding
from axolotl_medusa.model.tensor_files import LazyTensor, TensorFiles
from axolotl_medusa.serving.export import export
from axolotl_medusa.serving.import_heads import import_heads
from axolotl_medusa.serving.lora import changed, read_adapter
from axolotl_medusa.serving.model_card import measured_in_training, model_card
from axolotl_medusa.serving.served_model import lm_head, merged_tensors
from axolotl_medusa.serving.verify import verify_export
from axolotl_medusa.terminal.prompts import read_prompts
from axolotl_medusa.training.datasets import dataset_problems
from axolotl_medusa.training.hidden_cache import HiddenCache
from axolotl_medusa.training.renamed_keys import renamed_key_hints
from axolotl_medusa.training.yaml_problems import config_problems

VOCAB, HIDDEN = 8, 4


def put(directory: Path, **files: Any) -> None:
    """Writes JSON values and bytes; `__` in a name is a dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name.replace("__", ".")).write_bytes(content)


def weights(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 10


# ---- tensors ----

TENSORS = {
    "a.weight": weights(2, 3),
    "b.bf16": weights(5).bfloat16(),
    "empty": torch.zeros(0, 4),
    "ids": torch.tensor([7]),
}
SAFETENSORS = as_safetensors(TENSORS, metadata={"format": "pt"})


def torch_bytes(content: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A header damaged as JSON and given its length, or a file damaged as bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    length = struct.unpack("<Q", content[:8])[0]
    header = draw(damaged_value(json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from((len(header), len(header), len(header), len(header) + 1, 2**63)))
    return struct.pack("<Q", length) + header + content[8 + struct.unpack("<Q", content[:8])[0] :]


@st.composite
def damaged_archive(draw: st.DrawFn, content: bytes) -> bytes:
    """An archive of torch whose entries are damaged, packed, or called otherwise, or a file damaged as bytes."""
    if draw(st.booleans()):
        return draw(damaged_bytes(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = draw(st.integers(0, len(entries) - 1))
    name, entry = entries[number]
    entries[number] = (
        draw(st.sampled_from((name, name, name, "../x", "archive/constants.pkl"))),
        draw(damaged_bytes(entry)),
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(
        stream, "w", draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    ) as archive:
        for name, entry in entries:
            archive.writestr(name, entry)
    return stream.getvalue()


def load_all(files: TensorFiles) -> None:
    for name in files:
        tensor = files.load(name)
        assert (tuple(tensor.shape), tensor.dtype) == (files.shape(name), files.dtype(name))
        assert tensor.nbytes <= files.file(name).stat().st_size


def make_index(directory: Path) -> None:
    (directory.parent / "outside.safetensors").write_bytes(SAFETENSORS)
    put(
        directory,
        one__safetensors=as_safetensors({"x": weights(2)}),
        two__safetensors=as_safetensors({"y": weights(3)}),
    )
    (directory / "link.safetensors").symlink_to(directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(INDEX))


def read_index(directory: Path) -> None:
    files = TensorFiles.open(directory)
    load_all(files)
    for name in files:
        assert files.file(name).resolve().is_relative_to(directory.resolve())


INDEX = {"metadata": {"total_size": 20}, "weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
TORCH = {"a.weight": weights(2, 3), "b": torch.nn.Parameter(weights(5))}

# ---- heads and models ----

HEADS = {
    "0.0.linear.weight": weights(HIDDEN, HIDDEN),
    "0.0.linear.bias": weights(HIDDEN),
    "1.0.linear.weight": weights(HIDDEN, HIDDEN),
    "1.0.linear.bias": weights(HIDDEN),
    "lm_heads.0.weight": weights(VOCAB, HIDDEN),
}
HEADS_CONFIG = heads_config(MedusaHeads(HIDDEN, VOCAB, 2, 1, "shared", device="meta"), "../base")
META = {
    "recipe": "medusa-1",
    "lm_head_sha256": "0" * 64,
    "dtype": "float32",
    "versions": {"torch": "2.13.0", "python": "3.11"},
    "git_commit": None,
    "yaml": {"base_model": "../base", "datasets": [{"path": "org/data"}, {"path": "x.jsonl"}]},
}
STATE = {
    "best_model_checkpoint": "checkpoint-4",
    "global_step": 4,
    "log_history": [
        {"loss": 3.0, "base_loss": 2.5, "medusa0_loss": 3.5, "step": 2, "epoch": 0.5},
        {"eval_medusa0_top1": 0.62, "eval_medusa_acceptance_length": 1.87, "step": 4},
    ],
}
BASE_CONFIG = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "tie_word_embeddings": False}
BASE = {
    "model.embed_tokens.weight": weights(VOCAB, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": weights(HIDDEN, HIDDEN),
    "lm_head.weight": weights(VOCAB, HIDDEN),
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "lora_alpha": 16,
    "r": 2,
    "use_rslora": False,
    "alpha_pattern": {"q_proj": 8},
    "target_modules": ["q_proj"],
    "trainable_token_indices": [1, 2],
    "base_model_name_or_path": "base",
    "init_lora_weights": True,
}
ADAPTER = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": weights(2, HIDDEN),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": weights(HIDDEN, 2),
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": weights(2, HIDDEN),
}


def make_base(directory: Path) -> None:
    put(
        directory, config__json=BASE_CONFIG, model__safetensors=as_safetensors(BASE), tokenizer__json={"version": "1.0"}
    )


def make_heads(directory: Path, base: Path | str = "base", recipe: str = "medusa-1") -> None:
    put(directory)
    (directory / HEADS_FILE).write_bytes(as_safetensors(HEADS))
    (directory / CONFIG_FILE).write_text(json.dumps({**HEADS_CONFIG, "base_model_name_or_path": str(base)}))
    (directory / META_FILE).write_text(json.dumps({**META, "recipe": recipe}))


def make_run(directory: Path) -> None:
    """An output_dir of Medusa-2 with an adapter, and its base model beside it."""
    make_base(directory.parent / "base")
    make_heads(directory / "medusa_heads", directory.parent / "base", "medusa-2")
    put(
        directory,
        adapter_config__json=ADAPTER_CONFIG,
        adapter_model__safetensors=as_safetensors(ADAPTER),
        trainer_state__json=STATE,
    )


def read_heads_directory(directory: Path) -> None:
    heads = read_heads(directory).build()
    assert sum(parameter.nbytes for parameter in heads.parameters()) <= (directory / HEADS_FILE).stat().st_size


def read_source(directory: Path) -> None:
    source = find_source(directory)
    source.tokenizer_files()
    assert source.form == "shared"
    for tensor in merged_tensors(source):
        assert tuple(tensor.load().shape) == tensor.shape


def read_lora(directory: Path) -> None:
    _, changes = read_adapter(directory)
    base = {name: LazyTensor.of(name, tensor.clone()) for name, tensor in BASE.items()}
    for name, change in changes.items():
        if name in base:
            changed(base[name], change, transposed=change.is_embedding, resizable=False, adapter_dir=directory).load()


def read_embedding(directory: Path) -> None:
    assert len(stored_output_embedding(directory).load().shape) == 2


def import_to(directory: Path) -> None:
    out = directory.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_heads(directory, out)
    read_heads(out)


def make_vllm_heads(directory: Path) -> None:
    make_heads(directory)
    names = {f"{i}.0.linear.{kind}": f"blocks.{i}.layers.0.{kind}" for i in range(2) for kind in ("weight", "bias")}
    put(directory, model__safetensors=as_safetensors({names.get(name, name): tensor for name, tensor in HEADS.items()}))
    (directory / HEADS_FILE).unlink()


def make_torch_heads(directory: Path) -> None:
    put(
        directory,
        config__json={"base_model_name_or_path": "base", "medusa_num_heads": 2},
        medusa_lm_head__pt=TORCH_HEADS,
    )


TORCH_HEADS = torch_bytes(
    {f"{head}.0.linear.{kind}": HEADS[f"{head}.0.linear.{kind}"] for head in range(2) for kind in ("weight", "bias")}
    | {f"{head}.1.weight": weights(VOCAB, HIDDEN) for head in range(2)}
)


WRAPPED_HEADS = torch_bytes(
    {
        "state_dict": {
            f"module.medusa_head.{head}.0._fsdp_wrapped_module.linear.{kind}": HEADS[f"{head}.0.linear.{kind}"]
            for head in range(2)
            for kind in ("weight", "bias")
        },
        "medusa_head": {f"{head}.1.weight": weights(VOCAB, HIDDEN) for head in range(2)},
        "optimizer": {"state": {0: {"exp_avg": weights(2, 2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
    }
)


def make_wrapped_heads(directory: Path) -> None:
    put(directory, config__json={"base_model_name_or_path": "base"}, medusa_step_9__pt=WRAPPED_HEADS)


def make_export(target: str) -> Any:
    def make(directory: Path) -> None:
        make_base(directory.parent / "base")
        make_heads(directory.parent / "heads", directory.parent / "base")
        export(find_source(directory.parent / "heads"), target, directory, verify=False)

    return make


def verify(target: str) -> Any:
    def read(directory: Path) -> None:
        source = find_source(directory.parent / "heads")
        trained = {
            name: LazyTensor.of(name, tensor).load for name, tensor in HEADS.items() if name != "lm_heads.0.weight"
        }
        verify_export(target, directory, trained, lm_head(source).load)

    return read


# ---- what training leaves ----


def read_state(directory: Path) -> None:
    measured = measured_in_training(directory)
    meta = json.loads(json.dumps(META))
    card = model_card(
        target="vllm", config=HEADS_CONFIG, meta=meta, base_model="org/base", model="base", serve="x", measured=measured
    )
    assert card.count("\n## ") == 2


def read_meta(directory: Path) -> None:
    source = find_source(directory)
    card = model_card(
        target="vllm", config=source.config, meta=source.meta, base_model=source.base_model, model="base", serve="x"
    )
    assert card.startswith("---\ntags:") and card.count("\n---\n") == 1


class _Axes:
    def plot(self, steps: Any, values: Any, style: str, label: str) -> None:
        assert len(steps) == len(values)
        [float(number) for number in (*steps, *values)]

    def set(self, **_: str) -> None:
        pass


@contextlib.contextmanager
def no_pictures() -> Iterator[None]:
    """Gives what would be drawn to axes that only look at it: a picture takes a fifth of a second."""
    save_plot = training_plots.save_plot
    training_plots.save_plot = lambda file, draw, name: draw(_Axes(), name) or file
    try:
        yield
    finally:
        training_plots.save_plot = save_plot


def draw_plots(directory: Path) -> None:
    with no_pictures():
        training_plots.write_training_plots(directory, directory)


def read_tree_file(directory: Path) -> None:
    tree = named_tree(directory / "tree.json", 5)
    assert tree.depth <= 5 and len(tree.attention_mask) == tree.num_nodes <= 1024 and tree.top_k <= 1000


def read_prompt_file(directory: Path) -> None:
    for prompt in read_prompts(directory / "prompts.jsonl"):
        assert isinstance(prompt.id, str) and isinstance(prompt.category, str | None)
        assert all(isinstance(message["content"], str) for message in prompt.messages)


PROMPTS = (
    {"id": "1", "prompt": "Hello", "category": "chat"},
    {"id": 2, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt": "x\u2028y"},
)
TREE = {"choices": [[0], [1], [0, 0], [0, 1], [0, 0, 0]], "num_nodes": 6, "expected": 2.5}

# ---- YAML and data sets ----

YAML = {
    "base_model": "base",
    "plugins": ["axolotl_medusa.MedusaPlugin"],
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "medusa_only_heads": True,
    "medusa_lm_head": "shared",
    "medusa_scheduler": "sine_0.5",
    "medusa_heads_coefficient": 0.2,
    "medusa_logging_topk": 5,
    "medusa_hidden_cache": "cache",
    "medusa_init_from": "heads",
    "datasets": [
        {
            "path": "rows.jsonl",
            "type": "chat_template",
            "field_messages": "messages",
            "roles_to_train": ["assistant"],
            "roles": {"assistant": ["gpt"]},
            "message_property_mappings": {"role": "role", "content": "content"},
        },
        {"path": "tokens.json", "type": ""},
    ],
    "deepspeed": "zero.json",
    "sequence_len": 128,
    "adapter": None,
    "fsdp_config": {},
    "learning_rate": 0.001,
    "optimizer": "adamw_torch",
    "chat_template_jinja": "x.jinja",
    "lora_model_dir": "adapter",
    "resume_from_checkpoint": None,
}
ROWS = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}]},
)
TOKENS = ({"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}, {"input_ids": [1, 2], "labels": [-100, 2]})


def make_yaml(directory: Path) -> None:
    make_base(directory / "base")
    make_heads(directory / "heads")
    put(directory / "adapter", adapter_config__json=ADAPTER_CONFIG)
    put(
        directory,
        config__yml=YAML,
        rows__jsonl=b"\n".join(json.dumps(row).encode() for row in ROWS),
        tokens__json=list(TOKENS),
        zero__json={"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
        x__jinja=b"{{ messages }}",
    )


def read_yaml(directory: Path) -> None:
    with contextlib.chdir(directory):
        try:
            cfg = yaml.load((directory / "config.yml").read_bytes(), yaml.CSafeLoader)
        except (yaml.YAMLError, ValueError, RecursionError, TypeError):
            return  # axolotl reads it, and says so itself
        if not isinstance(cfg, dict):
            return
        problems = [*config_problems(cfg), *dataset_problems(cfg)]
        for line in [*renamed_key_hints(cfg), *problems]:
            assert isinstance(line, str) and line and "\n" not in line, line
        if problems:
            raise ValueError(problems[0])


# ---- hidden states ----

ROWS_OF = {b"a" * 16: 3, b"b" * 16: 2}
STATES = {key: weights(rows, HIDDEN).bfloat16() + 1 for key, rows in ROWS_OF.items()}


def open_cache(directory: Path) -> HiddenCache:
    return HiddenCache.open(directory, {"weights": "x"}, ROWS_OF, HIDDEN, limit_gb=1.0)


def make_cache(directory: Path) -> None:
    cache = open_cache(directory)
    for key, states in STATES.items():
        cache.write(key, states)


def read_cache(directory: Path) -> None:
    cache = open_cache(directory)
    for key, states in STATES.items():
        assert not cache.has(key) or torch.equal(cache.read(key), states)


def cache_files() -> tuple[str, dict[str, bytes]]:
    """The folder of a filled cache, and what is in its files."""
    with tempfile.TemporaryDirectory() as place:
        make_cache(Path(place))
        files = [file for file in Path(place).rglob("*") if file.is_file()]
        return files[0].parent.name, {file.name: file.read_bytes() for file in files}


CACHE_FOLDER, CACHE_FILES = cache_files()

# ---- commands ----


def command(*arguments: str) -> Any:
    """Runs the command in this process; its one line of an error becomes a ValueError."""

    def read(directory: Path) -> None:
        shutil.rmtree(directory.parent / "out", ignore_errors=True)
        errors, output = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            status = cli.main([part.format(directory=directory, out=directory.parent / "out") for part in arguments])
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("axolotl-medusa")]
        assert (status, len(lines)) in ((0, 0), (1, 1)), (status, errors.getvalue())
        if lines:
            raise ValueError(lines[0])

    return read


def json_of(value: Any) -> SearchStrategy[bytes]:
    return damaged_json(value)


HEADS_DAMAGE = {
    CONFIG_FILE: json_of(HEADS_CONFIG),
    META_FILE: json_of(META),
    HEADS_FILE: damaged_safetensors(as_safetensors(HEADS)),
}
VLLM_FILE = as_safetensors(
    {**{f"blocks.{i}.layers.0.{k}": HEADS[f"{i}.0.linear.{k}"] for i in range(2) for k in ("weight", "bias")}}
)

PACKAGE_READERS = [
    Reader(
        "safetensors",
        lambda directory: put(directory, a__safetensors=SAFETENSORS),
        lambda directory: load_all(TensorFiles.open(directory / "a.safetensors")),
        {"a.safetensors": damaged_safetensors(SAFETENSORS)},
        900,
    ),
    Reader(
        "torch-archive",
        lambda directory: put(directory, a__pt=torch_bytes(TORCH)),
        lambda directory: load_all(TensorFiles.open(directory / "a.pt")),
        {"a.pt": damaged_archive(torch_bytes(TORCH))},
        500,
    ),
    Reader(
        "torch-legacy",
        lambda directory: put(directory, a__bin=torch_bytes(TORCH, legacy=True)),
        lambda directory: load_all(TensorFiles.open(directory / "a.bin")),
        {"a.bin": damaged_bytes(torch_bytes(TORCH, legacy=True))},
        500,
    ),
    Reader("index", make_index, read_index, {"model.safetensors.index.json": json_of(INDEX)}, 500),
    Reader("heads", make_heads, read_heads_directory, HEADS_DAMAGE, 700),
    Reader(
        "source",
        make_run,
        read_source,
        {
            **{f"medusa_heads/{name}": damage for name, damage in HEADS_DAMAGE.items()},
            "adapter_config.json": json_of(ADAPTER_CONFIG),
            "../base/config.json": json_of(BASE_CONFIG),
        },
        500,
    ),
    Reader(
        "adapter",
        lambda directory: put(
            directory, adapter_config__json=ADAPTER_CONFIG, adapter_model__safetensors=as_safetensors(ADAPTER)
        ),
        read_lora,
        {
            "adapter_config.json": json_of(ADAPTER_CONFIG),
            "adapter_model.safetensors": damaged_safetensors(as_safetensors(ADAPTER)),
        },
        500,
    ),
    Reader(
        "embeddings",
        make_base,
        read_embedding,
        {"config.json": json_of(BASE_CONFIG), "model.safetensors": damaged_safetensors(as_safetensors(BASE))},
        300,
    ),
    Reader(
        "import-vllm",
        make_vllm_heads,
        import_to,
        {
            "config.json": json_of(HEADS_CONFIG),
            META_FILE: json_of({**META, "export": {"config": HEADS_CONFIG}}),
            "model.safetensors": damaged_safetensors(VLLM_FILE),
        },
        400,
    ),
    Reader(
        "import-torch",
        make_torch_heads,
        import_to,
        {
            "config.json": json_of({"base_model_name_or_path": "base"}),
            "medusa_lm_head.pt": damaged_archive(TORCH_HEADS),
        },
        200,
    ),
    Reader("import-wrapped", make_wrapped_heads, import_to, {"medusa_step_9.pt": damaged_archive(WRAPPED_HEADS)}, 200),
    *(
        Reader(
            f"verify-{target}",
            make_export(target),
            verify(target),
            {"config.json": json_of({**HEADS_CONFIG, **extra}), file: damaged_safetensors(as_safetensors(HEADS))},
            150,
        )
        for target, file, extra in (
            ("vllm", "model.safetensors", {}),
            ("tgi", HEADS_FILE, {}),
            ("lorax", HEADS_FILE, {}),
            ("tensorrt-llm", HEADS_FILE, {}),
            ("modelopt", "model.safetensors", {"medusa": {"num_medusa_heads": 2, "num_medusa_layers": 1}}),
        )
    ),
    Reader(
        "trainer-state",
        lambda directory: put(directory, trainer_state__json=STATE),
        read_state,
        {"trainer_state.json": json_of(STATE)},
        300,
    ),
    Reader("model-card", make_heads, read_meta, {META_FILE: json_of(META)}, 300),
    Reader(
        "training-plots",
        lambda directory: put(directory, trainer_state__json=STATE),
        draw_plots,
        {"trainer_state.json": json_of(STATE)},
        300,
    ),
    Reader(
        "tree",
        lambda directory: put(directory, tree__json=TREE),
        read_tree_file,
        {"tree.json": st.one_of(json_of(TREE), json_of(TREE["choices"]))},
        500,
    ),
    Reader(
        "prompts",
        lambda directory: put(directory, prompts__jsonl=b"\n".join(json.dumps(row).encode() for row in PROMPTS)),
        read_prompt_file,
        {"prompts.jsonl": damaged_lines(PROMPTS)},
        400,
    ),
    Reader(
        "yaml",
        make_yaml,
        read_yaml,
        {
            "config.yml": json_of(YAML),
            "heads/config.json": json_of(HEADS_CONFIG),
            "base/config.json": json_of(BASE_CONFIG),
            "zero.json": json_of({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}),
            "adapter/adapter_config.json": json_of(ADAPTER_CONFIG),
        },
        700,
        refusals=(ValueError,),
    ),
    Reader(
        "datasets",
        make_yaml,
        read_yaml,
        {"rows.jsonl": damaged_lines(ROWS), "tokens.json": json_of(list(TOKENS))},
        400,
        refusals=(ValueError,),
    ),
    Reader(
        "hidden-cache",
        make_cache,
        read_cache,
        {f"{CACHE_FOLDER}/{name}": damaged_bytes(content) for name, content in CACHE_FILES.items()},
        300,
        refusals=(),
    ),
    Reader(
        "plot-command",
        lambda directory: put(directory, trainer_state__json=STATE),
        no_pictures()(command("plot", "{directory}")),
        {"trainer_state.json": json_of(STATE)},
        100,
    ),
    Reader(
        "import-command",
        make_torch_heads,
        command("import", "{directory}", "--to", "canonical", "--out", "{out}"),
        {
            "config.json": json_of({"base_model_name_or_path": "base"}),
            "medusa_lm_head.pt": damaged_archive(TORCH_HEADS),
        },
        100,
    ),
    Reader(
        "export-command",
        make_run,
        command("export", "{directory}", "--to", "vllm", "--model", "merged", "--out", "{out}"),
        {
            "adapter_config.json": json_of(ADAPTER_CONFIG),
            "trainer_state.json": json_of(STATE),
            "medusa_heads/config.json": json_of(HEADS_CONFIG),
        },
        100,
    ),
]
"""All of them."""
