"""What became of the input rows of a run. Knows nothing about files or servers."""

from dataclasses import dataclass, fields

from parts.conversations import CONTEXT_FULL, CUT_REASONING, Conversation


@dataclass
class Counts:
    """What became of the input rows in this run; tokens are those of the conversations written."""

    input_rows: int = 0
    succeeded: int = 0
    failed: int = 0
    skipped_already_done: int = 0
    skipped_failed_before: int = 0
    skipped_left_out_before: int = 0
    skipped_duplicates: int = 0
    skipped_unusable: int = 0
    skipped_cut: int = 0
    cut_answers: int = 0
    cut_reasoning: int = 0
    context_full: int = 0
    tool_turns_left_out: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def skipped(self) -> int:
        """Rows neither written nor failed."""
        return sum(getattr(self, name.name) for name in fields(self) if name.name.startswith("skipped_"))

    @property
    def left(self) -> int:
        """Rows not dealt with, 0 unless the run was interrupted: succeeded + failed + skipped + left = input_rows."""
        return self.input_rows - self.succeeded - self.failed - self.skipped

    @property
    def nothing_usable(self) -> bool:
        """Whether every row was left out, now or by an earlier run."""
        left_out = self.skipped_unusable + self.skipped_cut + self.skipped_left_out_before
        return left_out > 0 and left_out + self.skipped_duplicates == self.input_rows

    def add_ends(self, conversation: Conversation) -> None:
        """Counts what ended before its end in a conversation, whatever became of it."""
        self.cut_answers += conversation.cut_answers
        self.tool_turns_left_out += conversation.tool_turns_left_out
        self.context_full += conversation.ended_by == CONTEXT_FULL
        self.cut_reasoning += conversation.ended_by == CUT_REASONING

    def summary(self) -> str:
        """Returns what a user wants to know at the end, in one line."""
        parts = [f"{getattr(self, name)} {name}" for name in ("succeeded", "failed", "skipped")]
        parts += [f"{self.left} left"] if self.left else []
        cut = f"; {self.cut_answers} answers cut" if self.cut_answers else ""
        cut += f", {self.cut_reasoning} of them inside their thoughts" if self.cut_reasoning else ""
        cut += f"; {self.context_full} conversations ended where the context was full" if self.context_full else ""
        cut += f"; {self.tool_turns_left_out} tool turns left out" if self.tool_turns_left_out else ""
        return f"{', '.join(parts)} of {self.input_rows} rows; {self.completion_tokens} tokens written{cut}"
