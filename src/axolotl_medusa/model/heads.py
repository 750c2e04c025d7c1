"""Medusa heads as a plain module: residual blocks, their output layers, and where they attach to a model.

Contract: knows the shape of a Hugging Face causal LM (a backbone and an output embedding) and nothing about training,
data or files. The state dict of `MedusaHeads` has the names of the heads directory: `{i}.{j}.linear.weight`,
`{i}.{j}.linear.bias` and, for heads with an output layer of their own, `{i}.{num_layers}.weight`; where one layer serves all of
them, it is head 0's. Heads that choose among a part of the vocabulary have its tokens as `token_map`, vLLM's name for it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from axolotl_medusa.model.anatomy import causal_lm, probe_logits
from axolotl_medusa.model.head_form import TOKEN_MAP, HeadForm

HEADS_NAME = "medusa_heads"
"""Name of the submodule under which heads are attached to the causal LM."""


class ResidualBlock(nn.Module):
    """One block of a head: `x + SiLU(W x + b)` (Medusa, section 2.1.1), started at the identity (W = 0, b = 0).

    Args:
        hidden_size: Size H of the hidden state.
        dtype: Type of the parameters.
        device: Device of the parameters.
    """

    def __init__(
        self, hidden_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, dtype=dtype, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the block's output, `[..., hidden_size]` like `hidden`."""
        return hidden + nn.functional.silu(self.linear(hidden))


class MedusaHeads(nn.ModuleList):
    """N heads; head i, fed the hidden state at position t, predicts token t + 2 + i, i from 0.

    Each head is a sequence of `num_layers` independent residual blocks and, in the `separate` form, an output layer
    `[vocab_size, hidden_size]` without bias. In the `trained` form head 0 has one, which follows the blocks of all. In the
    `shared` form the model's own output embedding does.

    Args:
        hidden_size: Size H of the model's last hidden state, after the final norm.
        vocab_size: Rows V of the model's output embedding.
        num_heads: Number of heads N, at least 1.
        num_layers: Residual blocks per head, at least 1.
        form: `separate` (each head owns an output layer, v1), `shared` (heads reuse the model's, v2), or `trained` (heads
            own one together).
        dtype: Type of the parameters.
        device: Device of the parameters.
        draft_vocab: How many tokens the heads choose among, None for all; output layers have a row for each. Which ones
            they are `choose_tokens` says; before, they are the first.
    """

    token_map: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_heads: int,
        num_layers: int = 1,
        form: HeadForm = "separate",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        draft_vocab: int | None = None,
    ) -> None:
        super().__init__()
        if draft_vocab is not None and draft_vocab > vocab_size:
            raise ValueError(
                f"heads are to choose among {draft_vocab} tokens of {vocab_size}: expected no more than the model has"
            )
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.form: HeadForm = form
        self.draft_vocab = draft_vocab
        self.register_buffer(TOKEN_MAP, None if draft_vocab is None else torch.arange(draft_vocab, device=device))
        for index in range(num_heads):
            head = nn.Sequential(*(ResidualBlock(hidden_size, dtype, device) for _ in range(num_layers)))
            if form == "separate" or (form == "trained" and index == 0):
                head.append(nn.Linear(hidden_size, draft_vocab or vocab_size, bias=False, dtype=dtype, device=device))
            self.append(head)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def blocks(self, index: int) -> nn.Sequential:
        """The residual blocks of head `index`, without its output layer."""
        return cast(nn.Sequential, cast(nn.Sequential, self[index])[: self.num_layers])

    def output_layer(self, index: int) -> nn.Linear | None:
        """The output layer of head `index`, its own or all heads', None in the shared form."""
        if self.form == "shared":
            return None
        head = cast(nn.Sequential, self[index if self.form == "separate" else 0])
        return cast(nn.Linear, head[self.num_layers])

    def output_layers(self) -> list[nn.Linear]:
        """The output layers that are the heads', each once."""
        count = {"separate": self.num_heads, "trained": 1, "shared": 0}[self.form]
        return [cast(nn.Linear, self.output_layer(index)) for index in range(count)]

    def hidden(self, index: int, hidden: Tensor) -> Tensor:
        """Runs the residual blocks of head `index`.

        Args:
            index: The head, from 0.
            hidden: Last hidden states after the final norm, `[..., hidden_size]`.

        Returns:
            What goes into the output layer, `[..., hidden_size]`, in the heads' type.
        """
        output: Tensor = self.blocks(index)(hidden.to(self.dtype))
        return output

    @torch.no_grad()
    def start_output_layers_from(self, weight: Tensor) -> None:
        """Copies an output embedding `[vocab_size, hidden_size]` into every output layer, so that a fresh head equals it."""
        for layer in self.output_layers():
            layer.weight.copy_(weight if self.token_map is None else weight[self.token_map.to(weight.device)])

    def choose_tokens(self, tokens: Tensor) -> None:
        """Sets which tokens heads of a draft vocabulary choose among, `[draft_vocab]`.

        Raises:
            ValueError: They are not so many different tokens of the model in ascending order.
        """
        if self.token_map is None:
            raise ValueError("heads of the whole vocabulary are given a token_map: expected none")
        check_token_map(tokens, self.vocab_size, tuple(self.token_map.shape))
        self.token_map.copy_(tokens)


def check_token_map(tokens: Tensor, vocab_size: int, shape: tuple[int, ...]) -> None:
    """Checks what is to be a `token_map`: every index into a vocabulary is taken from it.

    Raises:
        ValueError: It is not of that shape, or not ascending numbers of tokens below `vocab_size`.
    """
    if tokens.dtype != torch.int64 or tuple(tokens.shape) != shape:
        found = f"{str(tokens.dtype).removeprefix('torch.')} {tuple(tokens.shape)}"
        raise ValueError(f"{TOKEN_MAP} is {found}, expected int64 {shape}: get the heads again")
    if bool((tokens.diff() <= 0).any()) or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
        raise ValueError(
            f"{TOKEN_MAP} is not ascending within {vocab_size} tokens, expected it so: get the heads again"
        )


def attach_heads(model: nn.Module, heads: MedusaHeads, *, probe: bool = True) -> None:
    """Attaches `heads` to the causal LM inside `model` as the submodule `medusa_heads`.

    Call it after adapters are added: earlier, `lora_target_linear` would take the heads for LoRA targets.

    Args:
        model: The model, possibly wrapped by peft.
        heads: What to attach.
        probe: Whether to check the model's logits now; where it cannot run yet, call `anatomy.probe_logits` later.

    Raises:
        ValueError: The model's logits are not a known function of lm_head's output.
    """
    if probe:
        probe_logits(model)
    causal_lm(model).add_module(HEADS_NAME, heads)


def attached_heads(model: nn.Module) -> MedusaHeads:
    """The heads that `attach_heads` attached to `model`.

    Raises:
        RuntimeError: There are none.
    """
    heads = getattr(causal_lm(model), HEADS_NAME, None)
    if not isinstance(heads, MedusaHeads):
        raise RuntimeError(
            f"no Medusa heads on {type(causal_lm(model)).__name__}: the plugin's post_lora_load hook did not run; "
            "is `axolotl_medusa.MedusaPlugin` under `plugins:`?"
        )
    return heads
