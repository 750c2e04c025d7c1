"""Medusa decoding against transformers' own greedy decoding and against a naive reference without a cache."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from conftest import FAMILIES, HIDDEN, VOCAB, add_lora, make_model, randomize
from decoding_models import (
    fitted_heads,
    prompts,
    random_heads,
    varied_model,
)
from naive_decoding import greedy, naive_decode, typical
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TextStreamer

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.model.anatomy import backbone
from axolotl_medusa.model.heads import MedusaHeads

NEW = 24
BUSHY = Tree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0)])
TREES = {"none": Tree(), "chain": chain(5), "bushy": BUSHY, "64 nodes": default_tree()}

FALSE_ALARM = 1e-4
"""Chance that a chi-square test would fail with correct sampling and another seed."""


def plain(model, ids, mask, new=NEW, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


@pytest.fixture(scope="module")
def llama():
    """A random Llama, and heads that are often right about it."""
    model = varied_model()
    return MedusaModel(model, fitted_heads(model, *prompts()))


# Greedy decoding is lossless


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_plain_decoding_for_every_family(family):
    model = varied_model(family)
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    expected = plain(model, ids, mask)
    assert len(expected[:, 9:].unique()) > 20, "text that repeats itself would hide a wrong mask"
    for tree in TREES.values():
        assert torch.equal(medusa.generate(ids, mask, NEW, tree=tree), expected)
    single = plain(model, ids[1:2, 3:], None)
    assert torch.equal(medusa.generate(ids[1:2, 3:], max_new_tokens=NEW), single)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family):
    """Soft-capping and scaling leave greedy tokens as they are, but not what is sampled."""
    model = make_model(family).eval()
    ids = prompts(1)[0]
    with torch.no_grad():
        found = MedusaModel(model, random_heads()).logits(backbone(model)(ids)[0])
        torch.testing.assert_close(found, model(ids).logits)


@pytest.mark.parametrize("form", ["separate", "shared"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_plain_decoding_with_random_heads(form, tree, attention):
    model = varied_model("qwen3")
    model.set_attn_implementation(attention)
    medusa = MedusaModel(model, random_heads(form=form))
    ids, mask = prompts()
    assert torch.equal(medusa.generate(ids, mask, NEW, tree=TREES[tree]), plain(model, ids, mask))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fitted_heads_are_accepted_and_output_stays_the_same(llama, attention):
    ids, mask = prompts()
    llama.base_model.set_attn_implementation(attention)
    tokens, stats = llama.generate(ids, mask, NEW, tree="default", return_stats=True)
    assert torch.equal(tokens, plain(llama.base_model, ids, mask))
    assert stats.acceptance_length > 2
    assert len(stats.acceptance_lengths) > 1
    llama.base_model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("gemma2-softcap", {"sliding_window": 6}),
        ("phi3", {"sliding_window": 6}),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_are_seen_as_plain_decoding_sees_them(family, changes, attention):
    model = varied_model(family, **changes)
    model.set_attn_implementation(attention)
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    expected = plain(model, ids, mask)
    wide = varied_model(family, **{**changes, "sliding_window": 100})
    assert not torch.equal(plain(wide, ids, mask), expected), "the window does nothing in this test"
    for tree in TREES.values():
        assert torch.equal(medusa.generate(ids, mask, NEW, tree=tree), expected)


def test_draft_logits_of_one_trained_output_layer_are_those_of_its_copies():
    model, trained = make_model("llama").eval(), random_heads(form="trained")
    separate = random_heads(form="separate")
    with torch.no_grad():
        for head in range(3):
            separate.output_layer(head).weight.copy_(trained.output_layer(0).weight)
            separate.blocks(head).load_state_dict(trained.blocks(head).state_dict())
    hidden = torch.randn(2, 4, trained.hidden_size)
    found, expected = (MedusaModel(model, heads).draft_logits(hidden, 3) for heads in (trained, separate))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi-lm-head-bias"])
@pytest.mark.parametrize("form", ["separate", "shared", "trained"])
def test_heads_of_a_draft_vocabulary_propose_its_tokens_alone_and_decoding_stays_lossless(form, family):
    model = make_model(family).eval()
    heads = random_heads(form=form, draft_vocab=40)
    heads.choose_tokens(torch.arange(VOCAB)[2:122:3])
    medusa = MedusaModel(model, heads)
    hidden = torch.randn(2, heads.hidden_size)
    logits = medusa.draft_logits(hidden, 3)
    assert logits.shape == (2, 3, VOCAB)
    outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, heads.token_map, False)
    assert bool(torch.isneginf(logits[..., outside]).all()) and bool(logits[..., ~outside].isfinite().all())
    for head in range(3):
        layer = heads.output_layer(head)
        own = model.get_output_embeddings()(heads.hidden(head, hidden))[:, heads.token_map] if layer is None else None
        expected = own if layer is None else layer(heads.hidden(head, hidden))
        torch.testing.assert_close(logits[:, head, heads.token_map], expected, rtol=1e-5, atol=1e-5)
    ids, mask = prompts()
    for tree in (None, "chain"):
        assert torch.equal(medusa.generate(ids, mask, NEW, tree=tree), plain(model, ids, mask))


def test_adapters_stay_unmerged_and_are_decoded_with():
    model = add_lora(make_model("llama")).eval()
    ids, mask = prompts()
    expected = plain(model, ids, mask)
    with model.disable_adapter():
        assert not torch.equal(plain(model, ids, mask), expected)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for form in ("separate", "shared", "trained"):
        medusa = MedusaModel(model, random_heads(form=form))
        assert torch.equal(medusa.generate(ids, mask, NEW), expected)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "quantization",
    [{"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}],
    ids=["4-bit", "8-bit"],
)
def test_quantized_models_are_decoded_losslessly(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    varied_model(hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(tmp_path)
    options = dict(quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    tokens, stats = medusa.generate(ids, mask, NEW, tree="default", return_stats=True)
    assert torch.equal(tokens, plain(model, ids, mask))
    assert stats.acceptance_length > 1.5


def test_bf16_model_decodes_in_bf16():
    model = make_model("llama").to(torch.bfloat16).eval()
    medusa = MedusaModel(model, random_heads())
    assert medusa.heads.dtype == torch.bfloat16
    assert medusa.generate(*prompts(), max_new_tokens=NEW).shape == (4, 9 + NEW)


# What is accepted, against the naive reference


@pytest.mark.parametrize("tree", [chain(1), chain(5), BUSHY], ids=["one", "chain", "bushy"])
def test_accepted_tokens_equal_the_naive_reference(llama, tree):
    ids, mask = prompts()
    for row in range(4):
        prompt = ids[row][mask[row].bool()]
        expected, lengths = naive_decode(llama.base_model, llama.heads, prompt.tolist(), tree.choices, NEW, greedy)
        tokens, stats = llama.generate(prompt[None], None, NEW, tree=tree, eos_token_id=[], return_stats=True)
        assert tokens[0, len(prompt) :].tolist() == expected
        assert stats.acceptance_lengths == Counter(lengths)
        assert stats.batch_forwards == stats.forward_passes == 1 + len(lengths)


def test_typical_acceptance_equals_the_naive_reference(llama):
    ids, mask = prompts()
    settings = dict(epsilon=0.2, delta=0.6, temperature=2.0)
    differs = False
    for row in range(4):
        prompt = ids[row][mask[row].bool()]
        expected, lengths = naive_decode(
            llama.base_model, llama.heads, prompt.tolist(), BUSHY.choices, NEW, typical(**settings)
        )
        tokens, stats = llama.generate(
            prompt[None], None, NEW, tree=BUSHY, acceptance="typical", **settings, eos_token_id=[], return_stats=True
        )
        assert tokens[0, len(prompt) :].tolist() == expected
        assert stats.acceptance_lengths == Counter(lengths)
        differs |= not torch.equal(tokens, llama.generate(prompt[None], None, NEW, eos_token_id=[]))
    assert differs


def test_a_batch_has_the_steps_of_its_rows(llama):
    ids, mask = prompts()
    _, together = llama.generate(ids, mask, NEW, tree=BUSHY, eos_token_id=[], return_stats=True)
    alone = [
        llama.generate(ids[row : row + 1], mask[row : row + 1], NEW, tree=BUSHY, eos_token_id=[], return_stats=True)[1]
        for row in range(4)
    ]
    assert together.acceptance_lengths == sum((stats.acceptance_lengths for stats in alone), start=Counter())
    assert together.forward_passes == sum(stats.forward_passes for stats in alone)
    assert together.batch_forwards == max(stats.batch_forwards for stats in alone)
    assert together.emitted_tokens == 4 * NEW


def test_heads_run_on_the_accepted_position_only(llama, monkeypatch):
    shapes = []
    run = llama.draft_logits
    monkeypatch.setattr(
        llama, "draft_logits", lambda hidden, n: shapes.append((tuple(hidden.shape), n)) or run(hidden, n)
    )
    llama.generate(*prompts(), max_new_tokens=8, tree=BUSHY, eos_token_id=[])
    assert shapes
    assert all(shape[1:] == (HIDDEN,) and shape[0] <= 4 and heads <= 4 for shape, heads in shapes)


# Sampling


@pytest.mark.parametrize("tree", ["none", "bushy"])
def test_rejection_sampling_has_the_base_models_distribution(tree):
    """Chi-square over all 125 continuations of three tokens; false alarms at FALSE_ALARM."""
    vocab, temperature, draws, length = 5, 1.7, 20_000, 3
    model = make_model("llama", vocab_size=vocab, eos_token_id=None).eval()
    medusa = MedusaModel(model, random_heads(num_heads=2, vocab=vocab))
    prompt = [3, 1, 4]
    continuations = list(itertools.product(range(vocab), repeat=length))
    texts = torch.tensor([prompt + list(continuation) for continuation in continuations])
    with torch.no_grad():
        log_p = torch.log_softmax(model(texts).logits.double() / temperature, -1)[:, len(prompt) - 1 : -1]
    expected = draws * log_p.gather(-1, texts[:, len(prompt) :, None]).sum((1, 2)).exp()
    torch.manual_seed(0)
    candidates = Tree() if tree == "none" else Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 2)])
    tokens, stats = medusa.generate(
        torch.tensor([prompt]).expand(draws, -1),
        None,
        length,
        tree=candidates,
        do_sample=True,
        temperature=temperature,
        return_stats=True,
    )
    index = (tokens[:, len(prompt) :] * torch.tensor([vocab**2, vocab, 1])).sum(-1)
    found = torch.bincount(index, minlength=vocab**length).double()
    assert expected.min() >= 5
    assert chisquare(found.numpy(), expected.numpy() * (draws / expected.sum().item())).pvalue > FALSE_ALARM
    assert (stats.acceptance_length > 1.1) == (tree == "bushy")


def test_sampling_at_a_low_temperature_is_greedy(llama):
    ids, mask = prompts()
    expected = llama.generate(ids, mask, NEW)
    for acceptance in ("rejection", "typical"):
        sampled = llama.generate(ids, mask, NEW, do_sample=True, acceptance=acceptance, temperature=1e-4)
        assert torch.equal(sampled, expected)


def test_sampling_repeats_with_the_same_seed(llama):
    ids, mask = prompts()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(llama.generate(ids, mask, NEW, do_sample=True, temperature=3.0))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# Arguments


def test_streamer_gets_the_prompt_and_every_steps_tokens(llama):
    class Recorder:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value.tolist())

        def end(self):
            self.ended = True

    recorder = Recorder()
    ids = prompts()[0][:1]
    tokens, stats = llama.generate(ids, None, NEW, streamer=recorder, return_stats=True)
    assert recorder.ended
    assert recorder.values[0] == ids.tolist()
    assert list(itertools.chain(*recorder.values[1:])) == tokens[0, ids.shape[1] :].tolist()
    assert len(recorder.values) == 1 + stats.batch_forwards
    with pytest.raises(ValueError, match="a streamer takes one prompt, the batch has 4"):
        llama.generate(*prompts(), streamer=recorder)


def test_transformers_text_streamer_prints_the_text(llama, capsys):
    class Letters:
        def decode(self, tokens, **_):
            return " ".join(map(str, tokens)) + " "

    ids = prompts()[0][:1]
    tokens = llama.generate(ids, None, 9, streamer=TextStreamer(Letters(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(token) for token in tokens[0, 9:].tolist()]


def test_padding_is_found_by_its_token_where_no_mask_is_given(llama):
    ids, mask = prompts()
    assert torch.equal(llama.generate(ids, max_new_tokens=NEW), llama.generate(ids, mask, NEW))


def test_special_tokens_come_from_the_generation_config(llama):
    ids, mask = prompts()
    free = llama.generate(ids, mask, NEW, eos_token_id=[])
    eos = free[0, 12].item()
    default = llama.base_model.generation_config.eos_token_id
    llama.base_model.generation_config.eos_token_id = [eos]
    try:
        stopped = llama.generate(ids, mask, NEW)
        assert torch.equal(stopped, plain(llama.base_model, ids, mask))
    finally:
        llama.base_model.generation_config.eos_token_id = default
    assert not torch.equal(stopped, free)


def test_learned_positions_are_used_up_to_the_last_one():
    """GPT-2 has no position after its context; a tree must not ask for one."""
    model = make_model("gpt2", n_positions=32, max_position_embeddings=32).eval()
    ids, mask = prompts(length=9)
    medusa = MedusaModel(model, random_heads())
    expected = plain(model, ids, mask, 23, eos_token_id=None, pad_token_id=0)
    assert torch.equal(medusa.generate(ids, mask, 23, eos_token_id=[], pad_token_id=0), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "options", "message"),
    [
        (torch.zeros(1, 0).long(), None, {}, "prompt 0 is empty, expected at least one token"),
        (torch.zeros(0, 3).long(), None, {}, "the batch is empty"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), {}, "prompt 1 is empty"),
        (torch.zeros(1, 3).long(), None, {}, "prompt 0 is empty"),  # nothing but padding
        (torch.ones(1, 3).long(), torch.tensor([[1, 1, 0]]), {}, "padded on the right or inside"),
        (torch.ones(1, 128).long(), None, {}, "a prompt has 128 tokens, but the model's context has 128: shorten it"),
        (torch.ones(1, 100).long(), None, {"max_new_tokens": 29}, "set max_new_tokens to at most 28"),
        (torch.ones(1, 3).long(), None, {"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        (torch.ones(3).long(), None, {}, r"input_ids is \[3\] and attention_mask \[3\], expected both"),
        (torch.ones(1, 3).long(), None, {"tree": "oak"}, "unknown tree oak"),
        (torch.ones(1, 3).long(), None, {"tree": chain(6)}, "tree has depth 6, but there are 5 heads"),
        (torch.ones(1, 3).long(), None, {"tree": Tree(((131,),))}, "rank 131 of a head, but only ranks 0 to 130"),
        (torch.ones(1, 3).long(), None, {"do_sample": True, "temperature": 0}, "temperature is 0, expected above 0"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line(llama, ids, mask, options, message):
    with pytest.raises(ValueError, match=message) as error:
        llama.generate(ids, mask, **options)
    assert "\n" not in str(error.value)


def test_heads_of_another_size_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is \[131, 32\].*trained with one of \[200, 32\]"):
        MedusaModel(model, random_heads(vocab=200))
    with pytest.raises(ValueError, match=r"is \[131, 32\].*one of \[131, 48\]"):
        MedusaModel(model, random_heads(hidden=48))


def test_model_is_put_into_evaluation_mode_and_keeps_its_modules():
    model = make_model("llama").train()
    names = [name for name, _ in model.named_modules()]
    medusa = MedusaModel(model, randomize(MedusaHeads(HIDDEN, VOCAB, 2)))
    assert not model.training
    assert not medusa.heads.training
    assert [name for name, _ in model.named_modules()] == names
