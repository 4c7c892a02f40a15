"""The state of an optimizer that a run goes on with, under the settings that it has now.

    given = options_of(optimizer)                            # before the state is loaded, which replaces them
    keep_options(optimizer, scheduler, given, checkpoint)    # after it

Torch keeps rates, betas and decay beside the moments, and a scheduler its first rates: a checkpoint would bring back
those that it was written under.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from utils.errors import UserError, in_one_line, some

SET = ("betas", "eps", "initial_lr", "weight_decay")
"""Options of a group that come from the settings. Others may be an optimizer's own count of what it has done."""

Options = list[dict[str, Any]]


def options_of(optimizer: torch.optim.Optimizer) -> Options:
    """What is set of each parameter group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def keep_options(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    given: Options,
    checkpoint: str,
) -> None:
    """Give groups that were loaded the options that they had before, and the rates that their schedule has by now.

    Where nothing has changed, neither does a bit.

    Raises:
        UserError: options are lacking, as those of another optimizer's groups are.
    """
    for group, options in zip(optimizer.param_groups, given, strict=True):
        if lacking := options.keys() - group.keys():
            raise other_state(checkpoint, f"its groups have no {some(sorted(lacking))}")
        group.update({name: options[name] for name in SET if name in options})
    if isinstance(scheduler, LambdaLR):  # what works layer by layer has another in its place
        _keep_rates(optimizer, scheduler, [options["initial_lr"] for options in given])


def _keep_rates(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, peaks: Sequence[float]) -> None:
    rates = [peak * factor(scheduler.last_epoch) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": list(peaks), "_last_lr": rates})


@contextlib.contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Tell of a checkpoint whose weights do not fit those that are there.

    Raises:
        UserError: in place of torch's error in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise other_state(checkpoint, error) from error


def other_state(checkpoint: str, reason: object) -> UserError:
    """What to say of a checkpoint that does not fit what trains now."""
    told = in_one_line(reason) if isinstance(reason, Exception) else reason
    return UserError(
        f"{Path(checkpoint).name} was written with another optimizer, or other weights in training ({told}); go on "
        "with the settings that it was written under, of model, adapter, freeze and optim: the lines above say which "
        f"have changed. Or start another run by --output.name NAME, from these weights by model.path={checkpoint}, "
        "or adapter.path if they are an adapter's"
    )
