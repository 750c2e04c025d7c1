"""Heads for timing decoders: as training begins with them, or trained on the very answers that are decoded later.

    python -m demo.smollm2 .demo/smollm2
    python -m benchmarks.overfitted_heads .demo/smollm2 HEADS [--steps 200]

With `--steps 0` they guess nothing right. After the steps they know the model's own greedy answers to a few prompts by heart
and accept more than trained heads do on new text. So the two are ends of a range; neither says how good Medusa is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.model.anatomy import backbone, embedding_shape, output_embedding
from axolotl_medusa.model.heads import HEADS_NAME, MedusaHeads, attach_heads
from axolotl_medusa.model.heads_directory import heads_config, heads_file, heads_meta, write_heads
from axolotl_medusa.terminal.prompts import prompt_tokens, read_prompts

PROMPTS = Path(__file__).resolve().parents[1] / "data_generation" / "prompts_heldout.jsonl"
LEARNING_RATE = 2e-3


@torch.no_grad()
def examples(model: nn.Module, prompt: list[int], max_new_tokens: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Hidden states before every token of a greedy answer, `[positions, H]`, and what heads predict there, `[positions, heads]`."""
    answer = PlainDecoding(model, torch.tensor([prompt]), max_new_tokens)
    while not answer.done:
        answer.step()
    text = torch.tensor([*prompt, *answer.tokens])
    hidden = backbone(model)(input_ids=text[None, :-1], use_cache=False)[0][0, len(prompt) - 1 :]
    targets = text[len(prompt) + 1 :].unfold(0, num_heads, 1)
    return hidden[: len(targets)], targets


def train(heads: MedusaHeads, lm_head: Tensor, hidden: Tensor, targets: Tensor, steps: int) -> float:
    """Trains heads with cross-entropy among the tokens that the answers have; returns the last step's loss.

    Other rows of the output layers stay as they are: they are lm_head's, which seldom prefers a token that is in no answer.
    Heads that share lm_head train their blocks alone.
    """
    tokens, wanted = torch.unique(targets, return_inverse=True)
    layers = [heads.output_layer(head) for head in range(heads.num_heads)]
    own = [layer for layer in layers if layer is not None]
    rows = [(lm_head if layer is None else layer.weight).detach()[tokens] for layer in layers]
    trained = [row.requires_grad_() for row in rows] if own else []
    blocks = [parameter for head in range(heads.num_heads) for parameter in heads.blocks(head).parameters()]
    optimizer = torch.optim.AdamW([*blocks, *trained], LEARNING_RATE, weight_decay=0.0)
    loss = torch.zeros(())
    for _ in range(steps):
        logits = torch.stack([heads.hidden(head, hidden) @ weight.T for head, weight in enumerate(rows)], 1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer, weight in zip(own, trained, strict=True):
            layer.weight[tokens] = weight
    return float(loss.detach())


def write(directory: Path, model: Any, heads: MedusaHeads, base: Path) -> None:
    """Writes heads as training does."""
    attach_heads(model, heads)
    write_heads(directory, heads_file(model, heads_config(heads, str(base)), heads_meta(model, "medusa-1", {})))
    delattr(model, HEADS_NAME)


def main() -> None:
    """Makes the heads and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what demo.smollm2 unpacked")
    parser.add_argument("heads", type=Path, help="directory to write")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=8, help="prompts to learn by heart (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument(
        "--form", choices=("separate", "shared"), default="separate", help="of the heads (default: separate)"
    )
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    vocab_size, hidden_size = embedding_shape(output_embedding(model))
    heads = MedusaHeads(hidden_size, vocab_size, args.num_heads, form=args.form)
    heads.start_output_layers_from(output_embedding(model).weight)
    if args.steps:
        begun = time.perf_counter()
        prompts = [prompt_tokens(tokenizer, row) for row in read_prompts(args.prompts, args.limit)]
        rows = [examples(model, prompt, args.max_new_tokens, args.num_heads) for prompt in prompts]
        hidden, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
        loss = train(heads, output_embedding(model).weight, hidden, targets, args.steps)
        print(f"{len(targets)} positions, {args.steps} steps, loss {loss:.3f}, {time.perf_counter() - begun:.0f} s")
    write(args.heads, model, heads, args.model)
    print(f"written to {args.heads}")


if __name__ == "__main__":
    main()
