"""Every cause of a low acceptance is named, and a server as it should be is not blamed for anything."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from conftest import VOCAB, add_lora, make_model
from decoding_models import fitted_heads, prompts, random_heads, varied_model
from fake_vllm_server import FakeVllm, serving

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.live.check_server import Chat, Report, check_server
from axolotl_medusa.live.server import Server, ServerError

NUM_HEADS = 3
TOKENS = 24
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model():
    return varied_model(eos_token_id=None)


@pytest.fixture(scope="module")
def texts():
    ids, mask = prompts(batch=8)
    return ids, torch.ones_like(mask)


@pytest.fixture(scope="module")
def heads(model, texts):
    """Heads that are often right on the prompts' continuations, the farther ahead the less, with biases that matter."""
    found = fitted_heads(model, *texts, num_heads=NUM_HEADS, tokens=TOKENS, bias_scale=6.0)
    torch.manual_seed(4)
    with torch.no_grad():
        for index, share in enumerate((0.25, 0.45, 0.6)):
            layer = found.output_layer(index)
            layer.weight += share * layer.weight.std() * torch.randn_like(layer.weight)
    return found


def chats_of(texts, input_ids=None) -> list[Chat]:
    return [Chat(MESSAGES, row) for row in (input_ids or texts[0].tolist())]


def check(fake: FakeVllm, model, heads, texts, chats: Sequence[Chat] | None = None) -> Report:
    chats = chats_of(texts) if chats is None else chats
    if fake.chat_ids is None:
        rendered = iter([list(chat.input_ids) for chat in chats])
        fake.chat_ids = lambda messages: next(rendered)
    with serving(fake) as address:
        return check_server(Server(address), MedusaModel(model, copy.deepcopy(heads)), chats, TOKENS)


def reordered(heads, order):
    other = copy.deepcopy(heads)
    other.load_state_dict(
        {
            f"{place}.{name.partition('.')[2]}": tensor
            for name, tensor in heads.state_dict().items()
            for place, head in enumerate(order)
            if name.partition(".")[0] == str(head)
        }
    )
    return other


def zeroed(heads, *kinds):
    other = copy.deepcopy(heads)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith(kinds):
                parameter.zero_()
    return other


def test_server_as_it_should_be_is_not_blamed(model, heads, texts):
    fake = FakeVllm(model, heads)
    report = check(fake, model, heads, texts)
    assert report.causes == []
    assert report.same_chats == (8, 8) and report.own == 1.0 and report.tokens == 8 * TOKENS
    assert report.moved < 1e-5
    assert report.heads.served.accepted == pytest.approx(report.heads.predicted.accepted, abs=0.03)
    assert report.heads.served.accepted[0] > 0.5, "nothing was compared"
    assert all(request["temperature"] == 0 and request["repetition_penalty"] == 1 for request in fake.requests)


def test_other_chat_template_is_named(model, heads, texts):
    fake = FakeVllm(model, heads, chat_ids=lambda messages: [5, 6, 7])
    (cause,) = check(fake, model, heads, texts).causes
    assert "chat template is another" in cause and "8 of 8 chats" in cause


def test_thinking_mode_is_named(model, heads, texts):
    chats = [Chat(MESSAGES, chat.input_ids, {"enable_thinking: true": [5, 6, 7]}) for chat in chats_of(texts)]
    fake = FakeVllm(model, heads, chat_ids=lambda messages: [5, 6, 7])
    (cause,) = check(fake, model, heads, texts, chats).causes
    assert "renders chats with enable_thinking: true" in cause


def test_server_without_a_chat_template_is_named(model, heads, texts):
    fake = FakeVllm(model, heads)
    with serving(fake) as address:
        report = check_server(Server(address), MedusaModel(model, copy.deepcopy(heads)), chats_of(texts), TOKENS)
    assert len(report.causes) == 1 and "refuses chats" in report.causes[0]


def test_other_base_model_is_named(model, heads, texts):
    (cause,) = check(FakeVllm(varied_model(seed=3, eos_token_id=None), heads), model, heads, texts).causes
    assert "runs another model" in cause


def test_base_model_without_its_adapter_is_named(heads, texts):
    adapted = add_lora(varied_model(eos_token_id=None)).eval()
    fake = FakeVllm(varied_model(eos_token_id=None), heads)
    (cause,) = check(fake, adapted, heads, texts).causes
    assert "base model without the adapter" in cause


