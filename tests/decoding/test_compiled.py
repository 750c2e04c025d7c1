"""Compiled decoding: the same tokens and steps as without, over a cache whose shapes never change."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
import torch._inductor.config
from conftest import add_lora, make_model
from decoding_models import CYCLE, counting_heads, counting_model, fitted_heads, prompts, random_heads, varied_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from axolotl_medusa.decoding import compiled as compiled_module
from axolotl_medusa.decoding.acceptance import accept_greedy
from axolotl_medusa.decoding.compiled import COLUMNS
from axolotl_medusa.decoding.loop import Decoding
from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.tree import Tree, chain, default_tree
from axolotl_medusa.measuring.step_times import measure_steps
from axolotl_medusa.model.anatomy import backbone

NEW = 24
TOLERANCE = 1e-3  # as in test_target_cache


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def traced(model, heads, backend: object = "eager") -> MedusaModel:
    """A model whose forwards are traced, guarded and replayed, but by default not turned into other kernels."""
    medusa = MedusaModel(model, heads)
    medusa._compile_backend = backend
    return medusa


def assert_nothing_changes(medusa, ids, mask, tree, **options) -> None:
    expected, plain_stats = medusa.generate(ids, mask, NEW, tree=tree, return_stats=True, **options)
    found, stats = medusa.generate(ids, mask, NEW, tree=tree, return_stats=True, compile=True, **options)
    assert torch.equal(found, expected)
    assert stats == plain_stats


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("batch", [1, 4])
def test_compiled_tokens_and_steps_are_those_without(family, batch):
    model = varied_model(family)
    ids, mask = prompts(batch)
    medusa = traced(model, fitted_heads(model, ids, mask))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for tree in (Tree(), chain(5), default_tree()):
        assert_nothing_changes(medusa, ids, mask, tree)
        assert torch.equal(medusa.generate(ids, mask, NEW, tree=tree, compile=True), expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma2-softcap", {"sliding_window": 6}),
        ("gpt2", {}),
    ],
)
def test_compiled_tokens_are_those_without_for_other_attention(family, changes):
    model = varied_model(family, **changes)
    model.set_attn_implementation("eager" if family == "mistral" else "sdpa")
    ids, mask = prompts()
    assert_nothing_changes(traced(model, fitted_heads(model, ids, mask)), ids, mask, default_tree(nodes=16))


def test_compiled_tokens_are_those_without_for_unmerged_adapters():
    ids, mask = prompts()
    assert_nothing_changes(traced(add_lora(make_model("llama")).eval(), random_heads()), ids, mask, chain(3))


def test_rows_that_stopped_stay_and_change_nothing():
    """With one EOS in eight tokens rows stop at different steps, some within an accepted path."""
    model = varied_model()
    ids, mask = prompts()
    medusa = traced(model, fitted_heads(model, ids, mask))
    eos = list(range(0, model.config.vocab_size, 8))
    assert_nothing_changes(medusa, ids, mask, chain(3), eos_token_id=eos, pad_token_id=0)
    tokens = medusa.generate(ids, mask, NEW, tree=chain(3), eos_token_id=eos, pad_token_id=0, compile=True)
    ends = [next((i for i, token in enumerate(row.tolist()) if token in eos), NEW) for row in tokens[:, 9:]]
    assert len(set(ends)) > 2, "rows must stop at different times in this test"


@torch.no_grad()
def test_rows_that_stopped_take_no_more_columns():
    """All drafts are right, so a row that went on would grow by four columns a step."""
    medusa = traced(counting_model(), counting_heads([True] * 3))
    ids = torch.tensor([[1], [9]])
    settings = dict(tree=chain(3), rule=accept_greedy, max_new_tokens=12, eos_token_ids=[12])
    decoding = Decoding(medusa, ids, torch.ones_like(ids), **settings, compiled=medusa.compiled())
    while decoding.rows:
        decoding.step()
    assert decoding.tokens == [list(range(2, 13)), [10, 11, 12]]
    assert decoding.target.end.tolist() == [1 + 12, 1 + 4]


@pytest.mark.parametrize("tree", [chain(1), chain(5), default_tree(nodes=16)], ids=["chain-1", "chain-5", "default-16"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_length_around_a_caches_end_fits(batch, tree, monkeypatch):
    """A row that stops with accepted drafts goes past its last token, and the others' nodes come after its columns."""
    monkeypatch.setattr(compiled_module, "COLUMNS", 8)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # shapes are what matters here
    half = CYCLE // 2
    heads, wrong = counting_heads([True] * 5), counting_heads([False] * 5)
    with torch.no_grad():
        for index in range(5):
            heads.output_layer(index).weight[:, half:] = wrong.output_layer(index).weight[:, half:]
    medusa = MedusaModel(counting_model(), heads)
    for prompt in range(1, 9):
        ids = torch.full((batch, prompt), 3)
        ids[:, -1] = torch.tensor([0, half, 3][:batch])  # heads are right, wrong, soon wrong
        for new in range(1, 10):
            expected = medusa.generate(ids, torch.ones_like(ids), new, tree=tree)
            assert torch.equal(medusa.generate(ids, torch.ones_like(ids), new, tree=tree, compile=True), expected)


