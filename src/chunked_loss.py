"""Losses of supervised tokens from hidden states, in chunks, so that logits are never stored whole.

    loss, nll_T = chunked_loss(head, hidden_TH, targets_T, objective)

`loss` is the objective's sum, with a graph behind it; `nll_T` is for reports and has none.

Shapes: T supervised tokens, C of them in a chunk, H the model's width, V tokens in the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = {"cpu": 2**24}
"""Logits of a chunk, by device: on a CPU 64 MiB in float32, of which two such blocks stand at once. A quarter of that
was slower by a few percent of a whole step, at a vocabulary of 32,000."""

CHUNK_ELEMENTS_ELSEWHERE = 2**26
"""The same on a GPU, where a chunk of some hundred rows is needed to do more sums than reads of the head's weights: a
chunk of C rows does 6 C sums for each weight and moves about 16 bytes, and an H200 does 125 sums a byte."""

MIN_CHUNK_ROWS = 64
"""Rows of a chunk however large the vocabulary: below, each product waits for the head's weights."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Final logits, in a tensor of their own unless nothing is to be done."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


@dataclass(frozen=True)
class Objective:
    """What is minimized for a token: cross-entropy with smoothed targets, plus `z_loss` x logsumexp(logits)^2."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    transform: LogitTransform = field(default_factory=LogitTransform)

    @property
    def plain(self) -> bool:
        """Whether it is the negative log-likelihood itself."""
        return self.label_smoothing == 0.0 and self.z_loss == 0.0

    def of_final_logits(self) -> "Objective":
        """The same, of logits that the model has transformed itself."""
        return replace(self, transform=LogitTransform())


def token_losses(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective and the negative log-likelihood of each token, both (T,), through autograd.

    Args:
        logits_TV: the head's output, in any number format; computed in float32 or wider.
    """
    logits_TV = objective.transform(_wide(logits_TV))
    nll_T = functional.cross_entropy(logits_TV, targets_T, reduction="none")
    if objective.plain:
        return nll_T, nll_T.detach()
    loss_T = functional.cross_entropy(logits_TV, targets_T, reduction="none", label_smoothing=objective.label_smoothing)
    if objective.z_loss:
        loss_T = loss_T + objective.z_loss * torch.logsumexp(logits_TV, dim=-1).square()
    return loss_T, nll_T.detach()


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are computed at once."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE) // vocabulary)


