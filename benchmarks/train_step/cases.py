"""What `benchmarks.train_step` measures.

Contract: data only, without torch: the process that starts the measurements stays small, as Linux counts the memory of
the starting process into its child's peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

Side = Literal["ours", "reference"]
Stage = Literal["medusa-1", "medusa-2"]
Form = Literal["separate", "shared"]
Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
STAGES: tuple[Stage, ...] = ("medusa-1", "medusa-2")
FORMS: tuple[Form, ...] = ("separate", "shared")
LORA_RANK = 32
WIDE_VOCAB = 49152
WIDE_HIDDEN = 576
RECOMPUTED = 18
"""Of SmolLM2's 30 layers, in the Medusa-2 steps that must keep to a bound of memory: as few as that takes."""
LARGE_SEQ = 256
"""Tokens of a step with the large models' shapes: a step of the reference in fp32 takes about a minute of two cores."""
LARGE_HEADS: dict[tuple[str, Form], int] = {
    ("qwen3-8b", "shared"): 5,
    ("qwen3-8b", "separate"): 1,
    ("vicuna-7b", "shared"): 3,
    ("vicuna-7b", "separate"): 3,
}
"""Heads of the large models: as many of their own output layers as 24 GB hold in fp32 with gradient and AdamW's state."""
QWEN3_8B_LAYERS = 36
GPU_SEQ = 4096


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        model: `smollm2`, whose weights are read from `directory`, or one of `RANDOM_MODELS`.
        stage: `medusa-1`, or `medusa-2`: adapters on every matrix and self-distillation.
        form: `separate` or `shared` heads.
        precision: `fp32` or `bf16`: the backbone's type.
        heads_dtype: `backbone`: trained parameters and the optimizer's state have the backbone's type, without autocast.
            `float32`: they are fp32 and compute under autocast, as axolotl's `bf16: true` has it.
        optimizer: `adamw`, or `adamw8bit` of bitsandbytes.
        heads: Number of heads.
        batch: Samples of a step.
        seq: Tokens of each.
        directory: Where the model's weights are.
        vocab: Size of the vocabulary of a random model, if not its own.
        lora_dropout: Dropout of the adapters.
        recompute_layers: Of how many decoder layers our side recomputes the activations, `medusa_checkpoint_layers`.
        layers: Decoder layers of a random model.
        liger: Whether norms, rotary positions and MLPs of a random model are Liger's kernels, as with axolotl's LigerPlugin.
        device: Where it is measured.
    """

    model: str
    stage: Stage
    form: Form
    precision: Precision
    heads_dtype: Literal["backbone", "float32"] = "backbone"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    heads: int = 5
    batch: int = 2
    seq: int = 1024
    directory: str = ""
    vocab: int = 0
    lora_dropout: float = 0.05
    recompute_layers: int = 0
    layers: int = 1
    liger: bool = False
    device: Device = "cpu"

    @property
    def name(self) -> str:
        """What `--cases` selects by."""
        recomputed = f" {self.recompute_layers} layers recomputed" if self.recompute_layers else ""
        return f"{self.model} {self.stage} {self.form} {self.precision}{recomputed}"

    def to_json(self) -> str:
        """The case for a process of its own."""
        return json.dumps(asdict(self))


def step_cases(directory: str, device: Device = "cpu") -> list[Case]:
    """All training steps that are measured on a device; `directory` holds SmolLM2."""
    return gpu_step_cases() if device == "cuda" else cpu_step_cases(directory)


def gpu_step_cases() -> list[Case]:
    """Steps of all of Qwen3-8B with 5 heads and a sample of 4096 tokens; Medusa-2 also as its examples train, recomputed."""
    separate, shared = (
        Case("qwen3-8b", "medusa-1", form, "bf16", batch=1, seq=GPU_SEQ, layers=QWEN3_8B_LAYERS, device="cuda")
        for form in FORMS
    )
    medusa_2 = [replace(case, stage="medusa-2") for case in (separate, shared)]
    recomputed = [replace(case, recompute_layers=QWEN3_8B_LAYERS) for case in medusa_2]
    return [separate, shared, *medusa_2, *recomputed]


def cpu_step_cases(directory: str) -> list[Case]:
    """Steps of SmolLM2 in `directory`, and of the large models' shapes with one layer."""
    cases = []
    for precision in PRECISIONS:
        cases += [
            Case("smollm2", "medusa-1", "separate", precision, directory=directory),
            Case("smollm2", "medusa-1", "shared", precision, directory=directory),
            Case("smollm2", "medusa-2", "separate", precision, directory=directory),
            Case("smollm2", "medusa-2", "separate", precision, directory=directory, recompute_layers=RECOMPUTED),
            Case("smollm2", "medusa-2", "shared", precision, directory=directory),
        ]
    for precision in PRECISIONS:
        for stage in STAGES:
            for (model, form), heads in LARGE_HEADS.items():
                cases.append(Case(model, stage, form, precision, batch=1, seq=LARGE_SEQ, heads=heads))
    return cases


def heads_loss_cases(directory: str, device: Device = "cpu") -> list[Case]:
    """The shapes at which the heads' loss is measured alone; of a random model one layer is enough for that."""
    return [replace(case, layers=1) for case in step_cases(directory, device) if case.stage == "medusa-1"]


def vocabulary_case(form: Form, factor: int) -> Case:
    """A step whose vocabulary is `factor` times as large, all else equal."""
    return Case("wide", "medusa-1", form, "fp32", heads=2, batch=1, vocab=factor * WIDE_VOCAB)
