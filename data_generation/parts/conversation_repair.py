"""Bring a conversation into the form that chat templates render: a system turn or none, then user and assistant in turn.

Answers stay as they are. What cannot be mended ends the conversation at the last answer before it. Knows nothing about files.
"""

from collections.abc import Sequence

from parts.input_turns import TOOL_ROLES, Turn
from parts.reasoning import END_THINK, THINK

JOINT = "\n\n"


class Repair:
    """The repaired turns of one conversation, and what was done.

    Attributes:
        turns: The turns; none if no answer is left.
        done: Names of what was done, one for each time.
    """

    def __init__(self, turns: Sequence[Turn], system: str) -> None:
        """Repairs turns.

        Args:
            turns: As `parse_turns` gives them.
            system: "keep", "join" to the user turn, or "drop".
        """
        self.done: list[str] = []
        self.system: list[str] = []
        self.rounds: list[Turn] = []
        self.instructions: list[str] = []  # late system turns, for the next user turn
        kept = self.without_blanks(turns)
        for turn in kept:
            if not self.add(turn, system):
                break
        if self.instructions:
            self.done.append("system turns without a user turn after them left out")
        if self.rounds and self.rounds[-1]["role"] == "user":
            self.rounds.pop()
            self.done.append("user turns without an answer left out")
        head = [{"role": "system", "content": JOINT.join(self.system)}] if self.system else []
        self.turns: list[Turn] = [*head, *self.rounds] if self.rounds else []

    def without_blanks(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns that are not blank; a blank answer ends them."""
        kept: list[Turn] = []
        for turn in turns:
            if turn["role"] in TOOL_ROLES or turn["content"].strip():
                kept.append(turn)
            elif turn["role"] == "assistant":
                self.done.append("conversations ended before a blank answer")
                break
            else:
                self.done.append(f"blank {turn['role']} turns left out")
        return kept

    def add(self, turn: Turn, system: str) -> bool:
        """Takes the next turn in; returns whether the conversation goes on."""
        match turn["role"]:
            case "system":
                self.add_system(turn["content"], system)
            case "user":
                self.add_user(turn["content"])
            case "assistant":
                return self.add_answer(turn)
            case _:
                self.done.append("conversations ended before a tool turn")
                return False
        return True

    def add_system(self, text: str, system: str) -> None:
        """Takes a system turn in: templates have room for one, at the beginning."""
        if system == "drop":
            self.done.append("system turns left out")
        elif system == "join" or self.rounds:
            self.instructions.append(text)
            self.done.append("system turns joined to a user turn")
        else:
            if self.system:
                self.done.append("system turns joined")
            self.system.append(text)

    def add_user(self, text: str) -> None:
        """Takes a user turn in; one after another becomes one."""
        text = JOINT.join([*self.instructions, text])
        self.instructions = []
        if self.rounds and self.rounds[-1]["role"] == "user":
            self.done.append("user turns joined")
            text = JOINT.join([self.rounds.pop()["content"], text])
        self.rounds.append({"role": "user", "content": text})

    def add_answer(self, turn: Turn) -> bool:
        """Takes an answer in; returns whether the conversation goes on."""
        if not self.rounds:
            self.done.append("answers before any user turn left out")
            return True
        if self.rounds[-1]["role"] == "assistant":
            self.done.append("conversations ended before a second answer in a row")
            return False
        if self.instructions:  # said after the user's turn and before the answer to it
            asked = self.rounds.pop()["content"]
            self.rounds.append({"role": "user", "content": JOINT.join([asked, *self.instructions])})
            self.instructions = []
        text = turn["content"]
        if text.lstrip().startswith(THINK) and END_THINK not in text:
            self.done.append("conversations ended before thoughts without an answer")
            return False
        self.rounds.append(turn)
        return True
