"""What a training line is made of: losses, tokens and time, summed on the device since the last one.

sums = StepSums(meter, device=args.device)
sums.begin_step(counts, counted)             # counts: the supervised tokens and tokens of all processes
sums.add_loss(torch.stack((nll, objective, routers)))
sums.take_steps(accelerator, guard.take())   # waits for the device
sums.speed()                                 # so does this
sums.clear()
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.training_args import TrainingArguments

from src.adapters import count_parameters
from utils.metrics import Counted, Meter, matrix_rate, work_of


@dataclass(frozen=True)
class StepFigures:
    """An optimizer step, of all processes: means over its supervised tokens in nats, of which there are `supervised`,
    and whether its loss, or its gradient, was not finite in some process."""

    nll: float
    objective: float
    routers: float
    supervised: int
    bad_loss: bool = False
    bad_gradient: bool = False


class StepSums:
    """Sums over the optimizer steps since the last line. Adding to them waits for no device; reading them does."""

    def __init__(self, meter: Meter, *, device: torch.device) -> None:
        """
        Args:
            meter: counts this process's work.
        """
        self.meter = meter
        self._tokens = torch.zeros(2, dtype=torch.int64, device=device)  # supervised, all
        self._unseen = torch.zeros((), dtype=torch.int64, device=device)  # of which the run's state knows nothing yet
        self._since = time.perf_counter()
        # Trainer adds up losses in float32, which is coarser than what is compared here.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._nothing = torch.zeros(3, dtype=wide, device=device)
        self._losses: list[torch.Tensor] = []  # of each step: negative log-likelihood, objective, routers'
        self._supervised: list[torch.Tensor] = []
        self._steps = 0

    def begin_step(self, counts: torch.Tensor, counted: Sequence[Counted]) -> None:
        """Add an optimizer step's tokens.

        Args:
            counts: int64, (2,): supervised tokens and tokens of all processes, on the device.
            counted: what is in each micro-batch of this process.
        """
        if self._steps == 0:
            self._since = time.perf_counter()
        for one in counted:
            self.meter.add(one)
        self._tokens += counts
        self._unseen += counts[1]
        self._steps += 1
        self._losses.append(self._nothing)
        self._supervised.append(counts[0])

    def add_loss(self, sums: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's negative log-likelihood, objective and routers' loss, (3,)."""
        self._losses[-1] = self._losses[-1] + sums.detach()

    def take_unseen(self) -> int:
        """Tokens since this was last asked."""
        unseen = int(self._unseen)
        self._unseen.zero_()
        return unseen

    def take_steps(self, accelerator: Accelerator, bad: torch.Tensor) -> list[StepFigures]:
        """The steps since this was last asked, the same in each process.

        Args:
            bad: whether the loss, and the gradient, of each was not finite in this process: (steps, 2).
        """
        if not self._losses:
            return []
        wide = self._nothing.dtype
        own = (torch.stack(self._losses), torch.stack(self._supervised)[:, None].to(wide), bad.to(wide))
        self._losses, self._supervised = [], []
        steps = accelerator.reduce(torch.cat(own, dim=1), reduction="mean").tolist()
        return [
            StepFigures(nll, objective, routers, round(supervised), bad_loss > 0, bad_gradient > 0)
            for nll, objective, routers, supervised, bad_loss, bad_gradient in steps
        ]

    def speed(self) -> dict[str, float]:
        """Tokens and supervised tokens a second of all processes, and what the meter tells."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        supervised, tokens = self._tokens.tolist()
        return {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            **self.meter.figures(seconds),
        }

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was spent on something else against the speed."""
        self._since += seconds

    def clear(self) -> None:
        """Start the sums again; tokens that the state knows nothing of stay."""
        self._steps = 0
        self._tokens.zero_()
        self.meter.clear()


def meter_of(model: PreTrainedModel, args: TrainingArguments, *, whole: bool) -> Meter:
    """What tells the share of the device's matrix rate, for a model that is `whole` in this process."""
    if not whole:
        return Meter(None, None)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return Meter(work_of(model, count_parameters(model)), matrix_rate(args.device.type, dtype))
