"""What a check of an installation finds: a difference within its bound, or an error that says what it means.

return judge("save", difference, bound=0.0, detail="logits after loading", meaning="...; reinstall safetensors")
"""

from dataclasses import dataclass

from utils.errors import UserError

FLOAT32 = 1e-5
"""Relative difference of float32 gradients that orders of summation explain: some 100 roundings of 6e-8. Each of the
bugs that the checks are for changes gradients by more than a hundredth."""


class SelftestError(UserError):
    """This installation does not compute what training means."""


@dataclass(frozen=True)
class Verdict:
    """A check that held."""

    name: str
    difference: float
    """The largest that was found, in the unit that `detail` says."""

    bound: float
    """The largest that is allowed, in the same unit."""

    detail: str
    """What was compared."""


def judge(name: str, difference: float, *, bound: float, detail: str, meaning: str) -> Verdict:
    """The verdict of a check that holds.

    Args:
        meaning: what a larger difference does to the user's training, and what to change.
    Raises:
        SelftestError: the difference is above the bound, or not a number.
    """
    if not difference <= bound:
        raise SelftestError(f"{detail}: the difference is {difference:.2g}, allowed is {bound:.2g}. {meaning}")
    return Verdict(name, difference, bound, detail)
