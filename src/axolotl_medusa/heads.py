"""Medusa heads as a plain module: residual blocks, their output layers, and where they attach to a model.

Contract: knows the shape of a Hugging Face causal LM (a backbone and an output embedding) and nothing about training,
data or files. The state dict of `MedusaHeads` has the names of the canonical checkpoint: `{i}.{j}.linear.weight`,
`{i}.{j}.linear.bias` and, for heads with an output layer of their own, `{i}.{num_layers}.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

HeadForm = Literal["separate", "shared"]

HEADS_NAME = "medusa_heads"
"""Name of the submodule under which heads are attached to the causal LM."""

_PROBE_TOKENS = 4
_PROBE_TOLERANCE = 0.02
"""Largest accepted difference of the probed logits, relative to the largest logit (bf16 has 8 bits of mantissa)."""


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
    `[vocab_size, hidden_size]` without bias. In the `shared` form the model's own output embedding follows the blocks.

    Args:
        hidden_size: Size H of the model's last hidden state, after the final norm.
        vocab_size: Rows V of the model's output embedding.
        num_heads: Number of heads N, at least 1.
        num_layers: Residual blocks per head, at least 1.
        form: `separate` (each head owns an output layer, v1) or `shared` (heads reuse the model's, v2).
        dtype: Type of the parameters.
        device: Device of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_heads: int,
        num_layers: int = 1,
        form: HeadForm = "separate",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.form: HeadForm = form
        for _ in range(num_heads):
            head = nn.Sequential(*(ResidualBlock(hidden_size, dtype, device) for _ in range(num_layers)))
            if form == "separate":
                head.append(nn.Linear(hidden_size, vocab_size, bias=False, dtype=dtype, device=device))
            self.append(head)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def blocks(self, index: int) -> nn.Sequential:
        """The residual blocks of head `index`, without its output layer."""
        return cast(nn.Sequential, cast(nn.Sequential, self[index])[: self.num_layers])

    def output_layer(self, index: int) -> nn.Linear | None:
        """The output layer that head `index` owns, None in the shared form."""
        head = cast(nn.Sequential, self[index])
        return cast(nn.Linear, head[self.num_layers]) if self.form == "separate" else None

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
        for index in range(self.num_heads):
            layer = self.output_layer(index)
            if layer is not None:
                layer.weight.copy_(weight)


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face causal LM inside `model`, which may be wrapped by peft."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def output_embedding(model: nn.Module) -> Any:
    """The model's output embedding (lm_head), possibly wrapped by an adapter.

    Raises:
        ValueError: The model has none: heads need one to start from and to be compared with.
    """
    lm = causal_lm(model)
    layer = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(
            f"{type(lm).__name__} has no output embedding (get_output_embeddings() is None): Medusa heads attach to "
            "causal language models only; set base_model to one"
        )
    return layer


def frozen_output_embedding(layer: nn.Module) -> Any:
    """The output embedding without what peft put around it: the teacher's, when adapters are off."""
    for attribute in ("original_module", "base_layer"):
        inner = getattr(layer, attribute, None)
        if isinstance(inner, nn.Module):
            return inner
    return layer


def backbone(model: nn.Module) -> Any:
    """The part of the causal LM that returns the last hidden state after the final norm.

    Raises:
        ValueError: The model is not made of a backbone and an output embedding.
    """
    lm = causal_lm(model)
    inner = getattr(lm, "base_model", lm)
    if inner is lm and hasattr(lm, "get_decoder") and not lm.config.is_encoder_decoder:
        inner = lm.get_decoder()
    if inner is lm or not isinstance(inner, nn.Module):
        raise ValueError(
            f"{type(lm).__name__} has no separate backbone (its base_model is itself): Medusa heads need the last hidden "
            "state; use the causal LM class of this model"
        )
    return inner


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The backbone's decoder layers and the module that holds them beside the final norm.

    Raises:
        ValueError: No list of `num_hidden_layers` modules is found.
    """
    config = causal_lm(model).config.get_text_config()
    for module in backbone(model).modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return child, module
    raise ValueError(
        f"found no list of {config.num_hidden_layers} decoder layers in {type(causal_lm(model)).__name__}: "
        "medusa_num_unfreeze_layers and medusa_checkpoint_layers cannot be used with this model; set them to 0"
    )


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Lets the backward recompute the activations of the first `count` decoder layers instead of keeping them.

    The first ones, because by the time they are recomputed those of the others are gone.

    Raises:
        ValueError: The model has fewer layers, or does not let single layers be recomputed.
    """
    layers, _ = decoder_layers(model)
    lm = causal_lm(model)
    if count > len(layers):
        raise ValueError(
            f"medusa_checkpoint_layers is {count} but the model has {len(layers)} decoder layers: expected at most that many"
        )
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        lm.gradient_checkpointing_disable()
        raise ValueError(
            f"{type(layers[0]).__name__} cannot be recomputed by itself: set gradient_checkpointing: true, which recomputes all "
            "layers, and remove medusa_checkpoint_layers"
        )
    for layer in list(layers)[count:]:
        setattr(layer, "gradient_checkpointing", False)  # noqa: B010 (mypy takes it for a submodule)


