"""What each part of the training step gains: this project's trainer, with one part taken away at a time.

    python scripts/benchmark.py gains --output docs/benchmarks/gains
    python scripts/benchmark.py gains --max_length 2048 --micro_batch_rows 1 --contenders smolfactory 'dense mask'

It takes all options of `step`; what the contenders are stands in scripts/benchmarking/variants.py. All train the same
losses, which are compared after each turn.
"""

from collections.abc import Sequence
from typing import Any

from scripts.benchmarking.report import agreement_text, figure, heading, said_failure, spread
from scripts.benchmarking.step import measure_and_draw, parse_arguments
from scripts.benchmarking.variants import OWN, VARIANTS

DEFAULTS = {
    "preset": "cpu-15m",
    "contenders": list(VARIANTS),
    "supervised": [0.3],
    "repeats": 2,
    "steps": 5,
    "warmup_steps": 2,
}

HEADER = (
    "| contender | what is otherwise | seconds a step | time is | peak memory | memory is |\n"
    "|---|---|---:|---:|---:|---:|\n"
)

NOTES = f"""
Each line is `{OWN}` with one thing otherwise; ratios are to `{OWN}` in the same turn, medians over turns, in brackets
the lowest and highest. Every contender trains the same weights on the same packs in the same order, in a process of its
own. Seconds are medians over whole optimizer steps with their data loading, after warmup; memory is
`torch.cuda.max_memory_allocated` while training, or on a CPU the resident size of the process, Python and torch
included.
"""


def ratios(entry: dict[str, Any], name: str, measure: str) -> list[float]:
    """A contender's figure to that of this project's trainer, for each turn in which both were measured."""
    pairs = zip(entry["contenders"][name], entry["contenders"].get(OWN, []), strict=False)
    return [other[measure] / own[measure] for other, own in pairs if "error" not in other and "error" not in own]


def markdown(record: dict[str, Any]) -> str:
    """The record as a page: a table for each case."""
    text = heading(record, "What each part of the training step gains")
    for entry in record["cases"]:
        rows = "".join(_row(name, entry) for name in entry["contenders"])
        text += f"\n## {entry['title']}\n\n{HEADER}{rows}\n{agreement_text(entry)}"
    return text + NOTES


def _row(name: str, entry: dict[str, Any]) -> str:
    results, meaning = entry["contenders"][name], VARIANTS[name].meaning if name in VARIANTS else ""
    if failure := said_failure(results):
        return f"| {name} | {meaning} | {failure} | | | |\n"
    times, memory = (ratios(entry, name, measure) for measure in ("seconds_per_step", "peak_memory_mib"))
    cells = [
        name,
        meaning,
        f"{figure(results, 'seconds_per_step'):.2f}",
        f"{spread(times, '.2f')} x" if times else "",
        f"{figure(results, 'peak_memory_mib') / 1024:.2f} GiB",
        f"{spread(memory, '.2f')} x" if memory else "",
    ]
    return "| " + " | ".join(cells) + " |\n"


def main(argv: Sequence[str], command: str) -> int:
    """Exit codes: 0 when every contender was measured, 1 when one failed or computes something else.

    Raises:
        UserError: the command is wrong.
    """
    given = parse_arguments(argv, verb="gains", description=__doc__, defaults=DEFAULTS)
    return measure_and_draw(given, command, page=markdown)
