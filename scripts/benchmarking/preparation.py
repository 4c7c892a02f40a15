"""How fast rows become packs: this project beside TRL's SFTTrainer, and beside rendering and tokenizing alone.

    python scripts/benchmark.py data --repeats 3 --output docs/benchmarks/data

The rows are GSM8K's training rows and GPTeacher, repeated with a number after each text, so that no copy is like
another; the tokenizer is Llama 2's, with a chat template; the assistant's turns are supervised. Every contender gets
the same file in a process of its own, all in turns:

- `smolfactory`: reading the file, conversion, masks, checks, writing to disk and packing;
- `trl N`: the making of an SFTTrainer (assistant_only_loss, packing) on rows read before, with N processes, for which
  the template is given `{% generation %}` marks;
- `floor`: rendering and `encode_batch_fast` on rows read before, and nothing else: no mask, no array, no file.

Beside that the record says how many tokens each one supervises; in how many of the first rows the masks of this project
and of TRL differ; the CPU time of each stage of ours; how it grows with the turns of a conversation; and how busy the
machine was.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from config.schema import DataConfig, SourceConfig
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.reproducibility import environment

ROOT = Path(__file__).resolve().parents[2]
IGNORED = -100
COMPARED_ROWS = 500
"""Rows whose masks are compared token for token."""

TURNS = (25, 50, 100, 200)
CLOSER = "closer"
CONTENDERS = ("floor", "smolfactory", "trl 1", "trl 2")
MAX_LENGTH = 2048

ANSWER = "' ' + message['content'] + ' ' + eos_token"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}MARKED{% endif %}{% endfor %}"
)


def template(*, marks: bool) -> str:
    """A chat template in the manner of Llama 2's, with `{% generation %}` marks or without."""
    answer = f"{{{{ {ANSWER} }}}}"
    return TEMPLATE.replace("MARKED", f"{{% generation %}}{answer}{{% endgeneration %}}" if marks else answer)


def llama2_tokenizer(data: Path, *, marks: bool = False) -> PreTrainedTokenizerBase:
    """Llama 2's tokenizer, made from the pieces in `data`."""
    from src.checkpoints.llama2c_tokenizer import read_pieces

    pieces = read_pieces(data / "tokenizers/llama2/tokenizer.bin", vocab_size=32_000)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces.to_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template(marks=marks)
    return tokenizer


