"""Axolotl's trainer with the Medusa objective: which parameters train and how fast, target counts, metrics, checkpoints.

Contract: the loss itself is in `objective` (the model's forward) and the files are in `saving` and `loading`; this module
only connects them to axolotl's trainer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer import SCHEDULER_NAME

from axolotl_medusa.losses.prediction import matmul_dtype
from axolotl_medusa.losses.targets import target_counts
from axolotl_medusa.model.anatomy import (
    frozen_output_embedding,
    output_embedding,
    recompute_layers,
)
from axolotl_medusa.model.heads import attached_heads
from axolotl_medusa.model.heads_directory import acting_output_layer
from axolotl_medusa.training.datasets import token_columns_only
from axolotl_medusa.training.draft_vocab import coverage, label_counts, most_frequent
from axolotl_medusa.training.epoch_shuffle import EpochShuffle
from axolotl_medusa.training.hidden_cache import (
    CachedRows,
    CrossedSamplesError,
    HiddenCache,
    cache_identity,
    dataset_samples,
)
from axolotl_medusa.training.interruptions import InterruptibleTrainer
from axolotl_medusa.training.learning_rates import (
    heads_group_for_deepspeed,
    left_out,
    rates_of_heads,
    separate_heads,
)
from axolotl_medusa.training.loading import accept_what_trains, load_heads, load_trained_model
from axolotl_medusa.training.machines import (
    checkpoint_problem,
    folder_of_this_machine,
    machines_without,
    own_disks_warning,
)
from axolotl_medusa.training.objective import Objective, metric_names
from axolotl_medusa.training.quantized_backbone import trained_by_its_heads
from axolotl_medusa.training.resuming import Resumption, resumption
from axolotl_medusa.training.saving import HeadsSaver
from axolotl_medusa.training.schedule import parse_schedule, scheduler_factor
from axolotl_medusa.training.stopping import nonfinite_loss, stop
from axolotl_medusa.training.trainable import check_trainable, set_trainable

LOG = get_logger(__name__)


_RATES_OF_OTHER_MODULES = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")
"""Keys with a learning rate for LoRA's B matrices, for embeddings or for chosen modules; axolotl would count biases or output
layers of heads among the former, and leaves biases out of the latter."""


def objective_of(cfg: DictDefault) -> Objective:
    """The training objective that a validated YAML asks for."""
    return Objective(
        only_heads=cfg.medusa_only_heads,
        decay_coefficient=cfg.medusa_decay_coefficient,
        lm_coefficient=cfg.medusa_lm_coefficient,
        kl_coefficient=cfg.medusa_kl_coefficient,
        distillation_regularization=cfg.medusa_distillation_regularization,
        head_loss=cfg.medusa_head_loss,
        head_weighting=cfg.medusa_head_weighting,
        chain_smoothing=cfg.medusa_chain_smoothing,
        logging=cfg.medusa_logging,
        logging_topk=cfg.medusa_logging_topk,
    )


def warn_of_slow_precision(model: nn.Module, cfg: DictDefault) -> None:
    """Says so where `bf16: true` makes training on a CPU slower instead of faster."""
    device = frozen_output_embedding(output_embedding(model)).weight.device
    if (cfg.bf16 or cfg.bfloat16) and matmul_dtype(torch.bfloat16, device) != torch.bfloat16:
        LOG.warning(
            "bf16 is on, but this CPU has no fast matmuls for it: the heads' loss is multiplied in fp32, and the backbone takes "
            "several times as long as with bf16: false"
        )


class MedusaTrainer(InterruptibleTrainer):
    """Trains Medusa heads; `setup_medusa` must be called before training, which the plugin does.

    Attributes:
        medusa_trains: Whether this trainer was made to train; otherwise an evaluation first loads what training left.
        reports_token_perplexity: False: the loss is no mean over tokens, and axolotl's `ppl` of it would mislead.
    """

    medusa_trains = False
    reports_token_perplexity = False
    _is_loaded = False
    _cached_rows: CachedRows | None = None

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        with trained_by_its_heads(model):
            super().__init__(model, *args, **kwargs)

    def setup_medusa(self, cfg: DictDefault) -> None:
        """Takes over the model that the plugin attached heads to.

        Args:
            cfg: The validated YAML.

        Raises:
            RuntimeError: The model has no heads, or the trainable set is not what the recipe means.
        """
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel): start with `accelerate launch -m axolotl.cli.train`, "
                "one process a GPU"
            )
        self.medusa_cfg = cfg
        self.medusa_objective = objective_of(cfg)
        self.medusa_num_heads = attached_heads(self.model).num_heads
        # The objective divides by the counts of the whole step, over all ranks; the Trainer multiplies by their number.
        self.model_accepts_loss_kwargs = self.args.average_tokens_across_devices = True
        self._medusa_names = metric_names(self.medusa_num_heads, self.medusa_objective)
        self._medusa_schedule = parse_schedule(cfg.medusa_scheduler)
        self._medusa_factor = scheduler_factor(*self._medusa_schedule, progress=0.0)
        self._medusa_sums: dict[str, Tensor | None] = {"train": None, "eval": None}
        set_trainable(self.model, cfg)
        if cfg.medusa_checkpoint_layers:
            recompute_layers(self.model, cfg.medusa_checkpoint_layers)
        warn_of_slow_precision(self.model, cfg)
        counts = check_trainable(self.model, cfg)
        LOG.info("Medusa trains " + ", ".join(f"{part}: {size:,}" for part, size in counts.items()) + " parameters")
        self._saver = HeadsSaver(self.model, cfg, self.processing_class, writes=self.args.should_save)
        if cfg.medusa_only_heads and self.is_deepspeed_enabled:
            accept_what_trains(self.model)

    def choose_checkpoint(self) -> None:
        """Makes axolotl go on from the newest whole checkpoint, where the YAML leaves the choice to it.

        Raises:
            ValueError: The checkpoint that the YAML names is not whole.
        """
        cfg = self.medusa_cfg
        choices = [resumption(cfg) if self.accelerator.is_main_process else Resumption(None)]
        if self.args.world_size > 1:  # disks may show other ranks other files
            torch.distributed.broadcast_object_list(choices, src=0)
        (choice,) = choices
        if choice.refusal:
            raise ValueError(choice.refusal)
        for line in choice.passed_over:
            LOG.warning(line)
        if choice.checkpoint is None:  # else axolotl takes the newest, whole or not
            cfg.auto_resume_from_checkpoints = False
        elif cfg.resume_from_checkpoint is None:  # by its name: other machines may have output_dir elsewhere
            cfg.resume_from_checkpoint = str(Path(cfg.output_dir) / Path(choice.checkpoint).name)

    def choose_draft_vocab(self) -> None:
        """Chooses the tokens of a draft vocabulary and says what they cover; heads that go on from others keep theirs.

        Raises:
            ValueError: The training data is streamed.
        """
        heads, cfg = attached_heads(self.model), self.medusa_cfg
        if heads.token_map is None:
            return
        counts = label_counts(self.train_dataset, heads.vocab_size)
        if cfg.medusa_init_from:
            chosen = coverage(heads.token_map.cpu(), counts)
        else:
            chosen = most_frequent(counts, len(heads.token_map))
            heads.choose_tokens(chosen.tokens)
            with acting_output_layer(self.model) as weight:
                heads.start_output_layers_from(weight)
        share = chosen.covered / max(1, chosen.total)
        LOG.info(
            f"heads choose among {len(chosen.tokens):,} of {heads.vocab_size:,} tokens, which are {share:.2%} of the "
            f"{chosen.total:,} answer tokens in the training data"
        )

    def open_hidden_cache(self) -> None:
        """Opens the `medusa_hidden_cache` of this model and training data, if the YAML wants one, and says how large it is.

        Raises:
            ValueError: It has no room, or the training data is streamed.
        """
        cfg = self.medusa_cfg
        if not cfg.medusa_hidden_cache:
            return
        samples = dataset_samples(self.train_dataset)
        main, precision = self.accelerator.is_main_process, self.accelerator.mixed_precision
        identity = cache_identity(self.model, self.processing_class, samples, precision, keep=main)
        if self.args.world_size > 1:  # only rank 0 hashes: the weights of others may still be empty
            identities = [identity]
            torch.distributed.broadcast_object_list(identities, src=0)
            (identity,) = identities
        size, limit_gb = attached_heads(self.model).hidden_size, cfg.medusa_hidden_cache_limit_gb
        parent = folder_of_this_machine(cfg.medusa_hidden_cache)
        with self.args.main_process_first(desc="reserving the hidden cache"):
            cache = HiddenCache.open(parent, identity, samples, size, limit_gb)
        LOG.info(
            f"hidden cache {cache.directory}: {cache.num_rows:,} rows of {size} in bf16, {cache.num_bytes / 1e9:.3g} GB; "
            f"{cache.num_stored} of {len(cache)} samples are stored"
        )
        if self.args.num_train_epochs <= 1 and self.args.max_steps <= 0 and cache.num_stored < len(cache):
            LOG.warning(
                "medusa_hidden_cache saves nothing in this run: with num_epochs: 1 no sample comes twice; a later run on the same "
                "model and data uses what this one stores"
            )
        self._cached_rows = CachedRows(cache, self._any_rank)

    def _run_backbone(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states of the counted rows, through all that is done to inputs on the way to the model's forward."""
        model.eval()  # axolotl counts the tokens of a forward in training
        with torch.no_grad():
            _, outputs = super().compute_loss(model, {**inputs, "return_hidden_rows": True}, return_outputs=True)
        model.train()
        rows: Tensor = outputs["hidden_rows"]
        return rows

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Collects the micro-batches of an optimizer step and counts the targets of the base model and of each head.

        Returns:
            The micro-batches and the counts over all of them and all ranks, `[num_heads + 1]`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack(
            [
                target_counts(batch["labels"], self.medusa_num_heads, batch.get("position_ids")).to(device)
                for batch in batches
            ]
        ).sum(dim=0)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The objective's loss; in evaluation with the full coefficient and over the batch's own counts."""
        coefficient = self.medusa_cfg.medusa_heads_coefficient
        is_training = self.model.training  # DeepSpeed's engine around it always says that it trains
        if is_training:
            progress = self.state.global_step / max(1, self.state.max_steps)
            self._medusa_factor = scheduler_factor(*self._medusa_schedule, progress)
            coefficient *= self._medusa_factor
            if self._cached_rows is not None:
                try:
                    rows = self._cached_rows(inputs, partial(self._run_backbone, model))
                except CrossedSamplesError as error:
                    raise stop(str(error)) from None
                device = frozen_output_embedding(output_embedding(self.model)).weight.device
                inputs = {**inputs, "hidden_rows": rows.to(device, non_blocking=True)}
        else:
            num_items_in_batch = None
        loss, outputs = super().compute_loss(
            model,
            {**inputs, "medusa_coefficient": coefficient},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        if is_training and not torch.isfinite(loss):
            raise nonfinite_loss(loss.item(), self.state.global_step + 1, self.model, self.args)
        self._add_metrics("train" if is_training else "eval", outputs["metric_sums"])
        return (loss, outputs) if return_outputs else loss

    def _add_metrics(self, split: str, sums: Tensor) -> None:
        stored = self._medusa_sums[split]
        self._medusa_sums[split] = sums if stored is None else stored + sums

    def _pop_metrics(self, split: str, prefix: str = "") -> dict[str, float]:
        """Averages since the last call, over all ranks; every rank must call it."""
        sums, self._medusa_sums[split] = self._medusa_sums[split], None
        if sums is None:
            return {}
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        values = (sums[:, 0] / sums[:, 1]).tolist()
        return {
            prefix + name: value for name, value in zip(self._medusa_names, values, strict=True) if math.isfinite(value)
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the heads' metrics of the logging interval to a training log."""
        if "loss" in logs:
            logs |= self._pop_metrics("train")
            logs["medusa_scheduler_coefficient"] = self._medusa_factor
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds the heads' metrics to an evaluation, so that `metric_for_best_model` finds them."""
        if not self.medusa_trains and not self._is_loaded:
            self._load_trained_model()
        self._medusa_sums["eval"] = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._pop_metrics("eval", f"{metric_key_prefix}_"))
        return output

    def _load_trained_model(self) -> None:
        try:
            load_trained_model(self.model, self.medusa_cfg)
        except ValueError as error:
            raise stop(str(error)) from None
        self._is_loaded = True

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Every data set passes here, also one that is handed to `evaluate`."""
        return super()._get_dataloader(token_columns_only(dataset), *args, **kwargs)

    def _create_multipack_sampler(self, base_sampler: Sampler[int], dataset: Any, **options: Any) -> Any:
        """Axolotl's packer, for training on our permutation; newer axolotl says whether it is for training."""
        if isinstance(base_sampler, RandomSampler) and options.get("is_training", True):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            base_sampler = EpochShuffle(len(dataset), seed)
        packer = super()._create_multipack_sampler(base_sampler, dataset, **options)
        if isinstance(base_sampler, EpochShuffle):
            base_sampler.packer = packer
        return packer

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Axolotl's optimizer, or the one that DeepSpeed will make, with the heads in groups of their own learning rate."""
        is_new = self.optimizer is None  # DeepSpeed asks twice, and so does a second try with a smaller batch
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        rate, multiplier = self.args.learning_rate, self.medusa_cfg.medusa_lr_multiplier
        owned = {id(parameter) for parameter in attached_heads(self.model).parameters()}
        named = {name: each for name, each in self.model.named_parameters() if id(each) in owned}
        heads = list(named.values())
        for_others = any(getattr(self.args, key, None) is not None for key in _RATES_OF_OTHER_MODULES)
        if not hasattr(optimizer, "param_groups"):  # a stand-in: DeepSpeed makes the optimizer of its configuration
            if multiplier != 1.0:
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                optimizer.params = heads_group_for_deepspeed(trained, heads, rate * multiplier)
        elif is_new:
            if number := left_out(optimizer, heads):
                LOG.warning(
                    f"{type(optimizer).__name__} leaves {number} of the heads' {len(heads)} tensors as they are"
                )
            try:
                if multiplier != 1.0 or for_others:
                    rates = rates_of_heads(named, rate, self.args.lr_groups)
                    own_rates = {id(named[name]): own for name, own in rates.items()} if for_others else None
                    separate_heads(optimizer, heads, multiplier, own_rates)
            except ValueError as error:
                raise stop(str(error)) from None
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model (Medusa-2 only) and the heads; every rank must call it, and one of them writes."""
        directory, writes = output_dir or self.args.output_dir, self.args.should_save
        if not self.medusa_cfg.medusa_only_heads:
            with self._saver.saving(directory, writes):
                super().save_model(output_dir, _internal_call)
            return
        with self._saver.collecting(writes):
            if writes:  # without gathering a model that is not written
                self._save(directory)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; with FSDP and an adapter the heads are saved here at the end, because axolotl writes the adapter by itself."""
        self._check_disks(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_fsdp_enabled and self.medusa_cfg.adapter:
            with self._saver.saving(self.args.output_dir, writes=self.args.should_save):
                pass
        return output

    def _check_disks(self, checkpoint: str | bool | None) -> None:
        """Stops where the machines would go on from different checkpoints, and says which of them get no heads."""
        if self.args.world_size == 1:
            return
        if problem := checkpoint_problem(checkpoint if isinstance(checkpoint, str) else None):
            raise stop(problem)
        if machines := machines_without(self.args.output_dir):
            is_divided = self.is_deepspeed_enabled or self.is_fsdp_enabled
            LOG.warning(own_disks_warning(self.args.output_dir, machines, is_divided))

    @property
    def medusa_written(self) -> Collection[Path] | None:
        """Where heads have been written so far, growing with the run; None on a rank that writes none."""
        return self._saver.written if self.args.should_save else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """In Medusa-1 without the model, which did not change: an engine would write it into every checkpoint."""
        is_engines = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self.medusa_cfg.medusa_only_heads or not is_engines:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import DeepSpeedSchedulerWrapper, save_fsdp_optimizer

        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            fsdp = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(fsdp, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled or not self.medusa_cfg.medusa_only_heads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_heads(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or not self.medusa_cfg.medusa_only_heads:
            super()._load_best_model()
        self._load_heads(self.state.best_model_checkpoint)

    def _load_heads(self, checkpoint: str) -> None:
        if self.is_deepspeed_enabled:
            return  # its own checkpoints hold the heads too
        try:
            load_heads(self.model, checkpoint)
        except ValueError as error:
            raise stop(str(error)) from None
