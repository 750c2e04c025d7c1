"""The anatomy of a Hugging Face causal LM: its backbone, decoder layers and output embedding, and what follows lm_head.

Contract: knows transformers' and peft's modules by their attributes, and nothing about heads, training or files. The
backbone is the decoder without lm_head; its output is the hidden state after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from axolotl_medusa.model.divided_parameters import whole_shape

_PROBE_TOKENS = 4

_PROBE_TOLERANCE = 0.02
"""Largest accepted difference of the probed logits, relative to the largest logit (bf16 has 8 bits of mantissa)."""


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


def recompute_layers(model: nn.Module, count: int) -> None:
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


def embedding_shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns `(vocab_size, hidden_size)` of an output embedding, also where ZeRO-3 has partitioned it."""
    vocab_size, hidden_size = whole_shape(frozen_output_embedding(layer).weight)
    return vocab_size, hidden_size


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
    dtypes = {
        parameter.dtype for parameter in lm.parameters() if parameter.is_floating_point()
    }  # 4-bit weights are bytes
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


def stored_text_config(name: str) -> Any:
    """The configuration of a model's text part, read from its directory or the Hub; the model's own code is not run.

    Raises:
        OSError: It is not there.
        ValueError: It is damaged, or only the model's own code can read it.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
