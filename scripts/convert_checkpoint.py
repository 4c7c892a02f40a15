"""Convert a checkpoint between formats, and prove that the result does what the source does.

python scripts/convert_checkpoint.py model.bin --tokenizer tokenizer.bin --to hf outputs/model

Exit codes: 0 the folder stands; 1 the result does not do what the source does; 2 a mistake in what was asked for, or
files that cannot be read or written. After 1 and 2 no folder was written.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.checkpoints.certificate import CertificateError, Kind
from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import DTYPES, SOURCES, TARGETS, convert
from src.checkpoints.meta_releases import RELEASES
from src.checkpoints.nanogpt import ACTIVATIONS
from utils.errors import UserError
from utils.logging import set_up_logging


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", type=Path, help="checkpoint: a file or folder, as its format has it")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--from", dest="source", choices=SOURCES, help="format of PATH; left out: told from the files")
    parser.add_argument("--to", dest="target", choices=TARGETS, required=True, help="format to write")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file or folder, where PATH does not hold it")
    parser.add_argument(
        "--activation", choices=ACTIVATIONS, help="GELU of a nanoGPT model: exact, or by tanh before June 2023"
    )
    parser.add_argument(
        "--certificate",
        choices=(*get_args(Kind), "none"),
        default="logits",
        help="how the result is compared with the source: every tensor, token ids and logits; or without logits",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights written; left out: the source's")
    parser.add_argument("--shard-gib", type=float, default=1.0, help="most GiB of a weight file")
    parser.add_argument(
        "--shards", type=int, default=1, help="with --to meta: files that each hold a slice of a matrix"
    )
    parser.add_argument("--meta-version", choices=RELEASES, help="with --from meta: which Llama it is")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--instruct", action="store_true", default=None, help="with --from meta: the model that answers")
    kind.add_argument("--base", dest="instruct", action="store_false", help="with --from meta: the base model")
    parser.add_argument("--chat-template", type=Path, help="file of Jinja, where PATH holds no chat template")
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
            reading=ReadOptions(
                tokenizer=arguments.tokenizer,
                meta_version=arguments.meta_version,
                instruct=arguments.instruct,
                chat_template=arguments.chat_template,
                activation=arguments.activation,
            ),
            writing=WriteOptions(
                dtype=arguments.dtype, shard_bytes=int(arguments.shard_gib * 2**30), shards=arguments.shards
            ),
            check=arguments.certificate,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CertificateError as error:
        print(f"error: {arguments.output} was not written: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {record['from']} -> {record['to']}, {len(record['outputs_sha256'])} files")
    print("\n".join(_told(record["check"])))
    return 0


def _told(check: dict[str, Any] | None) -> Iterator[str]:
    """What was compared, a line each."""
    if check is None:
        yield "not compared with the source"
        return
    moved = check["largest_relative_rounding_of_a_tensor"]
    yield f"tensors equal: {check['tensors_equal']}" + (f", once rounded by up to {moved:.1e} each" if moved else "")
    yield f"token ids equal on {check['token_ids_equal_on_texts']} texts"
    if check["kind"] == "tensors":
        return
    yield f"greedy tokens equal: {check['greedy_tokens_equal']}"
    yield f"largest logit {check['largest_logit']:.2f}, largest difference {check['max_logit_difference']:.1e}"
    if moved:
        yield (
            f"rounding moved logits by up to {check['max_logit_difference_by_rounding_weights']:.1e} and kept "
            f"{check['most_likely_tokens_kept_by_rounding_weights']:.1%} of the most likely tokens"
        )


if __name__ == "__main__":
    sys.exit(main())