def chunked_loss(
    head: torch.nn.Module,
    hidden_TH: torch.Tensor,
    targets_T: torch.Tensor,
    objective: Objective,
    *,
    vocabulary: int,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's sum over tokens, and the negative log-likelihood of each.

    A plain linear head's gradients are computed with the loss, chunk by chunk, so that no product is done twice. Any
    other head (LoRA beside it, a copy that PEFT trains) is run again in the backward pass, chunk by chunk: its own
    forward is the only thing that knows what it computes. So is every head in float16, whose gradients must be scaled
    before they are rounded.

    Args:
        head: the module that makes logits of hidden states; its `forward` is called without its hooks.
        vocabulary: V, the logits of a token.
        rows: tokens in a chunk. None: as many as `CHUNK_ELEMENTS` has room for.
    Returns:
        `loss`, a scalar, and `nll_T` without a graph; float32, or float64 where the logits are.
    """
    rows = rows or chunk_rows(vocabulary, hidden_TH.device)
    if type(head) is torch.nn.Linear and _product_dtype(hidden_TH, head.weight) != torch.float16:
        inputs = (hidden_TH, head.weight, head.bias)
        if not torch.is_grad_enabled():  # what needs a gradient would get one all the same
            inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
        return _LinearHeadLoss.apply(*inputs, targets_T, objective, rows)

    def part(hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss_C, nll_C = token_losses(head.forward(hidden_CH), targets_C, objective)
        return loss_C.sum(), nll_C

    chunks = zip(hidden_TH.split(rows), targets_T.split(rows), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [part(*chunk) for chunk in chunks]
    losses, nlls = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.cat(nlls)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _product_dtype(hidden_TH: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Number format that the head's product runs in."""
    kind = hidden_TH.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class _LinearHeadLoss(torch.autograd.Function):
    """Loss of a linear head, whose gradients are made in the forward pass and scaled in the backward pass.

    Only what needs a gradient gets one: with a frozen head no product for its weight is done.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        objective: Objective,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        product = _product_dtype(hidden_TH, weight_VH)
        hidden, weight = hidden_TH.to(product), weight_VH.to(product)
        bias = None if bias_V is None else bias_V.to(product)
        wide = torch.float64 if product == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        loss_T, nll_T = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        # Sums over chunks in float32: in bfloat16 each chunk's sum would be rounded to 8 bits.
        grad_weight = torch.zeros_like(weight_VH, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                span = slice(start, start + rows)
                logits_CV = functional.linear(hidden[span], weight, bias).to(wide)
                loss_T[span], nll_T[span], grad_CV = _chunk(
                    logits_CV, targets_T[span], objective, with_gradient=any(ctx.needs_input_grad)
                )
                del logits_CV
                if needs_bias:
                    grad_bias += grad_CV.sum(dim=0)
                if needs_hidden or needs_weight:
                    grad_CV = grad_CV.to(product)
                if needs_hidden:
                    grad_hidden[span] = grad_CV @ weight
                if needs_weight and product == wide:
                    torch.addmm(grad_weight, grad_CV.T, hidden[span], out=grad_weight)
                elif needs_weight:
                    grad_weight += grad_CV.T @ hidden[span]
                del grad_CV  # else it would stand beside the next chunk's blocks
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden_TH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(nll_T)
        return loss_T.sum(), nll_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients in place, which makes autograd refuse a second backward pass."""
        scaled = (
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _chunk(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, objective: Objective, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Objective and negative log-likelihood of each token of a chunk, and the gradient by the head's output.

    With y the final logits, p their softmax, s the smoothing and z the z-loss's weight, the gradient by y is
    p (1 + 2 z logsumexp(y)) - (1 - s) onehot(target) - s / V.
    """
    transform, smoothing = objective.transform, objective.label_smoothing
    final_CV, target_C1 = transform(logits_CV), targets_C[:, None]
    # One exponential a logit: the softmax's denominator is read off the likeliest token, whose share is at least 1 / V.
    grad_CV = torch.softmax(final_CV, dim=-1)
    largest_C, log_share_C = final_CV.amax(dim=-1), grad_CV.amax(dim=-1).log_()
    nll_C = (largest_C - final_CV.gather(1, target_C1)[:, 0]) - log_share_C
    loss_C, lse_C = nll_C, largest_C - log_share_C
    if smoothing:
        loss_C = (1 - smoothing) * nll_C + smoothing * (lse_C - final_CV.mean(dim=-1))
    if objective.z_loss:
        loss_C = loss_C + objective.z_loss * lse_C.square()
    if not with_gradient:
        return loss_C, nll_C, None
    if objective.z_loss:
        grad_CV *= (1 + 2 * objective.z_loss * lse_C)[:, None]
    if smoothing:
        grad_CV -= smoothing / grad_CV.shape[1]
    grad_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, smoothing - 1, dtype=grad_CV.dtype))
    if transform.softcap is not None:
        grad_CV.addcmul_(grad_CV, (final_CV / transform.softcap).square_(), value=-1)  # tanh' = 1 - tanh^2
    if transform.scale != 1.0:
        grad_CV *= transform.scale
    return loss_C, nll_C, grad_CV


def transforms_named_in(settings: Mapping[str, Any]) -> list[LogitTransform]:
    """What a model may do to its logits, by the numbers in its configuration, the likeliest first.

    Whether a number multiplies or divides differs from one architecture to the next (Granite divides by
    `logits_scaling`, HyperCLOVA X multiplies), so each is given both ways, and the model itself must tell.
    """
    caps = [settings[name] for name in ("final_logit_softcapping", "logits_soft_cap") if settings.get(name)]
    numbers = [
        settings.get(name) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
    ]
    scales = [
        scale for number in numbers if isinstance(number, int | float) and number for scale in (number, 1 / number)
    ]
    return [LogitTransform(scale, cap) for cap in (*caps, None) for scale in (*scales, 1.0)]
