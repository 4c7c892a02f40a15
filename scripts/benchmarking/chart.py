"""The training benchmark's record as a bar chart.

draw(record, Path("docs/benchmarks/step.png"))
"""

import importlib.util
from pathlib import Path
from statistics import median
from typing import Any

from utils.errors import UserError

OWN, OTHERS = "#1f77b4", "#b0b0b0"


def check_matplotlib() -> None:
    """
    Raises:
        UserError: there is no matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the chart needs matplotlib: pip install -r requirements/dev.txt")


def draw(record: dict[str, Any], target: Path) -> None:
    """Draw tokens a second of every contender, a panel for each case, with the lowest and highest of several turns.

    Raises:
        UserError: there is no matplotlib.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = record["cases"]
    most = max(len(entry["contenders"]) for entry in cases)
    figure = Figure(figsize=(8, len(cases) * (1.2 + 0.4 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, entry in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        _draw_case(axes, entry)
    figure.savefig(target, dpi=150)


def _draw_case(axes: Any, entry: dict[str, Any]) -> None:
    speeds = [
        [result["tokens_per_second"] for result in results if "error" not in result]
        for results in entry["contenders"].values()
    ]
    middles = [median(values) if values else 0.0 for values in speeds]
    lows = [middle - min(values, default=0.0) for middle, values in zip(middles, speeds, strict=True)]
    highs = [max(values, default=0.0) - middle for middle, values in zip(middles, speeds, strict=True)]
    colors = [OWN if name == "smolfactory" else OTHERS for name in entry["contenders"]]
    bars = axes.barh(list(entry["contenders"]), middles, xerr=[lows, highs], color=colors, capsize=3)
    axes.bar_label(bars, [f"{middle:,.0f}" if middle else "failed" for middle in middles], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("tokens/s, padding not counted")
    axes.set_title(entry["title"], fontsize=9)
