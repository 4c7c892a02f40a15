"""How fast training steps are: this project beside TRL, transformers' Trainer and a plain loop, on random weights.

    python scripts/benchmark.py step --preset cpu-15m --repeats 3 --output docs/benchmarks/step_cpu_15m
    python scripts/benchmark.py step --preset gpu-8b-lora --supervised 0.85 0.3
    python scripts/benchmark.py step --draw docs/benchmarks/step_cpu_15m.json

Every contender trains the same model on the same rows in the same order, in a process of its own, all in turns. After
each turn the losses and gradients of the first steps are compared; if they differ by more than rounding explains, the
command stops. With --output the record is written to NAME.json and NAME.md after every contender, and to NAME.png at
the end. Nothing is downloaded; what the contenders are stands in scripts/benchmarking/contenders.py.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from config.benchmark import PRESETS
from scripts.benchmarking.agreement import compare, disagreements
from scripts.benchmarking.case import Case
from scripts.benchmarking.chart import check_matplotlib, draw
from scripts.benchmarking.process import run_worker
from scripts.benchmarking.report import markdown
from utils.errors import UserError, tell_error
from utils.files import write_json, write_text
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parents[2]
MATRIX, MASKS, WEIGHTS = "matrix", "masks", "weights"
"""What is done beside the contenders' training, in processes of their own as well."""

TRIAL_STEPS = {"warmup_steps": 2, "steps": 3}
"""Steps of a trial that tells which attention is the best for TRL."""


def add_case_options(parser: argparse._ArgumentGroup) -> None:
    """One option for each field of a case, without a default, so that what was given can be told."""
    for part in dataclasses.fields(Case):
        choices = get_args(part.type) if get_origin(part.type) is Literal else None
        several = {"nargs": "+", "type": float} if part.name == "supervised" else {}
        kind = str if choices else part.type
        parser.add_argument(
            f"--{part.name}",
            **{"type": kind, "choices": choices, "default": argparse.SUPPRESS, "help": part.metadata["help"]} | several,
        )


