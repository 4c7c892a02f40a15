"""What a training line is made of: losses, tokens and time, summed on the device since the last one.

sums = StepSums(meter, device=args.device)
sums.begin_step(counts, counted)             # counts: the supervised tokens and tokens of all processes
sums.add_loss(torch.stack((nll, objective, routers)))
sums.figures(accelerator)                    # waits for the device
sums.clear()
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from utils.metrics import Counted, Meter


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
        self._loss = torch.zeros(3, dtype=wide, device=device)  # negative log-likelihood, objective, routers'
        self._steps = 0
        self._timed = False  # whether the time of these steps is counted

    def begin_step(self, counts: torch.Tensor, counted: Sequence[Counted]) -> None:
        """Add an optimizer step's tokens.

        Args:
            counts: int64, (2,): supervised tokens and tokens of all processes, on the device.
            counted: what is in each micro-batch of this process.
        """
        if not self._timed:
            self._since, self._timed = time.perf_counter(), True
        for one in counted:
            self.meter.add(one)
        self._tokens += counts
        self._unseen += counts[1]
        self._steps += 1

    def add_loss(self, sums: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's negative log-likelihood, objective and routers' loss, (3,)."""
        self._loss += sums.detach()

    def take_unseen(self) -> int:
        """Tokens since this was last asked."""
        unseen = int(self._unseen)
        self._unseen.zero_()
        return unseen

    def losses(self, accelerator: Accelerator) -> tuple[float, float, float]:
        """Means over the steps and the processes: negative log-likelihood, objective and routers' loss."""
        nll, objective, routers = (accelerator.reduce(self._loss, reduction="mean") / max(1, self._steps)).tolist()
        return nll, objective, routers

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What `load_state` needs for the next line to tell of the steps before a checkpoint too, as plain JSON; every
        process calls this."""
        return {"steps": self._steps, "losses": accelerator.gather(self._loss[None]).tolist()}

    def load_state(self, content: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Go on with the sums of a checkpoint; speed is that of the steps from here on."""
        losses = torch.tensor(content["losses"], dtype=self._loss.dtype)
        same = len(losses) == accelerator.num_processes  # else each takes the mean, which sums up to the same
        self._loss.copy_(losses[accelerator.process_index] if same else losses.mean(dim=0))
        self._steps = content["steps"]

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
        self._loss.zero_()
        self._steps = 0
        self._timed = False
        self._tokens.zero_()
        self.meter.clear()
