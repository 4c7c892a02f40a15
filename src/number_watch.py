"""What the host knows of steps that were left out and of losses that stand out, once it has read them.

watch = NumberWatch(max_bad_steps=10)
for event in watch.take(last_step=20, figures=steps):    # those since step 10, say
    event.step, event.spike
watch.line()                                             # what a training line says of the steps since the last
watch.too_many                                           # whether the run is to end
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from src.spikes import Spike, SpikeFinder
from src.step_sums import StepFigures

OVERFLOWS_IN_A_ROW = 32
"""Steps in a row that fp16's scale may leave out. It begins at 2^16 and is halved each time, so that by then it makes
gradients smaller, and what overflows is not its doing."""


@dataclass(frozen=True)
class Event:
    """A step to look into: the first of those that were left out in a row, or one whose loss is a spike."""

    step: int
    figures: StepFigures
    spike: Spike | None


class NumberWatch:
    """Counts the steps that were left out, and finds spikes, in the order of steps."""

    def __init__(self, *, max_bad_steps: int, scaled: bool = False) -> None:
        """
        Args:
            max_bad_steps: steps in a row that may be left out.
            scaled: whether gradients are scaled as fp16 needs it; one that overflows is then nothing bad.
        """
        self.max_bad_steps = max_bad_steps
        self.scaled = scaled
        self.skipped = 0
        """Steps of the run that were left out."""
        self.overflows = 0
        """Those that fp16's scale left out beside them."""
        self.in_a_row = 0
        """Steps that were left out up to the last one."""
        self._overflows_in_a_row = 0
        self._spikes = SpikeFinder()
        self._unlogged: list[StepFigures] = []

    @property
    def too_many(self) -> bool:
        """Whether more steps in a row were left out than may be."""
        return self.in_a_row > self.max_bad_steps

    def take(self, last_step: int, figures: Sequence[StepFigures]) -> list[Event]:
        """Take the figures of the steps up to `last_step`, and tell which of them to look into."""
        events = []
        for step, one in enumerate(figures, start=last_step - len(figures) + 1):
            self._unlogged.append(one)
            if self._is_bad(one):
                self.skipped += 1
                self.in_a_row += 1
                if self.in_a_row == 1:
                    events.append(Event(step, one, None))
                continue
            self.in_a_row = 0
            if one.supervised and (spike := self._spikes.add(one.nll, one.supervised)):
                events.append(Event(step, one, spike))
        return events

    def _is_bad(self, figures: StepFigures) -> bool:
        overflow = self.scaled and figures.bad_gradient and not figures.bad_loss
        self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflow else 0
        if overflow and self._overflows_in_a_row <= OVERFLOWS_IN_A_ROW:
            self.overflows += 1
            return False
        return figures.bad_loss or figures.bad_gradient

    def line(self) -> dict[str, float]:
        """Means over the steps since this was last asked whose losses are finite, NaN if there is none, and counts
        since the run's start."""
        good = [one for one in self._unlogged if math.isfinite(one.nll + one.objective + one.routers)]
        self._unlogged = []
        found: dict[str, float] = {
            "loss": _mean([one.nll for one in good]),
            "objective": _mean([one.objective for one in good]),
            "router_aux_loss": _mean([one.routers for one in good]),
            "skipped_steps": self.skipped,
        }
        return found | ({"overflow_steps": self.overflows} if self.scaled else {})

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on, as plain JSON."""
        return {
            "skipped": self.skipped,
            "overflows": self.overflows,
            "in_a_row": self.in_a_row,
            "overflows_in_a_row": self._overflows_in_a_row,
            "spikes": self._spikes.state(),
            "unlogged": [asdict(one) for one in self._unlogged],
        }

    def load_state(self, content: dict[str, Any]) -> None:
        """Go to where another watch was when it told its state."""
        self.skipped, self.overflows, self.in_a_row = (
            content["skipped"],
            content["overflows"],
            content["in_a_row"],
        )
        self._overflows_in_a_row = content["overflows_in_a_row"]
        self._spikes.load_state(content["spikes"])
        self._unlogged = [StepFigures(**one) for one in content["unlogged"]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
