"""Whether this installation trains right: checks by name, each on tiny random models, without network.

    for name in CHECKS:
        verdict = run_check(name)      # or SelftestError

What one computes is compared with what must equal it, on the device and with the libraries that will train.
"""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path

from src.selftest.gradients import accumulation, attention, chunks, loss, packing
from src.selftest.masks import masks
from src.selftest.saved import merge, resume, save
from src.selftest.verdict import SelftestError, Verdict
from utils.errors import in_one_line

CHECKS: dict[str, Callable[..., Verdict]] = {
    "packing": packing,
    "accumulation": accumulation,
    "loss": loss,
    "chunks": chunks,
    "attention": attention,
    "merge": merge,
    "save": save,
    "resume": resume,
    "masks": masks,
}
"""Some take a folder to write in."""


def run_check(name: str) -> Verdict:
    """Run one check; what it writes is removed.

    Args:
        name: one of CHECKS.
    Raises:
        SelftestError: it does not hold, or a library fails within it.
    """
    check = CHECKS[name]
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        given = [Path(folder)] if inspect.signature(check).parameters else []
        try:
            return check(*given)
        except SelftestError:
            raise
        except Exception as error:  # a library that fails in any way is what a check is to find
            raise SelftestError(
                f"{type(error).__name__}: {in_one_line(error)}. Training would fail likewise; install the packages "
                "that requirements/base.txt names, in the versions that it allows"
            ) from error
