"""Tells texts that are nearly the same as one of a given set. Knows nothing about rows.

Two texts are near-duplicates if they share half of their content words (of all that either has), or if a third of the
shorter one's runs of four words stand in the other one too. Case, punctuation and the commonest words do not count.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

SHARED_WORDS = 0.5
SHARED_RUNS = 1 / 3
RUN = 4


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


COMMON = frozenset(
    words_of(
        "a about all an and any are as at be been but by can could did do does doing for from get give had has have he her him "
        "his how i i'd i'm i've if in into is it it's its just make me more my need no not of on one or our out please she "
        "should so some than that the their them then there they this to up us use using want was we were what what's when "
        "which who why will with would write you your"
    )
)


def same_text_key(text: str) -> str:
    """Returns what is equal for texts that differ in case, punctuation and white space only."""
    return " ".join(words_of(text)) or text


class NearDuplicates:
    """Texts that others are compared with."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Reads the texts once."""
        self.texts = list(texts)
        self.words = [frozenset(words_of(text)) - COMMON for text in self.texts]
        self.runs = [_runs(text) for text in self.texts]
        self.with_word: dict[str, list[int]] = defaultdict(list)
        for index, words in enumerate(self.words):
            for word in sorted(words):
                self.with_word[word].append(index)

    def like(self, text: str) -> str | None:
        """Returns the first of the texts that this one is nearly the same as, or None."""
        words, runs = frozenset(words_of(text)) - COMMON, _runs(text)
        shared = Counter(index for word in words for index in self.with_word.get(word, ()))
        for index in sorted(shared):
            either = len(words | self.words[index])
            shorter = min(len(runs), len(self.runs[index]))
            if shared[index] >= SHARED_WORDS * either:
                return self.texts[index]
            if shorter and len(runs & self.runs[index]) >= SHARED_RUNS * shorter:
                return self.texts[index]
        return None


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    return frozenset(tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1))
