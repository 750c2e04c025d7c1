"""Every YAML in examples/medusa is accepted by axolotl, follows its recipe and trains a tiny model."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl_process import run_module
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from axolotl_medusa.args import RENAMED_BY_AXOLOTL, MedusaArgs, config_problems, renamed_key_hints
from axolotl_medusa.checkpoint import read_heads

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "medusa"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted(FOLDER.glob("*.yml"))
NAMES = [file.stem for file in EXAMPLES]
BIG = [name for name in NAMES if name != "smollm2"]
DEEPSPEED_CONFIGS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
OLD_FORK = Path(__file__).parent / "data" / "old_fork_vicuna.yml"
GPUS = {"qwen3_32b": 4}

H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
TORCH = {"torch_version": "2.13.0"}

LORA = {
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_target_modules": ["lm_head"],
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
EVERYWHERE = {
    "medusa_num_heads": 5,
    "medusa_num_layers": 1,
    "medusa_decay_coefficient": 0.8,
    "medusa_lr_multiplier": 4.0,
    "num_epochs": 2,
    "lr_scheduler": "cosine",
    "sample_packing": True,
    "weight_decay": 0.0,
}
MEDUSA_1 = {
    "medusa_only_heads": True,
    "medusa_heads_coefficient": 0.2,
    "medusa_scheduler": "constant",
    "learning_rate": 5e-4,
    "warmup_steps": 40,
    "sequence_len": 4096,
}
STAGE_2 = {**MEDUSA_1, **LORA, "medusa_only_heads": False}
SELF_DISTILLATION = {
    **STAGE_2,
    "medusa_self_distillation": True,
    "medusa_heads_coefficient": 0.01,
    "medusa_scheduler": "sine",
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "sequence_len": 2048,
}
RECIPES = {
    "vicuna_7b_medusa1": MEDUSA_1,
    "vicuna_7b_stage2": {**STAGE_2, "adapter": "lora", "medusa_init_from": "./outputs/vicuna-7b-medusa1"},
    "vicuna_7b_qlora_stage1": {**MEDUSA_1, **LORA, "adapter": "qlora", "load_in_4bit": True},
    "vicuna_7b_qlora_stage2": {
        **STAGE_2,
        "adapter": "qlora",
        "load_in_4bit": True,
        "medusa_init_from": "./outputs/vicuna-7b-qlora-stage1",
    },
    "zephyr_7b_self_distillation": {**SELF_DISTILLATION, "adapter": "lora"},
    "mistral_7b_instruct": MEDUSA_1,
    "qwen3": {**SELF_DISTILLATION, "adapter": "lora"},
    "qwen3_32b": {**SELF_DISTILLATION, "adapter": "lora"},
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, for the memory estimate."""

    hidden: int
    layers: int
    intermediate: int
    query: int
    key: int
    vocab: int

    @property
    def decoder(self) -> int:
        attention = 2 * self.hidden * (self.query + self.key)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embeddings(self) -> int:
        return 2 * self.vocab * self.hidden

    def lora(self, rank: int) -> int:
        hidden = self.hidden
        layer = 2 * (hidden + self.query) + 2 * (hidden + self.key) + 3 * (hidden + self.intermediate)
        return rank * (self.layers * layer + hidden + self.vocab)


SHAPES = {
    "lmsys/vicuna-7b-v1.5": Shape(4096, 32, 11008, 4096, 4096, 32000),
    "HuggingFaceH4/zephyr-7b-beta": Shape(4096, 32, 14336, 4096, 1024, 32000),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(4096, 32, 14336, 4096, 1024, 32768),
    "Qwen/Qwen3-8B": Shape(4096, 36, 12288, 4096, 1024, 151936),
    "Qwen/Qwen3-32B": Shape(5120, 64, 25600, 8192, 1024, 151936),
}


