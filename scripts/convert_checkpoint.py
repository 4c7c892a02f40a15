"""Convert a checkpoint between formats, or merge an adapter, and prove that the result does what the source does.

python scripts/convert_checkpoint.py model.bin --tokenizer tokenizer.bin --to hf outputs/model
python scripts/convert_checkpoint.py --merge outputs/run outputs/merged

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
from src.merging.adapter import QUANTIZATIONS, AdapterOptions
from src.merging.merge import MergeOptions, merge
from utils.errors import UserError, tell_error
from utils.logging import set_up_logging


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", type=Path, help="checkpoint: a file or folder; with --merge, an adapter's or its run's")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--from", dest="source", choices=SOURCES, help="format of PATH; left out: told from the files")
    parser.add_argument("--to", dest="target", choices=TARGETS, help="format to write; not with --merge: hf")
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
    _add_merging(parser)
    arguments = parser.parse_args()
    _check_merging(parser, arguments)
    return arguments


def _add_merging(parser: argparse.ArgumentParser) -> None:
    merging = parser.add_argument_group("merging")
    merging.add_argument("--merge", action="store_true", help="PATH is an adapter, to be merged into its base")
    merging.add_argument("--base-model", type=Path, help="folder of the base, where it is not where the adapter says")
    merging.add_argument(
        "--base-quantization",
        choices=QUANTIZATIONS,
        help="how the base was held while the adapter trained, where no run tells it",
    )
    merging.add_argument(
        "--rows", type=Path, help="file of held-out rows to compare on; left out: the run's own, and fixed texts"
    )


def _check_merging(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program where options of a merge stand beside those of a conversion."""
    of_merge = {"base_model": "--base-model", "base_quantization": "--base-quantization", "rows": "--rows"}
    of_conversion = {
        "source": "--from",
        "target": "--to",
        "tokenizer": "--tokenizer",
        "activation": "--activation",
        "certificate": "--certificate",
        "shards": "--shards",
        "meta_version": "--meta-version",
        "instruct": "--instruct or --base",
        "chat_template": "--chat-template",
    }
    others = of_conversion if arguments.merge else of_merge
    left_out = parser.parse_args(["path", "output"])
    given = [option for name, option in others.items() if getattr(arguments, name) != getattr(left_out, name)]
    if given:
        parser.error(f"{', '.join(given)} may not be given {'with' if arguments.merge else 'without'} --merge")
    if not arguments.merge and arguments.target is None:
        parser.error("the following arguments are required: --to, or --merge")


def main() -> int:
    """Run the command; returns its exit code."""
    arguments = _arguments()
    set_up_logging()
    transformers_logging.disable_progress_bar()
    try:
        record = _merged(arguments) if arguments.merge else _converted(arguments)
    except (UserError, OSError) as error:
        tell_error(error)
        return 2
    except CertificateError as error:
        tell_error(f"{arguments.output} was not written: {error}")
        return 1
    print(f"{arguments.output}: {record['from']} -> {record['to']}, {len(record['outputs_sha256'])} files")
    print("\n".join(_told(record["check"])))
    if arguments.merge:
        print("\n".join(_told_of_merge(record)))
    return 0


def _converted(arguments: argparse.Namespace) -> dict[str, Any]:
    return convert(
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


def _merged(arguments: argparse.Namespace) -> dict[str, Any]:
    return merge(
        arguments.path,
        arguments.output,
        MergeOptions(
            adapter=AdapterOptions(base=arguments.base_model, quantization=arguments.base_quantization),
            dtype=arguments.dtype,
            rows=arguments.rows,
            shard_bytes=int(arguments.shard_gib * 2**30),
        ),
    )


def _told_of_merge(record: dict[str, Any]) -> Iterator[str]:
    """How an adapter was merged, and what is left of it, a line each."""
    kept = record["kept"]
    yield f"{record['how']}; {record['dtype']}, as {record['dtype_because']}"
    if kept["least_cosine_tensor"] is None:
        yield "the adapter changes nothing"
    else:
        yield (
            f"{kept['tensors_changed']} tensors changed; the change is kept with a cosine of at least "
            f"{kept['least_cosine']:.4f} ({kept['least_cosine_tensor']})"
        )
    yield (
        f"{kept['tokens']} tokens of {kept['rows_from']}: {kept['kl_nats_per_token']:.1e} nats a token from what was "
        f"trained, where the adapter moved its base by {kept['kl_of_adapter_nats_per_token']:.1e}; "
        f"{kept['greedy_agreement']:.1%} of the most likely tokens are the same"
    )


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
