"""The proof that comes with a conversion: what was written, read back, does what the source does.

    measured = compare(source, hf.read_back(folder))

It proves agreement of two evaluations on a few texts in float32. How independent they are depends on the source: for
llama2.c the source is evaluated from its own file by `interleaved.interleaved_logits` and `ScoredPieces.encode`, which
share no code with transformers and tokenizers, but rest on this project's reading of the file's layout. It says nothing
about texts that are not here, about other number formats, or about the quality of the model.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.checkpoints.checkpoint import Checkpoint
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
# float32 rounding grows to about 1e-6 of the largest logit in small models and 1e-5 in deep ones; a wrong row, angle or
# norm moves logits by tenths of it.
RELATIVE_TOLERANCE = 1e-4


class CertificateError(RuntimeError):
    """What was written does not do what the source does."""


def _rows(source: Checkpoint) -> list[list[int]]:
    context = source.architecture.max_position_embeddings
    return [source.encode(text)[:context] for text in TEXTS]


def _greedy(written: Checkpoint, start: Sequence[int]) -> list[int]:
    """Continue `start` with the written model's most likely tokens, by one whole evaluation a token."""
    row = list(start)
    while len(row) < min(len(start) + GREEDY_TOKENS, written.architecture.max_position_embeddings):
        row.append(int(written.logits(row)[-1].argmax()))
    return row


def compare(source: Checkpoint, written: Checkpoint) -> dict[str, Any]:
    """Evaluate both on `TEXTS` and on the written model's greedy continuation of the first.

    The source is held to the greedy continuation by its most likely token at each place of it, which is the same as
    continuing on its own.

    Returns:
        The figures, ready for conversion.json.
    Raises:
        CertificateError: token ids, greedy tokens or logits differ; the message says where and by how much.
    """
    for text in TEXTS:
        if (expected := source.encode(text)) != (found := written.encode(text)):
            raise CertificateError(f"token ids of {text!r} differ: {expected} in the source, {found} as written")
    difference, largest = 0.0, 0.0
    for row in _rows(source):
        expected, found = source.logits(row), written.logits(row)
        if not expected.isfinite().all():
            raise CertificateError("the source's own logits are not finite; its weights are damaged")
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if not difference <= RELATIVE_TOLERANCE * largest:
        raise CertificateError(
            f"logits differ by {difference:.3g} with a largest logit of {largest:.3g}; at most "
            f"{RELATIVE_TOLERANCE:g} of it is rounding"
        )
    start = _rows(source)[0]
    continued = _greedy(written, start)
    expected = source.logits(continued[:-1])[len(start) - 1 :].argmax(dim=-1).tolist()
    if expected != continued[len(start) :]:
        raise CertificateError(f"greedy tokens differ: {expected} in the source, {continued[len(start) :]} as written")
    return {
        "token_ids_equal_on_texts": len(TEXTS),
        "max_logit_difference": difference,
        "largest_logit": largest,
        "relative_tolerance": RELATIVE_TOLERANCE,
        "greedy_tokens_equal": len(expected),
    }


def fingerprints(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {path.name: sha256_of_file(path) for path in files}


def versions() -> dict[str, str]:
    """Versions of the libraries that the evaluation rests on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