def estimated_gib(cfg: Mapping[str, Any], gpus: int = 1) -> float:
    """The formula of the examples' README, section "Memory"."""
    shape = SHAPES[cfg["base_model"]]
    rows = cfg["micro_batch_size"] * cfg["sequence_len"]
    hidden, intermediate, heads = shape.hidden, shape.intermediate, cfg["medusa_num_heads"]
    own_layers = shape.vocab * hidden if cfg["medusa_lm_head"] == "separate" else 0
    head_parameters = heads * (hidden**2 + hidden + own_layers)
    lora = shape.lora(cfg["lora_r"]) if cfg.get("adapter") else 0
    weights = (0.516 if cfg.get("load_in_4bit") else 2) * shape.decoder + 2 * shape.embeddings
    activations = 16 * heads * rows * hidden
    if cfg["medusa_only_heads"]:
        activations += 2 * rows * (4 * hidden + 3 * intermediate)
    else:
        activations += 2 * shape.layers * rows * hidden
        activations += 2 * rows * (8 * hidden + 4 * intermediate) + 10 * rows * (6 * hidden + intermediate)
    if cfg.get("medusa_self_distillation"):
        activations += 2 * rows * hidden
    if "zero3" in str(cfg.get("deepspeed")):
        gathered = 2 * (shape.vocab * hidden + shape.decoder / shape.layers)
        states = (weights + 18 * (head_parameters + lora)) / gpus + gathered
    else:
        states = weights + 14 * head_parameters + (4 if cfg["medusa_only_heads"] else 10) * lora
    return (states + activations) / 2**30 + 3


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yml").read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text_of(name))


def header_of(name: str) -> str:
    """The comment block that a file opens with, lines joined."""
    lines = text_of(name).splitlines()
    block = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in block)


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table behind `heading` in the README, the first being its column names."""
    lines = README[README.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_socket: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address} was tried")

    connect = socket.socket.connect

    def only_local(own: socket.socket, address: Any) -> None:  # the fork server of the training tests
        (connect if own.family == socket.AF_UNIX else refuse)(own, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("axolotl."):
            self.lines.append(record.getMessage())


@pytest.fixture
def axolotl_warnings() -> Iterator[list[str]]:
    """What axolotl, without this plugin, warns of."""
    handler = Warnings()
    logger = logging.getLogger("axolotl")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], Any]:
    """Axolotl's own steps from a YAML to a config: plugins, then its validator, as on a machine with an H100."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())

    def run(cfg: Mapping[str, Any]) -> Any:
        own = DictDefault(json.loads(json.dumps(cfg)))
        prepare_plugins(own)
        return validate_config(own, capabilities=H100, env_capabilities=TORCH)

    return run


