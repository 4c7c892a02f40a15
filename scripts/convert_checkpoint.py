"""Convert a checkpoint between formats, and prove that the result does what the source does.

python scripts/convert_checkpoint.py model.bin --tokenizer tokenizer.bin --to hf outputs/model

Exit codes: 0 the folder stands; 1 the result does not do what the source does; 2 a mistake in what was asked for, or
files that cannot be read or written. After 1 and 2 no folder was written.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.checkpoints.certificate import CertificateError
from src.checkpoints.convert import SOURCES, TARGETS, convert
from utils.errors import UserError
from utils.logging import set_up_logging


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", type=Path, help="checkpoint: a file or folder, as its format has it")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--from", dest="source", choices=SOURCES, help="format of PATH; left out: told from the files")
    parser.add_argument("--to", dest="target", choices=TARGETS, required=True, help="format to write")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file or folder, where PATH does not hold it")
    parser.add_argument("--no-check", action="store_true", help="skip reading back and comparing with the source")
    return parser.parse_args()


def main() -> int:
    """Run the command; returns its exit code."""
    arguments = _arguments()
    set_up_logging()
    transformers_logging.disable_progress_bar()
    try:
        record = convert(
            arguments.path,
            arguments.output,
            arguments.target,
            source=arguments.source,
            tokenizer=arguments.tokenizer,
            check=not arguments.no_check,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CertificateError as error:
        print(f"error: {arguments.output} was not written: {error}", file=sys.stderr)
        return 1
    check = record["check"]
    print(f"{arguments.output}: {record['from']} -> {record['to']}, {len(record['outputs_sha256'])} files")
    if check is None:
        print("not compared with the source")
    else:
        print(f"token ids equal on {check['token_ids_equal_on_texts']} texts")
        print(f"greedy tokens equal: {check['greedy_tokens_equal']}")
        print(f"largest logit {check['largest_logit']:.2f}, largest difference {check['max_logit_difference']:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
