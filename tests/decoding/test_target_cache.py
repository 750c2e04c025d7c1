"""Trees over transformers' KV cache: after every step the cache is what the text alone would have left."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conftest import FAMILIES, VOCAB, make_model
from decoding_models import fitted_heads, prompts, random_heads, varied_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from axolotl_medusa.decoding.acceptance import accept_greedy, accept_rejection, tree_tensors
from axolotl_medusa.decoding.loop import Decoding
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.plain import PlainDecoding
from axolotl_medusa.decoding.target_cache import TargetCache, check_target, mixes_layer_types, sliding_window
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.decoding.tree_chooser import PLAIN
from axolotl_medusa.model.anatomy import backbone

TOLERANCE = 1e-3  # keys and values are of size 1 to 10 and come from sums in another order
BUSHY = Tree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 1)])


SLIDING = [
    ("mistral", {"sliding_window": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("gemma2-softcap", {"sliding_window": 6}),
]
"""Families with windows, and sizes that make them act."""


def text_cache(model, text: list[int]) -> DynamicCache:
    cache = DynamicCache()
    backbone(model)(input_ids=torch.tensor([text]), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def assert_cache_is_that_of_the_text(model, decoding: Decoding, ids, mask) -> None:
    target = decoding.target
    for index, row in enumerate(decoding.rows):
        text = ids[row][mask[row].bool()].tolist() + decoding.tokens[row][:-1]
        start, end = target.start[index].item(), target.end[index].item()
        assert end - start == len(text)
        for found, expected in zip(target.cache.layers, text_cache(model, text).layers, strict=True):
            for name in ("keys", "values"):
                first = target.width - getattr(found, name).shape[2]  # sliding layers drop what no later token sees
                begin = max(start, first)
                ours = getattr(found, name)[index, :, begin - first : end - first]
                scratch = getattr(expected, name)[0, :, begin - start :]
                assert (ours - scratch).abs().max() <= TOLERANCE * scratch.abs().max()
    assert target.width == target.end.max().item()


def decode(model, medusa, ids, mask, tree, rule, new=20, eos=()) -> Decoding:
    decoding = Decoding(medusa, ids, mask, tree=tree, rule=rule, max_new_tokens=new, eos_token_ids=eos)
    with torch.no_grad():
        while decoding.rows:
            decoding.step()
            if decoding.rows:
                assert_cache_is_that_of_the_text(model, decoding, ids, mask)
    return decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_after_every_step_is_that_of_the_text(family):
    model = varied_model(family)
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    decoding = decode(model, medusa, ids, mask, BUSHY, accept_greedy)
    assert len(decoding.stats.acceptance_lengths) > 1, "rows must accept different numbers of tokens in this test"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [6, 100], ids=["past-the-window", "within-it"])
@pytest.mark.parametrize(("family", "changes"), SLIDING)
def test_plain_steps_between_trees_take_no_mask_and_no_column_that_the_window_hides(
    family, changes, window, attention, monkeypatch
):
    """As `--tree auto` decodes: its plain steps must cost what plain decoding does."""
    model = varied_model(family, **{**changes, "sliding_window": window})
    model.set_attn_implementation(attention)
    ids, mask = prompts()
    prompt = ids[:1, mask[0].bool()]
    medusa = MedusaModel(model, fitted_heads(model, prompt, torch.ones_like(prompt)))
    masks = []
    make = TargetCache._mask
    monkeypatch.setattr(TargetCache, "_mask", lambda cache, seen: masks.append(seen.shape) or make(cache, seen))
    answer = PlainDecoding(model, prompt, 24)
    while not answer.done:
        answer.step()
    expected = answer.tokens
    decoding = Decoding(
        medusa, prompt, torch.ones_like(prompt), tree=PLAIN, rule=accept_greedy, max_new_tokens=len(expected)
    )
    with torch.no_grad():
        for tree in itertools.cycle([PLAIN, PLAIN, BUSHY]):
            masks.clear()
            decoding.use(tree)
            decoding.step()
            if not decoding.rows:
                break
            assert_cache_is_that_of_the_text(model, decoding, prompt, torch.ones_like(prompt))
            columns = min(layer.keys.shape[2] for layer in decoding.target.cache.layers)
            assert columns == min(window - 1, decoding.target.width)
            assert bool(masks) is (tree is BUSHY)
    assert decoding.tokens[0] == expected


@pytest.mark.parametrize("tree", [chain(0), chain(3), default_tree()], ids=["none", "chain", "64 nodes"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 4])
def test_cache_is_that_of_the_text_for_every_tree(tree, attention, batch):
    model = varied_model()
    model.set_attn_implementation(attention)
    ids, mask = prompts(batch)
    decode(model, MedusaModel(model, fitted_heads(model, ids, mask)), ids, mask, tree, accept_greedy)


def test_cache_is_that_of_the_text_when_sampling_and_when_rows_leave():
    model = varied_model()
    ids, mask = prompts()
    medusa = MedusaModel(model, fitted_heads(model, ids, mask))
    torch.manual_seed(0)
    rule = functools.partial(accept_rejection, temperature=0.1)
    decoding = decode(model, medusa, ids, mask, BUSHY, rule, new=40, eos=range(0, VOCAB, 16))
    lengths = [len(tokens) for tokens in decoding.tokens]
    assert len(set(lengths)) > 2, "rows must leave at different times in this test"
    assert len(decoding.stats.acceptance_lengths) > 1


@pytest.mark.parametrize(("family", "changes"), SLIDING)
def test_cache_is_that_of_the_text_with_sliding_windows(family, changes):
    model = varied_model(family, **changes)
    ids, mask = prompts()
    decode(model, MedusaModel(model, fitted_heads(model, ids, mask)), ids, mask, BUSHY, accept_greedy)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nodes_see_what_plain_text_along_their_path_sees(attention):
    """Hidden states of all 64 nodes against 64 plain forwards."""
    model = varied_model("qwen3")
    model.set_attn_implementation(attention)
    ids, mask = prompts(2)
    tree = default_tree()
    torch.manual_seed(2)
    nodes = torch.randint(3, VOCAB, (2, tree.num_nodes))
    with torch.no_grad():
        target = TargetCache(model, mask)
        target.prefill(ids)
        found = target.verify(nodes, tree_tensors(tree, ids.device))
        for row in range(2):
            text = ids[row][mask[row].bool()].tolist()
            for node, path in enumerate(tree.paths):
                whole = torch.tensor([text + [nodes[row, i].item() for i in path]])
                torch.testing.assert_close(found[row, node], backbone(model)(whole)[0][0, -1], atol=1e-4, rtol=1e-4)


def test_accepted_columns_are_moved_in_place_and_the_rest_dropped():
    model = varied_model()
    ids, mask = prompts(2)
    tree = tree_tensors(BUSHY, ids.device)
    with torch.no_grad():
        target = TargetCache(model, mask)
        target.prefill(ids)
        target.verify(torch.full((2, BUSHY.num_nodes), 5), tree)
        before = [layer.keys.clone() for layer in target.cache.layers]
        pointers = [layer.keys.data_ptr() for layer in target.cache.layers]
        target.keep([BUSHY.choices.index((1, 0, 1)) + 1, 0], tree)
    path = [0, 2, 6, 9]
    assert BUSHY.paths[9] == tuple(path)
    for layer, whole, pointer in zip(target.cache.layers, before, pointers, strict=True):
        assert layer.keys.shape[2] == 9 + 4
        assert torch.equal(layer.keys[0], whole[0][:, list(range(9)) + [9 + node for node in path]])
        assert torch.equal(layer.keys[1, :, :10], whole[1, :, :10])
        assert layer.keys.data_ptr() == pointer
    assert target.end.tolist() == [13, 10]


@pytest.mark.parametrize(
    ("family", "changes", "window", "mixed"),
    [
        ("llama", {}, None, False),
        ("mistral", {"sliding_window": None}, None, False),
        ("mistral", {"sliding_window": 7}, 7, False),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, None, False),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, 7, True),
        ("gemma2-softcap", {"sliding_window": 7}, 7, True),
    ],
)
def test_sliding_window_is_read_from_the_configuration(family, changes, window, mixed):
    config = make_model(family, **changes).config
    assert sliding_window(config) == window
    assert mixes_layer_types(config) == mixed


def other_model(model_type: str, **options):
    config = AutoConfig.for_model(model_type, vocab_size=131, hidden_size=32, num_hidden_layers=2, **options)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: make_model("llama", layer_types=["full_attention", "linear_attention"]),
            "layers of type linear_attention",
        ),
        (lambda: other_model("bloom", n_head=4), "no position ids, 4-D mask and cache of keys and values"),
        (lambda: other_model("mamba", state_size=4), "layers of type linear_attention"),
    ],
    ids=["linear attention", "bloom", "mamba"],
)
def test_model_that_cannot_verify_trees_is_refused_in_one_line(model, message):
    with pytest.raises(ValueError, match=message) as error:
        check_target(model())
    assert "\n" not in str(error.value)


def test_attention_that_takes_no_mask_is_refused():
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"attention 'flash_attention_2', which takes no tree mask: load it with attn_impl"
    ):
        MedusaModel(model, random_heads())


def test_model_that_ignores_positions_is_refused(monkeypatch):
    model = varied_model()
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb, "forward", lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None].flip(-1))
    )
    with pytest.raises(ValueError, match="gives other hidden states in a tree than in plain text"):
        check_target(model)


def test_model_that_fails_on_a_tree_is_refused_with_the_reason(monkeypatch):
    model = make_model("llama")
    forward = model.model.rotary_emb.forward

    def only_plain(x, position_ids):
        if position_ids.max() < position_ids.shape[1] - 1 or position_ids.min() > 0:
            raise RuntimeError("positions must count\nup")
        return forward(x, position_ids)

    monkeypatch.setattr(model.model.rotary_emb, "forward", only_plain)
    with pytest.raises(ValueError, match=r"cannot verify a tree in one forward \(RuntimeError: positions must count\)"):
        check_target(model)


def test_model_without_memory_for_weights_is_not_tried():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_model("llama").config)
    check_target(model)
