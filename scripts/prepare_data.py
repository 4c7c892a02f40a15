"""Prepare the data of a recipe without its model, and hold it against the recipe's contract.

python scripts/prepare_data.py --config config/smol.py
python scripts/prepare_data.py --config config/smol.py --data.max_length 512 --data.contract.too_long 0.2

Every row is read, tokenized, checked and packed as train.py does it, into the same cache, so that a run after this one
starts at once. Any field of the recipe can be overridden, as for train.py. The exit code is 0 where `data.contract`
holds, 1 where more rows have a defect than it allows, and 2 after a mistake in the recipe or its data.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.loader import ConfigError, read_command_line
from config.schema import ModelConfig, RunConfig
from src.context import check_length, context_length
from src.contract import ContractError, Finding, percent
from src.data import build_datasets, token_folder
from src.model import load_settings, load_tokenizer
from src.new_tokenizer import with_tokenizer
from src.pack_report import pack_report
from src.packing import PackedRows
from utils.errors import UserError, tell_error
from utils.logging import set_up_logging


def prepare(config: RunConfig) -> int:
    """Prepare the data of a run, print its account and findings, and return the exit code.

    Raises:
        UserError: the recipe or its data is not right; it says what to change.
    """
    folder = token_folder(config.data, config.output)
    model = with_tokenizer(config.model, config.data, cache_folder=folder)
    tokenizer = load_tokenizer(model)
    context = _context(model, tokenizer, config.data.max_length)
    try:
        data = build_datasets(config.data, tokenizer, context_length=context, cache_folder=folder)
    except ContractError as error:
        print(str(error).splitlines()[0])
        print("\n".join(findings_table(error.findings)))
        return 1
    sides = {"train": data.train, "eval": data.eval}
    packs = {side: PackedRows.of(rows, config.data) for side, rows in sides.items() if rows is not None}
    packed = pack_report(config.data, data.report, **packs)
    for side in packs:
        print("\n".join(account_lines(side, data.report[side], packed[f"{side}_packs"], config.data.max_length)))
    print("\n".join(findings_table(data.findings)))
    return 1 if any(finding.broken for finding in data.findings) else 0


def _context(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int | None:
    """The model's context, which rows of `max_length` tokens fit, or None where only its tokenizer is there."""
    folder = Path(config.path or "")
    if config.path is not None and folder.is_dir() and not (folder / "config.json").is_file():
        return None
    settings = load_settings(config, tokenizer)
    check_length(settings, max_length)
    return context_length(settings)


def account_lines(side: str, report: dict[str, Any], packs: dict[str, Any], max_length: int) -> Iterator[str]:
    """What became of the rows of a side, source by source, and how they are packed."""
    for source, own_packs in zip(report["sources"], packs["sources"], strict=True):
        kept, read = source["rows_kept"], source["rows_read"]
        own = source["rows"] + source["rows_in_train_and_eval"] * (side == "train")
        apart = f", {own:,} of them for {side}" if own != read else ""
        yield f"{side}: {source['path']} as {source['format']}"
        yield f"  rows        {read:,} read{apart}, {kept:,} kept"
        yield from (f"              {text}" for text in _losses(source))
        supervised = f"{source['supervised_tokens']:,} supervised ({100 * source['supervised_share']:.1f}%)"
        lost = source["supervised_tokens_lost"]
        yield f"  tokens      {source['tokens']:,}, {supervised}{f', {lost:,} supervised lost' if lost else ''}"
        shares = (f"{share}% {length:,}" for share, length in source["length_percentiles"].items())
        yield f"  row length  {', '.join(shares) or 'no rows'}"
        yield f"  packs       {own_packs['packs']:,}, {100 * own_packs['fill']:.1f}% full"
    yield f"{side}: {packs['packs']:,} packs of {max_length:,} tokens in all, {100 * packs['fill']:.1f}% full"


def _losses(source: dict[str, Any]) -> Iterator[str]:
    """The rows of a source that are not kept as they are, each kind with its number and its first places."""
    shown = {"too long": "too_long", "nothing supervised": "masked"}
    shown["nothing supervised after truncation"] = "answer_truncated"
    parts = [(f"refused as {kind}", count, kind) for kind, count in source["refused"].items()]
    parts += [(f"dropped ({reason})", count, shown.get(reason, reason)) for reason, count in source["dropped"].items()]
    parts += [
        ("truncated", source["truncated"], ""),
        ("equal to one before", source["duplicated"], "duplicates"),
        ("left out that stand in data.eval too", source["rows_in_train_and_eval"], "leak"),
    ]
    for meaning, count, kind in parts:
        if count:
            places = (place.removeprefix(source["path"]).lstrip(" /") for place in source["examples"].get(kind, ())[:3])
            yield f"{count:,} {meaning}{''.join(f', {place}' for place in places).replace(', ', ': ', 1)}"


def findings_table(found: Sequence[Finding]) -> Iterator[str]:
    """A line for each finding of the contract with what it is about below, those that fail it first."""
    if not found:
        yield "contract: every check holds, no row has a defect"
        return
    broken = sum(finding.broken for finding in found)
    yield f"contract: {broken} of {len(found)} findings above data.contract" if broken else "contract: holds"
    heads = ("", "check", "rows", "share", "allowed", "source", "first rows")
    ordered = sorted(found, key=lambda finding: not finding.broken)
    table = [heads, *map(_cells, ordered)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row, advice in zip(table, ["", *(finding.advice() for finding in ordered)], strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if advice:
            yield f"       {advice}"


def _cells(finding: Finding) -> tuple[str, ...]:
    return (
        "FAILS" if finding.broken else "holds",
        finding.check,
        f"{finding.rows:,}",
        percent(finding.share),
        percent(finding.threshold),
        finding.source,
        finding.named(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Any other option overrides a field of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="recipe, a .py or .yaml file")
    known, overrides = parser.parse_known_args(arguments)
    set_up_logging()
    disable_progress_bar()
    try:
        return prepare(read_command_line(["--config", known.config, *overrides]).config)
    except (ConfigError, UserError) as error:
        tell_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
