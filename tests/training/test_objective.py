"""The objective against the naive reference: values and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE, HIDDEN, VOCAB, make_model
from naive_reference import naive_acceptance_length, naive_loss
from peft import LoraConfig, get_peft_model

from axolotl_medusa.losses import chunk_plan, chunked, prediction
from axolotl_medusa.losses.targets import target_counts
from axolotl_medusa.model.heads import MedusaHeads, attach_heads
from axolotl_medusa.training.objective import Objective, install_objective, metric_names

RTOL, ATOL = 2e-4, 2e-6  # fp32 rounding of sums over a vocabulary in another order
SEQ = 24


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    for name in ("CHUNK_LOGITS", "ACCELERATOR_CHUNK_LOGITS"):
        monkeypatch.setattr(chunk_plan, name, 5 * VOCAB)


def batch(packed: bool, seed: int = 1):
    """Two ragged rows with masked turns; packed: three samples in one row."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    labels = torch.randint(3, VOCAB, (1 if packed else 2, SEQ), generator=generator)
    input_ids = labels.clone()
    if packed:
        position_ids = torch.cat([torch.arange(n) for n in (10, 3, SEQ - 13)])[None]
        labels[0, 2:5] = labels[0, 10:12] = labels[0, 15:18] = -100
        return labels, {"input_ids": input_ids, "position_ids": position_ids}
    attention_mask = torch.ones_like(labels)
    attention_mask[1, 17:] = 0
    labels[1, 17:] = -100
    labels[0, :6] = labels[0, 12:14] = labels[1, 3:9] = -100
    return labels, {"input_ids": input_ids, "attention_mask": attention_mask}


