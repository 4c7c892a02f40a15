"""How time and memory of a training step grow with the length of packs and with the size of the model.

    python scripts/benchmark.py growth --output docs/benchmarks/growth
    python scripts/benchmark.py growth --lengths 512 1024 2048 --sizes --contenders smolfactory floor
    python scripts/benchmark.py growth --draw docs/benchmarks/growth.json

Three series: packs that are one document each, packs of many documents as rows come, and models of several sizes. Each
point is trained in a process of its own, all contenders in turns, and their losses are compared. A contender that is
over a limit of time or memory is said to be, and not tried at longer packs or with larger models. With --output the
record is written to NAME.json and NAME.md after every point, and to NAME.png at the end.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.benchmark import SHAPES
from scripts.benchmarking.agreement import compare, disagreements
from scripts.benchmarking.case import Case
from scripts.benchmarking.growth_chart import draw
from scripts.benchmarking.growth_page import laws, markdown
from scripts.benchmarking.process import LARGE, over_limit, run_worker
from utils.errors import UserError, tell_error
from utils.files import write_json, write_text
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parents[2]

DOCUMENT, PACKS, SIZE = "document", "packs", "size"
TITLES = {
    DOCUMENT: "Length, one document a pack",
    PACKS: "Length, packs of many documents",
    SIZE: "Size of the model",
}
"""The series, by their names in the record."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line after `growth`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths, sizes = [512, 1024, 2048, 4096, 8192, 16384], ["llama-5m", "llama-15m", "llama-42m", "llama-110m"]
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=lengths, help="tokens of a pack in the first two series")
    add("--model", default="llama-15m", help="shape that those train: a name of config/benchmark.py")
    add("--sizes", nargs="*", default=[*sizes, "llama-135m"], metavar="NAME", help="shapes of the third series")
    add("--size_length", type=int, default=1024, help="tokens of a pack there (default 1024)")
    add("--rows", choices=("instruction", "synthetic"), default="instruction", help="rows of packs; see `step`")
    add("--supervised", type=float, default=0.85, help="share of tokens that are supervised (default 0.85)")
    add("--tokens", type=int, default=4096, help="tokens that a point is measured over, at least (default 4096)")
    add("--contenders", nargs="+", metavar="NAME", default=["smolfactory", "trl packed"], help="who trains")
    add("--repeats", type=int, default=1, help="times each point runs, in turns (default 1)")
    add("--memory_gib", type=float, default=12, help="most resident memory of a process (default 12 GiB)")
    add("--timeout_s", type=float, default=150, help="most seconds of a process (default 150)")
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="folder with the data sets")
    add("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    add("--draw", type=Path, metavar="RECORD", help="only draw the chart of a record, beside it")
    return parser.parse_args(argv)


def series_of(given: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases of each series that is asked for, in the order in which they grow.

    Raises:
        UserError: a case that cannot be.
    """
    if given.tokens < 1:
        raise UserError(f"--tokens {given.tokens} must be 1 or more")

    def case(model: str, length: int, rows: str) -> Case:
        steps = max(1, -(-given.tokens // length))
        own = {"median_length": min(Case.median_length, length // 2), "supervised": given.supervised}
        return Case(model=model, rows=rows, max_length=length, steps=steps, warmup_steps=1, **own)

    lengths = sorted(set(given.lengths))
    kinds = {DOCUMENT: "document", PACKS: given.rows}
    found = {name: [case(given.model, length, rows) for length in lengths] for name, rows in kinds.items()}
    sizes = [case(model, given.size_length, given.rows) for model in dict.fromkeys(given.sizes)]
    found[SIZE] = sorted(sizes, key=lambda each: parameters_of(each.model))
    return {name: cases for name, cases in found.items() if cases}


def parameters_of(model: str) -> int:
    """Weights of a shape, one that is tied counted once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[model]))
    return sum(weight.numel() for weight in made.parameters())


def forecast(points: Sequence[dict[str, Any]], turn: int, name: str, *, length: int, memory_gib: float) -> str:
    """Why a contender is not tried at the next point of a series; empty if it is.

    Memory is at least a line in the length (a mask grows with its square), so where the line through the last two
    points is over the limit, the next point is as well.

    Args:
        points: those before, from which the last two may differ in length.
        length: tokens of a pack at the next.
    """
    before = [(point["case"]["max_length"], point["contenders"][name][turn]) for point in points]
    for point, (_, result) in zip(points, before, strict=True):
        if over_limit(result):
            return f"{result['error']}, at {point['label']} already"
    known = [(tokens, result["peak_memory_mib"] / 1024) for tokens, result in before if "error" not in result][-2:]
    if len(known) < 2 or known[0][0] == known[1][0]:
        return ""
    (first, less), (second, more) = known
    expected = more + (more - less) / (second - first) * (length - second)
    if expected <= memory_gib:
        return ""
    return f"{LARGE} {memory_gib:g} GiB: the line through the two points before says {expected:.1f}"


