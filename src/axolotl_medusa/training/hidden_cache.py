"""Hidden states of Medusa-1 training on disk: where a frozen backbone has run once, it need not run again.

Contract: knows samples, which of their positions count, hidden states and their files; nothing about axolotl. The unit is the sample,
not the batch: axolotl packs anew in each epoch, and attention does not cross packed samples, which is checked on the
first packed batch. Training always reads bf16 rows, also in the epoch that computes them: what a step sees then depends
on the stored rows alone, and a resumed run or one with a filled cache repeats the first bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from axolotl_medusa.losses.targets import IGNORE_INDEX, sample_ids
from axolotl_medusa.model.anatomy import backbone, causal_lm
from axolotl_medusa.model.heads_directory import parameter_hash
from axolotl_medusa.model.tensor_files import write_json

LOG = logging.getLogger(__name__)

_DISK_MARGIN_BYTES = 2 * 10**9
"""Stays free on the disk: checkpoints and logs are written during the run."""

_LARGEST_LEAK = 0.1
"""Accepted distance of a packed sample's states from those of the sample alone, relative to their norm: SmolLM2 has 0.02
in bf16, and 0.72 where attention crosses samples."""

_UNUSED_CONFIG = ("_name_or_path", "transformers_version", "architectures", "use_cache")

RunBackbone = Callable[[Mapping[str, Any]], Tensor]
"""Maps a batch to the hidden states of its counted rows, `[counted rows, hidden]`, in the order of the flattened batch."""

AnyRank = Callable[[list[bool]], list[bool]]
"""Tells of each flag whether any process has it set; every process calls it."""


class Sample(NamedTuple):
    """One sample inside a batch.

    Attributes:
        key: Hash of its tokens and labels up to the last label, so that padding after it does not count.
        num_rows: Counted rows, at least 1.
        row: Row of the batch.
        start: First token in that row.
        stop: First token after it.
    """

    key: bytes
    num_rows: int
    row: int
    start: int
    stop: int


def split_samples(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> list[Sample]:
    """Finds the samples of a batch on the CPU, in its order; those without a counted row are left out.

    Args:
        input_ids: Token ids, `[batch, seq]`.
        labels: Token ids or -100, `[batch, seq]`.
        attention_mask: 0 where a token is not attended to, `[batch, seq]`.
        position_ids: Positions that tell packed samples apart, `[batch, seq]`; None where nothing is packed.
    """
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, -1)  # an unseen token is another input
    input_ids, labels = input_ids.to(torch.int32), labels.to(torch.int32)
    numbers = None if position_ids is None else sample_ids(position_ids)
    samples = []
    for row in range(input_ids.shape[0]):
        starts = [0]
        if numbers is not None:
            starts += (numbers[row].diff().nonzero().flatten() + 1).tolist()
        for start, stop in pairwise([*starts, input_ids.shape[1]]):
            targets = (labels[row, start + 1 : stop] != IGNORE_INDEX).nonzero().flatten()
            if len(targets):
                seen = slice(start, start + 2 + int(targets[-1]))
                content = input_ids[row, seen].numpy().tobytes() + labels[row, seen].numpy().tobytes()
                key = hashlib.blake2b(content, digest_size=16).digest()
                samples.append(Sample(key, len(targets), row, start, stop))
    return samples


def batch_samples(batch: Mapping[str, Any]) -> list[Sample]:
    """The samples of a batch as a collator makes it; other columns are not looked at."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    return split_samples(**{name: batch[name].cpu() for name in names if batch.get(name) is not None})


def dataset_samples(dataset: Any) -> dict[bytes, int]:
    """Counted rows of every sample of a prepared data set, by key; equal samples share one entry.

    Args:
        dataset: A `datasets.Dataset` with `input_ids` and `labels`.

    Raises:
        ValueError: It is streamed, or has no counted row.
    """
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"medusa_hidden_cache needs to know every sample beforehand, and the training data is a {type(dataset).__name__}: "
            "do not stream it, or remove medusa_hidden_cache"
        )
    names = [n for n in ("input_ids", "labels", "attention_mask", "position_ids") if n in dataset.column_names]
    rows_of = {}
    for row in dataset.select_columns(names).with_format("torch"):
        for sample in batch_samples({name: values[None] for name, values in row.items()}):
            rows_of[sample.key] = sample.num_rows
    if not rows_of:
        raise ValueError("medusa_hidden_cache has nothing to store: no row of the training data has a label")
    return rows_of


