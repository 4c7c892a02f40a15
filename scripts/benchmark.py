"""Measure the training step: tokens a second, MFU and peak memory, on random weights of known shapes.

python scripts/benchmark.py --model llama-1b --micro_batch_rows 8 --compare --baseline
python scripts/benchmark.py --max_length 4096 --case "model=llama-1b" --case "model=llama-8b method=qlora" \\
    --repeats 3 --output docs/benchmarks/sizes
python scripts/benchmark.py data --repeats 3     # how fast rows are prepared, beside TRL
python scripts/benchmark.py scale                # in how much memory a million rows are

Nothing is downloaded. Each case is trained in a process of its own by the project's trainer on packs of synthetic rows,
so one that fails ends no other and memory figures are its own. With --output the record is written to NAME.json and
NAME.md after every case.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.benchmarking.case import Case
from scripts.benchmarking.report import markdown
from utils.errors import UserError


def truth(text: str) -> bool:
    """true or false, as YAML has them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def add_case_options(parser: argparse.ArgumentParser, *, prefix: str) -> None:
    """One option for each field of a case, without a default, so that what was given can be told."""
    for part in dataclasses.fields(Case):
        choices = get_args(part.type) if get_origin(part.type) else None
        parser.add_argument(
            f"{prefix}{part.name}",
            type=truth if part.type is bool else str if choices else part.type,
            choices=choices,
            default=argparse.SUPPRESS,
            help=f"{part.metadata['help']} (default {part.default})",
        )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; options of a case that were not given are absent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser.add_argument_group("the case, or what all cases share"), prefix="--")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="'NAME=VALUE ...'",
        help="one case, by what it has of its own, as in 'model=llama-1b method=lora'; may be given several times",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="measure each case packed and unpacked; unpacked accumulates as many more rows as a pack holds, so that "
        "both take about the same tokens to a step, with the same most tokens at once",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="measure each case with transformers' Trainer on padded rows as well"
    )
    parser.add_argument("--repeats", type=int, default=1, help="times each case is measured, in turns (default 1)")
    parser.add_argument("--peak_tflops", type=float, help="the device's best, for MFU (default: config/benchmark.py)")
    parser.add_argument("--timeout_s", type=float, default=600, help="seconds after which a case fails (default 600)")
    parser.add_argument("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def case_of(given: argparse.Namespace, text: str) -> Case:
    """The case that `text` names, beside what all cases share."""
    parser = argparse.ArgumentParser(prog="--case", add_help=False)
    add_case_options(parser, prefix="--")
    own = parser.parse_args([f"--{word}" for word in shlex.split(text)])
    shared = {part.name: getattr(given, part.name) for part in dataclasses.fields(Case) if hasattr(given, part.name)}
    return Case(**{**shared, **vars(own)})


def variants(case: Case, *, compare: bool, baseline: bool) -> list[Case]:
    """The case, and what it is compared with, at about the same tokens to a step."""
    from scripts.benchmarking.rows import rows_per_pack

    more = round(case.accumulation_steps * rows_per_pack(case))
    unpacked = dataclasses.replace(case, packing=False, accumulation_steps=more) if case.packing else case
    found = [dataclasses.replace(case, packing=True), unpacked] if compare else [case]
    return [*found, dataclasses.replace(unpacked, trainer="plain")] if baseline else found


def run_case(case: Case, *, peak: float | None, timeout_s: float) -> dict[str, Any]:
    """The figures of a case, measured in a process of its own, or `error` with what ended it."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        task = {"case": dataclasses.asdict(case), "folder": name, "peak": peak}
        command = [sys.executable, __file__, "--worker", json.dumps(task)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout_s:g} s"}
        result = Path(name) / "result.json"
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        error = lines[-1].replace(str(ROOT), ".").replace(name, "TEMPORARY") if lines else "no message"
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return {"error": f"{error[:300]} ({reason})", "stderr": done.stderr[-4000:]}


def work(task: dict[str, Any]) -> None:
    """Measure one case in this process, and leave its figures in the task's folder."""
    from scripts.benchmarking.measure import measure
    from utils.files import write_json

    folder = Path(task["folder"])
    write_json(folder / "result.json", measure(Case(**task["case"]), folder, peak=task["peak"]))


def recorded_command(argv: Sequence[str]) -> str:
    """The command as it can be given again; where its record went is no part of it."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--output"):
            kept.append(word)
        skip = word == "--output"
    return shlex.join(["python", "scripts/benchmark.py", *kept])


def measure_all(given: argparse.Namespace, command: str) -> int:
    """Measure every case in turns, and print the record.

    Returns:
        0, or 1 where a case failed.
    """
    from utils.files import write_json, write_text
    from utils.reproducibility import environment

    cases = [
        variant
        for text in given.case or [""]
        for variant in variants(case_of(given, text), compare=given.compare, baseline=given.baseline)
    ]
    entries = [{"case": dataclasses.asdict(case) | {"layout": case.layout}, "results": []} for case in cases]
    record = {
        "command": command,
        "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
        "cases": entries,
    }
    for turn in range(given.repeats):
        for number, (case, entry) in enumerate(zip(cases, entries, strict=True), start=1):
            result = run_case(case, peak=given.peak_tflops, timeout_s=given.timeout_s)
            stderr = result.pop("stderr", "")
            entry["results"].append(result)
            said = result.get("error") or f"{result['tokens_per_second']:,.0f} tokens/s"
            place = f"[{turn + 1}/{given.repeats}, {number}/{len(cases)}]"
            print(f"{place} {case.model} {case.method} {case.layout}: {said}", flush=True)
            if stderr:
                print(stderr, file=sys.stderr)
            if given.output:
                given.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(given.output.with_name(given.output.name + ".json"), record)
                write_text(given.output.with_name(given.output.name + ".md"), markdown(record))
    print("\n" + markdown(record))
    return int(any("error" in result for entry in entries for result in entry["results"]))


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 when every case was measured, 1 when one failed, 2 when the command is wrong."""
    try:
        if argv[:1] == ["data"]:
            from scripts.benchmarking import preparation

            return preparation.main(argv[1:], recorded_command(argv))
        if argv[:1] == ["scale"]:
            from scripts.benchmarking import scale

            return scale.main(argv[1:], recorded_command(argv))
        given = parse_arguments(argv)
        if given.worker is not None:
            work(json.loads(given.worker))
            return 0
        return measure_all(given, recorded_command(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
