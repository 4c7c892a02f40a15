"""A plan as it is printed: what the run will do, and what would go wrong.

print("\\n".join(lines_of(plan, checks)))
"""

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from src.plan_sizes import mib
from src.start_checks import StartChecks

if TYPE_CHECKING:
    from src.plan import Plan

WIDTH = 100
"""Columns that a line takes at most."""

CURVE_ROWS = 6

EIGHTHS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*##"
"""What fills a character of the curve from below, for terminals that show these and for others."""


def lines_of(plan: "Plan", checks: StartChecks) -> list[str]:
    """All of a plan."""
    parts = [_steps(plan), _tokens(plan), _data(plan), _rates(plan), _weights(plan), _machine(plan), _disk(plan)]
    return [line for part in parts for line in part] + _findings(checks)


def _titled(title: str, texts: Sequence[str]) -> list[str]:
    """Lines below a title that stands before the first."""
    first, *rest = (line for text in texts for line in textwrap.wrap(text, WIDTH - 15, break_long_words=False) or [""])
    return [f"{title:<14} {first}", *(f"{'':<14} {line}" for line in rest)]


def _steps(plan: "Plan") -> list[str]:
    epochs = f", {plan.epochs:.4g} epochs" if plan.epochs is not None else ", of a stream"
    texts = [f"{plan.steps:,}{epochs}"]
    if plan.first_step:
        texts.append(f"goes on from step {plan.first_step:,}: {plan.steps - plan.first_step:,} are left")
    return _titled("steps", texts)


def _tokens(plan: "Plan") -> list[str]:
    if plan.counts is None:
        window, steps = plan.window, plan.steps
        texts = [
            f"about {window[name]:,.0f} {label}, {window[name] * steps:,.0f} in all"
            for name, label in (("tokens", "tokens"), ("supervised_tokens", "supervised tokens"))
        ]
        return _titled("a step", [*texts, f"padding {window['padding_share']:.1%}, by the first micro-batches"])
    counts = plan.counts
    texts = []
    for label, values in (("tokens", counts.tokens), ("supervised tokens", counts.supervised)):
        a_step = f"{values.mean():,.0f} {label} ({values.min():,} to {values.max():,})"
        left = f", {values[plan.first_step :].sum():,} of them left" if plan.first_step else ""
        texts.append(f"{a_step}, {values.sum():,} in all{left}")
    texts.append(f"padding {counts.padding:.1%} of {counts.positions.sum():,} positions")
    return _titled("a step", texts)


def _data(plan: "Plan") -> list[str]:
    texts = []
    for side, verb in (("train", "train on"), ("eval", "evaluate on")):
        packs = plan.data.get(f"{side}_packs")
        if packs and "packs" in packs:
            tokens = plan.data[side]["supervised_tokens"]
            texts.append(
                f"{verb} {packs['rows']:,} rows in {packs['packs']:,} packs, {packs['tokens']:,} tokens"
                f"{'' if side == 'train' and _mixed(plan) else f', {tokens:,} supervised'}, fill {packs['fill']:.1%}"
            )
        elif packs:
            texts.append(f"{verb} a stream, in windows of {packs['window_rows']:,} rows")
    return _titled("data", texts)


def _mixed(plan: "Plan") -> bool:
    """Whether rows of a source stand in a pass more or less than once, so that its own counts are not a pass's."""
    return any("rows_a_pass" in source for source in plan.data["train"]["sources"])


def _rates(plan: "Plan") -> list[str]:
    rates = plan.rates
    texts = [f"{rates[0]:.2e} at step 1, at most {rates.max():.2e}, {rates[-1]:.2e} at step {plan.steps:,}"]
    return [*_titled("learning rate", texts), *curve(rates)]


def curve(rates: np.ndarray) -> list[str]:
    """Learning rates drawn over the steps, at most 8 lines of at most 100 columns.

    A column stands for the steps that fall to it, by their mean.
    """
    columns = min(len(rates), WIDTH - 12)
    means = np.array([part.mean() for part in np.array_split(rates, columns)])
    marks = EIGHTHS if _shows(EIGHTHS) else PLAIN
    eighths = np.rint(means / max(rates.max(), 1e-300) * CURVE_ROWS * 8).astype(int)
    eighths[(means > 0) & (eighths == 0)] = 1  # a small rate is not none
    lines = []
    for row in reversed(range(CURVE_ROWS)):
        label = f"{rates.max():.1e}" if row == CURVE_ROWS - 1 else "0" if row == 0 else ""
        drawn = "".join(marks[min(8, max(0, height - 8 * row))] for height in eighths)
        lines.append(f"{label:>9} |{drawn}".rstrip())
    last = f"step {len(rates):,}"
    return [*lines, f"{'':>9}  1{last:>{columns - 1}}" if columns > len(last) + 1 else f"{'':>9}  1 to {last}"]


def _shows(text: str) -> bool:
    """Whether standard output can write a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _weights(plan: "Plan") -> list[str]:
    total, trained = (sum(map(part, plan.weights.values())) for part in (sum, lambda numbers: numbers[0]))
    width = max(len(f"{sum(numbers):,}") for numbers in plan.weights.values())
    lines = [f"{trained:,} of {total:,} train ({trained / max(1, total):.2%})"]
    table = [
        f"{'':<14} {kind:<11}{train:>{width + 2},} train"
        + (f"{frozen:>{width + 2},} frozen" if trained < total else "")
        for kind, (train, frozen) in plan.weights.items()
    ]
    return _titled("weights", lines) + table


def _machine(plan: "Plan") -> list[str]:
    texts = [f"{plan.processes} process(es) on {plan.device}, attention {plan.attention}", plan.precision]
    if plan.start_loss is not None:
        loss = plan.start_loss
        texts.append(f"loss before the first step: {loss.loss:.4f} nats a token; a guess has {loss.guess:.4f}")
    return _titled("machine", texts)


def _disk(plan: "Plan") -> list[str]:
    texts = []
    if plan.sizes is not None:
        sizes = plan.sizes
        unknown = "" if sizes.complete else " and the optimizer's state, whose size only its first step tells"
        if sizes.checkpoints:
            texts.append(
                f"{sizes.checkpoints} checkpoints of {mib(sizes.checkpoint)}{unknown}, {sizes.kept} kept; "
                f"result {mib(sizes.result)}"
            )
        else:
            texts.append(f"no checkpoints; result {mib(sizes.result)}")
        texts.append(f"{mib(sizes.needed)} at most, {mib(sizes.free)} free")
    texts.append(", ".join(plan.files))
    return _titled("disk", texts) + (_titled("hub", [plan.hub]) if plan.hub else [])


def _findings(checks: StartChecks) -> list[str]:
    if not checks.findings:
        return _titled("findings", ["none"])
    lines = []
    for number, finding in enumerate(checks.findings):
        state = "forced" if finding.check in checks.forced else "stops the run"
        text = f"[{state if finding.stops else 'warning'}] {finding.sentence()}"
        lines += _titled("" if number else "findings", text.splitlines())
    return lines
