"""What a YAML means for memory and network: sizes, types, recipe and engine, in one record.

Contract: reads the YAML and the small files that it names; computes no memory. `engine` is how several GPUs share the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from axolotl_medusa.errors import first_line
from axolotl_medusa.estimating.sizes import ModelSizes, read_sizes
from axolotl_medusa.training.args import MedusaArgs
from axolotl_medusa.training.named_files import deepspeed_config
from axolotl_medusa.training.precision import precision_is_left_to_axolotl

Engine = Literal["ddp", "zero-1", "zero-2", "zero-3", "fsdp2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Device = Literal["gpu", "cpu"]

_ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size` where its configuration says nothing."""

_SHIPPED: dict[Engine, Mapping[str, Any]] = {
    "zero-1": {"overlap_comm": True},
    "zero-2": {"overlap_comm": True, "reduce_bucket_size": "auto"},
    "zero-3": {"overlap_comm": True, "reduce_bucket_size": "auto"},
}
"""What the files in deepspeed_configs say, for an engine that is not the YAML's own."""


@dataclass(frozen=True)
class Plan:
    """A training run as far as memory and network know it.

    Attributes:
        sizes: Of the base model.
        engine: How several GPUs share the work; with one GPU and `ddp` nothing is shared.
        gpus: Processes, one a GPU.
        device: `cpu`: the processes are a CPU's, without a GPU.
        micro_batch: Sequences of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        sequence: Tokens of a sequence.
        only_heads: Medusa-1.
        heads: Number of heads.
        blocks: Residual blocks of each.
        shared: Whether heads reuse lm_head.
        teacher: Whether the loss has a distance from a teacher.
        self_distillation: Whether that teacher is a second forward of the backbone.
        adapter: Parameters of LoRA, 0 without an adapter.
        rank: Its rank.
        dropout: Whether LoRA has dropout.
        adapts_output: Whether lm_head has an adapter.
        weight_bits: 32, 16, 8 or 4: how the base model's matrices are held.
        half: Whether computing is in 16 bits.
        head_bits: 32 or 16: how heads and adapters are held.
        optimizer: Its name, as the YAML has it.
        recomputed: Decoder layers whose activations are recomputed in the backward.
        trained_layers: Decoder layers whose weights train: Medusa-2 without an adapter.
        trains_embeddings: Whether embeddings and lm_head train too.
        eager: Whether attention keeps its probabilities.
        masked: Whether attention is given a mask of all pairs of tokens.
        bucket: Elements of DeepSpeed's bucket of gradients.
        overlap: Whether DeepSpeed has two of them.
        chain: Whether the heads' losses are weighted as a chain.
        one_output: Whether the heads have one output layer together.
        draft_vocab: Tokens that the heads choose among, 0 for all.
    """

    sizes: ModelSizes
    engine: Engine
    gpus: int
    device: Device
    micro_batch: int
    accumulation: int
    sequence: int
    only_heads: bool
    heads: int
    blocks: int
    shared: bool
    teacher: bool
    self_distillation: bool
    adapter: int
    rank: int
    dropout: bool
    adapts_output: bool
    weight_bits: int
    half: bool
    head_bits: int
    optimizer: str
    recomputed: int
    trained_layers: int
    trains_embeddings: bool
    eager: bool = False
    masked: bool = False
    bucket: int = 0
    overlap: bool = False
    chain: bool = False
    one_output: bool = False
    draft_vocab: int = 0

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def own_outputs(self) -> int:
        """Parameters of the heads' own output layers."""
        return self.own_output_layers * self.one_own_output

    @property
    def one_own_output(self) -> int:
        """Parameters of one of them."""
        return self.sizes.hidden * self.draft_vocab if self.draft_vocab else self.sizes.output

    @property
    def own_output_layers(self) -> int:
        """How many output layers are the heads'."""
        if self.shared:
            return 0
        return 1 if self.one_output else self.heads

    @property
    def head_parameters(self) -> int:
        """All of the heads'."""
        hidden = self.sizes.hidden
        return self.heads * self.blocks * (hidden**2 + hidden) + self.own_outputs

    @property
    def trained_base(self) -> int:
        """Parameters of the base model that train."""
        sizes = self.sizes
        part = sizes.layer * self.trained_layers
        return part + (sizes.embeddings + sizes.others if self.trains_embeddings else 0)

    @property
    def trained_adapter(self) -> int:
        """Parameters of the adapter that train."""
        return 0 if self.only_heads else self.adapter

    @property
    def trained(self) -> int:
        """All that trains."""
        return self.head_parameters + self.trained_adapter + self.trained_base


