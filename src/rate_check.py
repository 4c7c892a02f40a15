"""Whether a learning rate is of the size that its method uses.

    findings = rate_findings(config.optim, adapter="lora", weights=8_030_261_248, starts_fresh=False)

The ranges are wide: what lies outside them is most often a rate that was meant for another method. No run is stopped by
one.

Sources: the best rate of a model of N weights that trains from nothing is 0.003239 - 0.0001395 ln N (arXiv:2001.08361,
equation D.1), from 6e-4 for 125M to 6e-5 for 175B weights in arXiv:2005.14165, table 2.1. Whole models are fine-tuned
at less: 2e-5 for 7B (Stanford Alpaca), 5e-6 for 8B (arXiv:2411.15124), 1e-3 for 135M (SmolLM2's recipe). LoRA's best
rate is about 10 times that of all weights (https://thinkingmachines.ai/blog/lora/), 2e-4 in arXiv:2305.14314 for 7B and
13B. Lion takes 3 to 10 times less than AdamW (arXiv:2302.06675), schedule-free optimizers 1 to 10 times more
(arXiv:2405.15682).
"""

import math

from config.schema import OptimConfig
from src.start_checks import StartFinding

LEAST_RATE_OF_SIZE = 6e-5
"""Of the largest models, for which the formula would be negative."""

ADAM_LIKE = ("adam", "muon", "adafactor", "ademamix", "apollo", "lion", "schedule_free_adam", "schedule_free_radam")
"""Beginnings of optimizers' names whose update of a weight is about as large as the rate, whatever the gradient is."""

FROM_NOTHING, ALL_WEIGHTS, LORA = (1 / 100, 10.0), (1e-7, 3.0), (3e-5, 30.0)
"""Lowest and highest rate: from nothing as multiples of the best one for the size; else the lowest itself. A tenth and
less of 2e-4 leaves LoRA nearly where it starts."""


def rate_range(optim: OptimConfig, *, adapter: str, weights: int, starts_fresh: bool) -> tuple[float, float] | None:
    """The lowest and the highest peak rate that the method uses; None where nothing is known of it.

    Args:
        adapter: as `adapter.kind`.
        weights: of the whole model.
        starts_fresh: whether they are random.
    """
    name = optim.name.removeprefix("paged_").removeprefix("stable_")
    if adapter not in ("none", "lora") or not name.startswith(ADAM_LIKE):
        return None
    best = max(LEAST_RATE_OF_SIZE, 0.003239 - 0.0001395 * math.log(weights))
    low, times = LORA if adapter == "lora" else FROM_NOTHING if starts_fresh else ALL_WEIGHTS
    low, high = (low * best if starts_fresh else low), times * best
    if name.startswith("lion"):
        return low / 10, high / 3
    return low, high * (10 if name.startswith("schedule_free") else 1)


def rate_findings(optim: OptimConfig, *, adapter: str, weights: int, starts_fresh: bool) -> list[StartFinding]:
    """What is wrong with the size of `optim.learning_rate`; see `rate_range`."""
    known = rate_range(optim, adapter=adapter, weights=weights, starts_fresh=starts_fresh)
    if known is None or known[0] <= optim.learning_rate <= known[1]:
        return []
    low, high = known
    what = "LoRA" if adapter == "lora" else "training from random weights" if starts_fresh else "training all weights"
    over = optim.learning_rate > high
    return [
        StartFinding(
            "learning_rate",
            stops=False,
            found=f"optim.learning_rate={optim.learning_rate:g} is far {'above' if over else 'below'} what {what} with "
            f"{optim.name} uses on {weights:,} weights, {low:.1g} to {high:.1g}",
            why="at such a rate the loss rises, or falls and breaks out again" if over else "the weights hardly move",
            change=f"{'lower' if over else 'raise'} optim.learning_rate, unless it was found by trying",
        )
    ]
