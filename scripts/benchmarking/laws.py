"""The laws that time and memory grow by, fitted to what was measured.

line = fit_line(lengths, seconds_a_token)   # a cost that stands, and attention's, which grows with length
power = fit_power(parameters, seconds_a_token)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x."""

    intercept: float
    slope: float
    residual: float
    """Root of the mean square of (fitted - measured) / measured."""

    def at(self, x: float) -> float:
        """The fitted value."""
        return self.intercept + self.slope * x


@dataclass(frozen=True)
class Power:
    """y = factor x^exponent."""

    factor: float
    exponent: float
    residual: float
    """As a line's."""

    def at(self, x: float) -> float:
        """The fitted value."""
        return self.factor * x**self.exponent


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """Least squares of relative differences, so that small figures count as much as large ones.

    Args:
        y: above 0.
    Returns:
        None where there are less than three points, through which any line goes.
    """
    if len(x) < 3:
        return None
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    width = xs.max()  # else slopes of 1e-8 beside intercepts of 1 would be lost in rounding
    terms = np.stack([1 / ys, xs / width / ys], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(terms, np.ones_like(ys), rcond=None)
    line = Line(float(intercept), float(slope / width), 0.0)
    return Line(line.intercept, line.slope, _residual(line, xs, ys))


def fit_power(x: Sequence[float], y: Sequence[float]) -> Power | None:
    """Least squares of differences of logarithms.

    Args:
        x, y: above 0.
    Returns:
        None where there are less than three points.
    """
    if len(x) < 3:
        return None
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    terms = np.stack([np.ones_like(xs), np.log(xs)], axis=1)
    (logarithm, exponent), *_ = np.linalg.lstsq(terms, np.log(ys), rcond=None)
    power = Power(float(np.exp(logarithm)), float(exponent), 0.0)
    return Power(power.factor, power.exponent, _residual(power, xs, ys))


def _residual(law: Line | Power, xs: np.ndarray, ys: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square((law.at(xs) - ys) / ys))))
