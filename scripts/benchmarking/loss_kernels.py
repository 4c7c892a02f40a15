"""How fast the loss of a head is, with its gradients: this project's chunks, whole logits, and torch's own function.

    python scripts/benchmark.py loss --repeats 5 --output docs/benchmarks/loss

Every contender gets the same hidden states, head and targets and gives the summed loss, and the gradients of both, in
turns; figures are medians. Before any time is told, losses and gradients are compared with those of whole logits.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from src.chunked_loss import Objective, chunked_loss
from utils.distributed import accelerator_name
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("32000x288", "49152x576", "128256x2048")
TOKENS = (64, 512, 4096)
TORCH_CHUNKS = (256, 512, 1024)
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative difference that rounding explains: of sums of up to 4,096 products, and of 8 bits."""

Contender = Callable[[torch.nn.Linear, torch.Tensor, torch.Tensor], torch.Tensor]


def in_chunks(head: torch.nn.Linear, hidden_TH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """This project's own."""
    return chunked_loss(head, hidden_TH, targets_T, Objective(), vocabulary=head.out_features)[0]


def whole(head: torch.nn.Linear, hidden_TH: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """All logits at once, in float32."""
    return functional.cross_entropy(head(hidden_TH).float(), targets_T, reduction="sum")


def torch_chunks(head: torch.nn.Linear, hidden_TH: torch.Tensor, targets_T: torch.Tensor, *, rows: int) -> torch.Tensor:
    """torch's, in chunks of so many rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return functional.linear_cross_entropy(hidden_TH, head.weight, targets_T, reduction="sum", options=options)


def contenders() -> dict[str, Contender]:
    """What is compared; torch's function is in torch 2.13 and later."""
    found: dict[str, Contender] = {"chunks": in_chunks, "whole logits": whole}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found |= {f"torch {rows}": partial(torch_chunks, rows=rows) for rows in TORCH_CHUNKS}
    return found


def turn(
    work: Contender, head: torch.nn.Linear, hidden_TH: torch.Tensor, targets_T: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of a forward and backward pass, and the loss and gradients that came of it."""
    hidden_TH.grad = head.weight.grad = None
    # A CPU's own time, of all threads: neighbours of the machine do not count in it as they do in the clock's.
    now = time.perf_counter if hidden_TH.is_cuda else time.process_time
    _wait(hidden_TH)
    started = now()
    loss = work(head, hidden_TH, targets_T)
    loss.backward()
    _wait(hidden_TH)
    seconds = now() - started
    gradients = [hidden_TH.grad] + ([head.weight.grad] if head.weight.requires_grad else [])
    return seconds, [loss.detach(), *gradients]


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(
    vocabulary: int, width: int, tokens: int, *, dtype: torch.dtype, trains_head: bool, repeats: int
) -> dict[str, Any]:
    """One case: a contender's seconds in each turn.

    Raises:
        UserError: a contender computes something else.
    """
    torch.manual_seed(0)
    device = accelerator_name()
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(trains_head)
    hidden_TH = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
    targets_T = torch.randint(vocabulary, (tokens,), device=device)
    all_works = contenders()
    # torch in chunks larger than the batch is torch in one chunk, which the smallest of them stands for already.
    works = {name: all_works[name] for name in ("chunks", "whole logits")}
    for rows in TORCH_CHUNKS:
        if f"torch {rows}" in all_works and (rows <= tokens or rows == TORCH_CHUNKS[0]):
            works[f"torch {rows}"] = all_works[f"torch {rows}"]
    expected = [tensor.clone() for tensor in turn(whole, head, hidden_TH, targets_T)[1]]
    for name, work in works.items():
        for ours, theirs in zip(turn(work, head, hidden_TH, targets_T)[1], expected, strict=True):
            difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            if not difference <= AGREEMENT[dtype]:
                raise UserError(f"{name} computes something else: it differs by {difference:.2g} from whole logits")
    del expected
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(turn(work, head, hidden_TH, targets_T)[0])
    return {
        "vocabulary": vocabulary,
        "width": width,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "trains_head": trains_head,
        "seconds": seconds,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, a line for each case."""
    names = ["chunks", "whole logits", *(f"torch {rows}" for rows in TORCH_CHUNKS)]
    packages, hardware = record["environment"]["packages"], record["environment"]["hardware"]
    lines = [
        f"`{record['command']}`\n",
        f"torch {packages['torch']}, {record['device']}, {hardware['cores']} cores, {record['threads']} thread(s).",
        "Milliseconds of a loss and its gradients (on a CPU: of processor time), medians of turns, in brackets lowest",
        "and highest; `torch N` is `linear_cross_entropy` in chunks of N rows, left out where N is above the tokens",
        "but for the first.\n",
        "| vocabulary | width | tokens | format | head | " + " | ".join(names) + " |",
        "|---:|---:|---:|---|---|" + "---:|" * len(names),
    ]
    for case in record["cases"]:
        cells = [f"{case['vocabulary']:,}", str(case["width"]), f"{case['tokens']:,}", case["dtype"]]
        cells.append("trains" if case["trains_head"] else "frozen")
        for name in names:
            times = [1000 * value for value in case["seconds"].get(name, [])]
            cells.append(f"{median(times):,.0f} ({min(times):,.0f} to {max(times):,.0f})" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line after `loss`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="VxH", help="vocabulary x width")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="supervised tokens")
    parser.add_argument(
        "--max_product", type=int, default=2**36, help="most tokens x vocabulary x width of a case; others are left out"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and states")
    parser.add_argument("--frozen", action="store_true", help="the head gets no gradient")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender, at least 1")
    parser.add_argument("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    given = parser.parse_args(argv)
    if given.repeats < 1:
        raise UserError(f"--repeats={given.repeats} is below 1; give the turns of each contender")
    return given


def _size(given: str) -> tuple[int, int]:
    """
    Raises:
        UserError: it is not VOCABULARYxWIDTH.
    """
    parts = given.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--sizes has '{given}'; give vocabulary x width, such as 32000x288")
    return int(parts[0]), int(parts[1])


def main(argv: Sequence[str], command: str) -> int:
    """Measure each case and print the record; 0 when all ended well."""
    given = parse_arguments(argv)
    sizes = [_size(size) for size in given.sizes]
    record: dict[str, Any] = {
        "command": command,
        "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
        "device": accelerator_name(),
        "threads": torch.get_num_threads(),
        "cases": [],
    }
    cases = [(*size, tokens) for size in sizes for tokens in given.tokens]
    for vocabulary, width, tokens in cases:
        if vocabulary * width * tokens > given.max_product:
            continue
        record["cases"].append(
            measure(
                vocabulary,
                width,
                tokens,
                dtype=getattr(torch, given.dtype),
                trains_head=not given.frozen,
                repeats=given.repeats,
            )
        )
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.output.with_name(given.output.name + ".json"), record)
            write_text(given.output.with_name(given.output.name + ".md"), markdown(record))
    print(markdown(record), flush=True)
    return 0
