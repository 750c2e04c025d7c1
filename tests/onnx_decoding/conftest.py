"""One export of a small random model for all tests of its decoding."""

from __future__ import annotations

import pytest
from onnx_directories import exported

from axolotl_medusa.onnx_decoding.onnx_medusa import OnnxMedusa


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("onnx"), tokenizer=True, eos_token_id=None)


@pytest.fixture(scope="session")
def llama(llama_directory):
    model, directory = llama_directory
    return model, OnnxMedusa.from_pretrained(directory)
