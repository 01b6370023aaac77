"""Aggregation: find the most frequent words of a list.

Common words: ten words occur more often than all others, which are equally rare. Coded words: the
frequencies of made-up words follow a zeta distribution, and the most frequent one is to be ignored.
"""

from __future__ import annotations

import math
import random
import string

from sparselong.data.ruler.draft import Draft
from sparselong.data.ruler.words import load_words

COMMON = 10
"""Number of common words."""
_SHORT = 4096
"""Contexts shorter than this repeat words less often."""
_CODED_LETTERS, _EXPONENT, _ZETA = 6, 2, math.pi**2 / 6  # the zeta function of 2
_COMMON_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{text}\nQuestion: What are the 10 most common "
    "words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
_CODED_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {text}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text? Answer: According to the coded text above, the three most frequently appeared words are:"
)


def draw_common(source: random.Random, size: int, length: int) -> Draft:
    """Return a list of `size` different words, ten of them common, after a solved example."""
    short = length < _SHORT
    example = _draw_list(source, *((20, 3, 1) if short else (40, 10, 3)))
    question = _draw_list(source, size, *((6, 1) if short else (30, 3)))
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(example.answers, 1))
    return Draft(f"{example.prompt} {solved}\n{question.prompt}", question.answers)


def _draw_list(source: random.Random, size: int, common_times: int, rare_times: int) -> Draft:
    known = load_words()
    # Beyond the words that there are, rare ones occur more often; the common ones stay ahead.
    chosen = source.sample(known, min(size, len(known)))
    common, rare = chosen[:COMMON], chosen[COMMON:]
    more = source.choices(rare, k=size - len(chosen)) if size > len(chosen) else []
    listed = common * common_times + (rare + more) * rare_times
    source.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return Draft(_COMMON_TEXT.format(text=text), common)


def draw_coded(source: random.Random, size: int, length: int) -> Draft:
    """Return about `size` coded words, of a vocabulary of a fiftieth of the length in tokens."""
    vocabulary = ["..."]
    while len(vocabulary) < max(4, length // 50):
        word = "".join(source.choices(string.ascii_lowercase, k=_CODED_LETTERS))
        if word not in vocabulary:
            vocabulary.append(word)
    text = [
        word
        for rank, word in enumerate(vocabulary, 1)
        for _ in range(int(size * rank**-_EXPONENT / _ZETA))
    ]
    source.shuffle(text)
    return Draft(_CODED_TEXT.format(text=" ".join(text)), vocabulary[1:4])
