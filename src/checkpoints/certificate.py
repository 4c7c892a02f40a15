"""The proof that comes with a conversion: what was written, read back, is what the source is, and does what it does.

    measured = compare(source, hf.read_back(folder), rounding=None, kind="logits")

Every tensor is compared, bit for bit: with the source's own, or where the target's number format is coarser, with the
source's own rounded to it. Then both are evaluated in float32, the source with weights rounded in the same way, so that
what is left is the rounding of two orders of summation. How far rounding weights moved the logits is told beside it.

It proves agreement of two evaluations on a few texts and random rows. How independent they are depends on the source:
for llama2.c and Meta's shards the source is evaluated from its own files by `interleaved.interleaved_logits`, and
tokenized by `ScoredPieces.encode`, SentencePiece or tiktoken, which share no code with transformers and tokenizers, but
rest on this project's reading of the files' layout. It says nothing about texts that are not here, about other number
formats, or about the quality of the model.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from src.checkpoints.checkpoint import Checkpoint, Rounding
from utils.files import sha256_of_file

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "",
    " ",
    " a text that begins with a space, and  has  double   ones ",
    "line\nbreaks\r\n\nand\ttabs",
    "naïve café, Zürich, Ελληνικά, русский, 日本語, العربية",
    "🙂 👩‍👩‍👧 ½ \u00a0 \u200b",
    "2,500 + 17.5% = x_1; if (a[0] >= b) { return; }",
)
GREEDY_TOKENS = 32
LARGE, GREEDY_TOKENS_OF_LARGE = 5 * 10**8, 4  # weights from which an evaluation takes seconds
# float32 rounding grows to about 1e-6 of the largest logit in small models and 1e-5 in deep ones; a wrong row, angle or
# norm moves logits by tenths of it.
RELATIVE_TOLERANCE = 1e-4


RANDOM_ROWS, RANDOM_TOKENS = 2, 24
COMPARED = 2**24  # values

Kind = Literal["logits", "tensors"]
"""`logits`: tensors, token ids and evaluations are compared; `tensors`: tensors and token ids."""


class CertificateError(RuntimeError):
    """What was written does not do what the source does."""


def compare(source: Checkpoint, written: Checkpoint, rounding: Rounding | None, kind: Kind) -> dict[str, Any]:
    """Compare what was written with its source.

    Args:
        rounding: how the target rounds weights; None: it does not.
    Returns:
        The figures, ready for conversion.json.
    Raises:
        CertificateError: they differ; the message says where and by how much.
    """
    figures: dict[str, Any] = {
        "kind": kind,
        **_compare_tensors(source, written, rounding),
        **_compare_ids(source, written),
    }
    return figures | _compare_logits(source, written, rounding) if kind == "logits" else figures


def _compare_tensors(source: Checkpoint, written: Checkpoint, rounding: Rounding | None) -> dict[str, Any]:
    if source.tensors.keys() != written.tensors.keys():
        apart = sorted(source.tensors.keys() ^ written.tensors.keys())
        raise CertificateError(f"{len(apart)} tensors are on one side alone: {apart[:4]}")
    moved = 0.0
    for name, tensor in source.tensors.items():
        own = tensor.load()
        expected = own if rounding is None else rounding(name, own)
        found = written.tensors[name].load()
        if not _equal(expected, found):
            raise CertificateError(
                f"{name} of {tuple(found.shape)} differs from the source's of {tuple(expected.shape)}"
                + (f" by {float((expected - found).abs().max()):.3g}" if expected.shape == found.shape else "")
            )
        if rounding is not None and expected.numel():
            moved = max(moved, float((expected.float() - own.float()).norm() / own.float().norm().clamp(min=1e-30)))
    return {"tensors_equal": len(source.tensors), "largest_relative_rounding_of_a_tensor": moved}


def _equal(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; a slice at a time, since float32 copies of an embedding take memory."""
    if expected.shape != found.shape:
        return False
    slices = zip(expected.reshape(-1).split(COMPARED), found.reshape(-1).split(COMPARED), strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in slices)


