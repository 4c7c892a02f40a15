"""Whether contenders compute the same, so that none is fast because it computes less.

found = compare(figures, exact=True)     # figures: by contender, what `measure` returns
text = disagreements(found)              # nothing where all agree

Those that train on the same packs must have the same supervised tokens, losses and gradient norms in their first steps;
those that pad, the same loss over the rows of the first step, before training. The gradient's norm is compared because
a model of random weights has a loss near log(vocabulary) whatever is supervised.
"""

from collections.abc import Mapping
from typing import Any

TOLERANCES = {
    # float32: sums run in another order, and Adam's first steps turn faint gradients into whole ones of either sign.
    # Documents that see each other change the first gradient's norm by 3e-2 in a model of two layers.
    True: {"loss": 2e-6, "later_loss": 5e-5, "grad_norm": 1e-4, "later_grad_norm": 5e-3},
    # bf16: numbers of 8 bits; beside 4-bit weights TRL holds adapters in them too.
    False: {"loss": 3e-4, "later_loss": 1e-3, "grad_norm": 1e-2, "later_grad_norm": 5e-2},
}
"""Largest relative differences, by whether products are of float32: of the first step, and of those after it."""

OWN_ADAPTER = ("unsloth",)
"""Contenders whose adapter starts from other weights, so that only the first loss can be the same."""


def compare(figures: Mapping[str, Mapping[str, Any]], *, exact: bool) -> dict[str, Any]:
    """Compare every contender with the first that trains on packs.

    Args:
        figures: those of contenders that did not fail.
        exact: whether products are of float32.
    Returns:
        `reference`, its name, or None where no contender trains on packs; and `contenders`, by name: `differences`,
        the largest relative difference of each figure, and `faults`, in words.
    """
    allowed = TOLERANCES[exact]
    reference = next((name for name, found in figures.items() if "loss_of_first_rows" not in found), None)
    compared = {}
    for name, found in figures.items():
        if reference is None or name == reference:
            continue
        other, differences, faults = figures[reference], {}, []
        if "loss_of_first_rows" in found:
            differences["loss"] = _relative(found["loss_of_first_rows"], other["first_losses"][0])
        else:
            if found["first_supervised_tokens"] != other["first_supervised_tokens"]:
                faults.append(
                    f"supervised tokens of the first steps are {found['first_supervised_tokens']}, and "
                    f"{other['first_supervised_tokens']} in {reference}"
                )
            for figure in ("loss",) if name in OWN_ADAPTER else ("loss", "grad_norm"):
                key = {"loss": "first_losses", "grad_norm": "first_grad_norms"}[figure]
                apart = [_relative(own, its) for own, its in zip(found[key], other[key], strict=True)]
                differences[figure] = apart[0]
                if name not in OWN_ADAPTER:
                    differences[f"later_{figure}"] = max(apart[1:], default=0.0)
        faults += [
            f"{figure} differs from that of {reference} by {difference:.2g} of it (allowed {allowed[figure]:g})"
            for figure, difference in differences.items()
            if not difference <= allowed[figure]
        ]
        compared[name] = {"differences": differences, "faults": faults}
    return {"reference": reference, "allowed": allowed, "contenders": compared}


def disagreements(found: Mapping[str, Any]) -> list[str]:
    """What is wrong, a line for each contender that computes something else."""
    return [f"{name}: {'; '.join(own['faults'])}" for name, own in found["contenders"].items() if own["faults"]]


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-30)