def cache_identity(
    model: nn.Module, tokenizer: Any, keys: Iterable[bytes], precision: str, keep: bool = True
) -> dict[str, str]:
    """What the hidden states of a data set depend on; under ZeRO-3 and FSDP every process must call it.

    Args:
        model: The model, possibly wrapped by peft.
        tokenizer: Its tokenizer.
        keys: The samples' keys, in any order.
        precision: Type that autocast computes in, `no` without.
        keep: Whether this process wants the identity; without, it only takes part in gathering the weights.
    """
    decoder, config = backbone(model), causal_lm(model).config
    tensors = {**decoder.state_dict(), **dict(decoder.named_parameters())}  # quantized layers: scales are in the former
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            weights.update(f"{name} {tensor.dtype} {parameter_hash(tensor, keep)}\n".encode())
    options = {name: value for name, value in config.to_dict().items() if name not in _UNUSED_CONFIG}
    return {
        "weights": weights.hexdigest(),
        "config": _json_hash(options),
        "attention": str(config._attn_implementation),
        "precision": precision,
        "tokenizer": _json_hash(tokenizer.get_vocab()),
        "data": hashlib.sha256(b"".join(sorted(keys))).hexdigest(),
    }


def _json_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class HiddenCache:
    """Hidden states of known samples, memory-mapped and shared by all processes that open the same directory.

    `hidden.bin` holds the rows in bf16, sample after sample in the order of their keys, so that every process knows every
    offset. `marks.bin` has one int64 a sample: 0, or 2^32 + the CRC-32 of its rows, written after them. Rows that do not
    match their mark count as not stored, whatever a crash, a full disk or two writers at once left behind.

    Args:
        directory: Where the files are, or will be.
        rows_of: Counted rows of each sample.
        hidden_size: Size H of a row.
    """

    def __init__(self, directory: Path, rows_of: Mapping[bytes, int], hidden_size: int) -> None:
        self.directory = directory
        self.hidden_size = hidden_size
        keys = sorted(rows_of)
        ends = [0, *accumulate(rows_of[key] for key in keys)]
        self.num_rows = ends[-1]
        self.num_bytes = 2 * self.num_rows * hidden_size
        self._places = {key: (index, slice(*ends[index : index + 2])) for index, key in enumerate(keys)}
        self._verified: set[bytes] = set()
        self._hidden = self._marks = torch.empty(0)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def open(
        cls,
        parent: str | Path,
        identity: Mapping[str, str],
        rows_of: Mapping[bytes, int],
        hidden_size: int,
        limit_gb: float,
    ) -> HiddenCache:
        """Opens the cache of these samples and this model under `parent`, and reserves its space on the disk.

        Raises:
            ValueError: It would be larger than `limit_gb` (in 10^9 bytes) or than the disk has room for, or cannot be made.
        """
        directory = Path(parent).expanduser() / _json_hash(identity)[:16]
        cache = cls(directory, rows_of, hidden_size)
        try:
            cache._check_size(limit_gb)
            cache._map()
        except OSError as error:
            raise ValueError(
                f"medusa_hidden_cache {directory} cannot be made ({error.strerror}): choose a directory that can be written to, with "
                f"{cache.num_bytes / 1e9:.3g} GB of room"
            ) from error
        size = {"samples": len(cache), "rows": cache.num_rows, "hidden_size": hidden_size, "dtype": "bfloat16"}
        with contextlib.suppress(
            FileNotFoundError
        ):  # for people only; another process may write the same at this moment
            write_json(directory / "meta.json", {**size, **identity})
        return cache

    @property
    def num_stored(self) -> int:
        """Samples whose rows are stored, as far as their marks say."""
        return int(self._marks.count_nonzero())

    def _check_size(self, limit_gb: float) -> None:
        size = f"{self.num_rows:,} rows of {self.hidden_size} in bf16 need {self.num_bytes / 1e9:.3g} GB"
        if self.num_bytes > limit_gb * 1e9:
            raise ValueError(
                f"medusa_hidden_cache: {size}, more than medusa_hidden_cache_limit_gb {limit_gb:g}: raise it or remove "
                "medusa_hidden_cache"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "hidden.bin"
        held = file.stat().st_blocks * 512 if file.exists() else 0
        free = shutil.disk_usage(self.directory).free
        if self.num_bytes - held + _DISK_MARGIN_BYTES > free:
            raise ValueError(
                f"medusa_hidden_cache {self.directory}: {size} (now {held / 1e9:.3g}), the disk has {free / 1e9:.3g} GB free and "
                f"{_DISK_MARGIN_BYTES / 1e9:.3g} of them stay free: make room, or choose another directory"
            )

    def _map(self) -> None:
        # Without reserved blocks a disk that fills up later would kill the process at a store into the mapping.
        for name, num_bytes in (("hidden.bin", self.num_bytes), ("marks.bin", 8 * len(self))):
            with (self.directory / name).open("ab") as stream:
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
        hidden, marks = str(self.directory / "hidden.bin"), str(self.directory / "marks.bin")
        self._hidden = torch.from_file(hidden, shared=True, size=self.num_bytes // 2, dtype=torch.bfloat16)
        self._hidden = self._hidden.view(self.num_rows, self.hidden_size)
        self._marks = torch.from_file(marks, shared=True, size=len(self), dtype=torch.int64)

    def has(self, key: bytes) -> bool:
        """Whether the rows of a known sample are stored; the first time in a process their checksum is compared."""
        index, rows = self._places[key]
        mark = int(self._marks[index])
        if key not in self._verified and mark and mark == _mark_of(self._hidden[rows]):
            self._verified.add(key)
        return key in self._verified

    def read(self, key: bytes) -> Tensor:
        """The stored rows of a sample, `[rows, hidden]`, bf16."""
        return self._hidden[self._places[key][1]]

    def write(self, key: bytes, hidden: Tensor) -> None:
        """Stores the rows of a known sample, `[rows, hidden]`."""
        index, rows = self._places[key]
        self._marks[index] = 0
        self._hidden[rows] = hidden.to(torch.bfloat16)
        self._marks[index] = _mark_of(self._hidden[rows])
        self._verified.add(key)


def _mark_of(rows: Tensor) -> int:
    return 2**32 + zlib.crc32(rows.view(torch.uint8).numpy().data)


class CrossedSamplesError(ValueError):
    """Packed samples see each other, so that the states of one cannot be kept."""


class CachedRows:
    """Hidden states of a batch's counted rows: from the cache where all its samples are stored, else from the backbone.

    Args:
        cache: What is stored, and gets what is missing.
        any_rank: Joins the processes: partitioned weights are gathered only if all of them run the backbone.
    """

    def __init__(self, cache: HiddenCache, any_rank: AnyRank = list) -> None:
        self.cache = cache
        self.num_unknown = 0
        self._any_rank = any_rank
        self._isolated = False

    def __call__(self, batch: Mapping[str, Any], run_backbone: RunBackbone) -> Tensor:
        """Returns the rows of `batch`, `[counted rows, hidden]`, bf16, on the CPU.

        Args:
            batch: `input_ids` and `labels`, where there are any also `attention_mask` and `position_ids`, `[batch, seq]`.
            run_backbone: Computes them; called only where a sample of any process is missing.

        Raises:
            CrossedSamplesError: The states of a packed sample depend on the others in its row.
        """
        samples = batch_samples(batch)
        missing = not all(sample.key in self.cache and self.cache.has(sample.key) for sample in samples)
        packed = [sample for sample in samples if sample.start > 0]
        missing, unchecked = self._any_rank([missing, bool(packed) and not self._isolated])
        computed = run_backbone(batch).cpu() if missing else None
        if computed is not None and unchecked:
            self._check_isolation(batch, samples, computed, run_backbone)
        num_rows = sum(sample.num_rows for sample in samples)
        pinned = torch.cuda.is_available()  # else the copy to the GPU would wait for the step before
        rows = torch.empty(num_rows, self.cache.hidden_size, dtype=torch.bfloat16, pin_memory=pinned)
        for sample, part in _parts(samples):
            known = sample.key in self.cache
            if computed is not None and known and not self.cache.has(sample.key):
                self.cache.write(sample.key, computed[part])
            if computed is not None and not known:
                self._count_unknown(sample)
                rows[part] = computed[part]
            else:
                rows[part] = self.cache.read(sample.key)
        return rows

    def _count_unknown(self, sample: Sample) -> None:
        self.num_unknown += 1
        if self.num_unknown == 1:
            LOG.warning(
                f"a sample of {sample.stop - sample.start} tokens is not in the training data as it was prepared (cut or changed by "
                "the collator?): its hidden states are computed anew each time"
            )

    def _check_isolation(
        self, batch: Mapping[str, Any], samples: list[Sample], computed: Tensor, run_backbone: RunBackbone
    ) -> None:
        """Compares one packed sample with itself alone; a process without one runs along with what it has."""
        parts = list(_parts(samples))
        sample, part = max(parts, key=lambda pair: pair[0].start, default=(Sample(b"", 0, 0, 0, 1), slice(0, 0)))
        shape, tokens = batch["input_ids"].shape, slice(sample.start, sample.stop)
        alone = run_backbone(
            {
                name: value[sample.row : sample.row + 1, tokens]
                for name, value in batch.items()
                if isinstance(value, Tensor) and value.shape == shape
            }
        ).cpu()
        leak = (computed[part].float() - alone.float()).norm() / alone.float().norm().clamp(min=1e-12)
        if not leak <= _LARGEST_LEAK:
            raise CrossedSamplesError(
                f"medusa_hidden_cache: hidden states of a packed sample differ by {leak:.3g} of their size from those of the sample "
                "alone: this model or its attention does not keep packed samples apart; set sample_packing: false or another "
                "attn_implementation, or remove medusa_hidden_cache"
            )
        self._isolated = True


def _parts(samples: list[Sample]) -> Iterator[tuple[Sample, slice]]:
    """Each sample with its part of the batch's counted rows."""
    bounds = [0, *accumulate(sample.num_rows for sample in samples)]
    return zip(samples, (slice(*pair) for pair in pairwise(bounds)), strict=True)
