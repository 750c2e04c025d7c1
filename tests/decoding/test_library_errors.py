"""What libraries raise while they load, as one line of the right kind."""

from __future__ import annotations

import pytest
import torch

from axolotl_medusa.decoding.library_errors import OwnCodeError, one_line_for


def ended(error: BaseException) -> BaseException:
    with pytest.raises(BaseException) as caught, one_line_for("models/m", "cannot be loaded", "get it again"):
        raise error
    assert caught.value.__cause__ is error or caught.value is error
    return caught.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Exception("Token `zz`\nout of vocabulary."), "Token `zz` out of vocabulary"),
        (KeyError("NOPE"), "KeyError: 'NOPE'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("size\n\tmismatch\x1b[31m"), "size mismatch?[31m"),
        (OSError("x" * 900), "x" * 200),
    ],
)
def test_error_about_files_is_one_line_with_its_reason(error, message):
    found = ended(error)
    assert type(found) is ValueError
    assert str(found) == f"models/m cannot be loaded: {message}; get it again"


MISSING = [
    (ImportError("requires Accelerate: `pip install 'accelerate>=1.1.0'`"), "accelerate"),
    (ImportError("You can update it with pip: `pip install --upgrade accelerate`. Restart"), "accelerate"),
    (ImportError("run `pip install kernels[torch]`."), "kernels[torch]"),
    (ModuleNotFoundError("No module named 'einops.layers'", name="einops.layers"), "einops"),
    (ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found\nin it"), "sentencepiece"),
    (ValueError("Couldn't instantiate the backend:\n You need to have sentencepiece installed."), "sentencepiece"),
]


@pytest.mark.parametrize(("error", "package"), MISSING)
def test_missing_package_is_an_error_of_the_environment_that_says_what_to_install(error, package, monkeypatch):
    monkeypatch.setattr("axolotl_medusa.decoding.library_errors._is_there", lambda name: name != "sentencepiece")
    found = ended(error)
    assert type(found) is RuntimeError and "\n" not in str(found)
    assert str(found).startswith("models/m cannot be loaded: ") and str(found).endswith(f"; pip install {package}")


def test_tokenizer_package_that_is_there_is_not_to_blame(monkeypatch):
    monkeypatch.setattr("axolotl_medusa.decoding.library_errors._is_there", lambda name: True)
    assert type(ended(ValueError("sentencepiece cannot read tokenizer.model"))) is ValueError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_too_little_memory_is_not_blamed_on_the_files(error):
    found = ended(error)
    assert type(found) is RuntimeError and str(found).startswith("models/m does not fit into memory (")


def test_code_of_a_model_and_interrupts_pass():
    assert isinstance(ended(ValueError("set trust_remote_code=True")), OwnCodeError)
    refused = OwnCodeError("brings code")
    assert ended(refused) is refused
    interrupt = KeyboardInterrupt()
    assert ended(interrupt) is interrupt