class Growth:
    """The series of one command, their record, and where it is written."""

    def __init__(self, given: argparse.Namespace, command: str) -> None:
        """
        Raises:
            UserError: a case or a contender that cannot be.
        """
        from scripts.benchmarking.contenders import checked_contenders, needs_checkpoint, packed_attentions

        self.given, self.cases, self.attention = given, series_of(given), packed_attentions()[0]
        names = checked_contenders(given.contenders)
        if loads := [name for name in names if needs_checkpoint(name, Case())]:
            raise UserError(f"--contenders {', '.join(loads)}: it trains from a checkpoint only; use `step` for it")
        self.record: dict[str, Any] = {
            "command": command,
            "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
            "repeats": given.repeats,
            "limits": {"memory_gib": given.memory_gib, "timeout_s": given.timeout_s},
            "load": [],
            "series": {
                series: {"title": TITLES[series], "points": [_point(series, case, names) for case in cases]}
                for series, cases in self.cases.items()
            },
            "laws": {},
        }

    def run(self) -> int:
        """Measure every point in turns, and print the record; 0, or 1 where one failed or computes something else."""
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        agree = True
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            for turn in range(self.given.repeats):
                self.record["load"].append(round(os.getloadavg()[0], 2))
                for series, cases in self.cases.items():
                    for number, case in enumerate(cases):
                        agree &= self._measure(turn, series, number, case, Path(name) / f"{series}{number}")
                if not agree:
                    break
        print("\n" + markdown(self.record))
        points = [point for each in self.record["series"].values() for point in each["points"]]
        results = [result for point in points for found in point["contenders"].values() for result in found]
        return int(not agree or any("error" in result and not over_limit(result) for result in results))

    def _measure(self, turn: int, series: str, number: int, case: Case, folder: Path) -> bool:
        """Measure all contenders at a point once, and say whether they compute the same."""
        from scripts.benchmarking.models import autocast_dtype, weights_dtype

        points = self.record["series"][series]["points"]
        point, figures = points[number], {}
        if not folder.exists():
            self._prepare(case, folder)
        for name, results in point["contenders"].items():
            limits = {"length": case.max_length, "memory_gib": self.given.memory_gib}
            reason = forecast(points[:number], turn, name, **limits)
            results.append({"error": reason} if reason else self._ask(case, folder, name))
            said = results[-1].get("error") or f"{results[-1]['tokens_per_second']:,.0f} tokens/s"
            print(f"[{turn + 1}/{self.given.repeats}] {series} {point['label']}: {name}: {said}", flush=True)
            if "error" not in results[-1]:
                figures[name] = results[-1]
        exact = autocast_dtype(case) is None and weights_dtype(case) == "float32"
        point["agreement"].append(compare(figures, exact=exact))
        wrong = disagreements(point["agreement"][-1])
        for line in wrong:
            tell_error(f"it does not compute what the others do: {line}")
        self.record["laws"] = laws(self.record)
        self._write()
        return not wrong

    def _prepare(self, case: Case, folder: Path) -> None:
        """Write a point's rows.

        Raises:
            UserError: they are too few.
        """
        from scripts.benchmarking.layout import Layout
        from scripts.benchmarking.rows import token_rows

        rows = token_rows(case, self.given.data)
        Layout.of(case, rows)  # so that too few packs are told before anything is trained
        rows.save_to_disk(str(folder / "rows"))

    def _ask(self, case: Case, folder: Path, name: str) -> dict[str, Any]:
        """What a contender measures; one whose peak was over the limit between two looks is over it as well."""
        task = {"name": name, "case": dataclasses.asdict(case), "attention": self.attention}
        limit = self.given.memory_gib
        result = run_worker(folder, task, timeout_s=self.given.timeout_s, memory_gib=limit)
        if "error" not in result and result["peak_memory_mib"] / 1024 > limit:
            return {"error": f"{LARGE} {limit:g} GiB"}
        return result

    def _write(self) -> None:
        if target := self.given.output:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target.with_name(target.name + ".json"), self.record)
            write_text(target.with_name(target.name + ".md"), markdown(self.record))


def _point(series: str, case: Case, names: Sequence[str]) -> dict[str, Any]:
    return {
        "label": case.model if series == SIZE else f"{case.max_length:,}",
        "x": parameters_of(case.model) if series == SIZE else case.max_length,
        "case": dataclasses.asdict(case),
        "contenders": {name: [] for name in names},
        "agreement": [],
    }


def main(argv: Sequence[str], command: str) -> int:
    """Exit codes: 0 when every point was measured or is over a limit, 1 when one failed or computes something else.

    Raises:
        UserError: the command is wrong.
    """
    given = parse_arguments(argv)
    if given.draw:
        draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png"))
        return 0
    growth = Growth(given, command)
    code = growth.run()
    if given.output:
        try:
            draw(growth.record, given.output.with_name(given.output.name + ".png"))
        except UserError as error:
            print(f"no chart was drawn, but `--draw {given.output}.json` can later: {error}", file=sys.stderr)
    return code
