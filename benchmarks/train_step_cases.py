"""What `train_step.py` measures.

Contract: data only, without torch: the process that starts the measurements stays small, as Linux counts the memory of
the starting process into its child's peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Side = Literal["ours", "reference"]
Stage = Literal["medusa-1", "medusa-2"]
Form = Literal["separate", "shared"]
Precision = Literal["fp32", "bf16"]

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
        checkpoint_layers: Of how many decoder layers our side recomputes the activations, `medusa_checkpoint_layers`.
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
    checkpoint_layers: int = 0

    @property
    def name(self) -> str:
        """What `--cases` selects by."""
        recomputed = f" {self.checkpoint_layers} layers recomputed" if self.checkpoint_layers else ""
        return f"{self.model} {self.stage} {self.form} {self.precision}{recomputed}"

    def to_json(self) -> str:
        """The case for a process of its own."""
        return json.dumps(asdict(self))


def step_cases(directory: str) -> list[Case]:
    """All training steps that are measured; `directory` holds SmolLM2."""
    cases = []
    for precision in PRECISIONS:
        cases += [
            Case("smollm2", "medusa-1", "separate", precision, directory=directory),
            Case("smollm2", "medusa-1", "shared", precision, directory=directory),
            Case("smollm2", "medusa-2", "separate", precision, directory=directory),
            Case("smollm2", "medusa-2", "separate", precision, directory=directory, checkpoint_layers=RECOMPUTED),
            Case("smollm2", "medusa-2", "shared", precision, directory=directory),
        ]
    for precision in PRECISIONS:
        for stage in STAGES:
            for (model, form), heads in LARGE_HEADS.items():
                cases.append(Case(model, stage, form, precision, batch=1, seq=LARGE_SEQ, heads=heads))
    return cases


def heads_loss_cases(directory: str) -> list[Case]:
    """The shapes at which the heads' loss is measured alone."""
    return [case for case in step_cases(directory) if case.stage == "medusa-1"]


def vocabulary_case(form: Form, factor: int) -> Case:
    """A step whose vocabulary is `factor` times as large, all else equal."""
    return Case("wide", "medusa-1", form, "fp32", heads=2, batch=1, vocab=factor * WIDE_VOCAB)