@pytest.fixture
def with_local_paths(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replaces the paths that an earlier step would have made: a downloaded model, the heads of stage 1."""

    def replace(cfg: dict[str, Any]) -> dict[str, Any]:
        if cfg["base_model"].startswith("."):
            model = tmp_path / "model"
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text("{}")
            (model / "model.safetensors").touch()
            cfg = {**cfg, "base_model": str(model)}
        if cfg.get("medusa_init_from"):
            heads = tmp_path / "stage1" / "medusa_heads"
            heads.mkdir(parents=True, exist_ok=True)
            config = {"medusa_num_heads": 5, "medusa_num_layers": 1, "original_lm_head": False}
            (heads / "config.json").write_text(json.dumps(config))
            (heads / "medusa_lm_head.safetensors").touch()
            cfg = {**cfg, "medusa_init_from": str(heads.parent)}
        return cfg

    return replace


def known_keys() -> set[str]:
    """Keys that axolotl or this plugin reads; axolotl drops all others silently."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    aliases = {field.alias for field in AxolotlInputConfig.model_fields.values() if field.alias}
    return set(AxolotlInputConfig.model_fields) | aliases | set(MedusaArgs.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_accepted_by_the_plugin_and_by_axolotl(name, validated, with_local_paths, axolotl_warnings):
    cfg = with_local_paths(load(name))
    assert config_problems(cfg) == []
    assert renamed_key_hints(cfg) == []
    assert set(cfg) <= known_keys()
    result = validated(cfg)
    assert {key: result[key] for key in cfg if key.startswith(("medusa_", "lora_"))} == {
        key: value for key, value in cfg.items() if key.startswith(("medusa_", "lora_"))
    }
    assert result.attn_implementation == ("sdpa" if name == "smollm2" else "flash_attention_2")
    assert not any(result[f"lora_{part}_kernel"] for part in ("mlp", "qkv", "o", "embedding"))
    assert [line for line in axolotl_warnings if "deprecated" in line or "ignored" in line] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_names_files_that_exist(name):
    cfg = load(name)
    named = re.findall(r"[\w./-]+\.(?:py|yml|jinja)\b", header_of(name))
    named += re.findall(r"deepspeed_configs/\w+\.json", text_of(name))
    named += [cfg["chat_template_jinja"]] if cfg.get("chat_template_jinja") else []
    missing = [path for path in named if not (ROOT / path).is_file() and not (FOLDER / path).is_file()]
    assert missing == []
    prompts = re.findall(r"--data_path (\S+)", text_of(name))
    assert [path for path in prompts if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_opens_with_what_it_needs_and_how_to_run(name):
    header = header_of(name)
    for start in ("Needs:", "Data:", "Run:"):
        assert re.search(rf"^{start}", header, re.MULTILINE), start
    pattern = rf"accelerate launch (--num_processes \d+ )?-m axolotl\.cli\.train examples/medusa/{name}\.yml"
    assert re.search(pattern, header)


@pytest.mark.parametrize("name", BIG)
def test_example_for_gpus_says_what_comes_next_and_its_limits(name):
    header, cfg = header_of(name), load(name)
    output = cfg["output_dir"].removeprefix("./")
    assert re.search(r"^Limits:", header, re.MULTILINE)
    assert f'"model": "{output}/medusa_heads"' in header
    merges = f"axolotl merge-lora examples/medusa/{name}.yml" in header
    assert merges is not cfg["medusa_only_heads"]
    assert not merges or f"{output}/merged" in header


@pytest.mark.parametrize("name", BIG)
def test_example_memory_is_the_readmes_formula(name):
    gpus = GPUS.get(name, 1)
    estimate = round(estimated_gib(load(name), gpus))
    (written,) = re.findall(r"Estimated, not measured: (\d+) GiB", header_of(name))
    count, size = map(int, re.findall(r"Needs: (\d+) GPUs? with (\d+) GB", header_of(name))[0])
    assert (count, int(written)) == (gpus, estimate)
    assert estimate * 2**30 < 0.95 * size * 1e9
    (cell,) = (row[8] for row in table_after("# Recipes") if row[0] == f"`{name}.yml`")
    assert cell == (f"{estimate} on {gpus} GPUs" if gpus > 1 else str(estimate))


def test_example_memory_of_the_alternatives_in_comments():
    qwen3, large = load("qwen3"), load("qwen3_32b")
    separate = {"medusa_lm_head": "separate"}
    more = estimated_gib({**qwen3, **separate}) - estimated_gib(qwen3)
    assert f"separate: {round(more)} GiB more to train" in text_of("qwen3")
    medusa_1 = {**qwen3, "medusa_only_heads": True, "medusa_self_distillation": False}
    assert f"Medusa-1 {round(estimated_gib(medusa_1))} GiB" in header_of("qwen3")
    assert f"On 2 GPUs {round(estimated_gib(large, 2))} GiB each" in header_of("qwen3_32b")
    assert f"separate: {round(estimated_gib({**large, **separate}, 4))} GiB instead of 26" in text_of("qwen3_32b")


@pytest.mark.parametrize("name", BIG)
def test_example_has_the_values_of_its_recipe(name):
    expected = {**EVERYWHERE, **RECIPES[name]}
    expected["optimizer"] = "adamw_torch_fused" if name == "qwen3_32b" else "adamw_bnb_8bit"
    cfg = load(name)
    assert {key: cfg.get(key) for key in expected} == expected
    if not cfg.get("adapter"):
        assert not any(key.startswith("lora_") for key in cfg)
    assert bool(cfg.get("medusa_self_distillation")) is bool(RECIPES[name].get("medusa_self_distillation"))
    per_step = cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"] * GPUS.get(name, 1)
    assert per_step == 8
    if name in ("vicuna_7b_medusa1", "vicuna_7b_stage2", "zephyr_7b_self_distillation"):
        assert (cfg["micro_batch_size"], cfg["gradient_accumulation_steps"]) == (2, 4)


def test_every_example_has_a_recipe():
    assert set(RECIPES) == set(BIG)


def test_stage_2_starts_where_stage_1_writes():
    for stage_2, stage_1 in (
        ("vicuna_7b_stage2", "vicuna_7b_medusa1"),
        ("vicuna_7b_qlora_stage2", "vicuna_7b_qlora_stage1"),
    ):
        assert load(stage_2)["medusa_init_from"] == load(stage_1)["output_dir"] != load(stage_2)["output_dir"]


def test_readme_table_names_every_yaml_and_agrees_with_it():
    header, *rows = table_after("# Recipes")
    assert header[0] == "file"
    assert sorted(row[0].strip("`") for row in rows) == [file.name for file in EXAMPLES]
    for file, model, recipe, heads, rate, coefficient, lora, context, _, launch in rows:
        cfg = load(Path(file.strip("`")).stem)
        if not cfg["base_model"].startswith("."):
            bits = ", 4 bits" if cfg.get("load_in_4bit") else ""
            assert model == cfg["base_model"].split("/")[1] + bits
        assert ("Medusa-1" in recipe) is cfg["medusa_only_heads"]
        assert ("self-distillation" in recipe) is bool(cfg.get("medusa_self_distillation"))
        assert ("stage 2" in recipe) is ("medusa_init_from" in cfg)
        assert heads == f"{cfg['medusa_num_heads']} {cfg['medusa_lm_head']}"
        assert float(rate) == cfg["learning_rate"]
        schedule = cfg.get("medusa_scheduler", "constant")
        assert coefficient == f"{cfg['medusa_heads_coefficient']} {schedule}"
        frozen = ", frozen" if cfg["medusa_only_heads"] else ""
        assert lora == (f"r {cfg['lora_r']}{frozen}" if cfg.get("adapter") else "–")
        assert int(context) == cfg["sequence_len"]
        assert (Path(str(cfg.get("deepspeed"))).name in launch) is bool(cfg.get("deepspeed"))


RECIPE_COLUMNS = {1: MEDUSA_1, 2: STAGE_2, 3: SELF_DISTILLATION}


@pytest.mark.parametrize("column", RECIPE_COLUMNS)
@pytest.mark.parametrize("name", ["vicuna_7b_stage2", "qwen3"])
def test_switching_the_recipe_as_the_readme_says_is_valid(name, column, validated, with_local_paths):
    header, *rows = table_after("## The recipes and the paper")
    assert header[column].startswith("Medusa-1" if column == 1 else "Medusa-2")
    lines = {row[0].strip("`"): yaml.safe_load(row[column]) for row in rows}
    lines = {key: float(value) if key == "learning_rate" else value for key, value in lines.items()}
    expected = {"medusa_self_distillation": False, **RECIPE_COLUMNS[column]}
    assert lines == {key: expected[key] for key in lines}
    cfg = {**with_local_paths(load(name)), **lines}
    assert config_problems(cfg) == []
    assert validated(cfg).medusa_scheduler == lines["medusa_scheduler"]


def test_readme_lora_lines_are_those_of_the_examples():
    section = README[README.index("## Switch recipe") : README.index("## Prompts")]
    block = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert yaml.safe_load(block) == {key: load("vicuna_7b_stage2")[key] for key in yaml.safe_load(block)}
    assert LORA.items() <= yaml.safe_load(block).items()


def test_qwen3_marks_the_lines_that_make_it_medusa_1(validated):
    marked = re.findall(r"^(\w+): \S+ # Medusa-1: (\S+)$", text_of("qwen3"), re.MULTILINE)
    changes = {key: yaml.safe_load(value) for key, value in marked}
    changes["learning_rate"] = float(changes["learning_rate"])
    assert len(marked) == 6 and "six lines" in header_of("qwen3")
    expected = {"medusa_self_distillation": False, **MEDUSA_1}
    assert changes == {key: expected[key] for key in changes}
    cfg = {**load("qwen3"), **changes}
    assert config_problems(cfg) == []
    assert validated(cfg).medusa_only_heads is True


@pytest.mark.parametrize("file", DEEPSPEED_CONFIGS, ids=lambda file: file.stem)
def test_deepspeed_config_leaves_nothing_to_fill_in_after_the_trainer(file):
    from transformers import TrainingArguments

    config = json.loads(file.read_text(encoding="utf-8"))
    assert "optimizer" not in config and "scheduler" not in config
    stage = config["zero_optimization"]["stage"]
    assert file.stem.startswith(f"zero{stage}")
    assert config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) is (stage == 3)
    model = make_model("llama")
    arguments = TrainingArguments(output_dir="unused", report_to=[], per_device_train_batch_size=2, use_cpu=True)
    arguments.bf16 = True  # after the constructor, which refuses it without a GPU
    try:
        parsed = HfTrainerDeepSpeedConfig(config)
        parsed.trainer_config_process(arguments)
        parsed.trainer_config_finalize(arguments, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()  # models made while it is set would be partitioned
    assert "auto" not in json.dumps(parsed.config)
    assert parsed.config["bf16"]["enabled"] is True
    assert parsed.config["train_micro_batch_size_per_gpu"] == 2


def test_deepspeed_configs_are_named_in_the_readme():
    named = set(re.findall(r"deepspeed_configs/(\w+\.json)", README))
    assert named == {file.name for file in DEEPSPEED_CONFIGS}


# Prompts: what is trained and what is masked.

ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def qwen3_template() -> str:
    from axolotl.utils import chat_templates

    return chat_templates.get_chat_template("qwen3")


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a byte and the special tokens of the examples' models; a chat template where the real one has one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL[:6])
    tokenizer.add_tokens(SPECIAL[6:])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family == "qwen3":
        tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = {"zephyr": ZEPHYR, "mistral": MISTRAL, "qwen3": qwen3_template()}.get(family)
    return fast


def masked(tokenizer: PreTrainedTokenizerFast, cfg: Mapping[str, Any], row: dict[str, Any]) -> tuple[str, list[str]]:
    """A row as axolotl tokenises it: the whole text, and the pieces of it that have labels."""
    from axolotl.prompt_strategies.chat_template import load as load_strategy
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset

    dataset = SFTDataset(**cfg["datasets"][0]).model_dump(exclude_none=True)
    full = DictDefault({"train_on_inputs": False, **cfg})
    tokenized = load_strategy(tokenizer, full, ds_cfg=dataset).tokenize_prompt(row)
    pieces: list[list[int]] = [[]]
    for token, label in zip(tokenized["input_ids"], tokenized["labels"], strict=True):
        if label == -100:
            pieces.append([])
        else:
            assert label == token
            pieces[-1].append(token)
    return tokenizer.decode(tokenized["input_ids"]), [tokenizer.decode(piece) for piece in pieces if piece]


def test_vicuna_template_is_the_format_that_vicuna_was_tuned_on():
    """FastChat's `vicuna_v1.1` conversation, written out: separators " " and "</s>", "ROLE: " before each turn."""
    tokenizer = make_tokenizer("vicuna")
    tokenizer.chat_template = (ROOT / load("vicuna_7b_medusa1")["chat_template_jinja"]).read_text(encoding="utf-8")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "How are you?"},
    ]
    expected = f"<s>{system} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    own = [{"role": "system", "content": "Be brief."}, *turns[:2]]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "<s>Be brief. USER: Hello! ASSISTANT: Hi!</s>"
    with pytest.raises(Exception, match="found tool"):
        tokenizer.apply_chat_template([*turns[:2], {"role": "tool", "content": "1"}], tokenize=False)


def test_vicuna_trains_answers_and_their_end_only():
    cfg, tokenizer = load("vicuna_7b_medusa1"), make_tokenizer("vicuna")
    tokenizer.chat_template = (ROOT / cfg["chat_template_jinja"]).read_text(encoding="utf-8")
    turns = [("human", "Hello!"), ("gpt", "Hi!"), ("human", "More"), ("gpt", "Yes")]
    row = {"id": "1", "conversations": [{"from": role, "value": text} for role, text in turns]}
    text, trained = masked(tokenizer, cfg, row)
    assert text.endswith("USER: Hello! ASSISTANT: Hi!</s>USER: More ASSISTANT: Yes</s>")
    assert trained == ["Hi!</s>", "Yes</s>"]


@pytest.mark.parametrize(
    ("answer", "rendered", "trained"),
    [
        ("Yes.", "<think>\n\n</think>\n\nYes.<|im_end|>", ["Yes.<|im_end|>"]),
        (
            "<think>\nHm.\n</think>\n\nYes.",
            "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
            ["Hm.\n</think>\n\nYes.<|im_end|>"],
        ),
    ],
    ids=["without thinking", "with thinking"],
)
def test_qwen3_trains_the_answer_and_its_thoughts_but_no_inserted_think_block(answer, rendered, trained):
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    text, found = masked(make_tokenizer("qwen3"), load("qwen3"), {"messages": turns})
    assert text.rstrip("\n").endswith(f"<|im_start|>assistant\n{rendered}")
    assert found == trained


# Through axolotl itself, on tiny models.

FAMILIES = {"vicuna": "llama", "zephyr": "mistral", "mistral": "mistral", "qwen3": "qwen3"}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer random model and its tokenizer for each family, wide enough for 4-bit blocks of 64."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in FAMILIES.items():
        tokenizer = make_tokenizer(name)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 1024}
        make_model(family, vocab_size=len(tokenizer), **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 conversations as the generator writes them, and the same as ShareGPT has them."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "messages.jsonl").open("w") as own, (folder / "conversations.jsonl").open("w") as sharegpt:
        for number in range(40):
            answer = " ".join(str(number + k) for k in range(3 + number % 9))
            texts = [("user", "human", f"Count from {number}."), ("assistant", "gpt", answer)]
            turns = [{"role": role, "content": text} for role, _, text in texts]
            own.write(json.dumps({"messages": turns, "finish_reasons": ["stop"]}) + "\n")
            turns = [{"from": role, "value": text} for _, role, text in texts]
            sharegpt.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")
    return folder


def on_cpu(name: str, tiny_models: Path, tiny_data: Path, output: Path) -> dict[str, Any]:
    """An example with a tiny model and what a CPU cannot do replaced."""
    cfg = load(name)
    cfg["base_model"] = str(tiny_models / name.split("_")[0])
    cfg["datasets"][0]["path"] = str(tiny_data / f"{cfg['datasets'][0]['field_messages']}.jsonl")
    for key in ("deepspeed", "evals_per_epoch", "saves_per_epoch"):
        cfg.pop(key, None)
    cpu = {"attn_implementation": "sdpa", "bf16": False, "tf32": False, "optimizer": "adamw_torch"}
    short = {"sequence_len": 256, "max_steps": 2, "val_set_size": 0.0, "warmup_steps": 0, "save_strategy": "no"}
    paths = {"output_dir": str(output), "dataset_prepared_path": str(output.with_name(output.name + "-prepared"))}
    processes = {"dataset_num_proc": 1, "dataloader_num_workers": 0}
    return {**cfg, **cpu, **short, **paths, **processes}


@pytest.mark.parametrize("name", ["vicuna_7b_stage2", "zephyr_7b_self_distillation", "qwen3"])
def test_lora_lines_adapt_every_linear_layer_and_lm_head(name, tiny_models, tiny_data, tmp_path):
    """`lora_target_linear` alone leaves lm_head out."""
    from axolotl.loaders import ModelLoader, load_tokenizer
    from axolotl.utils.config import normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = on_cpu(name, tiny_models, tiny_data, tmp_path)
    cfg = {key: value for key, value in cfg.items() if key != "plugins" and not key.startswith("medusa_")}
    adapted = {}
    for targets in (cfg["lora_target_modules"], None):
        own = DictDefault(json.loads(json.dumps({**cfg, "lora_target_modules": targets})))
        own = validate_config(own, capabilities={**H100, "compute_capability": None}, env_capabilities=TORCH)
        normalize_config(own)
        model, _ = ModelLoader(own, load_tokenizer(own)).load()
        found = {path for path, module in model.named_modules() if hasattr(module, "lora_A")}
        adapted[str(targets)] = {path.rpartition(".")[2] for path in found}
        assert len(found) == 2 * len(LINEAR) + bool(targets), found
    assert adapted == {"['lm_head']": LINEAR | {"lm_head"}, "None": LINEAR}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path, tiny_data: Path) -> Callable[[str], Path]:
    """Trains an example with axolotl's own command, stage 1 before stage 2, and returns its output_dir."""
    folder = tmp_path_factory.mktemp("outputs")
    outputs = {load(name)["output_dir"]: name for name in BIG}

    def train(name: str) -> Path:
        output = folder / name
        if (output / "medusa_heads").is_dir():
            return output
        cfg = on_cpu(name, tiny_models, tiny_data, output)
        if cfg.get("medusa_init_from"):
            cfg["medusa_init_from"] = str(train(outputs[cfg["medusa_init_from"]]))
        file = folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(cfg), encoding="utf-8")
        result = run_module("axolotl.cli.train", [str(file)], ROOT, folder / f"{name}.log")
        assert result.returncode == 0, result.output[-6000:]
        return output

    return train


