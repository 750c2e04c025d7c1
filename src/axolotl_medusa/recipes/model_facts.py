"""What a recipe has to know of a model, from its config and its tokenizer's files alone.

Contract: reads small files, local or in the Hub's cache; runs no code of the model's and loads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from axolotl_medusa.estimating.sizes import ModelSizes, find_config, sizes_of
from axolotl_medusa.model.file_names import HEADS_FILE
from axolotl_medusa.model.json_files import read_json, read_json_if_there
from axolotl_medusa.serving.chat_templates import chat_template

Thoughts = Literal["none", "switch", "always"]

_SWITCH = "enable_thinking"
_OTHER_SENSES = ("vision_config", "audio_config")
_CAUSAL_LM = re.compile(r"ForCausalLM$|LMHeadModel$|ForConditionalGeneration$")
_LONGEST_TEMPLATE_BYTES = 1_000_000


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe has to know of a model.

    Attributes:
        name: Directory or Hub name, as the YAML will have it.
        sizes: Its sizes.
        positions: Tokens of its context, None where its config does not say.
        flash_attention: Whether transformers has flash attention for it.
        pad_token: A token to pad with, where the tokenizer has none that means nothing else.
        template_file: The chat template where it is not the tokenizer's own.
        thoughts: Whether its template opens thoughts: not, by the switch `enable_thinking`, or always.
        refuses_system: Whether its template refuses system turns.
    """

    name: str
    sizes: ModelSizes
    positions: int | None = None
    flash_attention: bool = True
    pad_token: str | None = None
    template_file: str | None = None
    thoughts: Thoughts = "none"
    refuses_system: bool = False

    @property
    def title(self) -> str:
        """The last part of its name."""
        return Path(self.name).expanduser().resolve().name if self.name.startswith((".", "~")) else Path(self.name).name

    @property
    def slug(self) -> str:
        """Its name as a part of file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-.") or "model"

    @property
    def tied(self) -> bool:
        """Whether lm_head is the input embedding."""
        return self.sizes.embeddings == self.sizes.output


def read_facts(name: str, template_file: str | None = None) -> ModelFacts:
    """The facts of a model.

    Args:
        name: A directory, or a Hub name whose files are in the cache.
        template_file: A chat template for models whose tokenizer has none.

    Raises:
        ValueError: It is no model that heads can be trained on with a recipe, or a file is missing; the message says which.
    """
    if (Path(name).expanduser() / HEADS_FILE).is_file():
        raise ValueError(f"{name} holds Medusa heads: expected the model that they belong to")
    file = find_config(name)
    content = read_json(file)
    _refuse(name, content)
    sizes = sizes_of(name, content, str(file))
    template = _template(name, file.parent, template_file)
    return ModelFacts(
        name=name,
        sizes=sizes,
        positions=_positions(content),
        flash_attention=_has_flash_attention(str(content["model_type"])),
        pad_token=_pad_token(file.parent),
        template_file=template_file,
        thoughts="switch" if _SWITCH in template else "always" if "<think>" in template else "none",
        refuses_system="System role not supported" in template,
    )


def _refuse(name: str, content: Mapping[str, Any]) -> None:
    """Raises for what transformers can build, but a recipe does not know."""
    quantized = content.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise ValueError(
            f"{name} is stored quantized ({method or 'quantization_config'}), expected weights of 16 or 32 bits: take the "
            "original; a recipe for a small --gpu-gib loads it in 4 bits"
        )
    senses = [key for key in _OTHER_SENSES if content.get(key)]
    if senses:
        raise ValueError(f"{name} takes more than text ({senses[0]} in its config), expected a language model for text")
    architectures = content.get("architectures")
    if isinstance(architectures, list) and architectures and not any(_CAUSAL_LM.search(str(a)) for a in architectures):
        raise ValueError(
            f"{name} is a {str(architectures[0])[:100]}, expected a causal language model (...ForCausalLM): heads predict next tokens"
        )


def _positions(content: Mapping[str, Any]) -> int | None:
    value = content.get("max_position_embeddings") or content.get("n_positions")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _has_flash_attention(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return bool(getattr(model, "_supports_flash_attn", True))


def _template(name: str, directory: Path, template_file: str | None) -> str:
    """The text of the chat template.

    Raises:
        ValueError: There is none.
    """
    if template_file is not None:
        file = Path(template_file).expanduser()
        if not file.is_file() or file.stat().st_size > _LONGEST_TEMPLATE_BYTES:
            raise ValueError(f"--chat-template {template_file} is no file of a template: expected one in Jinja")
        return file.read_text(encoding="utf-8", errors="replace")
    if not (directory / "tokenizer_config.json").is_file():
        fetch = "complete the directory"
        if not Path(name).expanduser().is_dir():
            fetch = f"get the small files with `hf download {name} --include '*.json' '*.jinja'`"
        raise ValueError(f"{name} has no tokenizer_config.json here, which says how it is prompted: {fetch}")
    found = chat_template(directory)
    if found is None:
        raise ValueError(
            f"{name} has no chat template: expected a model for chats; give the format that it will be asked in with "
            "--chat-template FILE.jinja"
        )
    return found


def _pad_token(directory: Path) -> str | None:
    """The unknown token, where the tokenizer pads with nothing or with the token that ends an answer."""
    tokens = {**read_json_if_there(directory / "special_tokens_map.json")}
    tokens.update(
        {key: value for key, value in read_json_if_there(directory / "tokenizer_config.json").items() if value}
    )
    pad, end, unknown = (_text(tokens.get(f"{kind}_token")) for kind in ("pad", "eos", "unk"))
    return unknown if pad in (None, end) and unknown != end else None


def _text(token: object) -> str | None:
    """A special token, which tokenizers write as a text or as an object around it."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) and value else None
