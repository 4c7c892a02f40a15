"""Losses that stand out from those of the steps before.

    finder = SpikeFinder()
    spike = finder.add(loss=9.3, tokens=4096)    # None, or how far it stands out

A loss is compared by its logarithm, as the losses of batches are skewed: hard ones lie further above the middle than
easy ones below. Its middle is the median of the last few, which follows a loss that falls. The spread is told by the
differences between steps, in which a fall hardly shows, and by their median deviation, which outliers among the steps
before do not move. A batch of fewer tokens may stray further, by the square root of their ratio.
"""

import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW = 64
"""Steps that the spread is told by: a median deviation of so many is known to a seventh."""

RECENT = 16
"""Newest of them, whose median a loss is compared with. They are few, as a loss that is learned fast falls within them:
over the last 32 of a planted case of tests/test_spikes.py it fell to a third."""

FEWEST = 20
"""Steps before which no loss is compared: the spread of fewer says little."""

THRESHOLD = 6.0
"""Deviations from the median, from which a loss stands out. Of 20,000 normal, lognormal and Student (5 degrees of
freedom) losses it takes 0, 0 and 5; see docs/numbers.md."""

MEMORY, MOST = 256, 4
"""Steps in which so many losses that stand out are spikes. If there are more, the data has hard steps as a rule, as
from a second source, and they are none."""

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
        self._stood_out: deque[bool] = deque(maxlen=MEMORY)
        """Whether each step's loss did."""

    def add(self, loss: float, tokens: int) -> Spike | None:
        """Take a step's loss.

        Args:
            loss: mean over its supervised tokens in nats, finite.
            tokens: their number.
        Returns:
            What it is, if it is a spike.
        """
        height = math.log(max(loss, SMALLEST_LOSS))
        spike = self._compared(height, tokens) if len(self._window) >= FEWEST else None
        self._window.append((height, tokens))
        self._stood_out.append(spike is not None)
        return spike if sum(self._stood_out) <= MOST else None

    def _compared(self, height: float, tokens: int) -> Spike | None:
        heights = [other for other, _ in self._window]
        middle = statistics.median(heights[-RECENT:])
        changes = statistics.median(abs(after - before) for before, after in itertools.pairwise(heights))
        spread = max(SMALLEST_SPREAD, _DEVIATIONS * changes / math.sqrt(2))  # a difference has the variance of two
        fewer = statistics.median(others for _, others in self._window) / max(1, tokens)
        deviations = (height - middle) / (spread * math.sqrt(max(1.0, fewer)))
        return Spike(usual=math.exp(middle), deviations=deviations) if deviations >= THRESHOLD else None

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on, as plain JSON."""
        return {"window": list(self._window), "stood_out": list(self._stood_out)}

    def load_state(self, content: dict[str, Any]) -> None:
        """Go to where another finder was when it told its state."""
        self._window = deque(map(tuple, content["window"]), maxlen=WINDOW)
        self._stood_out = deque(content["stood_out"], maxlen=MEMORY)