def write_rows(data: Path, target: Path, *, copies: int) -> int:
    """Write the rows as messages, a line each, and return their number.

    Raises:
        UserError: the data sets are not in `data`.
    """
    files = [data / "datasets/gsm8k/train.jsonl", *sorted((data / "datasets/gpteacher").glob("*/*.json"))]
    if not files[0].is_file() or len(files) < 3:
        raise UserError(f"--data={data} has no datasets/gsm8k and datasets/gpteacher; give the folder that has them")
    pairs = [(row["question"], row["answer"]) for row in map(json.loads, files[0].read_text("utf-8").splitlines())]
    for file in files[1:]:
        for row in json.loads(file.read_text("utf-8")):
            pairs.append(("\n".join(filter(None, (row["instruction"], row["input"]))), row["response"]))
    with open(target, "w", encoding="utf-8") as lines:
        for copy in range(copies):
            for question, answer in pairs:
                turns = (("user", question), ("assistant", answer))
                messages = [{"role": role, "content": f"{content} ({copy})"} for role, content in turns]
                lines.write(json.dumps({"messages": messages}) + "\n")
    return copies * len(pairs)


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, with its wall and CPU seconds, those of the processes it started among them."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, whose))
    started = time.perf_counter()
    found = work()
    found["seconds"] = time.perf_counter() - started
    found["cpu_seconds"] = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, whose)) - before
    return found | {"peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def prepare_floor(rows: Path, data: Path) -> dict[str, Any]:
    """Render and tokenize, 1000 rows at once."""
    tokenizer = llama2_tokenizer(data)
    messages = [json.loads(line)["messages"] for line in rows.read_text("utf-8").splitlines()]
    encodings: list[Any] = []

    def work() -> dict[str, Any]:
        for start in range(0, len(messages), 1000):
            texts = tokenizer.apply_chat_template(messages[start : start + 1000], tokenize=False)
            encodings.extend(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return {}

    return measured(work) | {"tokens": sum(len(encoding) for encoding in encodings)}


def prepare_smolfactory(rows: Path, data: Path) -> dict[str, Any]:
    """The project's own pipeline, from the file to packs on disk."""
    from src.data import build_datasets
    from src.packing import PackedRows

    tokenizer, config = llama2_tokenizer(data), data_config(rows)

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            prepared = build_datasets(config, tokenizer, cache_folder=Path(folder))
            packs = PackedRows.of(prepared.train, config).describe(MAX_LENGTH)
        return {name: packs[name] for name in ("tokens", "packs", "fill")} | {
            "supervised_tokens": prepared.report["train"]["supervised_tokens"]
        }

    return measured(work)


def data_config(rows: Path) -> DataConfig:
    """The project's settings for what every contender does."""
    return DataConfig(train=(SourceConfig(path=str(rows)),), max_length=MAX_LENGTH, too_long="truncate")


def prepare_trl(rows: Path, data: Path, *, processes: int) -> dict[str, Any]:
    """TRL's SFTTrainer, made for a model that is too small to take time."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        make = trl_trainer(rows, data, Path(folder), processes=processes, packing=True)
        trainers: list[Any] = []

        def work() -> dict[str, Any]:
            trainers.append(make())
            return {}

        found = measured(work)
        packs = trainers[0].train_dataset.with_format("arrow")
        lengths = [len(ids) for ids in packs["input_ids"]]
        supervised = sum(int(np.count_nonzero(labels.values.to_numpy() != IGNORED)) for labels in packs["labels"])
    tokens = sum(lengths)
    fill = round(tokens / (len(lengths) * MAX_LENGTH), 4)
    return found | {"tokens": tokens, "packs": len(lengths), "fill": fill, "supervised_tokens": supervised}


def trl_trainer(rows: Path, data: Path, folder: Path, *, processes: int, packing: bool) -> Callable[[], Any]:
    """What makes TRL's trainer, which prepares the rows; they are read before."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = llama2_tokenizer(data, marks=True)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))
    table = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    args = SFTConfig(
        output_dir=str(folder),
        max_length=MAX_LENGTH,
        packing=packing,
        assistant_only_loss=True,
        dataset_num_proc=processes,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    return lambda: SFTTrainer(model, args=args, train_dataset=table, processing_class=tokenizer)


def compare_masks(rows: Path, data: Path) -> dict[str, int]:
    """The ids and labels of the first rows, one by one, beside those of TRL."""
    from src.data import build_datasets

    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        first = folder / "first.jsonl"
        with open(rows, encoding="utf-8") as lines:
            first.write_text("".join(itertools.islice(lines, COMPARED_ROWS)), encoding="utf-8")
        ours = build_datasets(data_config(first), llama2_tokenizer(data), cache_folder=folder / "cache").train
        theirs = trl_trainer(first, data, folder, processes=1, packing=False)().train_dataset
        pairs = list(zip(ours, theirs, strict=True))
        same = [all(own[name] == other[name] for name in ("input_ids", "labels")) for own, other in pairs]
    return {
        "rows": len(same),
        "tokens": sum(len(own["labels"]) for own, _ in pairs),
        "supervised_tokens": sum(label != IGNORED for own, _ in pairs for label in own["labels"]),
        "rows_that_differ": same.count(False),
    }


def look_closer(rows: Path, data: Path) -> dict[str, Any]:
    """What the record says beside the contenders' figures."""
    from scripts.benchmarking.stages import by_turns, shares

    tokenizer = llama2_tokenizer(data)
    return {
        "masks_beside_trl": compare_masks(rows, data),
        "cpu_seconds_by_stage": shares(tokenizer, data_config(rows)),
        "cpu_seconds_by_turns": by_turns(tokenizer, TURNS),
    }


def contend(name: str, rows: Path, data: Path) -> dict[str, Any]:
    """One contender's figures, measured in this process."""
    if name == CLOSER:
        return look_closer(rows, data)
    kind, _, processes = name.partition(" ")
    if kind == "trl":
        return prepare_trl(rows, data, processes=int(processes))
    return {"floor": prepare_floor, "smolfactory": prepare_smolfactory}[kind](rows, data)


def markdown(record: dict[str, Any]) -> str:
    """The record as tables: medians over the repeats."""
    lines = [
        "| contender | tokens/s | tokens/s of CPU time | seconds | CPU seconds | supervised | packs | fill | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in record["contenders"].items():
        middle = {key: median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_mib")}
        first = runs[0]
        supervised = f"{first['supervised_tokens']:,}" if "supervised_tokens" in first else ""
        lines.append(
            f"| {name} | {first['tokens'] / middle['seconds']:,.0f} | {first['tokens'] / middle['cpu_seconds']:,.0f} "
            f"| {middle['seconds']:.1f} | {middle['cpu_seconds']:.1f} | {supervised} | {first.get('packs', '')} "
            f"| {first.get('fill', '')} | {middle['peak_mib']:,.0f} |"
        )
    tokens = next(iter(record["contenders"].values()))[0]["tokens"]
    head = f"{record['rows']:,} rows, {tokens:,} tokens, {record['repeats']} repeats in turns, the median of each.\n"
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    busy = f"Processes at work on the machine's {record['cores']} cores before each turn: {load}.\n"
    closer = _closer_tables(record["closer"]) if record["closer"] else []
    return "\n".join([f"`{record['command']}`\n", head, busy, *lines, "", *closer])


def _closer_tables(closer: dict[str, Any]) -> list[str]:
    masks, stages = closer["masks_beside_trl"], closer["cpu_seconds_by_stage"]
    whole = sum(stages.values())
    return [
        f"Of the first {masks['rows']} rows, {masks['tokens']:,} tokens, {masks['supervised_tokens']:,} of them "
        f"supervised, {masks['rows_that_differ']} differ from TRL's in an id or a label.\n",
        "| stage of smolfactory | CPU seconds | share |",
        "|---|---|---|",
        *(f"| {stage} | {seconds:.2f} | {seconds / whole:.1%} |" for stage, seconds in stages.items()),
        "",
        "| turns of a conversation | CPU milliseconds | microseconds a turn |",
        "|---|---|---|",
        *(
            f"| {turns} | {seconds * 1e3:.2f} | {seconds * 1e6 / int(turns):.0f} |"
            for turns, seconds in closer["cpu_seconds_by_turns"].items()
        ),
        "",
    ]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line after `data`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder with the data sets")
    parser.add_argument("--copies", type=int, default=4, help="times the rows are repeated (default 4)")
    parser.add_argument("--repeats", type=int, default=1, help="times each contender runs, in turns (default 1)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--output", type=Path, help="where the record goes, without an ending (default: nowhere)")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "ROWS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_contender(name: str, rows: Path, data: Path) -> dict[str, Any]:
    """The figures of one contender, from a process of its own.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "data", "--data", str(data)]
    done = subprocess.run([*command, "--worker", name, str(rows)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str], command: str) -> int:
    """Run every contender in turns and print the record; 0 when all ran."""
    given = parse_arguments(argv)
    if given.worker:
        print(json.dumps(contend(given.worker[0], Path(given.worker[1]), given.data)))
        return 0
    record: dict[str, Any] = {
        "command": command,
        "environment": {name: value for name, value in environment(ROOT).items() if name != "command"},
        "repeats": given.repeats,
        "cores": os.cpu_count(),
        "load": [],
        "contenders": {name: [] for name in given.contenders},
        "closer": None,
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        rows = Path(folder) / "rows.jsonl"
        record["rows"] = write_rows(given.data, rows, copies=given.copies)
        for turn in range(given.repeats):
            record["load"].append(round(os.getloadavg()[0], 2))
            for name, runs in record["contenders"].items():
                runs.append(run_contender(name, rows, given.data))
                rate = runs[-1]["tokens"] / runs[-1]["seconds"]
                print(f"[{turn + 1}/{given.repeats}] {name}: {rate:,.0f} tokens/s", flush=True)
        if set(given.contenders) == set(CONTENDERS):
            record["closer"] = run_contender(CLOSER, rows, given.data)
    print("\n" + markdown(record))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output.with_name(given.output.name + ".json"), record)
        write_text(given.output.with_name(given.output.name + ".md"), markdown(record))
    return 0
