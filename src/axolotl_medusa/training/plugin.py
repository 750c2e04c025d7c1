"""The axolotl plugin: hooks of a few lines each.

Contract: every error that a user can cause ends here in one line and a non-zero exit, never in training without heads.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from pydantic import ValidationError
from torch import nn

from axolotl_medusa.errors import first_line
from axolotl_medusa.model.anatomy import embedding_shape, output_embedding, probe_logits
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import acting_output_layer, load_into, open_heads
from axolotl_medusa.training.args import PATH_KEYS, take_path_keys
from axolotl_medusa.training.axolotl_versions import keep_from_telemetry, missing_fsdp_version, unread_options
from axolotl_medusa.training.datasets import dataset_problems
from axolotl_medusa.training.divided_models import loads_no_weights, save_whole_at_the_end
from axolotl_medusa.training.earlier_stage import adapter_with_heads_problems, take_heads_of_earlier_stage
from axolotl_medusa.training.lora_kernels import (
    cuda_kernel_problems,
    kernels_are_left_to_axolotl,
    reason_against_kernels,
    runs_on_gpus_alone,
    switch_kernels_off,
)
from axolotl_medusa.training.merged import trained_heads, write_heads_of_merged
from axolotl_medusa.training.named_files import heads_directory
from axolotl_medusa.training.objective import install_objective
from axolotl_medusa.training.plots_at_the_end import LogKeeper, draw_log, plots_problems
from axolotl_medusa.training.precision import half_precision_problems, precision_is_left_to_axolotl
from axolotl_medusa.training.quantized_backbone import quantize_a_frozen_backbone
from axolotl_medusa.training.renamed_keys import renamed_key_hints
from axolotl_medusa.training.rendering import check_rendering
from axolotl_medusa.training.saving import check_heads_were_left
from axolotl_medusa.training.stopping import stop
from axolotl_medusa.training.tied_embeddings import merge_advice, merge_would_part, parts_tied_embeddings
from axolotl_medusa.training.trainable import heads_dtype
from axolotl_medusa.training.trainer import MedusaTrainer, objective_of
from axolotl_medusa.training.vocabulary import check_new_tokens, check_rows, tokenizer_and_rows
from axolotl_medusa.training.yaml_problems import config_problems

LOG = get_logger(__name__)


class MedusaPlugin(BasePlugin):  # type: ignore[misc]
    """Adds Medusa heads to the model that axolotl trains."""

    _kernels_are_axolotls = False
    _rows_on_disk = 0
    _written: Collection[Path] | None = None
    _hints: Sequence[str] = ()
    _log: LogKeeper | None = None

    def register(self, cfg: DictDefault, **_: Any) -> None:
        """Validates the Medusa part of the YAML; all of its errors are reported together."""
        keep_from_telemetry(PATH_KEYS.values())
        if unread := unread_options(sys.argv):
            raise stop(
                f"`axolotl` hands {' '.join(unread)} to its launcher, which does not train with it: run "
                "`accelerate launch -m axolotl.cli.train x.yml --medusa_num_heads=3`, or write the key into the YAML"
            )
        problems = take_path_keys(cfg)
        if cfg.get("merge_lora") and merge_would_part(cfg):
            LOG.warning(merge_advice(cfg.get("lora_model_dir") or cfg.get("output_dir")))
        self._fill_in_for_axolotl(cfg)
        quantize_a_frozen_backbone(cfg)
        self._hints = renamed_key_hints(cfg)
        for hint in self._hints:
            LOG.warning(f"renamed by axolotl: {hint}")
        try:
            for line in take_heads_of_earlier_stage(cfg):
                LOG.warning(f"set by the plugin: {line}")
        except ValueError as error:
            raise stop(str(error)) from None
        problems += config_problems(cfg, missing_fsdp_version())
        problems += adapter_with_heads_problems(cfg)
        problems += cuda_kernel_problems(cfg, torch.cuda.is_available())
        problems += half_precision_problems(cfg, torch.accelerator.is_available())
        problems += plots_problems(cfg)
        if problems:
            raise stop(f"{_problems(problems, cfg)}{_also(self._hints)}")

    def on_config_validation_error(self, cfg: DictDefault) -> None:
        """Where axolotl refuses an old YAML, ends with what to change: a traceback of axolotl's would bury the hints."""
        error = sys.exception()
        if self._hints and isinstance(error, (ValueError, DeprecationWarning)):
            raise stop(f"axolotl refuses {_yaml_file(cfg)}: {_reason(error)}{_also(self._hints)}") from None

    def _fill_in_for_axolotl(self, cfg: DictDefault) -> None:
        """Where the YAML leaves LoRA's kernels and the precision open, sets what a machine without a GPU can run."""
        self._kernels_are_axolotls = kernels_are_left_to_axolotl(cfg)
        if cfg.get("use_ray"):
            return  # the driver is not the machine that trains
        if self._kernels_are_axolotls and not torch.cuda.is_available():
            switch_kernels_off(cfg)
            LOG.info("axolotl's LoRA kernels stay off: they need a CUDA GPU, and there is none here")
        if precision_is_left_to_axolotl(cfg) and not torch.accelerator.is_available():
            cfg["bf16"] = False
            LOG.info("training in fp32: the YAML sets no precision, and there is no GPU here")

    def get_input_args(self) -> str:
        """Names the pydantic model that axolotl merges into its own."""
        return "axolotl_medusa.training.args.MedusaArgs"

    def get_trainer_cls(self, cfg: DictDefault) -> type[MedusaTrainer]:
        """Returns the trainer."""
        return MedusaTrainer

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """Allows `bf16: true` where there is no accelerator: the Trainer wants to be told."""
        return {} if torch.accelerator.is_available() else {"use_cpu": True}

    def post_model_build(self, cfg: DictDefault, model: nn.Module) -> None:
        """Notes the size of the embeddings before axolotl resizes them."""
        if cfg.inference or cfg.merge_lora:
            return
        try:
            self._rows_on_disk = embedding_shape(output_embedding(model))[0]
        except ValueError as error:
            raise stop(str(error)) from None

    def post_lora_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Attaches the heads: after the embeddings are resized and after adapters looked for their targets."""
        if cfg.inference or cfg.merge_lora:
            return
        try:
            rows = embedding_shape(output_embedding(model))[0]
            check_rows(cfg, before=self._rows_on_disk, after=rows)
            attach(cfg, model)
            if cfg.adapter and not cfg.medusa_only_heads and parts_tied_embeddings(model):
                LOG.warning(merge_advice(cfg.output_dir))
        except ValueError as error:
            raise stop(str(error)) from None

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Checks the model's logits: its first forward, now that every layer is as it will train."""
        if cfg.inference or cfg.merge_lora or loads_no_weights(cfg):
            return
        if runs_on_gpus_alone(cfg, model):
            LOG.info(
                "the model's logits are not checked: its weights are not on the GPU yet, where its LoRA kernels run"
            )
            return
        try:
            probe_logits(model)
        except ValueError as error:
            raise stop(str(error)) from None

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Stops where a dataset has nothing to train on; loading itself is left to axolotl."""
        if self._kernels_are_axolotls and cfg.lora_qkv_kernel and (reason := reason_against_kernels(cfg)):
            switch_kernels_off(cfg)
            LOG.warning(f"axolotl's LoRA kernels are switched off, because they do not fit this model: {reason}")
        if save_whole_at_the_end(cfg):
            LOG.info(
                "fsdp_config.final_state_dict_type: FULL_STATE_DICT is set by the plugin, so that the end is written whole"
            )
        found = tokenizer_and_rows(cfg)
        try:
            if found:
                check_new_tokens(cfg, *found)
            problems = dataset_problems(cfg)
            if found and not problems:
                check_rendering(cfg, found[0])
        except ValueError as error:
            raise stop(str(error)) from None
        if problems:
            raise stop("; ".join(problems))

    def post_lora_merge(self, cfg: DictDefault, adapter_path: str, output_path: str) -> None:
        """Writes the heads that belong to a merged model beside it, where axolotl says that it has merged one."""
        heads_dir = trained_heads(adapter_path, cfg.output_dir)
        if heads_dir is None:
            LOG.warning(f"no heads beside the merged model in {output_path}: there are none in {adapter_path}")
            return
        if merge_would_part(cfg):
            LOG.warning(
                f"no heads beside the merged model in {output_path}, whose logits are not those that they learnt"
            )
            return
        try:
            LOG.info(f"Medusa heads of the merged model: {write_heads_of_merged(heads_dir, output_path)}")
        except ValueError as error:
            raise stop(str(error)) from None

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: MedusaTrainer) -> list[Any]:
        """Hands the YAML to the trainer: the one hook after its creation that training and `axolotl evaluate` share."""
        if not isinstance(trainer, MedusaTrainer):
            raise stop(
                f"another plugin brought the trainer {type(trainer).__name__}, which does not train heads: remove that plugin, or list "
                "axolotl_medusa.MedusaPlugin before it"
            )
        try:
            trainer.setup_medusa(cfg)
        except (ValueError, RuntimeError) as error:
            raise stop(str(error)) from None
        self._log = LogKeeper() if cfg.medusa_plots else None
        return [] if self._log is None else [self._log]

    def post_trainer_create(self, cfg: DictDefault, trainer: MedusaTrainer) -> None:
        """Tells the trainer that it will train; `axolotl evaluate` does not come here."""
        trainer.medusa_trains = True
        self._written = trainer.medusa_written
        try:
            trainer.choose_checkpoint()
            trainer.choose_draft_vocab()
            trainer.open_hidden_cache()
        except ValueError as error:
            raise stop(str(error)) from None

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Ends with an error where the run left no heads: every run comes here once, after all is saved.

        axolotl 0.21 comes here after an error, too, which is to be the one that the user reads.
        """
        if self._written is None or sys.exc_info()[0] is not None:
            return
        try:
            check_heads_were_left(cfg.output_dir, self._written)
        except ValueError as error:
            raise stop(str(error)) from None
        if self._log is not None and self._log.history:
            draw_log(self._log.history, cfg.output_dir)