def yaml_of(file: str | Path) -> dict[str, Any]:
    """Reads a YAML.

    Raises:
        ValueError: It is missing or no YAML of keys.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): expected the YAML of a training") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no YAML ({first_line(error)}): expected the YAML of a training") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no keys: expected the YAML of a training")
    return content


def engine_of(cfg: Mapping[str, Any]) -> Engine:
    """The engine that a YAML asks for.

    Raises:
        ValueError: There is none of that kind here.
    """
    if cfg.get("deepspeed"):
        zero = deepspeed_config(cfg).get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
        engines: dict[Any, Engine] = {0: "ddp", 1: "zero-1", 2: "zero-2", 3: "zero-3"}
        if stage not in engines:
            raise ValueError(f"deepspeed asks for stage {stage!r}: expected 0, 1, 2 or 3")
        return engines[stage]
    if cfg.get("fsdp") or cfg.get("fsdp_config") or cfg.get("fsdp_version"):
        version = cfg.get("fsdp_version", 2)
        if str(version) != "2":
            raise ValueError(f"fsdp_version is {version}: heads train with FSDP2; set fsdp_version: 2")
        return "fsdp2"
    return "ddp"


def plan_of(
    cfg: Mapping[str, Any],
    *,
    gpus: int = 1,
    engine: str | None = None,
    device: Device = "gpu",
    sizes: ModelSizes | None = None,
) -> Plan:
    """The plan of a YAML.

    Args:
        cfg: The YAML's keys.
        gpus: Number of GPUs.
        engine: Instead of the YAML's.
        device: Where it will train.
        sizes: The base model's; read from its config where they are not given.

    Raises:
        ValueError: Something in it is missing, or not known here.
    """
    args = _medusa_args(cfg)
    if gpus < 1:
        raise ValueError(f"the number of GPUs is {gpus}: expected at least 1")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine {engine} is not known: expected {', '.join(ENGINES)}")
    found = engine_of(cfg) if engine is None else engine
    name = cfg.get("base_model")
    if not isinstance(name, str) or not name:
        raise ValueError("base_model is missing: expected a model directory or a hub name")
    sizes = sizes or read_sizes(name, _text(cfg, "revision_of_model"))
    every, targets = _adapter(cfg)
    has_adapter = every or bool(targets)
    rank = _whole(cfg, "lora_r", 8) if has_adapter else 0
    half = _is_half(cfg, device)
    layers, embeddings = _trained(args, sizes, has_adapter)
    attention = str(cfg.get("attn_implementation") or ("flash_attention_2" if cfg.get("flash_attention") else "sdpa"))
    packed = bool(cfg.get("sample_packing"))
    zero = _zero_options(cfg, found)
    return Plan(
        sizes=sizes,
        engine=found,
        gpus=gpus,
        device=device,
        micro_batch=_whole(cfg, "micro_batch_size", 1),
        accumulation=_whole(cfg, "gradient_accumulation_steps", 1),
        sequence=_whole(cfg, "sequence_len", 512),
        only_heads=args.medusa_only_heads,
        heads=args.medusa_num_heads,
        blocks=args.medusa_num_layers,
        shared=args.medusa_lm_head == "shared",
        teacher=args.medusa_self_distillation or args.medusa_head_loss != "ce",
        draft_vocab=args.medusa_draft_vocab or 0,
        one_output=args.medusa_lm_head == "trained",
        chain=args.medusa_head_weighting == "chain",
        self_distillation=args.medusa_self_distillation,
        adapter=sizes.adapter(rank, targets, every=every),
        rank=rank,
        dropout=bool(cfg.get("lora_dropout")),
        adapts_output="lm_head" in targets,
        weight_bits=4 if cfg.get("load_in_4bit") else 8 if cfg.get("load_in_8bit") else 16 if half else 32,
        half=half,
        head_bits=32,
        optimizer=str(cfg.get("optimizer") or "adamw_torch_fused"),
        recomputed=sizes.layers if cfg.get("gradient_checkpointing") else args.medusa_checkpoint_layers,
        trained_layers=layers,
        trains_embeddings=embeddings,
        eager=attention == "eager",
        masked=attention != "eager" and "flash" not in attention and packed,
        bucket=_bucket(zero, sizes),
        overlap=bool(zero.get("overlap_comm")),
    )


def _medusa_args(cfg: Mapping[str, Any]) -> MedusaArgs:
    from pydantic import ValidationError

    known = {key: value for key, value in cfg.items() if str(key).startswith("medusa")}
    try:
        return MedusaArgs.model_validate(known)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc'])) or 'YAML'}: {first_line(each['msg'])}" for each in error.errors()]
        raise ValueError("; ".join(lines)) from None


def _whole(cfg: Mapping[str, Any], key: str, default: int) -> int:
    value = cfg.get(key, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}: expected a whole number, at least 1")
    return value


def _text(cfg: Mapping[str, Any], key: str) -> str | None:
    value = cfg.get(key)
    return value if isinstance(value, str) else None


def _adapter(cfg: Mapping[str, Any]) -> tuple[bool, set[str]]:
    """Whether every linear layer of the decoder has an adapter, and the names of others that have one; neither: there is none."""
    kind = cfg.get("adapter")
    if not kind:
        return False, set()
    if kind not in ("lora", "qlora"):
        raise ValueError(f"adapter is {kind!r}: its memory is not known here; expected lora or qlora")
    named = cfg.get("lora_target_modules") or []
    names = {str(name) for name in (named if isinstance(named, list) else [named])}
    if not names and not cfg.get("lora_target_linear"):
        raise ValueError(f"adapter is {kind} without targets: set lora_target_linear: true or lora_target_modules")
    return bool(cfg.get("lora_target_linear")), names


def _is_half(cfg: Mapping[str, Any], device: Device) -> bool:
    """Whether computing is in 16 bits; where the YAML leaves it open, axolotl does on a GPU, and a CPU trains in fp32."""
    if precision_is_left_to_axolotl(cfg):
        return device == "gpu"
    return any(cfg.get(key) for key in ("bf16", "bfloat16", "fp16", "float16"))


def _trained(args: MedusaArgs, sizes: ModelSizes, has_adapter: bool) -> tuple[int, bool]:
    """How many decoder layers train, and whether embeddings do."""
    if args.medusa_only_heads or has_adapter:
        return 0, False
    if args.medusa_num_unfreeze_layers:
        return min(args.medusa_num_unfreeze_layers, sizes.layers), False
    return sizes.layers, True


def _zero_options(cfg: Mapping[str, Any], engine: Engine) -> Mapping[str, Any]:
    """DeepSpeed's options as far as memory depends on them."""
    if not engine.startswith("zero"):
        return {}
    if cfg.get("deepspeed") and engine_of(cfg) == engine:
        zero = deepspeed_config(cfg).get("zero_optimization")
        return zero if isinstance(zero, Mapping) else {}
    return _SHIPPED[engine]


def _bucket(zero: Mapping[str, Any], sizes: ModelSizes) -> int:
    """Elements of DeepSpeed's bucket; the Trainer fills in `auto`."""
    value = zero.get("reduce_bucket_size", _ZERO_BUCKET if zero else 0)
    if value == "auto":
        return sizes.hidden**2
    return int(value) if isinstance(value, int | float) else _ZERO_BUCKET
