"""The proof that a merged model does what its base with the adapter does.

    figures = prove(trained, hf.read_back(folder), rows)

Two things are measured. Of each tensor that the adapter changes, how much of the change is left: the cosine between
what was written less the base as training saw it, and the change. And what comes out: on held-out rows, the divergence
of the merged model's next-token distribution from that of the base with the adapter, as PEFT evaluates them, beside how
far the adapter itself moved it.
"""

import math
from collections.abc import Mapping
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
"""Most divergence, as a share of what the adapter itself makes. The error that `LEAST_COSINE` lets through is a fifth of
the change, and divergence goes by its square, 4 %."""
AGREEMENT = 0.97
"""Least share of places at which the most likely token is the same: where two are as good as equal they may turn."""
ACTIVATIONS = 2.0
"""int8 products round each activation to 8 bits too, which no merged model does. What that alone does to the base is
measured, and the merged model may differ by twice as much on top, as the adapter moves which values are rounded."""


@dataclass(frozen=True)
class Kept:
    """How much of the adapter's change is left in one number format."""

    least_cosine: float
    """1 where nothing was changed."""
    least_cosine_tensor: str | None
    tensors_changed: int
    largest_relative_change: float
    """The change's norm over the weight's, of the tensor where that is largest."""


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


def prove(trained: Trained, written: Checkpoint, rows: Rows) -> dict[str, Any]:
    """Compare a merged model with what was trained.

    Returns:
        The figures, ready for conversion.json.
    Raises:
        CertificateError: the merged model lost part of what was learned; it says how much, and what to do.
    """
    kept = kept_change(trained, written.tensors)
    expected, of_base = trained.logits(rows.ids), trained.logits(rows.ids, adapter=False)
    learned, _ = compare_logits(expected, of_base)
    lost, agreement = compare_logits(expected, written.logits(rows.ids))
    noise, turned = 0.0, 0.0
    if trained.logits_without_rounding is not None:
        noise, same = compare_logits(of_base, trained.logits_without_rounding(rows.ids, adapter=False))
        turned = 1 - same
    most = max(KL_FLOOR, KL_SHARE * learned) + ACTIVATIONS * noise
    least = AGREEMENT - ACTIVATIONS * turned
    figures = {
        "rows": len(rows.ids),
        "tokens": rows.tokens,
        "rows_from": rows.origin,
        **asdict(kept),
        "least_cosine_allowed": LEAST_COSINE,
        "kl_nats_per_token": lost,
        "kl_allowed": most,
        "kl_of_adapter_nats_per_token": learned,
        "kl_of_rounded_activations_nats_per_token": noise,
        "greedy_agreement": agreement,
        "greedy_agreement_allowed": least,
    }
    faults = []
    if not kept.least_cosine >= LEAST_COSINE:
        faults.append(
            f"the change of {kept.least_cosine_tensor} is kept with a cosine of {kept.least_cosine:.3f}; at least "
            f"{LEAST_COSINE} is needed"
        )
    if not lost <= most:
        faults.append(
            f"it diverges from what was trained by {lost:.2g} nats a token, where the adapter moved its base by "
            f"{learned:.2g}; at most {most:.2g} is allowed"
        )
    if not agreement >= least:
        faults.append(f"the most likely token is the same at {agreement:.1%} of places; {least:.0%} is needed")
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
