"""A tiny random model that vLLM serves in seconds, and heads that guess some of its tokens right.

    python -m tiny_served_model DIR

writes `model`, `shared` and `separate` (heads directories) and `lora` (an adapter of other linear layers) into DIR.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_medusa.model.heads import HeadForm, MedusaHeads
from axolotl_medusa.model.heads_directory import HeadsFile, heads_config, write_heads

VOCAB, HIDDEN, HEADS, CONTEXT = 64, 128, 3, 256
ROWS, LENGTH, STEPS = 24, 64, 80


def random_model() -> LlamaForCausalLM:
    """A model whose next tokens are neither certain nor uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if "lm_head" in name else 3.0)
    return model


@torch.no_grad()
def sampled_text(model: LlamaForCausalLM, greedy_rows: int) -> torch.Tensor:
    """Text of the model's own, `[ROWS, LENGTH]`: some rows greedy, the others sampled at temperature 1."""
    text = torch.randint(VOCAB, (ROWS, 4))
    while text.shape[1] < LENGTH:
        logits = model(input_ids=text).logits[:, -1]
        tokens = torch.multinomial(logits.softmax(-1), 1)
        tokens[:greedy_rows] = logits[:greedy_rows].argmax(-1, keepdim=True)
        text = torch.cat([text, tokens], 1)
    return text


def trained_heads(model: LlamaForCausalLM, text: torch.Tensor, form: HeadForm) -> MedusaHeads:
    """Heads trained with cross-entropy on the text."""
    heads = MedusaHeads(HIDDEN, VOCAB, HEADS, form=form)
    heads.start_output_layers_from(model.lm_head.weight)
    with torch.no_grad():
        hidden = model.model(input_ids=text).last_hidden_state
    optimizer = torch.optim.AdamW(heads.parameters(), 3e-3)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for index in range(HEADS):
            layer = heads.output_layer(index) or model.lm_head
            logits = layer(heads.hidden(index, hidden[:, : -2 - index]))
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 2 + index :].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return heads


def write_lora(model: LlamaForCausalLM, directory: Path) -> None:
    """An adapter that changes the model's text."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(directory)


def write_all(directory: Path) -> None:
    """Writes model, heads and adapter."""
    model = random_model()
    model.save_pretrained(directory / "model")
    text = sampled_text(model, ROWS // 2)
    for form in ("shared", "separate"):
        heads = trained_heads(model, text, form)
        tensors = {name: parameter.detach() for name, parameter in heads.named_parameters()}
        if form == "shared":
            tensors["lm_heads.0.weight"] = model.lm_head.weight.detach()
        write_heads(directory / form, HeadsFile(tensors, heads_config(heads, str(directory / "model"))))
    write_lora(model, directory / "lora")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