def _yaml_file(cfg: DictDefault) -> str:
    return str(cfg.get("axolotl_config_path") or "the YAML")


def _problems(problems: list[str], cfg: DictDefault) -> str:
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"{len(problems)} problem{'s' * (len(problems) > 1)} in {_yaml_file(cfg)}:{lines}"


def _also(hints: Sequence[str]) -> str:
    """Hints as the last thing that is printed."""
    lines = "".join(f"\n  - {hint}" for hint in hints)
    return f"\nkeys of this old YAML that axolotl has changed since:{lines}" if hints else ""


def _reason(error: BaseException) -> str:
    """What axolotl's validator says, on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {first_line(each['msg'])}" for each in error.errors())
    return first_line(error)


def attach(cfg: DictDefault, model: nn.Module) -> None:
    """Builds the heads that the YAML asks for and attaches them and their objective to `model`."""
    layer = output_embedding(model)
    vocab_size, hidden_size = embedding_shape(layer)
    device = next(layer.parameters()).device
    heads = MedusaHeads(
        hidden_size,
        vocab_size,
        cfg.medusa_num_heads,
        cfg.medusa_num_layers,
        cfg.medusa_lm_head,
        dtype=heads_dtype(model, cfg),
        device=None if device.type == "meta" else device,
        draft_vocab=cfg.medusa_draft_vocab,
    )
    if heads.form != "shared":
        with acting_output_layer(model) as weight:
            if not weight.is_meta:  # else another rank holds the model, and FSDP hands its heads to this one
                heads.start_output_layers_from(weight)
    attach_heads(model, heads, probe=False)  # LoRA's kernels are bound to the layers only after this hook
    if cfg.medusa_init_from:
        load_into(model, open_heads(heads_directory(cfg.medusa_init_from)))
        LOG.info(f"Medusa heads start from {cfg.medusa_init_from}")
    install_objective(model, objective_of(cfg))
    LOG.info(
        f"attached {heads.num_heads} Medusa heads of {heads.num_layers} residual block(s), {heads.form} output layer, "
        f"{sum(p.numel() for p in heads.parameters()):,} parameters in {heads.dtype}"
    )
