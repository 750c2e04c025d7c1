"""ONNX directories of small random models, for the tests of exporting and decoding them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB
from decoding_models import fitted_heads, prompts, varied_model
from example_tokenizers import make_tokenizer

from axolotl_medusa.model.heads import HEADS_NAME, MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import heads_config, heads_file, heads_meta, write_heads
from axolotl_medusa.model.sources import Source, find_source
from axolotl_medusa.onnx_export.export import export_onnx

HEADS = 2


def source_of(directory: Path, model: Any, heads: MedusaHeads, tokenizer: bool = True) -> Source:
    """A model and its heads on disk, as Medusa-1 leaves them."""
    model.save_pretrained(directory / "base")
    if tokenizer:
        make_tokenizer("zephyr").save_pretrained(directory / "base")
    attach_heads(model, heads)
    file = heads_file(model, heads_config(heads, str(directory / "base")), heads_meta(model, "medusa-1", {}))
    delattr(model, HEADS_NAME)
    write_heads(directory / "medusa_heads", file)
    return find_source(directory / "medusa_heads")


def model_with_heads(family: str = "llama", num_heads: int = HEADS, **changes: Any) -> tuple[Any, MedusaHeads]:
    """A random model whose text varies, and heads that are right about half the time."""
    options = {"vocab_size": 300 if changes.pop("tokenizer", False) else VOCAB, **changes}
    model = varied_model(family, **options)
    ids, mask = prompts(4, vocab=options["vocab_size"])
    heads = fitted_heads(model, ids, mask, num_heads)
    with torch.no_grad():
        for index in range(num_heads):
            heads.output_layer(index).weight.mul_(10.0)  # surer of what they were fitted to
    return model, heads


def known_prompts(count: int, vocab_size: int = 300) -> list[list[int]]:
    """Prompts that the heads were fitted on the continuations of."""
    ids, mask = prompts(count, vocab=vocab_size)
    return [row[begun.bool()].tolist() for row, begun in zip(ids, mask, strict=True)]


def exported(directory: Path, family: str = "llama", **options: Any) -> tuple[Any, Path]:
    """A torch model, and its export in `directory/out`."""
    precision = options.pop("precision", "fp32")
    verify = options.pop("verify", False)
    model, heads = model_with_heads(family, **options)
    source = source_of(directory, model, heads, tokenizer=options.get("tokenizer", False))
    export_onnx(source, directory / "out", precision, verify=verify)
    return model, directory / "out"


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new_tokens: int, eos: int | None = None) -> list[int]:
    """What transformers writes."""
    ids = torch.tensor([prompt])
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return text[0, len(prompt) :].tolist()


__all__ = ["HEADS", "exported", "greedy", "known_prompts", "model_with_heads", "source_of"]