def identity(logits: Tensor) -> Tensor:
    """What most models do to lm_head's output: nothing."""
    return logits


def logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to lm_head's output: nothing, soft-capping (Gemma) or scaling (Cohere, Granite).

    Args:
        config: The model's configuration; `final_logit_softcapping`, `logit_scale` and `logits_scaling` are read.

    Returns:
        A function of logits `[..., vocab_size]`: `cap · tanh(logits / cap)`, `scale · logits`, or the identity.
    """
    text_config = config.get_text_config()
    cap = getattr(text_config, "final_logit_softcapping", None)
    multiplier = getattr(text_config, "logit_scale", None) or 1.0
    multiplier /= getattr(text_config, "logits_scaling", None) or 1.0
    if cap is not None:
        return lambda logits: torch.tanh(logits * (multiplier / cap)) * cap
    if multiplier != 1.0:
        return lambda logits: logits * multiplier
    return identity


def attach_heads(model: nn.Module, heads: MedusaHeads) -> None:
    """Attaches `heads` to the causal LM inside `model` as the submodule `medusa_heads`.

    Call it after adapters are added: earlier, `lora_target_linear` would take the heads for LoRA targets.

    Raises:
        ValueError: Sizes of heads and model differ, or the model's logits are not a known function of lm_head's output.
    """
    lm = causal_lm(model)
    probe_logits(model)
    lm.add_module(HEADS_NAME, heads)


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


def embedding_shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns `(vocab_size, hidden_size)` of an output embedding, also where ZeRO-3 has partitioned it."""
    weight = frozen_output_embedding(layer).weight
    shape = getattr(weight, "ds_shape", None) or weight.shape
    return int(shape[0]), int(shape[1])


@torch.no_grad()
def probe_logits(model: nn.Module) -> None:
    """Checks on a few tokens that the model's logits equal `logit_transform(lm_head(last hidden state))`.

    Skipped where parameters are not materialised (meta device, ZeRO-3).

    Raises:
        ValueError: They differ: heads trained on this hidden state would not match what a server feeds them.
    """
    lm, layer, decoder = causal_lm(model), output_embedding(model), backbone(model)
    if any(p.is_meta or hasattr(p, "ds_shape") for p in lm.parameters()):
        return
    device = lm.get_input_embeddings().weight.device
    vocab_size = embedding_shape(layer)[0]
    input_ids = torch.arange(1, 1 + _PROBE_TOKENS, device=device)[None] % vocab_size
    dtypes = {parameter.dtype for parameter in lm.parameters()}
    half = torch.float16 if torch.float16 in dtypes else torch.bfloat16  # axolotl mixes half layers and fp32 embeddings
    training = lm.training
    lm.eval()
    with torch.autocast(device.type, dtype=half, enabled=len(dtypes) > 1):
        expected = lm(input_ids=input_ids, use_cache=False).logits.float()
        hidden = decoder(input_ids=input_ids, use_cache=False)[0]
        found = logit_transform(lm.config)(layer(hidden).float())
    lm.train(training)
    difference = (found.to(expected.device) - expected).abs().max().item()
    if not difference <= _PROBE_TOLERANCE * max(expected.abs().max().item(), 1e-6):
        raise ValueError(
            f"the logits of {type(lm).__name__} are not lm_head of its last hidden state (they differ by {difference:.3g}): "
            "the model transforms them in a way that is not known here; Medusa heads would be trained on the wrong values"
        )