@pytest.mark.e2e
@pytest.mark.parametrize("name", BIG)
def test_example_trains_a_tiny_model_of_its_family(name, trained):
    output, cfg = trained(name), load(name)
    heads = read_heads(output / "medusa_heads").head_tensors()
    moved = {key for key, tensor in heads.items() if ".linear." in key and tensor.abs().max() > 0}
    assert len(moved) == 2 * cfg["medusa_num_heads"], "every head's weight and bias left zero"
    assert (output / "adapter_model.safetensors").is_file() is not cfg["medusa_only_heads"]
    if cfg.get("chat_template_jinja"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "medusa_heads")
        assert "USER: " in tokenizer.chat_template


# YAMLs of the first Medusa fork of axolotl.

TODAY = {
    "datasets": [
        {
            "path": "data/sharegpt.jsonl",
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        }
    ],
    "attn_implementation": "flash_attention_2",
}
PROBES: dict[str, Any] = {
    "lora_model_dir": "adapter",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_fan_in_fan_out": False,
    "adapter": "lora",
    "dataset_prepared_path": "prepared",
    "wandb_project": "medusa",
    "wandb_entity": "me",
    "wandb_watch": "gradients",
    "wandb_run_id": "run",
    "wandb_log_model": "end",
    "early_stopping_patience": 3,
    "resume_from_checkpoint": "checkpoint-1",
    "local_rank": 0,
    "xformers_attention": True,
    "save_steps": 40,
    "debug": True,
    "deepspeed": "deepspeed/zero2.json",
    "fsdp": ["full_shard"],
    "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
}
"""A value for each key that the old YAML leaves blank."""
TOGETHER = {"early_stopping_patience": {"save_steps": 40}, "xformers_attention": {"flash_attention": None}}
ANYTHING = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "max_packed_sequence_len": 2048,
    "noisy_embedding_alpha": 5.0,
    "dataset_processes": 2,
    "evaluation_strategy": "steps",
    "wandb_run_id": "run",
    "eval_table_size": 5,
    "eval_max_new_tokens": 64,
}
SET_BY_AXOLOTL = {"local_rank", *(key for key in RENAMED_BY_AXOLOTL if key.endswith("_derived_model"))}


