"""Where vLLM finds the drafter: `"model": "axolotl_medusa.vllm_drafter.MedusaDrafter"` of its `--speculative-config`.

Contract: a public name; imports torch, safetensors and what is beside it, never transformers or axolotl.
"""

from __future__ import annotations

from axolotl_medusa.serving.vllm_drafter import MedusaDrafter

__all__ = ["MedusaDrafter"]
