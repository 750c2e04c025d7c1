"""What `--help` ends with: an example for each command, and what exit statuses mean.

Contract: texts alone; imports nothing of ours.
"""

from __future__ import annotations

EXAMPLES = {
    "recipe": "Qwen/Qwen3-8B --method self-distillation --gpu-gib 24 --out my.yml",
    "estimate": "my.yml --gpus 4 --gpu-gib 24",
    "export": "outputs/my-model --to tgi --out heads-tgi",
    "import": "published-heads --to canonical --out heads",
    "push": "heads-tgi --repo me/my-heads --private",
    "evaluate": "outputs/my-model --prompts data_generation/prompts_heldout.jsonl --json measured.json",
    "tree": "outputs/my-model --calibration data_generation/prompts.jsonl --out tree.json",
    "generate": "outputs/my-model --prompt 'What is the capital of France?'",
    "chat": "outputs/my-model --temperature 0.7",
    "demo": "outputs/my-model --max-new-tokens 64",
    "plot": "outputs/my-model --out plots",
    "report": "outputs/my-model --with measured.json --prompts data_generation/prompts_heldout.jsonl",
    "doctor": "outputs/my-model",
    "completion": "bash > ~/.local/share/bash-completion/completions/axolotl-medusa",
    "serve": "outputs/my-model --dry-run",
    "plan": "outputs/my-model",
    "check-server": "http://127.0.0.1:8000 outputs/my-model",
    "calibrate": "outputs/my-model --prompts data_generation/prompts_by_hand.jsonl",
}
"""Arguments by command, as a shell reads them."""

EXIT_STATUSES = {
    0: "done",
    1: "an error, said in one line",
    2: "wrong usage",
    130: "interrupted",
}


def exit_statuses() -> str:
    """The exit statuses in one line."""
    return "exit status: " + "; ".join(f"{number} {meaning}" for number, meaning in EXIT_STATUSES.items())
