"""data_generation/chat_template.py against transformers' own rendering, and read back at every place a text may end."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from parts import chat_template
from parts.chat_template import ChatTemplate
from parts.prompt_files import InputError, Turn
from parts.turn_reader import SplitText

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = ROOT / "tests" / "data" / "chat_templates"
CHATML_TOKENS = {"eos_token": "<|im_end|>"}
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class Format:
    """A template, and what is expected of it."""

    path: Path
    tokens: dict[str, str]
    user_prefix: str  # of the first turn, without BOS and blanks at its end
    user_stop: str
    system: str = "own"  # or "folded" into a user's text, or "refused"
    trims: bool = False
    closes_last_turn: bool = True
    kwargs: dict[str, bool] = field(default_factory=dict)

    def load(self) -> ChatTemplate:
        return ChatTemplate(self.path.read_text(), self.tokens, self.path.name)


def chat_format(name: str, *args: object, **kwargs: object) -> Format:
    return Format(TEMPLATES / f"{name}.jinja", *args, **kwargs)


TODAY = datetime.now().strftime("%d %b %Y")
LLAMA3_HEAD = f"<|start_header_id|>system<|end_header_id|>\n\nToday: {TODAY}\n\n<|eot_id|>"
FORMATS = {
    "chatml": chat_format("chatml", CHATML_TOKENS, "<|im_start|>user\n", "<|im_end|>"),
    "smollm2": chat_format(
        "chatml_default_system",
        {"bos_token": "<|im_start|>", **CHATML_TOKENS},
        "<|im_start|>system\nYou are a test.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>",
    ),
    "llama2": chat_format("llama2", LLAMA_TOKENS, "[INST]", "[/INST]", trims=True),
    "llama3": chat_format(
        "llama3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA3_HEAD + "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        trims=True,
    ),
    "vicuna": Format(
        ROOT / "examples" / "medusa" / "vicuna.jinja",
        LLAMA_TOKENS,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER:",
        "ASSISTANT:",
    ),
    "mistral": chat_format("mistral", LLAMA_TOKENS, "[INST]", "[/INST]", system="folded"),
    "gemma": chat_format(
        "gemma",
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        "<start_of_turn>user\n",
        "<end_of_turn>",
        system="refused",
        trims=True,
    ),
    "zephyr": chat_format("zephyr", LLAMA_TOKENS, "<|user|>\n", "</s>"),
    "qwen3": chat_format("qwen3", CHATML_TOKENS, "<|im_start|>user\n", "<|im_end|>"),
    "qwen3-off": chat_format(
        "qwen3", CHATML_TOKENS, "<|im_start|>user\n", "<|im_end|>", kwargs={"enable_thinking": False}
    ),
    "deepseek": chat_format("deepseek", LLAMA_TOKENS, "<|User|>", "<|Assistant|>"),
    "phi3": chat_format("phi3", {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, "<|user|>\n", "<|end|>"),
    "eager": chat_format("eager", {}, "<|user|>\n", "<|end|>", system="folded"),
    "bare-words": chat_format("bare_words", {}, "\n\n### Instruction:\n", "### Response:", closes_last_turn=False),
}

SYSTEM = {"role": "system", "content": "Answer as a pirate.\n\nBe brief [and <kind>]."}
# Blanks of all kinds around and inside; beginnings of marks that are none.
USERS = ["Hi", "  What is\n\n  1 < 2? [x] </ # ", "Say <|im_ or [/IN to me:\n```\n### a\n```\n"]
ANSWERS = ["Hello!\n\nHow\tare you? ", " - a\n - b <", "\nDone. <|", "Ünïcödé 😀 </"]


def conversation(rounds: int, system: bool = False) -> list[Turn]:
    turns = [dict(SYSTEM)] if system else []
    for user, answer in zip(USERS[:rounds], ANSWERS, strict=False):
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return turns


CONVERSATIONS = [conversation(rounds, system) for rounds in (1, 2, 3) for system in (False, True)]
FORMAT = pytest.mark.parametrize("name", FORMATS)
CHAT = pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda turns: f"{len(turns)}-{turns[0]['role']}")


def as_rendered(turns: list[Turn], chat_format: Format) -> list[Turn]:
    """The turns that a text in this format can give back."""
    if chat_format.trims:
        turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
    if chat_format.system == "folded" and turns[0]["role"] == "system":
        system, *turns = (dict(turn) for turn in turns)
        index = -2 if chat_format.path.stem == "mistral" else 0
        turns[index]["content"] = f"{system['content']}\n\n{turns[index]['content']}"
    return turns


def rendered_by_transformers(chat_format: Format, turns: list[Turn], generation: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **chat_format.tokens)
    tokenizer.chat_template = chat_format.path.read_text()
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **chat_format.kwargs)


@FORMAT
@CHAT
@pytest.mark.parametrize("generation", [False, True])
def test_render_of_each_format_equals_transformers(name: str, turns: list[Turn], generation: bool) -> None:
    chat_format = FORMATS[name]
    if turns[0]["role"] == "system" and chat_format.system == "refused":
        with pytest.raises(InputError, match="No system role"):
            chat_format.load().render(turns, generation)
        return
    shown = turns[:-1] if generation else turns
    expected = rendered_by_transformers(chat_format, shown, generation)
    assert chat_format.load().render(shown, generation, **chat_format.kwargs) == expected
    assert expected  # not both empty


def test_render_with_tojson_and_loop_controls_equals_transformers(tmp_path: Path) -> None:
    path = tmp_path / "tools.jinja"
    path.write_text(
        "{%- for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "\n    {% if loop.first %}\n  first{% endif %}\n{{ message | tojson }}{{ message | tojson(indent=2) }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "<b>'é' & \"q\"</b>"}] * 3
    chat_format = Format(path, {}, "", "")
    assert chat_format.load().render(turns) == rendered_by_transformers(chat_format, turns, False)


@FORMAT
def test_user_prompt_of_nothing_is_the_bare_user_prefix(name: str) -> None:
    assert FORMATS[name].load().user_prompt([]) == FORMATS[name].user_prefix


@FORMAT
def test_user_prompt_after_turns_is_what_stands_before_the_next_user_turn(name: str) -> None:
    template = FORMATS[name].load()
    turns = conversation(2)
    prompt = template.user_prompt(turns, strip_bos=False)
    whole = template.render([*turns, {"role": "user", "content": "Bye"}])
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip(" ").startswith("Bye")


@FORMAT
def test_user_stop_stands_right_after_the_user_turn(name: str) -> None:
    template = FORMATS[name].load()
    assert template.user_stop == FORMATS[name].user_stop
    after = template.render(conversation(1), add_generation_prompt=False).partition("Hi")[2]
    assert after.lstrip().startswith(template.user_stop)


@pytest.mark.parametrize("name", ["llama2", "llama3", "vicuna", "mistral", "gemma", "deepseek"])
def test_user_prompt_leaves_out_bos_once_unless_told_otherwise(name: str) -> None:
    template, bos = FORMATS[name].load(), FORMATS[name].tokens["bos_token"]
    turns = conversation(1)
    kept = template.user_prompt(turns, strip_bos=False)
    assert kept.startswith(bos)
    assert template.user_prompt(turns) == kept.removeprefix(bos)
    assert not template.user_prompt([]).startswith(bos)


def test_user_prompt_keeps_bos_that_opens_every_turn() -> None:
    assert FORMATS["smollm2"].load().user_prompt([]).startswith("<|im_start|>system")


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({"tokenizer_config.json": {"add_bos_token": False}}, True),
        ({"tokenizer_config.json": {"add_bos_token": True}, "tokenizer.json": {"post_processor": None}}, False),
        ({"tokenizer.json": {"post_processor": {"single": [{"SpecialToken": {"id": "<bos>"}}]}, "model": {}}}, False),
        ({"tokenizer.json": {"post_processor": {"type": "ByteLevel"}, "model": {"vocab": {"<bos>": 1}}}}, True),
        ({"tokenizer.json": {"model": {}}}, True),
        ({}, False),
    ],
)
def test_user_prompt_keeps_bos_where_the_tokenizer_adds_none(tmp_path: Path, files: dict, kept: bool) -> None:
    files = {**files, "special_tokens_map.json": FORMATS["gemma"].tokens}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text(FORMATS["gemma"].path.read_text())
    assert ChatTemplate.load(str(tmp_path)).user_prompt([]).startswith("<bos>") == kept


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_user_prompt_after_a_user_turn_where_roles_must_alternate_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"Two user turns in a row|Roles have to alternate"):
        FORMATS[name].load().user_prompt([{"role": "user", "content": "Hi"}])


def test_user_prompt_of_a_template_without_user_text_is_an_error() -> None:
    with pytest.raises(InputError, match="drops the last user turn"):
        ChatTemplate("{{ messages | length }}", {}, "counting").user_prompt([], strip_bos=False)


@FORMAT
@CHAT
def test_split_turns_of_a_rendered_conversation_gives_its_turns(name: str, turns: list[Turn]) -> None:
    chat_format = FORMATS[name]
    if turns[0]["role"] == "system" and chat_format.system == "refused":
        return
    template = chat_format.load()
    text = template.render(turns)
    assert template.split_turns(text) == SplitText(as_rendered(turns, chat_format), not chat_format.closes_last_turn)
    bos = chat_format.tokens.get("bos_token", "")
    if bos and name != "smollm2":
        assert template.split_turns(text.removeprefix(bos)) == template.split_turns(text)
        assert template.split_turns(bos + text) == template.split_turns(text)


@FORMAT
@CHAT
def test_split_turns_of_a_text_cut_anywhere_gives_the_turns_so_far(name: str, turns: list[Turn]) -> None:
    chat_format = FORMATS[name]
    if turns[0]["role"] == "system" and chat_format.system == "refused":
        return
    template = chat_format.load()
    text, whole = template.render(turns), as_rendered(turns, chat_format)
    # Where no mark stands before the system text, a text that ends inside it cannot be told from any other text.
    unmarked_system = name in ("vicuna", "deepseek", "bare-words") and turns[0]["role"] == "system"
    seen = 0
    for size in range(len(text) + 1):
        split = template.split_turns(text[:size])
        assert not split.problem or (unmarked_system and not split.turns), (text[:size], split)
        assert split.turns[:-1] == whole[: len(split.turns)][:-1], (text[:size], split)
        assert seen <= len(split.turns) <= len(whole), "a turn was there and went away"
        seen = len(split.turns)
        if split.turns:
            last, original = split.turns[-1], whole[seen - 1]
            assert last["role"] == original["role"]
            assert original["content"].startswith(last["content"]), (text[:size], split)
            assert split.cut or last == original, (text[:size], split)
    assert seen == len(whole)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].closes_last_turn])
def test_split_turns_without_the_last_newline_is_not_cut(name: str) -> None:
    template = FORMATS[name].load()
    text = template.render(conversation(2)).rstrip()
    assert template.split_turns(text) == SplitText(as_rendered(conversation(2), FORMATS[name]), False)


@FORMAT
def test_split_turns_of_what_follows_a_user_prompt_gives_the_new_user_turn(name: str) -> None:
    chat_format = FORMATS[name]
    template = chat_format.load()
    stop = template.render(conversation(1)).partition("Hi")[2].partition(template.user_stop)
    text = template.user_prompt(conversation(1)) + " And you?" + "".join(stop[:2])
    split = template.split_turns(text)
    assert [turn["content"].strip() for turn in split.turns] == ["Hi", ANSWERS[0].strip(), "And you?"]
    assert not split.cut


def chatml(*turns: str) -> str:
    return "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)


@pytest.mark.parametrize(
    ("text", "contents", "cut", "problem"),
    [
        (chatml("user\nA", "user\nB", "assistant\nC"), ["A"], False, "user"),
        (chatml("user\nA", "assistant\nB", "assistant\nC"), ["A", "B"], False, "assistant"),
        (chatml("user\nA", "assistant\nB", "system\nC", "user\nD"), ["A", "B"], False, "system"),
        (chatml("user\nA", "tool\nB"), ["A"], False, "tool"),
        (chatml("assistant\nB", "user\nA"), [], False, "beginning"),
        (chatml("users\nA"), [], False, "beginning"),
        ("once upon a time", [], False, "beginning"),
        ("", [], False, ""),
        (chatml("user\nA", "assistant\nB") + "and on", ["A", "B"], False, "and on"),
        (chatml("user\nA") + "<|im_start|>assistant\nB<|im_start|>user\nC", ["A", "B"], True, "inside"),
        (chatml("user\nA") + "<|im_start|>assistant\n <|im_start|>user\nC", ["A"], False, "inside"),
        (chatml("user\nA", "assistant\n", "user\nB"), ["A", "", "B"], False, ""),
        (chatml("user\nA") + "<|im_start|>assistant\n", ["A"], False, ""),
    ],
)
def test_split_turns_stops_at_what_is_not_in_its_place(text: str, contents: list[str], cut: bool, problem: str) -> None:
    split = FORMATS["chatml"].load().split_turns(text)
    assert ([turn["content"] for turn in split.turns], split.cut) == (contents, cut)
    assert problem in split.problem
    assert bool(split.problem) == bool(problem)


@pytest.mark.parametrize(
    ("name", "contents", "text"),
    [
        ("llama2", "ABCD", "[INST]A[/INST]B</s><s> [INST] C [/INST]  D</s>"),  # blanks lost and added, no first BOS
        ("llama2", "ABCD", "<s> [INST] A [/INST] B </s>[INST] C [/INST] D </s>"),  # a model that writes no BOS
        ("vicuna", "ABCD", "USER: A ASSISTANT:B</s> USER: C ASSISTANT: D</s>"),  # no default system turn
        (
            "smollm2",
            "ABC",
            "<|im_start|>user\nA<|im_end|><|im_start|>assistant\nB<|im_end|><|im_start|>user\nC<|im_end|>\n",
        ),
        ("gemma", "AB", "<start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\nB<eos>"),  # EOS, not the end mark
        ("phi3", "ABC", "<|user|>\nA<|end|>\n<|assistant|>\nB<|end|><|endoftext|>\n<|user|>\nC<|end|>"),
        ("deepseek", "ABCD", "<|User|>A<|Assistant|>B</s><|User|>C<|Assistant|>D</s>"),
        ("bare-words", "ABC", "### Instruction:\nA\n\n### Response:\nB\n\n### Instruction:\nC\n\n### Response:\n"),
    ],
)
def test_split_turns_where_models_write_other_blanks_and_tokens(name: str, contents: str, text: str) -> None:
    split = FORMATS[name].load().split_turns(text)
    assert "".join(turn["content"].strip() for turn in split.turns) == contents
    assert (split.cut, split.problem) == (False, "")


@pytest.mark.parametrize("name", FORMATS)
def test_split_turns_of_another_format_finds_no_turns(name: str) -> None:
    split = FORMATS[name].load().split_turns("Once upon a time\nthere was <|nobody|>: a text.")
    assert (split.turns, split.cut) == ([], False)
    assert split.problem.startswith("found 'Once upon a time")


def test_split_turns_of_another_day_knows_the_head() -> None:
    text = FORMATS["llama3"].load().render(conversation(1)).replace(TODAY, "01 Feb 2003")
    assert "01 Feb 2003" in text
    split = FORMATS["llama3"].load().split_turns(text)
    assert split == SplitText(as_rendered(conversation(1), FORMATS["llama3"]), False)


THOUGHT = "<think>\nHm.\n</think>\n\nB"


@pytest.mark.parametrize(
    ("answer", "content"),
    [("<think>\n\n</think>\n\nB", "B"), ("B", "B"), (THOUGHT, THOUGHT), ("<think>\n\n", "<think>\n\n")],
)
def test_split_turns_drops_the_empty_reasoning_of_the_template_and_keeps_any_other(answer: str, content: str) -> None:
    template = FORMATS["qwen3"].load()
    for text in (chatml("user\nA", f"assistant\n{answer}"), chatml("user\nA", f"assistant\n{answer}", "user\nC")):
        split = template.split_turns(text)
        assert split.turns[1] == {"role": "assistant", "content": content}
        assert (split.cut, split.problem) == (False, "")
    if answer == THOUGHT:
        assert template.render(split.turns[:2]) == chatml("user\nA", f"assistant\n{answer}")


def test_split_turns_of_a_template_without_marks_is_an_error() -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}\n{% endfor %}", {}, "plain")
    with pytest.raises(InputError, match=r"plain: .*nothing between turns"):
        template.split_turns("Hi")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x %}", "no valid chat template"),
        ("{{ raise_exception('Only for tools') }}", "says 'Only for tools'"),
        ("{{ bos_token + messages[0].content }}", "tokenizer_config.json that defines it"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
    ],
)
def test_render_with_a_template_that_fails_is_an_error_with_its_message(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(source, {}, "broken").render(conversation(1))


SMALL = "{{ bos_token }}{% for message in messages %}[{{ message.content }}]{{ eos_token }}{% endfor %}"
HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": SMALL},
        {"chat_template.json": json.dumps({"chat_template": SMALL})},
        {"tokenizer_config.json": json.dumps({"chat_template": SMALL})},
        {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": SMALL}]}
            )
        },
        {"chat_template.jinja": SMALL, "tokenizer_config.json": json.dumps({"chat_template": "old"})},
    ],
)
def test_load_from_a_directory_finds_template_and_special_tokens(tmp_path: Path, files: dict[str, str]) -> None:
    config = {"bos_token": {"content": "<b>", "lstrip": False}, "unk_token": None, "add_bos_token": True}
    files = {**files, "special_tokens_map.json": json.dumps({"eos_token": "<e>", "bos_token": "<old>"})}
    files["tokenizer_config.json"] = json.dumps({**json.loads(files.get("tokenizer_config.json", "{}")), **config})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert ChatTemplate.load(str(tmp_path)).render(HI) == "<b>[Hi]<e>"


def test_load_from_a_file_takes_the_special_tokens_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(SMALL)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>", "chat_template": "other"}))
    assert ChatTemplate.load(str(tmp_path / "mine.jinja")).render(HI) == "<b>[Hi]"


def test_load_of_a_saved_tokenizer_renders_as_it_does(tmp_path: Path) -> None:
    chat_format = FORMATS["llama2"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **chat_format.tokens)
    tokenizer.chat_template = chat_format.path.read_text()
    tokenizer.save_pretrained(tmp_path)
    assert ChatTemplate.load(str(tmp_path)).render(conversation(2)) == tokenizer.apply_chat_template(
        conversation(2), tokenize=False
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "expected a tokenizer's directory"),
        ("nowhere.jinja", "expected a tokenizer's directory"),
        ("/nowhere/at/all", "expected a tokenizer's directory"),
        ("org/no-such-model", "--tokenizer DIR"),
        ("no such model", "--tokenizer DIR"),
    ],
)
def test_load_of_what_cannot_be_found_is_one_line_with_advice(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        ChatTemplate.load(name)
    assert "\n" not in str(error.value)


def test_load_of_a_directory_without_a_template_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no chat template.*put a chat_template\.jinja"):
        ChatTemplate.load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="expected an object"):
        ChatTemplate.load(str(tmp_path))


def test_load_without_huggingface_hub_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install huggingface_hub, or .*--tokenizer DIR"):
        ChatTemplate.load("org/model")


def test_load_from_the_hub_takes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo: str, file: str) -> str:
        if repo == "org/model" and (tmp_path / file).is_file():
            return str(tmp_path / file)
        raise LocalEntryNotFoundError(f"{file} is not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = {"chat_template": SMALL, "bos_token": "<b>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load("org/model").render(HI) == "<b>[Hi]"


def test_import_needs_neither_torch_nor_transformers_nor_the_hub() -> None:
    code = "import sys, parts.chat_template; print({'torch', 'transformers', 'huggingface_hub', 'aiohttp'} & set(sys.modules))"
    directory = Path(chat_template.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