def _texts(source: Checkpoint) -> list[str]:
    """The texts, less the characters that the source's tokenizer refuses."""
    known = source.characters
    return [text if known is None else "".join(filter(known.__contains__, text)) for text in TEXTS]


def _compare_ids(source: Checkpoint, written: Checkpoint) -> dict[str, Any]:
    for text in _texts(source):
        if (expected := source.encode(text)) != (found := written.encode(text)):
            raise CertificateError(f"token ids of {text!r} differ: {expected} in the source, {found} as written")
    return {"token_ids_equal_on_texts": len(TEXTS)}


def _rows(source: Checkpoint) -> list[list[int]]:
    """Those of the texts that have a token, and random ones."""
    sizes = source.architecture
    context = sizes.max_position_embeddings
    rows = [source.encode(text)[:context] for text in _texts(source)]
    random = torch.Generator().manual_seed(0)
    shape = (RANDOM_ROWS, min(RANDOM_TOKENS, context))
    rows += torch.randint(sizes.vocab_size, shape, generator=random).tolist()
    return [row for row in rows if row]


def _greedy(written: Checkpoint, start: Sequence[int]) -> list[int]:
    """Continue `start` with the written model's most likely tokens, by one whole evaluation a token."""
    row = list(start)
    weights = sum(math.prod(tensor.shape) for tensor in written.tensors.values())
    tokens = GREEDY_TOKENS if weights < LARGE else GREEDY_TOKENS_OF_LARGE
    while len(row) < min(len(start) + tokens, written.architecture.max_position_embeddings):
        row.append(int(written.logits([row])[0][-1].argmax()))
    return row


def _compare_logits(source: Checkpoint, written: Checkpoint, rounding: Rounding | None) -> dict[str, Any]:
    """Evaluate both on some rows and on the written model's greedy continuation of the first.

    The source is held to the greedy continuation by its most likely token at each place of it, which is the same as
    continuing on its own.
    """
    rows = _rows(source)
    continued = _greedy(written, rows[0])
    *all_expected, of_continued = source.logits([*rows, continued[:-1]], rounding)
    all_found = written.logits(rows)
    difference, largest = 0.0, 0.0
    for expected, found in zip(all_expected, all_found, strict=True):
        if not expected.isfinite().all():
            raise CertificateError("the source's own logits are not finite; its weights are damaged")
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if not difference <= RELATIVE_TOLERANCE * largest:
        raise CertificateError(
            f"logits differ by {difference:.3g} with a largest logit of {largest:.3g}; at most "
            f"{RELATIVE_TOLERANCE:g} of it is rounding"
        )
    expected = of_continued[len(rows[0]) - 1 :].argmax(dim=-1).tolist()
    if expected != continued[len(rows[0]) :]:
        raise CertificateError(
            f"greedy tokens differ: {expected} in the source, {continued[len(rows[0]) :]} as written"
        )
    moved, agreement = 0.0, 1.0
    if rounding is not None:
        unrounded = source.logits(rows)
        moved = max(float((own - found).abs().max()) for own, found in zip(unrounded, all_found, strict=True))
        same = [own.argmax(-1) == found.argmax(-1) for own, found in zip(unrounded, all_found, strict=True)]
        agreement = float(torch.cat(same).float().mean())
    return {
        "max_logit_difference": difference,
        "largest_logit": largest,
        "relative_tolerance": RELATIVE_TOLERANCE,
        "greedy_tokens_equal": len(expected),
        "max_logit_difference_by_rounding_weights": moved,
        "most_likely_tokens_kept_by_rounding_weights": agreement,
    }


def fingerprints(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {path.name: sha256_of_file(path) for path in files}


def versions() -> dict[str, str]:
    """Versions of the libraries that the evaluation rests on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