def coarse(model, step):
    """The model with its weights rounded, row by row, as quantisation does."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                scale = parameter.abs().amax(-1, keepdim=True).clamp_min(1e-9) * step
                parameter.copy_((parameter / scale).round() * scale)
    return other


@pytest.mark.parametrize("said", [None, "awq"])
def test_quantised_weights_are_named_with_how_far_they_moved(model, heads, texts, said, tmp_path):
    content = {"quantization_config": {"quant_method": said}} if said else {}
    (tmp_path / "config.json").write_text(json.dumps(content))
    report = check(FakeVllm(coarse(model, 0.02), heads, root=str(tmp_path)), model, heads, texts)
    assert "as by quantisation" in report.causes[0] and f"moved by {report.moved:.3f}" in report.causes[0]
    assert ("its config.json says awq" in report.causes[0]) is (said is not None)
    assert report.moved > 0.01 and report.own < 0.95


def test_model_that_rounds_a_little_counts_as_ours(model, heads, texts):
    """As one that computes in bf16 does."""
    report = check(FakeVllm(coarse(model, 0.003), heads), model, heads, texts)
    assert report.causes == [] and report.moved > 0.001


def test_heads_of_another_order_are_named_with_the_order(model, heads, texts):
    (cause,) = check(FakeVllm(model, reordered(heads, (2, 0, 1))), model, heads, texts).causes
    assert "in another order: heads 2, 0, 1 at places 0 to 2" in cause


def test_missing_biases_are_named(model, heads, texts):
    (cause,) = check(FakeVllm(model, zeroed(heads, "bias")), model, heads, texts).causes
    assert cause.startswith("the server has the heads without their biases") and "medusa_fc_bias" in cause


def test_server_without_heads_is_named(model, heads, texts):
    report = check(FakeVllm(model), model, heads, texts)
    assert len(report.causes) == 1 and "it does not speculate" in report.causes[0]
    assert report.heads.served is None and report.heads.predicted.accepted[0] > 0.5


def test_server_that_drafts_nothing_is_named(model, heads, texts):
    (cause,) = check(FakeVllm(model, heads, length=lambda drafted: 0), model, heads, texts).causes
    assert "drafts nothing" in cause


def test_adaptive_server_is_held_to_the_share_of_its_drafts(model, heads, texts):
    report = check(FakeVllm(model, heads, length=lambda drafted: 1 + drafted % 2), model, heads, texts)
    assert report.causes == [] and report.heads.adaptive
    (cause,) = check(
        FakeVllm(model, zeroed(heads, "bias"), length=lambda drafted: 1 + drafted % 2), model, heads, texts
    ).causes
    assert "--fixed" in cause


def test_others_that_ask_at_the_same_time_are_noticed(model, heads, texts):
    (cause,) = check(FakeVllm(model, heads, extra_tokens=5), model, heads, texts).causes
    assert "others asked the server" in cause


@pytest.mark.parametrize(
    "options", [{"logprobs": False}, {"given": lambda found: [None] * len(found)}, {"given": lambda found: found[1:]}]
)
def test_server_without_logprobs_is_compared_by_its_tokens(model, heads, texts, options):
    report = check(FakeVllm(model, heads, **options), model, heads, texts)
    assert report.causes == [] and report.moved is None and report.own == 1.0


def test_server_without_token_ids_is_refused(model, heads, texts):
    with pytest.raises(ServerError, match=r"answers without token_ids, expected vLLM 0.10.2 or newer"):
        check(FakeVllm(model, heads, token_ids=False), model, heads, texts)


def test_heads_are_as_they_were_afterwards(model, heads, texts):
    medusa = MedusaModel(model, copy.deepcopy(heads))
    with serving(FakeVllm(model, heads, chat_ids=lambda messages: [1])) as address:
        check_server(Server(address), medusa, [Chat(None, [4, 5, 6])], 4)
    assert all(torch.equal(a, b) for a, b in zip(medusa.heads.parameters(), heads.parameters(), strict=True))


def test_fewer_places_than_heads_are_compared(model, heads, texts):
    two = type(heads)(heads.hidden_size, VOCAB, 2)
    two.load_state_dict({name: tensor for name, tensor in heads.state_dict().items() if not name.startswith("2.")})
    report = check(FakeVllm(model, two), model, heads, texts)
    assert report.causes == [] and len(report.heads.served.accepted) == 2


@pytest.mark.parametrize("url", ["ftp://host", "http://", ""])
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(ValueError, match=r"expected one such as http://127.0.0.1:8000"):
        Server(url)


def test_server_that_is_not_there_is_one_line():
    with pytest.raises(ServerError, match=r"127.0.0.1:9 cannot be reached") as error:
        Server("127.0.0.1:9/v1/")
    assert "\n" not in str(error.value)


def test_shared_heads_use_the_models_own_output_layer(texts):
    model = make_model(eos_token_id=None).eval()
    shared = random_heads(num_heads=2, form="shared")
    report = check(FakeVllm(model, shared), model, shared, texts)
    assert report.causes == []
