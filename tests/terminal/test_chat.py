"""What a terminal shows: text as it comes, colours, commands, history."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import randomize
from decoding_models import varied_model
from example_tokenizers import SPECIAL, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from axolotl_medusa.decoding.medusa_model import MedusaModel
from axolotl_medusa.decoding.running_rows import GenerationStats
from axolotl_medusa.decoding.tree import chain
from axolotl_medusa.model.heads import MedusaHeads
from axolotl_medusa.terminal.chat import Answerer, Chat, TextPrinter, speed_line

GREEN, PLAIN = "\033[32m", "\033[0m"


def tokens(text):
    return make_tokenizer("zephyr")(text)["input_ids"]


def printed(steps, colour=False, tokenizer=None):
    out = io.StringIO()
    tokenizer = tokenizer or make_tokenizer("zephyr")
    printer = TextPrinter(tokenizer, out, colour)
    printer.put(torch.tensor([tokenizer("the prompt")["input_ids"]]))
    shown = []
    for step in steps:
        printer.put(torch.tensor(step))
        shown.append(out.getvalue())
    printer.end()
    return shown, out.getvalue()


def test_text_is_printed_step_by_step_without_the_prompt():
    assert printed([tokens("a"), tokens("b c\n"), tokens("d")]) == (["a", "ab c\n", "ab c\nd"], "ab c\nd\n")


def test_accepted_draft_tokens_are_coloured_and_the_models_own_are_not():
    _, whole = printed([tokens("a"), tokens("bc")], colour=True)
    assert whole == f"a{GREEN}b{PLAIN}c\n"


def test_characters_wait_for_all_their_bytes():
    bytes_ = tokens("é")
    assert len(bytes_) == 2
    assert printed([bytes_[:1], bytes_[1:], tokens("x")])[0] == ["", "é", "éx"]
    assert printed([tokens("x"), bytes_[:1]]) == (["x", "x"], "x\ufffd\n")


def sentencepiece_tokenizer():
    """One token a character or byte, decoded as Llama's tokenizers are: the first blank of a text is left out."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", *"abcdefghijklmnopqrstuvwxyz():"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "▁")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", ["def f():\n    a\n   b\n\n  c\n\n\n d", "a\n é\n  ü\n", "\n  a\n b"])
@pytest.mark.parametrize("per_step", [1, 3])
def test_lines_keep_their_indentation_with_sentencepiece(per_step, text):
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    steps = [ids[start : start + per_step] for start in range(0, len(ids), per_step)]
    assert printed(steps, tokenizer=tokenizer)[1] == text + "\n"


def test_long_answer_is_decoded_a_line_at_a_time():
    tokenizer, longest = make_tokenizer("zephyr"), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: longest.append(len(ids)) or decode(ids, **options)
    assert printed([tokens("abc\n")] * 50, tokenizer=tokenizer)[1] == "abc\n" * 50 + "\n"
    assert max(longest) == 8


def test_special_tokens_are_not_shown():
    assert printed([tokens("a"), [SPECIAL.index("</s>")]])[1] == "a\n"


@pytest.fixture(scope="module")
def model():
    base = varied_model(vocab_size=300, eos_token_id=None)
    return MedusaModel(base, randomize(MedusaHeads(32, 300, 2, 1)))


def answerer(model, **changes):
    settings = {"temperature": 0.0, "max_new_tokens": 6, "out": io.StringIO(), **changes}
    return Answerer(model, settings.pop("tokenizer", make_tokenizer("zephyr")), chain(2), **settings)


def test_answer_is_the_models_own_greedy_text(model):
    tokenizer, found = make_tokenizer("zephyr"), answerer(model)
    text, speed = found.answer([{"role": "user", "content": "Hi"}])
    prompt = tokenizer("<|user|>\nHi</s>\n", return_tensors="pt").input_ids
    expected = model.base_model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.out.getvalue() == text + "\n"
    assert speed.startswith("6 tokens, ") and "acceptance length" in speed


def test_answers_at_a_temperature_are_drawn(model):
    torch.manual_seed(0)
    texts = {answerer(model, temperature=2.0).answer([{"role": "user", "content": "Hi"}])[0] for _ in range(4)}
    assert len(texts) > 1
    with pytest.raises(ValueError, match="temperature is -1, expected 0"):
        answerer(model, temperature=-1)


def test_answers_end_where_the_context_does(model):
    _, speed = answerer(model, max_new_tokens=500).answer([{"role": "user", "content": "x" * 100}])
    used = len(tokens("<|user|>\n" + "x" * 100 + "</s>\n"))
    assert speed.startswith(f"{128 - used} tokens")


def test_speed_line_gives_tokens_per_second_and_acceptance_length():
    stats = GenerationStats(emitted_tokens=30, forward_passes=12)
    assert speed_line(stats, 2.0) == "30 tokens, 15.0 tokens/s, acceptance length 2.50"


class Scripted:
    """An `Answerer` with answers of its own."""

    def __init__(self, failing=()):
        self.tokenizer, self.out, self.asked, self.failing = make_tokenizer("zephyr"), io.StringIO(), [], failing

    def answer(self, messages):
        self.asked.append([message["content"] for message in messages])
        if messages[-1]["content"] in self.failing:
            raise ValueError("a prompt has 200 tokens")
        return f"to {messages[-1]['content']}", "the speed"


def talk(lines, **options):
    answers, rest = Scripted(**options), iter(lines)

    def read(_):
        for line in rest:
            return line
        raise EOFError

    chat = Chat(answers, read)
    chat.run()
    return answers.asked, answers.out.getvalue().splitlines()[1:], list(rest)


def test_history_goes_along_until_it_is_reset():
    asked, said, _ = talk(["one", "", " two ", "/reset", "three"])
    assert asked == [["one"], ["one", "to one", "two"], ["three"]]
    assert said == ["[the speed]", "[the speed]", "[nothing was said yet]", "[the speed]"]


def test_exit_ends_the_chat_and_unknown_commands_are_not_sent():
    asked, said, rest = talk(["/help me", "/exit", "one"])
    assert (asked, rest) == ([], ["one"])
    assert said == ["[unknown command /help: expected /reset or /exit]"]


def test_a_turn_that_cannot_be_answered_is_not_kept():
    asked, said, _ = talk(["one", "long", "two"], failing=("long",))
    assert asked[-1] == ["one", "to one", "two"]
    assert said[1] == "[not answered: a prompt has 200 tokens; /reset begins anew]"


def test_a_chat_needs_a_chat_template(model):
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which a chat needs"):
        Chat(answerer(model, tokenizer=make_tokenizer("vicuna")), input).run()