def build(
    family="llama",
    form="separate",
    num_heads=3,
    num_layers=1,
    lora: str | None = None,
    only_heads=False,
    draft=False,
    **model_changes,
):
    """A model with heads that are no longer at their zero start, and the same in plain pieces for the reference."""
    model = make_model(family, **model_changes)
    teacher = copy.deepcopy(model).eval()
    if lora:
        targets = ["q_proj", "up_proj"] + (["lm_head"] if lora == "lm_head" else [])
        torch.manual_seed(5)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        )
    heads = MedusaHeads(HIDDEN, VOCAB, num_heads, num_layers, form, draft_vocab=VOCAB // 2 if draft else None)
    if draft:
        heads.choose_tokens(torch.arange(VOCAB)[1::2])
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.3)
    attach_heads(model, heads)
    if only_heads:
        model.requires_grad_(False)
    heads.requires_grad_(True)
    return model, heads, teacher


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "medusa1-separate": dict(only_heads=True),
    "medusa1-shared": dict(only_heads=True, form="shared"),
    "medusa1-kl": dict(only_heads=True, head_loss="kl"),
    "medusa1-tv": dict(only_heads=True, head_loss="tv"),
    "medusa1-lk-shared-packed": dict(only_heads=True, head_loss="lk", form="shared", packed=True),
    "medusa1-two-layers": dict(only_heads=True, num_layers=2, num_heads=2),
    "medusa1-one-head": dict(only_heads=True, num_heads=1),
    "medusa1-five-heads-packed": dict(only_heads=True, num_heads=5, packed=True),
    "medusa2-full": dict(),
    "medusa2-full-shared-kl": dict(form="shared", head_loss="kl"),
    "medusa2-full-tied": dict(family="llama-tied", form="shared"),
    "medusa2-packed": dict(packed=True, num_heads=4),
    "medusa2-regularized": dict(regularization=0.4),
    "medusa2-lora": dict(lora="body"),
    "medusa2-lora-packed-five": dict(lora="body", packed=True, num_heads=5),
    "medusa2-lora-lm-head-shared": dict(lora="lm_head", form="shared"),
    "medusa2-lora-lm-head-separate": dict(lora="lm_head"),
    "medusa2-lora-lm-head-tied": dict(lora="lm_head", family="llama-tied", form="shared"),
    "medusa2-distil": dict(lora="body", lm_coefficient=0.0, kl_coefficient=1.0, form="shared"),
    "medusa2-distil-lm-head-both-terms": dict(
        lora="lm_head", lm_coefficient=0.5, kl_coefficient=0.7, form="shared", packed=True
    ),
    "medusa2-distil-kl-heads": dict(
        lora="lm_head", lm_coefficient=0.0, kl_coefficient=1.0, head_loss="kl", num_heads=2
    ),
    "medusa2-tv-lm-head-packed": dict(lora="lm_head", head_loss="tv", packed=True),
    "medusa2-distil-lk-heads": dict(
        lora="lm_head", lm_coefficient=0.0, kl_coefficient=1.0, head_loss="lk", form="shared"
    ),
    "medusa1-draft-separate": dict(only_heads=True, draft=True),
    "medusa1-draft-shared-packed": dict(only_heads=True, form="shared", draft=True, packed=True),
    "medusa1-draft-trained-chain": dict(only_heads=True, form="trained", draft=True, chain_smoothing=0.4),
    "medusa1-draft-trained-lk-chain": dict(
        only_heads=True, form="trained", draft=True, head_loss="lk", chain_smoothing=0.5
    ),
    "medusa2-draft-shared-full": dict(form="shared", draft=True, head_loss="kl"),
    "medusa2-draft-distil-kl-heads": dict(
        lora="lm_head", lm_coefficient=0.5, kl_coefficient=1.0, head_loss="kl", form="shared", draft=True
    ),
    "gemma2-draft-shared": dict(family="gemma2-softcap", only_heads=True, cap=0.5, form="shared", draft=True),
    "phi-bias-draft-shared": dict(family="phi-lm-head-bias", form="shared", draft=True),
    "medusa1-trained": dict(only_heads=True, form="trained"),
    "medusa1-trained-chain-packed": dict(only_heads=True, form="trained", chain_smoothing=0.5, packed=True),
    "medusa2-trained-lm-head-lk": dict(lora="lm_head", form="trained", head_loss="lk"),
    "medusa1-chain": dict(only_heads=True, chain_smoothing=0.5),
    "medusa1-chain-shared-packed-five": dict(
        only_heads=True, form="shared", chain_smoothing=0.1, packed=True, num_heads=5
    ),
    "medusa1-chain-kl-packed": dict(only_heads=True, head_loss="kl", chain_smoothing=0.5, packed=True, num_heads=4),
    "medusa2-chain-exact": dict(chain_smoothing=0.0),
    "medusa2-chain-lm-head-shared": dict(lora="lm_head", form="shared", chain_smoothing=0.3),
    "medusa2-chain-distil-lk-heads": dict(
        lora="lm_head", lm_coefficient=0.5, kl_coefficient=1.0, head_loss="lk", chain_smoothing=0.5, packed=True
    ),
    "gemma2-softcap-chain-tv": dict(
        family="gemma2-softcap", only_heads=True, cap=0.5, head_loss="tv", chain_smoothing=0.5
    ),
    "gemma2-softcap": dict(family="gemma2-softcap", form="shared", cap=0.5),
    "gemma2-softcap-medusa1": dict(family="gemma2-softcap", only_heads=True, cap=0.5, head_loss="kl"),
    "phi-bias": dict(family="phi-lm-head-bias", form="shared"),
    "cohere-scale": dict(family="cohere-logit-scale", form="shared", scale=0.0625),
    "granite-scale": dict(family="granite-logits-scaling", only_heads=True, scale=1 / 8),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["gradient-in-forward", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_objective_values_and_gradients_equal_the_naive_reference(case, recompute, monkeypatch):
    options = dict(CASES[case])
    packed, cap, scale = options.pop("packed", False), options.pop("cap", None), options.pop("scale", 1.0)
    loss_options = {
        k: options.pop(k)
        for k in ("lm_coefficient", "kl_coefficient", "regularization", "head_loss", "chain_smoothing")
        if k in options
    }
    model, heads, teacher = build(**options)
    labels, inputs = batch(packed)
    only_heads = options.get("only_heads", False)
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    expected = naive_loss(
        lm,
        heads,
        cap,
        labels,
        inputs,
        only_heads=only_heads,
        teacher=teacher if loss_options.get("kl_coefficient") else None,
        scale=scale,
        draft_tokens=heads.token_map,
        **loss_options,
    )
    expected_gradients = gradients(model, expected)
    objective = Objective(
        only_heads=only_heads,
        lm_coefficient=loss_options.get("lm_coefficient", 1.0),
        kl_coefficient=loss_options.get("kl_coefficient", 0.0),
        distillation_regularization=loss_options.get("regularization", 0.0),
        head_loss=loss_options.get("head_loss", "ce"),
        head_weighting="chain" if "chain_smoothing" in loss_options else "decay",
        chain_smoothing=loss_options.get("chain_smoothing", 0.5),
    )
    install_objective(model, objective)
    monkeypatch.setattr(chunked, "_is_whole", lambda _: not recompute)
    out = model(**inputs, labels=labels, medusa_coefficient=0.2)
    torch.testing.assert_close(out.loss, expected, rtol=RTOL, atol=ATOL)
    found = gradients(model, out.loss)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=RTOL,
            atol=ATOL * gradient.abs().max().item() * 100 + 1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert moved == trainable


@pytest.mark.parametrize("weighting", ["decay", "chain"])
@pytest.mark.parametrize("only_heads", [True, False], ids=["medusa1", "medusa2"])
def test_objective_packed_batch_has_the_loss_and_gradients_of_the_same_samples_padded(only_heads, weighting):
    model, heads, _ = build(only_heads=only_heads, num_heads=4)
    install_objective(model, Objective(only_heads=only_heads, head_weighting=weighting))
    labels, packed = batch(packed=True)
    lengths = (10, 3, SEQ - 13)
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    mask, padded_labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    start = 0
    for row, length in enumerate(lengths):
        ids[row, :length] = packed["input_ids"][0, start : start + length]
        padded_labels[row, :length] = labels[0, start : start + length]
        mask[row, :length] = 1
        start += length
    a = model(**packed, labels=labels)
    ga = gradients(model, a.loss)
    b = model(input_ids=ids, attention_mask=mask, labels=padded_labels)
    gb = gradients(model, b.loss)
    torch.testing.assert_close(a.loss, b.loss, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(a.metric_sums, b.metric_sums, rtol=RTOL, atol=ATOL)
    for name in ga:
        torch.testing.assert_close(ga[name], gb[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("only_heads", [True, False])
def test_objective_hands_the_bounds_of_packed_samples_to_every_layer(only_heads):
    """Axolotl's collator works them out once for flash attention; other kinds of attention pass over them."""
    model, _, _ = build(only_heads=only_heads)
    install_objective(model, Objective(only_heads=only_heads))
    labels, inputs = batch(packed=True)
    ends = torch.tensor([0, 10, 13, SEQ], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 11, "max_length_k": 11}
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append({name: kwargs.get(name) for name in bounds}), with_kwargs=True
        )
    loss = model(labels=labels, **inputs, **bounds).loss
    assert seen == [bounds] * len(model.model.layers)
    assert torch.equal(loss, model(labels=labels, **inputs).loss)


@pytest.mark.parametrize("weighting", ["decay", "chain"])
def test_objective_four_micro_batches_with_step_counts_equal_one_batch(weighting):
    model, heads, _ = build(num_heads=3)
    install_objective(model, Objective(head_weighting=weighting))
    generator = torch.Generator(DEVICE).manual_seed(3)
    labels = torch.randint(3, VOCAB, (4, SEQ), generator=generator)
    ids = labels.clone()
    for row, masked in enumerate((0, 5, 11, 20)):  # very different numbers of targets in each micro-batch
        labels[row, :masked] = -100
    whole = model(input_ids=ids, labels=labels)
    expected = gradients(model, whole.loss)
    counts = target_counts(labels, 3)
    model.zero_grad()
    total = 0.0
    for row in range(4):
        part = model(input_ids=ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=counts)
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_objective_without_any_target_gives_every_trainable_parameter_a_zero_gradient():
    model, heads, _ = build(lora="lm_head", form="shared")
    install_objective(model, Objective())
    labels, inputs = batch(packed=False)
    out = model(**inputs, labels=torch.full_like(labels, -100))
    assert out.loss.item() == 0.0
    found = gradients(model, out.loss)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_objective_medusa1_backbone_records_no_graph_and_has_no_dropout():
    model, heads, _ = build(family="gpt2", only_heads=True, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    install_objective(model, Objective(only_heads=True))
    grad_modes, training = [], []
    block = model.transformer.h[0]

    def watch(module, *_):
        grad_modes.append(torch.is_grad_enabled())
        training.append(module.training)

    block.register_forward_hook(watch)
    model.train()
    labels, inputs = batch(packed=False)
    first, second = (model(**inputs, labels=labels).loss.item() for _ in range(2))
    assert grad_modes == [False, False] and training == [False, False]
    assert first == second
    assert model.transformer.training


def test_objective_metrics_equal_the_naive_acceptance_length_and_accuracies():
    model, heads, _ = build(only_heads=True, num_heads=3)
    with torch.no_grad():  # heads that repeat the base model's next token are often right on repetitive text
        for parameter in heads.parameters():
            parameter.mul_(0.05)
    heads.start_output_layers_from(model.lm_head.weight)
    labels, inputs = batch(packed=False)
    with torch.no_grad():
        logits = model(**inputs).logits
        labels = labels.where(labels == -100, logits.argmax(-1).roll(1, dims=1))
    objective = Objective(only_heads=True, logging_topk=3)
    install_objective(model, objective)
    model.eval()
    with torch.no_grad():
        sums = model(**inputs, labels=labels).metric_sums
    metrics = dict(zip(metric_names(3, objective), (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    plain = make_model()
    expected = naive_acceptance_length(plain, heads, labels, inputs)
    assert expected > 1.0, "a test of accepted tokens needs some"
    assert metrics["medusa_acceptance_length"] == pytest.approx(expected)
    assert 0 < metrics["medusa0_top1"] <= metrics["medusa0_top2"] <= metrics["medusa0_top3"] <= 1
    assert "medusa2_loss" in metrics and "medusa3_loss" not in metrics


@pytest.mark.parametrize("form", ["shared", "trained"])
def test_objective_of_a_draft_vocabulary_counts_what_it_lacks_as_misses_in_an_evaluation_too(form):
    model, heads, _ = build(only_heads=True, form=form, draft=True)
    model = model.bfloat16()
    heads.float()
    install_objective(model, Objective(only_heads=True, logging_topk=2))
    labels, inputs = batch(packed=False)
    heads_rows = [int(target_counts(labels, 3)[head + 1]) for head in range(3)]
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            sums = model(**inputs, labels=labels).metric_sums
        names = metric_names(3, Objective(only_heads=True, logging_topk=2))
        metrics = dict(zip(names, sums.tolist(), strict=True))
        for head, rows in enumerate(heads_rows):
            learnt = metrics[f"medusa{head}_loss"][1]
            assert 0 < learnt < rows == metrics[f"medusa{head}_top1"][1]
            assert metrics[f"medusa{head}_top1"][0] <= learnt
            assert training or metrics[f"medusa{head}_top2"][1] == rows


def test_objective_without_labels_is_the_models_own_forward():
    model, heads, teacher = build()
    install_objective(model, Objective())
    labels, inputs = batch(packed=False)
    torch.testing.assert_close(model(**inputs).logits, teacher(**inputs).logits, rtol=0, atol=0)


BF16_CASES = [
    "medusa2-full-shared-kl",
    "medusa2-distil-lm-head-both-terms",
    "medusa1-separate",
    "medusa1-tv",
    "medusa2-distil-lk-heads",
    "medusa1-chain",
    "medusa1-trained",
    "medusa1-draft-trained-chain",
    "medusa2-chain-lm-head-shared",
]


@pytest.mark.parametrize("multiplies_bf16", [True, False], ids=["in-bf16", "in-fp32"])
@pytest.mark.parametrize("case", BF16_CASES)
def test_objective_in_bf16_autocast_is_no_further_from_fp32_than_the_naive_reference(
    case, multiplies_bf16, monkeypatch
):
    """|ours - fp32| <= |naive bf16 - fp32| + tol: tells a bug from rounding."""
    computed_in, gradient_in_place = [], chunked.gradient_in_place

    def watched(logits, *arguments):
        computed_in.append(logits.dtype)
        return gradient_in_place(logits, *arguments)

    monkeypatch.setattr(prediction, "multiplies_bf16", lambda: multiplies_bf16)
    monkeypatch.setattr(chunked, "gradient_in_place", watched)
    options = dict(CASES[case])
    packed = options.pop("packed", False)
    names = ("lm_coefficient", "kl_coefficient", "head_loss", "chain_smoothing")
    loss_options = {k: options.pop(k) for k in names if k in options}
    model, heads, teacher = build(**options)
    labels, inputs = batch(packed)
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    arguments = dict(
        only_heads=options.get("only_heads", False),
        draft_tokens=heads.token_map,
        teacher=teacher if "kl_coefficient" in loss_options else None,
    )
    exact = gradients(model, naive_loss(lm, heads, None, labels, inputs, **arguments, **loss_options))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        naive = naive_loss(lm, heads, None, labels, inputs, **arguments, **loss_options)
    naive_gradients = gradients(model, naive)
    weighting = "chain" if "chain_smoothing" in loss_options else "decay"
    objective = Objective(only_heads=arguments["only_heads"], head_weighting=weighting, **loss_options)
    install_objective(model, objective)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = model(**inputs, labels=labels, medusa_coefficient=0.2)
    if options.get("lora") != "lm_head":  # an adapted output layer computes as autocast has it
        on_slow_cpu = DEVICE == "cpu" and not multiplies_bf16
        assert set(computed_in) == {torch.float32 if on_slow_cpu else torch.bfloat16}
    found = gradients(model, out.loss)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        ours, theirs = (found[name] - gradient).norm(), (naive_gradients[name] - gradient).norm()
        assert ours <= 1.5 * theirs + 0.01 * gradient.norm() + 1e-6, f"{name}: {ours:.3g} against {theirs:.3g}"
