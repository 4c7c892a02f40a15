"""The training benchmark's record as a page that people read.

text = markdown(record)
"""

from statistics import median
from typing import Any

HEADER = (
    "| contender | tokens/s | supervised tokens/s | smolfactory is | of the matrix rate | peak memory | first step "
    "| batch | padding | attention |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n"
)

NOTES = """
Every contender trains the same random weights on the same rows in the same order, in a process of its own, all in
turns; figures are medians over turns, in brackets the lowest and highest. Tokens are counted without padding. Times
are those of whole optimizer steps with their data loading, after warmup. The matrix rate is that of a large matrix
product in the same number format, measured in each turn; a step's operations are 6 for each token and weight that
trains and 4 for a frozen one, the output head's at supervised tokens only, and 12 x width for each layer and pair of
tokens of one document: what is computed again or in vain counts nothing. Peak memory is
`torch.cuda.max_memory_allocated` while training, or on a CPU the resident size of the process. The first step is timed
from the start of the process; rows are tokenized before. Batch is micro-batches a step x packs (padded: rows) at once.
Padded contenders take as many micro-batches a step as take about the same tokens and, unless --padded_rows says, as
many rows at once as never take more positions than the packs.
"""


def figure(results: list[dict[str, Any]], name: str) -> float:
    """The median over turns."""
    return median(result[name] for result in results)


def spread(values: list[float], form: str) -> str:
    """The median of several turns, with the lowest and highest where there are several."""
    text = format(median(values), form)
    if len(values) == 1:
        return text
    return f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def said_failure(results: list[dict[str, Any]]) -> str:
    """Why a contender has no figures, fit for a table; empty where every turn was measured."""
    failures = [f"failed: {result['error']}" for result in results if "error" in result] or ["not measured"] * (
        not results
    )
    return failures[0].replace("|", "\\|").replace("\n", " ") if failures else ""


def row(name: str, entry: dict[str, Any]) -> str:
    """The line of a contender; one that was not measured, or of which a turn failed, says so in place of figures."""
    results = entry["contenders"][name]
    if failure := said_failure(results):
        return f"| {name} | {failure} | | | | | | | | |\n"
    own = entry["contenders"].get("smolfactory", [])
    measured = own and not any("error" in result for result in own)
    ratio = f"{figure(own, 'tokens_per_second') / figure(results, 'tokens_per_second'):.2f} x" if measured else ""
    rates = [result["matrix_tflops"] for result in entry["matrix"] if "error" not in result]
    share = f"{figure(results, 'tflops_per_second') / median(rates):.1%}" if rates else ""
    cells = [
        name,
        spread([result["tokens_per_second"] for result in results], ",.0f"),
        spread([result["supervised_tokens_per_second"] for result in results], ",.0f"),
        ratio,
        share,
        f"{figure(results, 'peak_memory_mib') / 1024:.2f} GiB",
        f"{figure(results, 'seconds_to_first_step'):.1f} s",
        f"{results[0]['micro_batches_per_step']} x {results[0]['rows_at_once']}",
        f"{figure(results, 'padding_share'):.1%}",
        results[0]["attention"],
    ]
    return "| " + " | ".join(cells) + " |\n"


def agreement_text(entry: dict[str, Any]) -> str:
    """What was compared between contenders, and what differs."""
    turns = [found for found in entry["agreement"] if found["contenders"]]
    if not turns:
        return "No two contenders were compared.\n"
    lines = []
    for name in turns[0]["contenders"]:
        own = [found["contenders"][name] for found in turns if name in found["contenders"]]
        worst = {key: max(turn["differences"][key] for turn in own) for key in own[0]["differences"]}
        said = ", ".join(f"{key.replace('_', ' ')} {value:.1g}" for key, value in worst.items())
        faults = [fault for turn in own for fault in turn["faults"]]
        lines.append(f"- {name}: {said}" + (f". IT COMPUTES SOMETHING ELSE: {faults[0]}" if faults else ""))
    return (
        f"Largest relative differences from {turns[0]['reference']} in the first steps (padded contenders: in the loss "
        "over the rows of the first step, before training):\n\n" + "\n".join(lines) + "\n"
    )


def _case_text(entry: dict[str, Any]) -> str:
    text = f"\n## {entry['title']}\n\n" + HEADER + "".join(row(name, entry) for name in entry["contenders"]) + "\n"
    rates = [result for result in entry["matrix"] if "error" not in result]
    if rates:
        stated = rates[0]["stated_tflops"]
        text += (
            f"Matrix products of {rates[0]['matrix_dtype']} run at {figure(rates, 'matrix_tflops'):.3g} TFLOP/s"
            + (f" of {stated:g} that the maker states" if stated else "")
            + (f" with {rates[0]['threads']} thread(s)" if rates[0]["threads"] else "")
            + ".\n"
        )
    if entry["trials"]:
        trials = ", ".join(f"{name} {value}" for name, value in entry["trials"].items())
        text += f"Attention of TRL's packs, by a trial (tokens/s): {trials}.\n"
    if entry["masks_beside_trl"]:
        masks = entry["masks_beside_trl"]
        text += (
            f"Masks were not compared: {masks['error']}\n"
            if "error" in masks
            else (
                f"Of the first {masks['rows']} rows, {masks['rows_that_differ']} differ in an id or a label from what "
                "TRL's assistant_only_loss makes of them with marks in the template.\n"
            )
        )
    return text + "\n" + agreement_text(entry)


def heading(record: dict[str, Any], title: str) -> str:
    """The beginning of a page: the command, and what it ran on.

    Args:
        title: of the page; the device's name is added.
    """
    environment = record["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    hardware = environment["hardware"]
    device = ", ".join(hardware.get("gpus", [])) or f"{hardware['cores']} {hardware['machine']} cores"
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    return (
        f"# {title} on {device}\n\n"
        f"    {record['command']}\n\n"
        f"Python {environment['python']}, {packages}"
        + (f", CUDA {hardware['cuda']}" if "cuda" in hardware else "")
        + f"; commit {environment['git_commit'] or 'unknown'}. Processes at work before each turn: {load}.\n"
    )


def markdown(record: dict[str, Any]) -> str:
    """The record as a page: what it ran on, the command, a table for each case, and what the columns mean."""
    return heading(record, "Training speed") + "".join(_case_text(entry) for entry in record["cases"]) + NOTES
