"""A set of 64-bit hashes in 8 bytes each, asked and filled in batches.

seen = HashSet()
seen.add(np.array([7, 7, 9], dtype=np.uint64))   # array([False, True, False])
7 in seen                                        # True

A Python set of the same numbers takes about 100 bytes each.
"""

import numpy as np


class HashSet:
    """Sorted arrays, each at least twice as long as the next, so that n hashes stand in at most log2(n) of them and
    each is moved as often while they are merged."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Take in hashes, and say which were there.

        Args:
            hashes: uint64, (n,).
        Returns:
            bool, (n,): whether each was in the set, or stands earlier in `hashes`.
        """
        known = self.contains(hashes)
        distinct, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(hashes), dtype=bool)
        repeated[first] = False
        fresh = distinct[~known[first]]
        if len(fresh):
            self._sorted.append(fresh)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate((self._sorted.pop(), self._sorted.pop()))
            merged.sort(kind="stable")  # of two runs that are sorted, it is their merge
            self._sorted.append(merged)
        return known | repeated

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each of `hashes`, uint64 of shape (n,), is in the set: bool, (n,)."""
        found = np.zeros(len(hashes), dtype=bool)
        for part in self._sorted:
            places = np.searchsorted(part, hashes)
            found |= part[np.minimum(places, len(part) - 1)] == hashes
        return found

    def __contains__(self, number: int) -> bool:
        return bool(self.contains(np.array([number], dtype=np.uint64))[0])

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    @property
    def nbytes(self) -> int:
        """Bytes that the hashes take."""
        return sum(part.nbytes for part in self._sorted)
