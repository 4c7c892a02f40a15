"""The record of growth as a chart: speed and memory, by length in the upper two panels and by size in the lower two.

draw(record, Path("docs/benchmarks/growth.png"))

Dots are measured, lines are the fitted laws, and a cross at a panel's foot stands where a contender was over a limit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarking.chart import OWN, check_matplotlib
from scripts.benchmarking.growth_page import contenders, law_of, measured, memory_mib, seconds_a_token
from scripts.benchmarking.process import over_limit

COLORS = (OWN, "#d62728", "#7f7f7f", "#2ca02c", "#9467bd")
STYLES = {"document": ("-", "o", "one document"), "packs": ("--", "s", "many documents"), "size": ("-", "o", "")}
"""Line and mark of each series, and what the legend calls it."""


def draw(record: Mapping[str, Any], target: Path) -> None:
    """
    Raises:
        UserError: there is no matplotlib.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_length = [name for name in record["series"] if name != "size"]
    rows = [names for names in (by_length, [name for name in record["series"] if name == "size"]) if names]
    figure = Figure(figsize=(11, 4.2 * max(1, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    for (speed, memory), names in zip(figure.subplots(max(1, len(rows)), 2, squeeze=False), rows, strict=False):
        for name in names:
            _draw_series(speed, memory, record, name)
        each = [record["series"][name] for name in names]
        if not any(measured(series, own) for series in each for own in contenders(series)):
            continue  # a logarithm of no points is an error
        by_size = names == ["size"]
        x = "parameters" if by_size else "tokens of a pack"
        points = {point["x"]: point["label"] for series in each for point in series["points"]}
        speed.set(xscale="log", xlabel=x, ylabel="tokens/s")
        speed.set_xticks(list(points), list(points.values()), fontsize=8, rotation=30)
        speed.set_xticks([], minor=True)
        memory.set(xlabel=x, ylabel="peak memory, GiB")
        if by_size:
            speed.set_yscale("log")  # a power is a line there
        else:
            speed.set_ylim(bottom=0)
        memory.set_ylim(bottom=0)
        for axes in (speed, memory):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


def _draw_series(speed: Any, memory: Any, record: Mapping[str, Any], name: str) -> None:
    """The points and laws of all contenders of a series, in both panels."""
    line, mark, called = STYLES[name]
    series = record["series"][name]
    size = " by size" if name == "size" else ""
    for color, own in zip(COLORS, contenders(series), strict=False):
        points = measured(series, own)
        label = f"{own}, {called}" if called else own
        x = [point["x"] for point, _ in points]
        panels = {
            speed: ([1 / seconds_a_token(found) for _, found in points], f"time{size}", lambda seconds: 1 / seconds),
            memory: ([memory_mib(found) / 1024 for _, found in points], f"memory{size}", lambda mib: mib / 1024),
        }
        for axes, (y, kind, shown) in panels.items():
            axes.plot(x, y, mark, color=color, label=label, fillstyle="full" if line == "-" else "none")
            if law := law_of(record, name, own, kind):
                along = np.geomspace(min(x), max(x), 50)
                axes.plot(along, shown(law.at(along)), line, color=color, linewidth=1)
        _mark_limits((speed, memory), series, own, f"{label}: over a limit", color)


def _mark_limits(panels: tuple[Any, Any], series: Mapping[str, Any], name: str, label: str, color: str) -> None:
    """A cross at the foot of both panels where a contender was over a limit."""
    found = [(point["x"], point["contenders"].get(name, [])) for point in series["points"]]
    over = [x for x, results in found if any(over_limit(result) for result in results)]
    for axes in panels:
        if over:
            feet = axes.get_xaxis_transform()
            axes.plot(over, [0.03] * len(over), "x", color=color, transform=feet, label=label)
