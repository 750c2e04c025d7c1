"""Medusa decoding of an ONNX directory: what `MedusaModel` is for torch.

Contract: token ids in and out; needs numpy and onnxruntime. `tokenizer` turns text into them.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from axolotl_medusa.cpu_instructions import cpu_name
from axolotl_medusa.decoding.acceptance import Acceptance, AcceptanceRule, accept_greedy, acceptance_rule
from axolotl_medusa.decoding.arrays import NumpyArrays
from axolotl_medusa.decoding.running_rows import GenerationStats, Streamer, check_lengths, check_streamer
from axolotl_medusa.decoding.tree import Tree, asked_tree, read_least_probability
from axolotl_medusa.decoding.tree_chooser import (
    AUTO,
    PLAIN,
    TreeChooser,
    candidate_trees,
    is_auto,
    tuned_file,
    tuned_trees,
    why_plain,
)
from axolotl_medusa.onnx_decoding.decoding import AutoOnnxDecoding, OnnxDecoding
from axolotl_medusa.onnx_decoding.directory import About, read_about
from axolotl_medusa.onnx_decoding.graph_names import MODEL_FILE, head_file
from axolotl_medusa.onnx_decoding.heads import OnnxHeads
from axolotl_medusa.onnx_decoding.sessions import check_provider, open_session, runtime
from axolotl_medusa.onnx_decoding.target import Array, Forward, Target

LOG = logging.getLogger(__name__)


class OnnxMedusa:
    """A causal LM with Medusa heads in ONNX Runtime.

    Args:
        about: What the export wrote down.
        session: The model's graph.
        heads: The heads.
        provider: What runs them.
        tuned: Trees found beside the export and their expected acceptance lengths.
    """

    def __init__(
        self,
        about: About,
        session: Any,
        heads: OnnxHeads,
        provider: str = "cpu",
        tuned: dict[Tree, float] | None = None,
    ) -> None:
        self.about, self.heads = about, heads
        self._session, self._device = session, "cuda" if provider == "cuda" else "cpu"
        self._tuned = tuned or {}
        self._chooser: TreeChooser | None = None
        self._clock = time.perf_counter
        self._said: set[str] = set()

    @classmethod
    def from_pretrained(cls, directory: str | Path, provider: str = "cpu", threads: int | None = None) -> OnnxMedusa:
        """Opens an ONNX directory.

        Args:
            directory: What `axolotl-medusa export --to onnx` wrote.
            provider: `cpu`, `cuda` or `openvino`; nothing falls back to another one.
            threads: Threads, by default one per core that this process may use.

        Raises:
            ValueError: It is none, or damaged.
            RuntimeError: onnxruntime is missing, or lacks the provider or an operator.
        """
        directory = Path(directory).expanduser()
        about = read_about(directory)
        check_provider(provider, about.precision)
        session = open_session(directory / MODEL_FILE, provider, threads)
        drafters = [open_session(directory / head_file(head), provider, threads) for head in range(about.num_heads)]
        heads = OnnxHeads(drafters, about.draft_top_k)
        tuned = tuned_trees(directory, about.num_heads, about.draft_top_k)
        if tuned and (file := tuned_file(directory)):
            heads.least_of |= dict.fromkeys(tuned, read_least_probability(file))
        return cls(about, session, heads, provider, tuned)

    @property
    def context(self) -> int | None:
        """Positions that the model has, None where its configuration names no limit."""
        return self.about.context or None

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text."""
        return list(self.about.eos_token_ids)

    def hidden(self, text: Sequence[int]) -> Array:
        """Hidden states after the final norm at every token of a text, `[tokens, H]`."""
        states: Array = self.forward(text, np.arange(len(text))).hidden[0]
        return states

    def forward(self, text: Sequence[int], asked: Array, *, all_logits: bool = False) -> Forward:
        """One forward over a text, without anything before it.

        Args:
            text: Token ids.
            asked: Places in it that are asked for their next token.
            all_logits: Whether all logits are wanted there.
        """
        places = np.arange(len(text))[None]
        target = Target(self._session, self.about, 1, self._device)
        return target.forward(
            np.array([text]), places, np.tri(len(text), dtype=bool), asked[None], all_logits=all_logits
        )

    def environment(self) -> dict[str, Any]:
        """What a measurement depends on."""
        return {
            "onnxruntime": runtime().__version__,
            "device": cpu_name() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "precision": self.about.precision,
        }

    def chooser(self) -> TreeChooser:
        """What chooses the trees of `auto`, one for all decodings, so that what it learned is used again."""
        if self._chooser is None:
            trees = candidate_trees(self.heads.num_heads, self.heads.vocab_size)
            self._chooser = TreeChooser(trees, self._tuned)
        return self._chooser

    def tree(self, tree: Tree | str | Path | None = None) -> Tree:
        """The tree that an argument means, as `MedusaModel.tree`; a file also says how sure its drafts must be.

        Raises:
            ValueError: It is unknown or does not fit the heads.
        """
        found = asked_tree(tree, self.heads.num_heads, self.heads.vocab_size)
        if isinstance(tree, str | Path) and Path(tree).expanduser().is_file():
            self.heads.least_of[found] = read_least_probability(tree)
        return found

    def decoding(
        self,
        prompts: Sequence[Sequence[int]],
        tree: Tree | Literal["auto"],
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        rule: AcceptanceRule = accept_greedy,
        seed: int | None = None,
    ) -> OnnxDecoding:
        """Decoding of prompts, to be stepped by whoever measures or shows it; greedy without another rule."""
        if isinstance(tree, str) and (line := why_plain(len(prompts), False)):
            if line not in self._said:
                LOG.warning("%s", line)
            self._said.add(line)
            tree = PLAIN
        target = Target(self._session, self.about, len(prompts), self._device)
        options: dict[str, Any] = {
            "rule": rule,
            "arrays": NumpyArrays(seed),
            "max_new_tokens": max_new_tokens,
            "eos_token_ids": eos_token_ids,
            "last_position": max(0, self.about.context - 1),
        }
        if isinstance(tree, str):
            return AutoOnnxDecoding(
                target, self.heads, prompts[0], chooser=self.chooser(), clock=self._clock, **options
            )
        return OnnxDecoding(target, self.heads, prompts, tree=tree, **options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 20,
        *,
        tree: Tree | str | Path | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        acceptance: Acceptance | None = None,
        epsilon: float = 0.09,
        delta: float = 0.3,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
    ) -> tuple[list[list[int]], GenerationStats]:
        """Continues prompts; arguments mean what they mean to `MedusaModel.generate`.

        Args:
            prompts: Token ids of every prompt.
            max_new_tokens: Tokens that a row gets at most.
            tree: A candidate tree, its file or name, or `auto`, the default.
            do_sample: Whether to sample instead of greedy decoding.
            temperature: T of sampling and of typical acceptance.
            acceptance: `greedy`, `rejection` or `typical`.
            epsilon: ε of typical acceptance.
            delta: δ of typical acceptance.
            eos_token_id: Tokens that end a row, `[]` for none; by default the model's.
            seed: Of what is drawn.
            streamer: Gets the prompt and then the tokens of every step; for one prompt.

        Returns:
            New tokens of every prompt, and what they took.

        Raises:
            ValueError: Prompts are empty or too long, the tree is unknown, or settings contradict each other.
        """
        rule = acceptance_rule(acceptance, do_sample, temperature, epsilon, delta)
        check_lengths([len(prompt) for prompt in prompts], max_new_tokens, self.context)
        self._check_tokens(prompts)
        check_streamer(streamer, len(prompts))
        chosen: Tree | Literal["auto"] = AUTO if is_auto(tree, acceptance) else self.tree(tree)
        eos = self.eos_token_ids if eos_token_id is None else _listed(eos_token_id)
        decoding = self.decoding(prompts, chosen, max_new_tokens, eos, rule, seed)
        decoding.run(streamer, np.array(prompts[:1]), np.array)
        return decoding.tokens, decoding.stats

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
        """Continues one prompt, greedily at temperature 0: the new tokens, and what they took.

        Raises:
            ValueError: The prompt does not fit, or `compile` is set: graphs are compiled already.
        """
        if compile:
            raise ValueError("--compile with an ONNX directory, whose graphs are compiled already: leave it out")
        tokens, stats = self.generate(
            [prompt],
            max_new_tokens,
            tree=tree,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            streamer=streamer,
        )
        return tokens[0], stats

    def _check_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuses ids that the model does not have: the graph would read past its embeddings."""
        wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < self.about.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"a prompt has the token id {wrong}, expected 0 to {self.about.vocab_size - 1}")


def _listed(ids: int | Sequence[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids)
