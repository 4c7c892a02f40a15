"""Optimizer steps whose loss or gradient is not finite are left out, and no step waits for the device to know it.

    guard = StepGuard(device, scaled=False)
    loss = guard.marked(loss)                 # before the backward pass
    guard.see_gradient(norm)                  # of the whole step, after the processes' gradients are joined
    optimizer.step()                          # between the guard's two callbacks: changes nothing if the step is bad
    guard.take()                              # of each step since this was last asked: bad loss, bad gradient

A loss that is not finite makes each gradient NaN by itself or is made to, and gradients are added up over micro-batches
and processes. So the norm of a step's gradient tells of all of them, to every process alike.

An optimizer that takes `found_inf`, as torch's fused Adam does of `GradScaler`, leaves its weights, moments and step
count as they are where that is 1; so does `src.optim.MuonWithAdamW`. Any other has its gradients taken away, for which
the norm is read: on a GPU that waits until the step's backward pass is done.
Source: `torch.amp.GradScaler.step`, which hands `found_inf` to optimizers this way.
"""

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from src.optim import MuonWithAdamW
from utils.logging import get_logger

log = get_logger(__name__)


class StepGuard(TrainerCallback):
    """Leaves out bad steps, and remembers on the device which they were."""

    def __init__(self, device: torch.device, *, scaled: bool = False, leaves_out: bool = True) -> None:
        """
        Args:
            scaled: whether a `GradScaler` leaves out the steps whose scaled gradients overflow, as it does with fp16.
            leaves_out: whether a bad step can be left out. Not where weights are updated within the backward pass, as
                DeepSpeed and some optimizers do; what is bad is then seen all the same.
        """
        self.device = device
        self.scaled = scaled
        self.leaves_out = leaves_out
        self._no = torch.zeros((), dtype=torch.bool, device=device)
        self._bad_loss = self._bad_gradient = self._no
        self._steps: list[torch.Tensor] = []
        self._told = False

    def marked(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch, a scalar; one that is not finite is NaN, with a gradient that is NaN too."""
        finite = torch.isfinite(loss.detach())
        self._bad_loss = self._bad_loss | ~finite
        # A loss of infinity can have a finite gradient: softmax minus target, where the target's logit is -infinity.
        return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)

    def see_gradient(self, norm: torch.Tensor | float) -> None:
        """Take the norm of the step's gradient, over all micro-batches and processes."""
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is in parts
        self._bad_gradient = ~torch.isfinite(torch.as_tensor(whole, device=self.device))

    def take(self) -> torch.Tensor:
        """Whether the loss, and the gradient, of each step since this was last asked was not finite, as this process
        saw it: bool, (steps, 2), on the device."""
        steps, self._steps = self._steps, []
        return torch.stack(steps) if steps else self._no.new_zeros(0, 2)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Have the optimizer change nothing if the step is bad."""
        if self.scaled or not self.leaves_out:
            return
        inner = inner_optimizer(optimizer)
        if takes_found_inf(inner):
            inner.grad_scale, inner.found_inf = None, self._bad_gradient.float()
            return
        if self.device.type != "cpu" and not self._told:
            self._told = True
            log.warning(
                "%s cannot leave out a step on the device, so each step waits until it is known whether its gradient "
                "is finite; optim.name=adamw_torch_fused does not wait",
                type(inner).__name__,
            )
        if bool(self._bad_gradient):
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over weights without a gradient

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Note what the step was."""
        inner = inner_optimizer(optimizer)
        if hasattr(inner, "found_inf") and not self.scaled:
            del inner.found_inf, inner.grad_scale
        self._steps.append(torch.stack((self._bad_loss, self._bad_gradient)))
        self._bad_loss = self._bad_gradient = self._no


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, where Accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step changes nothing where its attribute `found_inf`, a scalar on the device, is 1."""
    fused = isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups)
    return fused or isinstance(optimizer, MuonWithAdamW)
