"""Show what a model will see of a recipe's data: each row's text, and which of it is supervised.

python scripts/inspect_data.py --config config/smol.py
python scripts/inspect_data.py --config config/smol.py --rows 10 --data.max_length 512

Supervised text is green on a terminal and stands in [[double brackets]] elsewhere. The text is decoded from the very
token ids and labels that training gets. Any field of the recipe can be overridden, as for train.py.
"""

import argparse
import sys
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.loader import ConfigError, read_command_line
from src.data import TokenizedData, build_datasets
from src.model import load_tokenizer
from src.tokenization import IGNORED
from utils.errors import UserError
from utils.logging import set_up_logging


def marked_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]], opening: str, closing: str) -> str:
    """A row's text with each run of supervised tokens between `opening` and `closing`."""
    ids, labels = row["input_ids"], row["labels"]
    bounds = [at for at in range(1, len(ids)) if (labels[at] == IGNORED) != (labels[at - 1] == IGNORED)]
    pieces = []
    for start, end in zip([0, *bounds], [*bounds, len(ids)], strict=True):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        pieces.append(text if labels[start] == IGNORED else f"{opening}{text}{closing}")
    return "".join(pieces)


def _show_rows(data: TokenizedData, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    opening, closing = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    for side, table in (("train", data.train), ("eval", data.eval)):
        for number in range(min(rows, len(table) if table is not None else 0)):
            row = table[number]
            supervised = len(row["labels"]) - row["labels"].count(IGNORED)
            print(f"--- {side} row {number}: {len(row['input_ids'])} tokens, {supervised} supervised")
            print(marked_text(tokenizer, row, opening, closing))


def _show_account(data: TokenizedData) -> None:
    for side in ("train", "eval"):
        report = data.report[side]
        if report is None:
            continue
        for source in report["sources"]:
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in source["dropped"].items())
            print(
                f"{side}: {source['path']} as {source['format']}: {source['rows_kept']:,} of {source['rows']:,} rows, "
                f"{source['tokens']:,} tokens, {source['supervised_tokens']:,} supervised, longest row "
                f"{source['longest_row_tokens']:,}{dropped}, {source['truncated']:,} truncated"
            )


def main() -> int:
    """Run the command; returns its exit code, which is 2 after a mistake in the recipe or the data."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Any other option overrides a field of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="recipe, a .py or .yaml file")
    parser.add_argument("--rows", type=int, default=3, help="rows shown of each side (default: %(default)s)")
    arguments, overrides = parser.parse_known_args()
    set_up_logging()
    disable_progress_bar()
    try:
        config = read_command_line(["--config", arguments.config, *overrides]).config
        tokenizer = load_tokenizer(config.model)
        data = build_datasets(config.data, tokenizer)
    except (ConfigError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show_rows(data, tokenizer, arguments.rows)
    _show_account(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