@torch.no_grad()
def test_compiled_cache_after_every_step_is_that_of_the_text():
    model = varied_model()
    ids, mask = prompts()
    medusa = traced(model, fitted_heads(model, ids, mask))
    decoding = Decoding(
        medusa, ids, mask, tree=chain(4), rule=accept_greedy, max_new_tokens=NEW, compiled=medusa.compiled()
    )
    steps = 0
    while decoding.rows and len(decoding.rows) == 4:
        decoding.step()
        steps += 1
        for row in range(4 if len(decoding.rows) == 4 else 0):
            text = ids[row][mask[row].bool()].tolist() + decoding.tokens[row][:-1]
            scratch = DynamicCache()
            backbone(model)(input_ids=torch.tensor([text]), past_key_values=scratch, use_cache=True)
            start, end = decoding.target.start[row].item(), decoding.target.end[row].item()
            assert end - start == len(text)
            for found, expected in zip(decoding.target.cache.layers, scratch.layers, strict=True):
                assert found.keys.shape[2] == COLUMNS
                for name in ("keys", "values"):
                    ours, own = getattr(found, name)[row, :, start:end], getattr(expected, name)[0]
                    assert (ours - own).abs().max() <= TOLERANCE * own.abs().max()
    assert steps > 5


def test_one_forward_is_compiled_for_all_steps_and_texts_of_a_shape():
    """Two texts of other lengths, rows that stop, and a tree of another size."""
    model = varied_model()
    ids, mask = prompts()
    counter = CompileCounterWithBackend("eager")
    medusa = traced(model, fitted_heads(model, ids, mask), counter)
    eos = list(range(0, model.config.vocab_size, 8))
    for new in (NEW, 2 * NEW):
        medusa.generate(ids, mask, new, tree=chain(3), eos_token_id=eos, pad_token_id=0, compile=True)
    medusa.generate(ids[:, 2:], mask[:, 2:], NEW, tree=chain(3), compile=True)
    frames = counter.frame_count
    assert frames == 1
    medusa.generate(ids, mask, NEW, tree=chain(2), compile=True)
    assert counter.frame_count == 2


def test_more_shapes_than_torch_allows_by_default_are_compiled():
    model = varied_model()
    counter = CompileCounterWithBackend("eager")
    medusa = traced(model, random_heads(), counter)
    ids, mask = prompts(1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for nodes in range(1, 5):
            medusa.generate(ids, mask, 2, tree=default_tree(nodes=nodes), compile=True)
    assert counter.frame_count == 4


def test_decoders_that_run_at_the_same_time_have_caches_of_their_own():
    model = varied_model()
    ids, mask = prompts(1)
    medusa = traced(model, fitted_heads(model, *prompts()))
    rule = dict(tree=chain(3), rule=accept_greedy, max_new_tokens=NEW, compiled=medusa.compiled())
    both = [Decoding(medusa, text, mask, **rule) for text in (ids, ids.flip(1))]
    with torch.no_grad():
        while any(decoding.rows for decoding in both):
            for decoding in both:
                if decoding.rows:
                    decoding.step()
    for decoding, text in zip(both, (ids, ids.flip(1)), strict=True):
        assert decoding.tokens[0] == medusa.generate(text, mask, NEW, eos_token_id=[])[0, 9:].tolist()
    times = measure_steps(medusa, ids[0].tolist(), [chain(1), chain(2)], rounds=2, compile=True)
    assert list(times.ratios) == [2, 3]


def test_cache_is_used_again_for_the_next_text_of_its_size():
    medusa = traced(varied_model(), random_heads())
    made = []
    for begun in (NEW, 3, 2 * NEW):  # the second is left before its end
        ids, mask = prompts(1)
        decoding = Decoding(
            medusa, ids, mask, tree=chain(2), rule=accept_greedy, max_new_tokens=begun, compiled=medusa.compiled()
        )
        made.append(id(decoding.target.cache))
        with torch.no_grad():
            decoding.step()
        del decoding
    assert len(set(made)) == 1 and len(medusa.compiled()._free) == 1


def test_caches_have_as_many_columns_as_are_needed():
    compiled = traced(varied_model(), random_heads()).compiled()
    cache, columns = compiled.cache(1, 10)
    assert columns == COLUMNS
    compiled.give_back(cache, 1, columns)
    assert compiled.cache(1, COLUMNS)[0] is cache
    assert compiled.cache(1, COLUMNS)[0] is not cache
    assert compiled.cache(1, COLUMNS + 1)[1] == 2 * COLUMNS


def test_quantized_models_are_refused():
    model = make_model("llama").eval()
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"compile=True with a quantized LlamaForCausalLM: .* leave it out"):
        MedusaModel(model, random_heads()).generate(*prompts(), compile=True)


def test_missing_compiler_is_one_line():
    message = r"torch.compile failed .*needs a C\+\+ compiler .*--compile"
    without = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with without, pytest.raises(RuntimeError, match=message) as error:
        MedusaModel(varied_model(), random_heads()).generate(*prompts(1), compile=True)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(sys.platform != "linux", reason="compiled kernels are tried on Linux only")
def test_compiled_kernels_write_the_same_tokens():
    model = varied_model()
    ids, mask = prompts()
    assert_nothing_changes(MedusaModel(model, fitted_heads(model, ids, mask)), ids, mask, chain(5))
