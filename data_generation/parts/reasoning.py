"""What a reasoning model thinks before it answers: told from the answer, and told from an answer that never came.

Servers with a reasoning parser report it apart; others leave it in the text, where the opening tag is missing if the
chat template has it in the prompt. Knows nothing about requests or files.
"""

from parts.chat_answer import Answer

THINK, END_THINK = "<think>", "</think>"


def split_reasoning(answer: Answer) -> tuple[str, str]:
    """Returns the reasoning of an answer, "" if there is none, and what is said after it."""
    reasoning, end, spoken = answer.text.partition(END_THINK)
    if answer.reasoning:  # some proxies leave it in the text too
        return answer.reasoning.strip(), (spoken if end else answer.text).strip()
    if end:
        return reasoning.replace(THINK, "", 1).strip(), spoken.strip()
    return "", answer.text


def is_cut_reasoning(answer: Answer, told_to_think: bool) -> bool:
    """Returns whether the length limit ended an answer before anything was said: all of its text are thoughts.

    Args:
        answer: What the server sent.
        told_to_think: Whether the model was told to think. A text without any tag are then thoughts that the prompt
            opened; otherwise it is an answer.
    """
    if answer.finish_reason != "length":
        return False
    if answer.reasoning or END_THINK in answer.text:
        return not split_reasoning(answer)[1].strip()
    return told_to_think or answer.text.lstrip().startswith(THINK)


def lacks_answer(answer: Answer) -> bool:
    """Returns whether a model that was told to think ended by itself without saying anything after its thoughts."""
    reasoning, spoken = split_reasoning(answer)
    return not spoken.strip() if reasoning else spoken.lstrip().startswith(THINK)