def old_yaml() -> dict[str, Any]:
    return yaml.safe_load(OLD_FORK.read_text(encoding="utf-8"))


def with_hints_applied(cfg: dict[str, Any]) -> dict[str, Any]:
    """The old YAML with the plugin and without what `renamed_key_hints` complains of."""
    kept = {key: value for key, value in cfg.items() if value is not None and key not in RENAMED_BY_AXOLOTL}
    return {**kept, **TODAY, "plugins": ["axolotl_medusa.MedusaPlugin"]}


def changed_in_axolotl(
    key: str, value: Any, validated: Callable[..., Any], warnings: list[str], cfg: Mapping[str, Any]
) -> bool:
    """Whether axolotl refuses `key`, does not know it, takes it for another, or warns that it is not what it was."""
    before = set(warnings)
    if key not in known_keys():
        return True
    try:
        result = validated({**cfg, key: value})
    except (ValueError, DeprecationWarning):
        return True
    if key not in result and key != "model_type":  # an alias of type_of_model
        return True
    new = [line for line in warnings if line not in before and key in line]
    return any("deprecated" in line or "instead" in line for line in new)


def test_old_yaml_is_accepted_by_the_plugin_and_refused_by_axolotl(validated):
    cfg = {**old_yaml(), "plugins": ["axolotl_medusa.MedusaPlugin"]}
    assert config_problems(cfg) == []
    with pytest.raises(ValueError, match="sharegpt"):
        validated(cfg)
    hints = renamed_key_hints(cfg)
    assert sorted(hint.split(":")[0].split(" (")[0] for hint in hints) == [
        "datasets type sharegpt",
        "flash_attention",
        "is_llama_derived_model",
    ]


