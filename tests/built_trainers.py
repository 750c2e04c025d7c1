"""Trainers as axolotl builds them from a YAML, without its commands: for tests of optimizers and learning rates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import HIDDEN, VOCAB, add_lora, make_model
from datasets import Dataset

from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.trainer import MedusaTrainer

RATE, MULTIPLIER, DECAY = 1e-3, 4.0, 0.01
_TRAINING_ARGUMENTS = (
    "loraplus_lr_ratio",
    "embedding_lr",
    "embedding_lr_scale",
    "lr_groups",
    "jagged_restart_steps",
    "cosine_min_lr_ratio",
)
"""Keys of the YAML that axolotl hands to the trainer as they are."""


def built_trainer(
    folder: Path, optimizer: str = "adamw_torch", multiplier: float = MULTIPLIER, with_lora: bool = False, **keys: Any
) -> MedusaTrainer:
    """A trainer as axolotl builds it, of a model with heads; keys of the YAML may be given."""
    from axolotl.core.builders.causal import HFCausalTrainerBuilder
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.utils.dict import DictDefault

    model = add_lora(make_model()) if with_lora else make_model()
    attach_heads(model, MedusaHeads(HIDDEN, VOCAB, 2))
    builder = SimpleNamespace(
        cfg=DictDefault({"optimizer": optimizer, "lr_scheduler": "constant", **keys}), model=model
    )
    options = {"learning_rate": RATE, "weight_decay": DECAY, "adam_beta1": 0.9, "adam_beta2": 0.999}
    options |= {"dion_learning_rate": RATE, "dion_momentum": 0.95} if optimizer == "dion" else {}
    trainer_options = {}
    HFCausalTrainerBuilder._configure_scheduler(builder, options)
    HFCausalTrainerBuilder._configure_optimizer(builder, options, trainer_options)
    options |= {key: keys[key] for key in _TRAINING_ARGUMENTS if key in keys}
    args = AxolotlTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=20, warmup_steps=4, report_to=[], **options
    )
    data = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    trainer = MedusaTrainer(model=model, args=args, train_dataset=data, **trainer_options)
    trainer.medusa_cfg = DictDefault(medusa_lr_multiplier=multiplier)
    return trainer
