"""Losses that stand out from those of the steps before.

    finder = SpikeFinder()
    spike = finder.add(loss=9.3, tokens=4096)    # None, or how far it stands out

A loss is compared by its logarithm, as the losses of batches are skewed: hard ones lie further above the middle than
easy ones below. The middle and the spread are a median and a median deviation, which outliers among the steps before do
not move. A batch of fewer tokens may stray further, by the square root of their ratio.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 64
"""Steps that a loss is compared with. Over so many a falling loss falls little, and a median deviation of them is known
to a seventh."""

FEWEST = 20
"""Steps before which no loss is compared: the spread of fewer says little."""

THRESHOLD = 6.0
"""Deviations from the median, from which a loss that is also above all of the window counts as a spike. Of 200,000
normal, lognormal and Student (5 degrees of freedom) losses it takes 0, 0 and 42; see docs/numbers.md."""

SMALLEST_SPREAD = 0.01
"""Least deviation of the logarithm, one percent: of batches that are all alike, each would stand out."""

SMALLEST_LOSS = 1e-6
"""In nats, below which float32 sums of losses are rounding."""

_DEVIATIONS = 1.4826
"""Standard deviations of a normal distribution to its median deviation."""


@dataclass(frozen=True)
class Spike:
    """A loss that stands out: by `deviations` from `usual`, in nats a token."""

    usual: float
    deviations: float


class SpikeFinder:
    """Compares each step's loss with those before it."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        """Logarithms of losses, with the supervised tokens of their steps."""

    def add(self, loss: float, tokens: int) -> Spike | None:
        """Take a step's loss.

        Args:
            loss: mean over its supervised tokens in nats, finite.
            tokens: their number.
        Returns:
            What it is, if it is a spike: one that stands out, and is above all that it is compared with, so that steps
            of harder data, which come now and then, are told once in a while and a new level is told once.
        """
        height = math.log(max(loss, SMALLEST_LOSS))
        spike = self._compared(height, tokens) if len(self._window) >= FEWEST else None
        self._window.append((height, tokens))
        return spike

    def _compared(self, height: float, tokens: int) -> Spike | None:
        heights = [other for other, _ in self._window]
        if height <= max(heights):
            return None
        middle = statistics.median(heights)
        spread = max(SMALLEST_SPREAD, _DEVIATIONS * statistics.median(abs(other - middle) for other in heights))
        fewer = statistics.median(others for _, others in self._window) / max(1, tokens)
        deviations = (height - middle) / (spread * math.sqrt(max(1.0, fewer)))
        return Spike(usual=math.exp(middle), deviations=deviations) if deviations >= THRESHOLD else None

    def state(self) -> list[tuple[float, int]]:
        """What `load_state` needs to go on, as plain JSON."""
        return list(self._window)

    def load_state(self, content: list[tuple[float, int]]) -> None:
        """Go to where another finder was when it told its state."""
        self._window = deque(map(tuple, content), maxlen=WINDOW)