def test_old_yaml_with_the_hints_applied_is_accepted_without_a_deprecation(validated, axolotl_warnings):
    cfg = with_hints_applied(old_yaml())
    assert renamed_key_hints(cfg) == []
    result = validated(cfg)
    assert [line for line in axolotl_warnings if "deprecated" in line] == []
    assert set(cfg) <= known_keys()
    for key in ("medusa_num_heads", "medusa_heads_coefficient", "learning_rate", "sequence_len", "optimizer"):
        assert result[key] == cfg[key]


def test_old_yaml_hints_come_before_axolotl_stops(validated, caplog):
    logging.getLogger("axolotl_medusa.plugin").addHandler(caplog.handler)
    with pytest.raises(ValueError, match="sharegpt"):
        validated({**old_yaml(), "plugins": ["axolotl_medusa.MedusaPlugin"]})
    logging.getLogger("axolotl_medusa.plugin").removeHandler(caplog.handler)
    assert any("flash_attention: use attn_implementation" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("key", sorted({*PROBES, *old_yaml()} - {"datasets", "plugins", "base_model"}))
def test_old_key_has_a_hint_where_axolotl_changed_it(key, validated, axolotl_warnings):
    value = old_yaml().get(key)
    value = PROBES[key] if value is None else value
    cfg = {**with_hints_applied(old_yaml()), **TOGETHER.get(key, {}), "adapter": "lora", **LORA}
    if key in ("flash_attention", "xformers_attention"):
        del cfg["attn_implementation"]
    del cfg["special_tokens"]
    hinted = bool(renamed_key_hints({key: value}))
    if key in SET_BY_AXOLOTL:
        assert hinted
    elif key in ("fsdp", "fsdp_config", "deepspeed"):
        assert hinted is (key != "fsdp_config"), "their values have changed, not their names"
    else:
        assert hinted is changed_in_axolotl(key, value, validated, axolotl_warnings, cfg)


@pytest.mark.parametrize("key", sorted(set(RENAMED_BY_AXOLOTL) - SET_BY_AXOLOTL))
def test_hint_is_for_a_key_that_axolotl_did_change(key, validated, axolotl_warnings):
    cfg = with_hints_applied(old_yaml())
    if key.endswith("_attention"):
        del cfg["attn_implementation"]
    assert changed_in_axolotl(key, ANYTHING.get(key, True), validated, axolotl_warnings, cfg)


def test_hint_names_a_key_that_axolotl_knows():
    named = {key: re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", hint) for key, hint in RENAMED_BY_AXOLOTL.items()}
    values = {"flash_attention_2"}
    assert {word for words in named.values() for word in words} - known_keys() - values == set()


def test_hint_for_blank_and_false_keys_is_none():
    assert renamed_key_hints({"debug": None, "xformers_attention": False, "fsdp": None, "deepspeed": None}) == []


def test_fsdp_1_of_an_old_yaml_is_a_hint():
    (hint,) = renamed_key_hints({"fsdp": ["full_shard", "auto_wrap"]})
    assert "fsdp_version: 2" in hint


def test_deepspeed_folder_of_an_old_yaml_is_a_hint_where_the_file_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (hint,) = renamed_key_hints({"deepspeed": "deepspeed/zero2.json"})
    assert "deepspeed_configs/zero2.json" in hint
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "zero2.json").touch()
    assert renamed_key_hints({"deepspeed": "deepspeed/zero2.json"}) == []


def test_readme_lists_the_keys_of_old_yamls_that_have_hints():
    listed = " ".join(row[0] for row in table_after("## Old YAMLs"))
    values = {**PROBES, **{key: value for key, value in old_yaml().items() if value is not None}}
    hinted = {key for key, value in values.items() if renamed_key_hints({key: value})}
    assert {key for key in hinted if f"`{key}" not in listed} == set()
