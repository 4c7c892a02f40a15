"""The record of growth as a page that people read, and the laws that it shows.

record["laws"] = laws(record)
text = markdown(record)
"""

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any

from scripts.benchmarking.laws import Line, Power, fit_line, fit_power
from scripts.benchmarking.process import over_limit
from scripts.benchmarking.report import agreement_text, heading, spread

NOTES = """
Every point is trained in a process of its own, all contenders in turns on the same random weights and the same packs in
the same order; figures are medians over turns, in brackets the lowest and highest. A step is one pack. Times are those
of whole optimizer steps with their data loading, after one step of warmup; memory is `torch.cuda.max_memory_allocated`
while training, or on a CPU the resident size of the process, Python and torch included. A contender that is over a
limit is not tried at longer packs or with larger models. Lines are least squares of relative differences, powers of
differences of logarithms; the residual is the root of the mean square of (fitted - measured) / measured. In a line of
time, the first term is what a token costs whatever its pack, and the second attention's share, which in one document
grows with its length.
"""

KINDS = {"time": Line, "memory": Line, "time by size": Power, "memory by size": Line}
"""Laws by their names in the record."""


def measured(series: Mapping[str, Any], name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The points of a series that a contender was measured at in every turn, each with its results."""
    found = [(point, point["contenders"].get(name, [])) for point in series["points"]]
    return [(point, own) for point, own in found if own and not any("error" in result for result in own)]


def contenders(series: Mapping[str, Any]) -> list[str]:
    """Their names, in the record's order."""
    return list(dict.fromkeys(name for point in series["points"] for name in point["contenders"]))


def seconds_a_token(results: list[dict[str, Any]]) -> float:
    """The median over turns."""
    return median(1 / result["tokens_per_second"] for result in results)


def memory_mib(results: list[dict[str, Any]]) -> float:
    """The median over turns."""
    return median(result["peak_memory_mib"] for result in results)


def laws(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By series and contender, what time a token and memory grow by, where three points were measured.

    Returns:
        `time`, seconds a token by tokens of a pack, and `memory`, MiB by tokens of a step; or by parameters `time by
        size` and `memory by size`. Each as the fields of its law.
    """
    found: dict[str, dict[str, Any]] = {}
    for title, series in record["series"].items():
        for name in contenders(series):
            points = measured(series, name)
            x = [point["x"] for point, _ in points]
            times, memory = ([of(own) for _, own in points] for of in (seconds_a_token, memory_mib))
            if title == "size":
                fitted = {"time by size": fit_power(x, times), "memory by size": fit_line(x, memory)}
            else:
                tokens = [own[0]["tokens_per_step"] for _, own in points]
                fitted = {"time": fit_line(x, times), "memory": fit_line(tokens, memory)}
            known = {kind: dataclasses.asdict(law) for kind, law in fitted.items() if law is not None}
            if known:
                found.setdefault(title, {})[name] = known
    return found


def law_of(record: Mapping[str, Any], series: str, name: str, kind: str) -> Line | Power | None:
    """A law of the record; None where there are too few points."""
    fields = record["laws"].get(series, {}).get(name, {}).get(kind)
    return KINDS[kind](**fields) if fields else None


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page: a table for each series, and the laws under it."""
    limits = record["limits"]
    text = heading(record, "How time and memory grow")
    text += f"Limits of a process: {limits['memory_gib']:g} GiB and {limits['timeout_s']:g} s.\n"
    for name, series in record["series"].items():
        text += f"\n## {series['title']}\n\n{_subject(name, series)}\n\n{_table(name, series)}\n"
        said = [_law_text(record, name, contender) for contender in contenders(series)]
        text += "".join(line for line in said if line)
        text += "\n" + _agreement(series)
    return text + NOTES


def _subject(name: str, series: Mapping[str, Any]) -> str:
    case = series["points"][0]["case"]
    what = f"{case['model']} full" if name != "size" else f"Packs of {case['max_length']:,} tokens, full"
    return f"{what}, {case['rows']} rows, {case['supervised']:.0%} supervised."


def _table(name: str, series: Mapping[str, Any]) -> str:
    names = contenders(series)
    first = ["tokens of a pack"] if name != "size" else ["model", "parameters"]
    columns = [title for own in names for title in (f"{own}, tokens/s", "ms a token", "peak memory")]
    lines = ["| " + " | ".join([*first, *columns]) + " |", "|" + "---|" * len(first) + "---:|" * len(columns)]
    for point in series["points"]:
        cells = [point["label"]] if name != "size" else [point["label"], f"{point['x']:,}"]
        for own in names:
            cells += _cells(point["contenders"].get(own, []))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(results: list[dict[str, Any]]) -> list[str]:
    """Speed, time a token and memory of a contender at a point; or why there are none."""
    if not results:
        return ["not measured", "", ""]
    if failed := [result for result in results if "error" in result]:
        error = failed[0]["error"].replace("|", "\\|").replace("\n", " ")
        return [f"over a limit: {error}" if over_limit(failed[0]) else f"failed: {error}", "", ""]
    return [
        spread([result["tokens_per_second"] for result in results], ",.0f"),
        f"{1000 * seconds_a_token(results):.3f}",
        f"{memory_mib(results) / 1024:.2f} GiB",
    ]


def _law_text(record: Mapping[str, Any], series: str, name: str) -> str:
    """The laws of a contender in words; empty where there are none."""
    said = []
    longest = max((point["x"] for point, _ in measured(record["series"][series], name)), default=0)
    if isinstance(line := law_of(record, series, name, "time"), Line):
        share = line.slope * longest / line.at(longest)
        said.append(
            f"ms a token = {1000 * line.intercept:.4f} {1e6 * line.slope:+.4f} x length / 1,000 "
            f"(residual {line.residual:.1%}; the second term is {share:.0%} at {longest:,})"
        )
    if isinstance(line := law_of(record, series, name, "memory"), Line):
        said.append(
            f"MiB = {line.intercept:.0f} {1000 * line.slope:+.1f} x tokens / 1,000 (residual {line.residual:.1%})"
        )
    if isinstance(power := law_of(record, series, name, "time by size"), Power):
        said.append(f"time a token grows as parameters^{power.exponent:.2f} (residual {power.residual:.1%})")
    if isinstance(line := law_of(record, series, name, "memory by size"), Line):
        said.append(
            f"MiB = {line.intercept:.0f} {1e6 * line.slope:+.1f} x parameters / 1,000,000, which is "
            f"{2**20 * line.slope:.1f} bytes a parameter (residual {line.residual:.1%})"
        )
    return f"- {name}: {'; '.join(said)}.\n" if said else ""


def _agreement(series: Mapping[str, Any]) -> str:
    """What was compared at all points of a series together."""
    return agreement_text({"agreement": [found for point in series["points"] for found in point["agreement"]]})