def parse_arguments(
    argv: Sequence[str],
    *,
    verb: str = "step",
    description: str | None = __doc__,
    defaults: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """The command line after `step`, or another verb that measures the same; options of a case that were not given are
    absent.

    Args:
        defaults: of options, in place of their own.
    """
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {verb}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what is trained; see config/benchmark.py")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="who trains (default: all that are installed)")
    parser.add_argument("--repeats", type=int, default=1, help="times each contender runs, in turns (default 1)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder with the data sets")
    parser.add_argument("--timeout_s", type=float, default=1800, help="seconds after which one fails (default 1800)")
    parser.add_argument("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    parser.add_argument("--draw", type=Path, metavar="RECORD", help="only draw the chart of a record, beside it")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "TASK"), help=argparse.SUPPRESS)
    add_case_options(parser.add_argument_group("in place of what the preset has"))
    parser.set_defaults(**defaults or {})
    given = parser.parse_args(argv)
    if not (given.preset or given.draw or given.worker):
        parser.error("--preset is missing: name what is trained")
    return given


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The preset's cases, with what was given in place of theirs; each with every share of supervised tokens."""
    own = {part.name: getattr(given, part.name) for part in dataclasses.fields(Case) if hasattr(given, part.name)}
    shares = own.pop("supervised", [None])
    cases = [Case(**fields | own | {"supervised": share}) for fields in PRESETS[given.preset] for share in shares]
    return list(dict.fromkeys(cases))


def work(folder: Path, task: dict[str, Any]) -> None:
    """Do a task in this process, and leave what it returns in the task's folder."""
    if task["name"] == "unsloth":
        import unsloth  # noqa: F401  before what it patches
    from datasets import Dataset

    from scripts.benchmarking.layout import Layout
    from scripts.benchmarking.measure import matrix_rate, measure
    from scripts.benchmarking.models import write_weights

    case, found = Case(**task["case"]), {}
    if task["name"] == MATRIX:
        found = matrix_rate(case)
    elif task["name"] == MASKS:
        found = compare_masks(Path(task["data"]), Path(task["folder"]))
    elif task["name"] == WEIGHTS:
        write_weights(case, folder / WEIGHTS)
    else:
        layout = Layout.of(case, Dataset.load_from_disk(str(folder / "rows")))
        given = {name: task[name] for name in ("attention", "started")}
        found = measure(task["name"], layout, Path(task["folder"]), weights=folder / WEIGHTS, **given)
    write_json(Path(task["folder"]) / "result.json", found)


def compare_masks(data: Path, folder: Path) -> dict[str, int]:
    """The ids and labels of instruction rows beside those that TRL makes of them."""
    from scripts.benchmarking import preparation
    from scripts.benchmarking.rows import write_instructions

    write_instructions(data, folder / "rows.jsonl")
    return preparation.compare_masks(folder / "rows.jsonl", data)


class Measurement:
    """The cases of one command, their record, and where it is written."""

    def __init__(self, given: argparse.Namespace, command: str, page: Callable[[dict[str, Any]], str]) -> None:
        """
        Args:
            page: makes a page of the record.
        Raises:
            UserError: a contender is asked for that is not one, or not installed.
        """
        from scripts.benchmarking.contenders import checked_contenders

        self.given, self.cases, self.page = given, cases_of(given), page
        self.names = checked_contenders(given.contenders)
        self.record: dict[str, Any] = {
            "command": command,
            "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
            "repeats": given.repeats,
            "load": [],
            "cases": [
                {
                    "case": dataclasses.asdict(case),
                    "title": case.title,
                    "contenders": {name: [] for name in self.names},
                    "matrix": [],
                    "trials": {},
                    "masks_beside_trl": None,
                    "agreement": [],
                }
                for case in self.cases
            ],
        }

    def run(self) -> int:
        """Measure every case in turns, and print the record; 0, or 1 where one failed or computes something else."""
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            folders = [Path(name) / str(number) for number in range(len(self.cases))]
            attentions = [self._prepare(*place) for place in zip(self.cases, folders, self._entries, strict=True)]
            agree = True
            for turn in range(self.given.repeats):
                self.record["load"].append(round(os.getloadavg()[0], 2))
                for case, folder, entry, attention in zip(self.cases, folders, self._entries, attentions, strict=True):
                    agree &= self._turn(turn, case, folder, entry, attention)
                if not agree:
                    break
        print("\n" + self.page(self.record))
        results = [result for entry in self._entries for found in entry["contenders"].values() for result in found]
        return int(not agree or any("error" in result for result in results))

    @property
    def _entries(self) -> list[dict[str, Any]]:
        return self.record["cases"]

    def _prepare(self, case: Case, folder: Path, entry: dict[str, Any]) -> str:
        """Write the case's rows and, where needed, its weights, and find the best attention for TRL's packs.

        Raises:
            UserError: the weights could not be written.
        """
        from datasets.utils.logging import disable_progress_bar

        from scripts.benchmarking.contenders import needs_checkpoint, packed_attentions
        from scripts.benchmarking.layout import Layout
        from scripts.benchmarking.rows import token_rows

        disable_progress_bar()
        rows = token_rows(case, self.given.data)
        Layout.of(case, rows)  # so that too few packs are told before anything is trained
        rows.save_to_disk(str(folder / "rows"))
        if case.rows == "instruction" and case.supervised is None:
            entry["masks_beside_trl"] = self._ask(case, folder, MASKS)
        if any(needs_checkpoint(name, case) for name in self.names) and (
            error := self._ask(case, folder, WEIGHTS).get("error")
        ):
            raise UserError(f"the weights of {case.title} could not be written: {error}")
        known = packed_attentions()
        if len(known) > 1 and {"trl packed", "trl liger", "unsloth"} & set(self.names):
            short = dataclasses.replace(case, **TRIAL_STEPS)
            found = {name: self._ask(short, folder, "trl packed", attention=name) for name in known}
            entry["trials"] = {
                name: result.get("error") or f"{result['tokens_per_second']:,.0f}" for name, result in found.items()
            }
            known.sort(key=lambda name: -found[name].get("tokens_per_second", 0))
        return known[0]

    def _ask(self, case: Case, folder: Path, name: str, **more: Any) -> dict[str, Any]:
        task = {"name": name, "case": dataclasses.asdict(case), "data": str(self.given.data), **more}
        return run_worker(folder, task, timeout_s=self.given.timeout_s)

    def _turn(self, turn: int, case: Case, folder: Path, entry: dict[str, Any], attention: str) -> bool:
        """Measure all contenders on a case once, and say whether they compute the same."""
        entry["matrix"].append(self._ask(case, folder, MATRIX))
        figures = {}
        for name, results in entry["contenders"].items():
            results.append(self._ask(case, folder, name, attention=attention))
            said = results[-1].get("error") or f"{results[-1]['tokens_per_second']:,.0f} tokens/s"
            print(f"[{turn + 1}/{self.given.repeats}] {case.title}: {name}: {said}", flush=True)
            if "error" not in results[-1]:
                figures[name] = results[-1]
            self._write()
        exact = entry["matrix"][-1].get("matrix_dtype") == "float32"
        entry["agreement"].append(compare(figures, exact=exact))
        wrong = disagreements(entry["agreement"][-1])
        for line in wrong:
            tell_error(f"it does not compute what the others do: {line}")
        self._write()
        return not wrong

    def _write(self) -> None:
        if target := self.given.output:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target.with_name(target.name + ".json"), self.record)
            write_text(target.with_name(target.name + ".md"), self.page(self.record))


def measure_and_draw(given: argparse.Namespace, command: str, *, page: Callable[[dict[str, Any]], str]) -> int:
    """Measure what a command line asks for, and draw its chart where it can be; the exit code.

    Args:
        page: makes a page of the record.
    Raises:
        UserError: a contender or a case cannot be.
    """
    if given.draw:
        draw(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(".png"))
        return 0
    charts = bool(given.output)
    try:
        check_matplotlib()
    except UserError as error:
        charts = False
        if given.output:
            print(f"no chart will be drawn, but `--draw {given.output}.json` can later: {error}", file=sys.stderr)
    measurement = Measurement(given, command, page)
    code = measurement.run()
    if charts:
        draw(measurement.record, given.output.with_name(given.output.name + ".png"))
    return code


def main(argv: Sequence[str], command: str) -> int:
    """Exit codes: 0 when every contender was measured, 1 when one failed or computes something else.

    Raises:
        UserError: the command is wrong.
    """
    given = parse_arguments(argv)
    if given.worker:
        work(Path(given.worker[0]), json.loads(given.worker[1]))
        return 0
    return measure_and_draw(given, command, page=markdown)
