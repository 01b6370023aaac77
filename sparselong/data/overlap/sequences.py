"""Hashes of sequences of words, the same in each process.

Words are letters and digits only, in lower case. Chinese, Japanese, Thai, Lao, Burmese and Khmer
put no spaces between words, so that each of their characters counts as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from zlib import crc32

import numpy

MOST_HASHES = 20_000_000
"""Number of hashes of which no more than a sample is looked at."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)
_SHIFT = numpy.uint64(29)


class Codes(dict[str, int]):
    """A number for each word."""

    def __missing__(self, word: str) -> int:
        self[word] = crc32(word.encode())
        return self[word]

    def number(self, words: Iterable[str]) -> numpy.ndarray:
        """Return the words' numbers, uint64 [words]."""
        return numpy.fromiter(map(self.__getitem__, words), numpy.uint64)


def find_words(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(text.lower())


def hash_sequences(numbers: numpy.ndarray, longest: int) -> Iterator[tuple[int, numpy.ndarray]]:
    """Yield each length from 1 to `longest` words, and the hashes of all sequences of that length.

    Args:
        numbers: uint64 [words], from `Codes.number`.
        longest: the longest sequences; fewer lengths are yielded if there are fewer words.

    Yields:
        length, and uint64 [words - length + 1].
    """
    hashes = numpy.zeros(len(numbers), numpy.uint64)
    for length in range(1, min(longest, len(numbers)) + 1):
        hashes = (hashes[: len(numbers) - length + 1] + numbers[length - 1 :]) * _FACTOR
        hashes ^= hashes >> _SHIFT
        yield length, hashes


def thin_out(hashes: list[numpy.ndarray]) -> list[numpy.ndarray]:
    """Return the arrays with a sample of their hashes, if there are more than MOST_HASHES.

    A hash is in the sample of every array or of none.
    """
    total = sum(map(len, hashes))
    if total <= MOST_HASHES:
        return hashes
    step = numpy.uint64(total // MOST_HASHES + 1)
    return [each[each % step == 0] for each in hashes]
