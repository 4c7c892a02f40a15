"""The benchmark's record as a table that people read.

text = markdown(record)
"""

from statistics import median
from typing import Any

HEADER = (
    "| case | batch | tokens/s | supervised tokens/s | s/step | MFU | peak memory | loss, first to last step |\n"
    "|---|---|---:|---:|---:|---:|---:|---|\n"
)

NOTES = """
Batch is rows (packs) at once x accumulation steps. Weights are random and rows synthetic: row lengths are log-normal
with the median given (300 tokens by default), and 20 to 80 % of each row is supervised. Tokens are counted without
padding. Times are those of whole optimizer steps with their data loading, after warmup: tokens/s over all measured
steps, s/step the median; of several repeats, the median with the lowest and highest. MFU is the share of the device's
dense bf16 peak{peak}, where each token takes 6 operations for a weight that trains and 4 for a frozen one, the output
head counts at supervised tokens only, attention takes 12 x width for each layer and pair of tokens of one document, and
recomputation, padding and lookups count nothing. Peak memory is `torch.cuda.max_memory_allocated` while training, or
the process's resident size on a CPU.
"""


def label(case: dict[str, Any], result: dict[str, Any]) -> str:
    """What tells a case from the others."""
    parts = [f"{case['model']} {case['method']}", case["layout"], f"{case['max_length']:,} tokens"]
    if case["gradient_checkpointing"]:
        parts.append("checkpointing")
    parts.append(result.get("attention") or case["attention"])
    if result.get("weights"):
        parts.append(f"{result['weights']} weights" + (f", {result['autocast']} autocast" * bool(result["autocast"])))
    if case["optimizer"] != "adamw_torch_fused":
        parts.append(case["optimizer"])
    return ", ".join(parts)


def spread(values: list[float], form: str, scale: float = 1.0) -> str:
    """The median of several repeats, with the lowest and highest where there are several."""
    text = format(median(values) * scale, form)
    if len(values) == 1:
        return text
    return f"{text} ({format(min(values) * scale, form)} to {format(max(values) * scale, form)})"


def row(entry: dict[str, Any]) -> str:
    """The line of a case; one that was not measured, or of which a repeat failed, says so in place of its figures."""
    case, results = entry["case"], entry["results"]
    failures = [f"failed: {result['error']}" for result in results if "error" in result] or ["not measured"] * (
        not results
    )
    batch = f"{case['micro_batch_rows']} x {case['accumulation_steps']}"
    if failures:
        error = failures[0].replace("|", "\\|").replace("\n", " ")
        return f"| {label(case, {})} | {batch} | {error} | | | | | |\n"
    first = results[0]

    def column(name: str, form: str, scale: float = 1.0) -> str:
        return spread([result[name] for result in results], form, scale)

    mfu = "" if first["mfu"] is None else f"{column('mfu', '.1f', 100)} %"
    memory = f"{max(result['peak_memory_mib'] for result in results) / 1024:.2f} GiB"
    cells = [
        label(case, first),
        batch,
        column("tokens_per_second", ",.0f"),
        column("supervised_tokens_per_second", ",.0f"),
        column("seconds_per_step", ".3f"),
        mfu,
        memory,
        f"{first['first_loss']:.4f} to {first['last_loss']:.4f}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def markdown(record: dict[str, Any]) -> str:
    """The record as a page: what it ran on, the command, the table, and what the columns mean."""
    environment = record["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    hardware = environment["hardware"]
    device = ", ".join(hardware.get("gpus", [])) or f"{hardware['cores']} {hardware['machine']} cores"
    peaks = {result.get("peak_tflops") for entry in record["cases"] for result in entry["results"]} - {None}
    peak = f" ({', '.join(f'{value:g} TFLOP/s' for value in sorted(peaks))})" if peaks else ""
    return (
        f"# Training speed on {device}\n\n"
        f"    {record['command']}\n\n"
        f"Python {environment['python']}, {packages}"
        + (f", CUDA {hardware['cuda']}" if "cuda" in hardware else "")
        + f"; commit {environment['git_commit'] or 'unknown'}.\n\n"
        + HEADER
        + "".join(row(entry) for entry in record["cases"])
        + NOTES.format(peak=peak)
    )
