"""Medusa decoding: text from a causal LM and its heads, several tokens per forward of the model.

Contract: needs torch and transformers only. A step forwards a candidate tree (`tree`) over the KV cache
(`target_cache`), decides what is accepted (`acceptance`), and runs the heads on the last accepted position alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from axolotl_medusa.decoding.acceptance import Acceptance, AcceptanceRule, accept_greedy, acceptance_rule
from axolotl_medusa.decoding.auto_decoding import AutoDecoding
from axolotl_medusa.decoding.compiled import CompiledBackbone
from axolotl_medusa.decoding.load_target import check_sizes, load_target
from axolotl_medusa.decoding.loop import Decoding, check_prompts
from axolotl_medusa.decoding.running_rows import GenerationStats, Streamer, check_streamer
from axolotl_medusa.decoding.target_cache import check_target
from axolotl_medusa.decoding.tree import Tree, asked_tree
from axolotl_medusa.decoding.tree_chooser import (
    AUTO,
    PLAIN,
    TreeChooser,
    candidate_trees,
    is_auto,
    tuned_trees,
    why_plain,
)
from axolotl_medusa.model.anatomy import causal_lm, frozen_output_embedding, logit_transform, output_embedding
from axolotl_medusa.model.heads import MedusaHeads

LOG = logging.getLogger(__name__)


class MedusaModel:
    """A causal LM with Medusa heads, for decoding. Puts both into evaluation mode.

    Args:
        base_model: The causal LM, possibly wrapped by peft with its adapters unmerged.
        heads: Heads trained with it; they are moved to the device and type of the model's output embedding.

    Raises:
        ValueError: Sizes of heads and model differ, or the model cannot verify a tree.
    """

    def __init__(self, base_model: nn.Module, heads: MedusaHeads) -> None:
        check_sizes(base_model, heads)
        self.base_model = base_model.eval()
        check_target(base_model)
        self._lm_head = output_embedding(base_model)
        weight = frozen_output_embedding(self._lm_head).weight
        dtype = weight.dtype if weight.is_floating_point() else causal_lm(base_model).dtype
        self.heads = heads.to(device=weight.device, dtype=dtype).eval()
        self._lm_head_rows: tuple[Tensor, Tensor | None] | None = None
        self._transform = logit_transform(causal_lm(base_model).config)
        self._compile_backend = "inductor"
        self._clock = time.perf_counter
        self._compiled: CompiledBackbone | None = None
        self._chooser: TreeChooser | None = None
        self._tuned: dict[Tree, float] = {}
        self._said: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        heads: str | Path,
        base_model: str | Path | nn.Module | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **load_options: Any,
    ) -> MedusaModel:
        """Loads heads and the model that they belong to, with its adapter if they were trained with one.

        Args:
            heads: A heads directory, an output_dir or a checkpoint.
            base_model: The base model, or its directory or Hub name; by default what training wrote down.
            dtype: Type to load the model in, `auto` for the one it is stored in; a model in bf16 is loaded in fp32 where it
                goes to a CPU without instructions for bf16.
            device: Where to put it; by default where transformers puts it.
            **load_options: Given to transformers' `from_pretrained`, e.g. `quantization_config`, `device_map`, or
                `trust_remote_code=True`, without which no code of a model is run.

        Raises:
            ValueError: There are no heads or no model, or the heads belong to another model.
        """
        model, file = load_target(heads, base_model, dtype, device, **load_options)
        medusa = cls(model, file.as_heads())
        medusa._tuned = tuned_trees(Path(heads).expanduser(), medusa.heads.num_heads, medusa.heads.vocab_size)
        return medusa

    @property
    def context(self) -> int | None:
        """Positions that the model has, None where its configuration names no limit."""
        config = causal_lm(self.base_model).config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text, from the generation config."""
        eos = getattr(getattr(causal_lm(self.base_model), "generation_config", None), "eos_token_id", None)
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def compiled(self) -> CompiledBackbone:
        """The backbone under `torch.compile`, one for all decodings: what is compiled once is used again.

        Raises:
            ValueError: The model is quantized.
        """
        if self._compiled is None:
            self._compiled = CompiledBackbone(self.base_model, self._compile_backend)
        return self._compiled

    def chooser(self) -> TreeChooser:
        """What chooses the trees of `auto`, one for all decodings, so that what it learned is used again."""
        if self._chooser is None:
            self._chooser = TreeChooser(candidate_trees(self.heads.num_heads, self.heads.vocab_size), self._tuned)
        return self._chooser

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's logits, `[..., vocab_size]`, of hidden states after the final norm, `[..., hidden_size]`."""
        logits: Tensor = self._transform(self._lm_head(hidden))
        return logits

    def draft_logits(self, hidden: Tensor, num_heads: int) -> Tensor:
        """What the first heads predict: head i at position t the token t + 2 + i, i from 0.

        Soft-capping and scaling are left out: they do not change which tokens are best.

        Args:
            hidden: Hidden states after the final norm, `[..., hidden_size]`.
            num_heads: Number of heads to run.

        Returns:
            Logits, `[..., num_heads, vocab_size]`.
        """
        hidden = hidden.to(next(self.heads.parameters()).device)
        blocks = [self.heads.hidden(index, hidden) for index in range(num_heads)]
        if self.heads.form == "shared":
            return self._over_all_tokens(self._shared_logits(torch.stack(blocks, -2)))
        if self.heads.form == "trained":
            return self._over_all_tokens(cast(nn.Linear, self.heads.output_layer(0))(torch.stack(blocks, -2)))
        layers = [cast(nn.Linear, self.heads.output_layer(index)) for index in range(num_heads)]
        return self._over_all_tokens(
            torch.stack([layer(block) for layer, block in zip(layers, blocks, strict=True)], -2)
        )

    def _shared_logits(self, hidden: Tensor) -> Tensor:
        """What the model's output layer says of the tokens that heads choose among, `[..., tokens]`."""
        tokens = self.heads.token_map
        if tokens is None or type(self._lm_head) is not nn.Linear:
            logits = cast(Tensor, self._lm_head(hidden))
            return logits if tokens is None else logits[..., tokens]
        if self._lm_head_rows is None:
            bias = self._lm_head.bias
            self._lm_head_rows = (self._lm_head.weight[tokens], None if bias is None else bias[tokens])
        return nn.functional.linear(hidden, *self._lm_head_rows)

    def _over_all_tokens(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary: of tokens that heads do not choose among, minus infinity."""
        tokens = self.heads.token_map
        if tokens is None:
            return logits
        spread = logits.new_full((*logits.shape[:-1], self.heads.vocab_size), -torch.inf)
        spread[..., tokens] = logits
        return spread

    def tree(self, tree: Tree | str | Path | None = None) -> Tree:
        """The tree that an argument means: itself, what `named_tree` knows, or by default `default_tree`.

        Raises:
            ValueError: It is unknown or does not fit the heads.
        """
        return asked_tree(tree, self.heads.num_heads, self.heads.vocab_size)

    def greedy_decoding(
        self,
        input_ids: Tensor,
        tree: Tree | Literal["auto"],
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        compile: bool = False,
    ) -> Decoding:
        """Greedy decoding of prompts of one length, `[batch, prompt]`, to be stepped by whoever measures or shows it."""
        mask = torch.ones_like(input_ids)
        return self._decoding(input_ids, mask, tree, accept_greedy, max_new_tokens, eos_token_ids, compile)

    def _decoding(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tree: Tree | Literal["auto"],
        rule: AcceptanceRule,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        compile: bool,
    ) -> Decoding:
        if isinstance(tree, str) and (line := why_plain(len(input_ids), compile)):
            if line not in self._said:
                LOG.warning("%s", line)
            self._said.add(line)
            tree = PLAIN
        if isinstance(tree, str):
            return AutoDecoding(
                self,
                input_ids,
                attention_mask,
                chooser=self.chooser(),
                num_heads=self.heads.num_heads,
                rule=rule,
                max_new_tokens=max_new_tokens,
                eos_token_ids=eos_token_ids,
                clock=self._clock,
            )
        return Decoding(
            self,
            input_ids,
            attention_mask,
            tree=tree,
            rule=rule,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            compiled=self.compiled() if compile else None,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        *,
        tree: Tree | str | Path | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        acceptance: Acceptance | None = None,
        epsilon: float = 0.09,
        delta: float = 0.3,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Streamer | None = None,
        return_stats: bool = False,
        compile: bool = False,
    ) -> Tensor | tuple[Tensor, GenerationStats]:
        """Continues prompts, as transformers' `generate` does and with its argument names.

        Greedy decoding in fp32 gives the tokens of `base_model.generate(..., do_sample=False)`; in half precision a near
        tie may fall the other way, because a tree is computed in another order than single tokens. In 8-bit the default
        `llm_int8_threshold` makes bitsandbytes pick outlier columns over all tokens of a forward, which is another model
        for a tree than for single tokens; with 0.0 greedy decoding is lossless there too. Logits processors
        of the model's generation config (penalties, top-k, top-p) are not applied.

        Args:
            input_ids: Prompts, padded on the left, `[batch, prompt]`.
            attention_mask: 1 for tokens, 0 for padding, `[batch, prompt]`; by default padding is where `pad_token_id` is.
            max_new_tokens: Tokens that a row gets at most.
            tree: A candidate tree, its file, `chain`, `chain-3`, `default`, `default-16`, or `none` for plain decoding.
                `auto`, the default, chooses step by step what is fastest here, plain decoding where no tree is
                (`tree_chooser`); the same seed draws the same tokens whatever it chooses. A batch, or what is compiled, it
                decodes plainly, and a warning says so. With typical acceptance the text depends on the tree: there the
                default is the one of 64 nodes, whatever it costs.
            do_sample: Whether to sample instead of greedy decoding.
            temperature: T of sampling and of typical acceptance.
            acceptance: `greedy` (lossless), `rejection` (exactly the model's distribution at T), or `typical` (the paper's:
                text that the model finds plausible, the model's own tokens greedy or, with `do_sample`, sampled). By
                default `rejection` with `do_sample`, else `greedy`.
            epsilon: ε of typical acceptance.
            delta: δ of typical acceptance.
            eos_token_id: Tokens that end a row, `[]` for none; by default the generation config's.
            pad_token_id: What fills rows that ended early; by default the generation config's, else the first EOS token.
            streamer: Gets the prompt and then the tokens of every step; for one prompt.
            return_stats: Whether to return what it took too.
            compile: Whether `torch.compile` compiles the forward that verifies a tree, over a cache of fixed shapes: the first
                steps take a minute or more, later ones of the same shape less time; rounding may differ in the last bit. On
                a GPU CUDA graphs are used too, which was not measured.

        Returns:
            Prompts and new tokens, `[batch, prompt + new]`; with `return_stats` a pair of that and the stats.

        Raises:
            ValueError: Prompts are empty or too long, the tree is unknown, settings contradict each other, or a quantized
                model is to be compiled.
            RuntimeError: Nothing can be compiled here.
        """
        rule = acceptance_rule(acceptance, do_sample, temperature, epsilon, delta)
        eos_token_ids, pad_token_id = self._special_tokens(eos_token_id, pad_token_id)
        if attention_mask is None:
            attention_mask = _mask_of(input_ids, None if pad_token_id in eos_token_ids else pad_token_id)
        check_prompts(input_ids, attention_mask, max_new_tokens, self.context)
        check_streamer(streamer, len(input_ids))
        device = causal_lm(self.base_model).get_input_embeddings().weight.device
        chosen: Tree | Literal["auto"] = AUTO if is_auto(tree, acceptance) else self.tree(tree)
        prompt, mask = input_ids.to(device), attention_mask.to(device)
        decoding = self._decoding(prompt, mask, chosen, rule, max_new_tokens, eos_token_ids, compile)
        decoding.run(streamer, input_ids.cpu(), torch.tensor)
        sequences = _joined(input_ids, decoding.tokens, pad_token_id)
        return (sequences, decoding.stats) if return_stats else sequences

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        tree: Tree | Literal["auto"],
        temperature: float = 0.0,
        streamer: Streamer | None = None,
        compile: bool = False,
    ) -> tuple[list[int], GenerationStats]:
        """Continues one prompt of token ids, greedily at temperature 0: the new tokens, and what they took."""
        generated = self.generate(
            torch.tensor([list(prompt)], dtype=torch.long),
            torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens,
            tree=tree,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            streamer=streamer,
            return_stats=True,
            compile=compile,
        )
        sequences, stats = cast(tuple[Tensor, GenerationStats], generated)
        return sequences[0, len(prompt) :].tolist(), stats

    def _special_tokens(self, eos: int | Sequence[int] | None, pad: int | None) -> tuple[list[int], int | None]:
        """EOS tokens and the padding token, from the generation config where they are not given."""
        config = getattr(causal_lm(self.base_model), "generation_config", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        eos_token_ids = self.eos_token_ids if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return eos_token_ids, eos_token_ids[0] if pad is None and eos_token_ids else pad


def _mask_of(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """1 where a prompt has begun: leading `pad_token_id` are padding."""
    if pad_token_id is None:
        return torch.ones_like(input_ids)
    return (input_ids != pad_token_id).long().cummax(-1).values


def _joined(input_ids: Tensor, tokens: list[list[int]], pad_token_id: int | None) -> Tensor:
    """Prompts and new tokens, rows that ended early filled up, `[batch, prompt + new]`."""
    longest = max(map(len, tokens))
    rows = [new + [pad_token_id or 0] * (longest - len(new)) for new in tokens]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], -1)
