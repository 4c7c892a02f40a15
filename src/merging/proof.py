"""The proof that a merged model does what its base with the adapter does.

    figures = prove(trained, hf.read_back(folder), rows)

Two things are measured. Of each tensor that the adapter changes, how much of the change is left: the cosine between
what was written less the base as training saw it, and the change. And what comes out: on held-out rows, the divergence
of the merged model's next-token distribution from that of the base with the adapter, as PEFT evaluates it, beside how
far the adapter itself moved it: once with the weights that training saw and sums in float32, so that weights alone part
the two; and where the base was quantized, once more with its own products.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from src.checkpoints.certificate import CertificateError
from src.checkpoints.checkpoint import Checkpoint, LazyTensor
from src.merging.rows import Rows
from src.merging.trained import Trained

LEAST_COSINE = 0.98
"""Of the change of each tensor; an error of a fifth of the change, at a right angle to it, gives it. bfloat16 rounds a
weight by 0.2 % of itself, so a change of 1 % of the weights passes and one of 0.5 % does not."""
KL_FLOOR = 1e-7
"""Nats a token that two orders of summation in float32 may part the evaluations of a deep model by."""
KL_SHARE = 0.05
"""Most divergence, as a share of what the adapter itself makes. The error that `LEAST_COSINE` lets through is a fifth
of the change, and divergence goes by its square, 4 %."""
AGREEMENT = 0.97
"""Least share of places at which the most likely token is the same: where two are as good as equal they may turn."""
ROUNDING = 2.0
"""Products of quantized weights round activations too, to 16 bits or to int8's 8, which no merged model does. What that
alone does to the base is measured, and the merged model may differ from the base as it ran by twice as much on top, as
the adapter moves which values are rounded."""


@dataclass(frozen=True)
class Kept:
    """How much of the adapter's change is left in one number format."""

    least_cosine: float
    """1 where nothing was changed."""
    least_cosine_tensor: str | None
    tensors_changed: int
    largest_relative_change: float
    """The change's norm over the weight's, of the tensor where that is largest."""


@dataclass(frozen=True)
class _Divergence:
    """How far the merged model is from an evaluation of what was trained, and how far it may be."""

    kl_nats_per_token: float
    kl_allowed: float
    greedy_agreement: float
    """Share of places at which the most likely token is the same."""
    greedy_agreement_needed: float

    @classmethod
    def of(
        cls, expected: list[torch.Tensor], found: list[torch.Tensor], most: float, agreement: float
    ) -> "_Divergence":
        lost, same = compare_logits(expected, found)
        return cls(lost, most, same, agreement)

    def faults(self, what: str, learned: float) -> Iterator[str]:
        """What is beyond its limit, for a message."""
        if not self.kl_nats_per_token <= self.kl_allowed:
            yield (
                f"it diverges from {what} by {self.kl_nats_per_token:.2g} nats a token, where the adapter moved its "
                f"base by {learned:.2g}; at most {self.kl_allowed:.2g} is allowed"
            )
        if not self.greedy_agreement >= self.greedy_agreement_needed:
            yield (
                f"the most likely token is that of {what} at {self.greedy_agreement:.1%} of places; "
                f"{self.greedy_agreement_needed:.1%} is needed"
            )


def kept_change(trained: Trained, written: Mapping[str, LazyTensor], dtype: torch.dtype | None = None) -> Kept:
    """How much of the change is left in tensors that were written.

    Args:
        written: by the names of `trained.merged`, which they may be.
        dtype: what they are rounded to first; None: they are as they are.
    """
    least, where, changed, largest = 1.0, None, 0, 0.0
    for name in trained.changed:
        if name not in trained.base:
            continue
        base = trained.base[name].load().float()
        change = trained.merged[name].load().float() - base
        norm = float(change.norm())
        if norm == 0.0:
            continue
        changed += 1
        largest = max(largest, norm / max(float(base.norm()), 1e-30))
        found = written[name].load()
        left = (found if dtype is None else found.to(dtype)).float() - base
        cosine = float(torch.sum(left * change) / (norm * max(float(left.norm()), 1e-30)))
        if cosine < least or where is None:
            least, where = min(cosine, 1.0), name
    return Kept(least, where, changed, largest)


def prove(
    trained: Trained, written: Checkpoint, rows: Rows, by_module: Mapping[str, LazyTensor] | None = None
) -> dict[str, Any]:
    """Compare a merged model with what was trained.

    Args:
        by_module: the tensors of `written` by their names in the model, where it stores them under others.
    Returns:
        The figures, ready for conversion.json.
    Raises:
        CertificateError: the merged model lost part of what was learned; it says how much, and what to do.
    """
    kept = kept_change(trained, by_module or written.tensors)
    expected, of_base = trained.logits(rows.ids), trained.logits(rows.ids, adapter=False)
    found = written.logits(rows.ids)
    learned, _ = compare_logits(expected, of_base)
    most = max(KL_FLOOR, KL_SHARE * learned)
    weights = _Divergence.of(expected, found, most, AGREEMENT)
    figures = {
        "rows": len(rows.ids),
        "tokens": rows.tokens,
        "rows_from": rows.origin,
        **asdict(kept),
        "least_cosine_allowed": LEAST_COSINE,
        "kl_of_adapter_nats_per_token": learned,
        **asdict(weights),
    }
    faults = []
    if not kept.least_cosine >= LEAST_COSINE:
        faults.append(
            f"the change of {kept.least_cosine_tensor} is kept with a cosine of {kept.least_cosine:.3f}; at least "
            f"{LEAST_COSINE} is needed"
        )
    faults += weights.faults("the weights that were trained", learned)
    if trained.quantized_logits is not None:
        noise, same = compare_logits(trained.quantized_logits(rows.ids, adapter=False), of_base)
        as_run = _Divergence.of(
            trained.quantized_logits(rows.ids), found, most + ROUNDING * noise, AGREEMENT - ROUNDING * (1 - same)
        )
        figures |= {"kl_of_rounded_activations_nats_per_token": noise, "as_quantized": asdict(as_run)}
        faults += as_run.faults("the quantized base with the adapter", learned)
    if faults:
        raise CertificateError(
            f"the merged model lost part of what was learned: {'; '.join(faults)}. Merge with --dtype float32, or keep "
            "the adapter beside its base"
        )
    return figures


def compare_logits(expected: list[torch.Tensor], found: list[torch.Tensor]) -> tuple[float, float]:
    """The mean divergence KL(expected, found) in nats a token, and the share of places with the same likeliest token.

    Args:
        expected: for each row logits (tokens, vocabulary); `found` likewise.
    """
    divergence, same, tokens = 0.0, 0, 0
    for one, other in zip(expected, found, strict=True):
        likely, unlikely = (logits.double().log_softmax(-1) for logits in (one, other))
        divergence += float((likely.exp() * (likely - unlikely)).sum())
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(one)
    return (divergence / tokens if math.isfinite(divergence) else math.inf), same / tokens
