"""Whether memory stays bounded as rows grow: generated rows of 1 to 2 KB each, from a file to packs on disk.

    python scripts/benchmark.py scale --rows 100000 300000 1000000 --folder /somewhere/with/room

Each number of rows is written to a jsonl file, and prepared and packed in a process of its own, whose memory is read
from the system ten times a second: `VmHWM`, the most that it ever held, of which pages of files that are mapped from
disk are a part; and `RssAnon`, what is its own. A second process then finds the rows prepared. No row is like another,
and the tokenizer, a byte-level BPE, is trained on the rows' words.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from utils.errors import UserError
from utils.files import write_json, write_text
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 2048
WORDS = 4000
ANSWER_WORDS = (100, 260)
"""Fewest and most words of an answer: with six letters and a blank each, 0.7 to 1.8 KB."""
SAMPLE_S = 0.1
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words() -> np.ndarray:
    """Words of three to nine letters, the same each time."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return np.array(["".join(rng.choice(letters, rng.integers(3, 10))) for _ in range(WORDS)])


def write_rows(target: Path, rows: int) -> None:
    """Write so many conversations of a question and an answer, a line each."""
    rng, known = np.random.default_rng(1), words()
    with open(target, "w", encoding="utf-8") as lines:
        for number in range(rows):
            picked = known[rng.integers(0, WORDS, rng.integers(*ANSWER_WORDS))].tolist()
            question = {"role": "user", "content": f"Row {number}: {' '.join(picked[:20])}?"}
            answer = {"role": "assistant", "content": " ".join(picked)}
            lines.write(json.dumps({"messages": [question, answer]}) + "\n")


def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE to which most of the words are one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * WORDS, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([f" {word}" for word in words()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def prepare(rows: Path, cache: Path) -> dict[str, Any]:
    """Prepare and pack a file in this process; seconds of each, and what came of it."""
    from config.schema import DataConfig, SourceConfig
    from src.data import build_datasets
    from src.packing import PackedRows

    made, started = tokenizer(), time.perf_counter()
    config = DataConfig(train=(SourceConfig(path=str(rows)),), max_length=MAX_LENGTH)
    data = build_datasets(config, made, cache_folder=cache)
    prepared, report = time.perf_counter(), data.report["train"]
    packs = PackedRows.of(data.train, config)
    packed = time.perf_counter()
    told = packs.describe(MAX_LENGTH)
    return {
        "rows_kept": report["rows_kept"],
        "tokens": report["tokens"],
        "packs": told["packs"],
        "fill": told["fill"],
        "prepare_s": round(prepared - started, 2),
        "pack_s": round(packed - prepared, 2),
    }


def _status_mib(pid: int, names: Sequence[str]) -> dict[str, float] | None:
    """Figures of /proc/PID/status in MiB; None once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    parts = [line.partition(":") for line in lines]
    found = {name: int(value.split()[0]) / 1024 for name, _, value in parts if name in names}
    return found if len(found) == len(names) else None


def watched(command: Sequence[str], timeline: Path) -> dict[str, Any]:
    """What a command prints as JSON on its last line, with its peaks of memory; samples go to `timeline`.

    Raises:
        UserError: it failed; with its exit code or signal.
    """
    names = ("VmHWM", "VmRSS", "RssAnon")
    peaks, started = dict.fromkeys(names, 0.0), time.perf_counter()
    with open(timeline, "w", encoding="utf-8") as samples, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        while child.poll() is None:
            if found := _status_mib(child.pid, names):
                peaks = {name: max(peaks[name], value) for name, value in found.items()}
                samples.write(json.dumps({"s": round(time.perf_counter() - started, 1), **found}) + "\n")
                samples.flush()
            time.sleep(SAMPLE_S)
        assert child.stdout is not None
        printed = child.stdout.read()
        if child.returncode:
            errors.seek(0)
            raise UserError(f"it ended with {child.returncode} (below 0: a signal): {errors.read()[-3000:]}")
    found = json.loads(printed.splitlines()[-1])
    return found | {"peak_mib": round(peaks["VmHWM"]), "peak_anon_mib": round(peaks["RssAnon"])}


def measurements(sizes: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """For each number of rows, what the first process and the one after it say."""
    for rows in sizes:
        file, cache = folder / f"{rows}.jsonl", folder / f"cache-{rows}"
        write_rows(file, rows)
        command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "scale", "--worker", str(file), str(cache)]
        first = watched(command, folder / f"{rows}-first.memory.jsonl")
        again = watched(command, folder / f"{rows}-again.memory.jsonl")
        written = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        yield {"rows": rows, "text_bytes": file.stat().st_size, "cache_bytes": written, "first": first, "again": again}
        file.unlink()
        shutil.rmtree(cache)


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, a line for each number of rows."""
    lines = [
        "| rows | text, GB | tokens | prepare, s | pack, s | peak MiB | of its own (anonymous) | again, s | fill |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in record["measured"]:
        first, again = found["first"], found["again"]
        lines.append(
            f"| {found['rows']:,} | {found['text_bytes'] / 1e9:.2f} | {first['tokens']:,} | {first['prepare_s']:.0f} "
            f"| {first['pack_s']:.2f} | {first['peak_mib']:,} | {first['peak_anon_mib']:,} "
            f"| {again['prepare_s']:.2f} | {first['fill']} |"
        )
    return "\n".join([f"`{record['command']}`\n", *lines, ""])


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line after `scale`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="numbers of rows")
    parser.add_argument("--folder", type=Path, help="where files go; needs 5 KB a row (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    parser.add_argument("--worker", nargs=2, metavar=("ROWS", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str], command: str) -> int:
    """Measure each number of rows and print the record; 0 when all ended well."""
    given = parse_arguments(argv)
    if given.worker:
        print(json.dumps(prepare(*map(Path, given.worker))))
        return 0
    record: dict[str, Any] = {
        "command": command,
        "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
        "measured": [],
    }
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=given.folder))
    try:
        for found in measurements(given.rows, folder):
            record["measured"].append(found)
            print(markdown(record), flush=True)
            if given.output:
                given.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(given.output.with_name(given.output.name + ".json"), record)
                write_text(given.output.with_name(given.output.name + ".md"), markdown(record))
    finally:
        shutil.rmtree(folder)
    return 0
