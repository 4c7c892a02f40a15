"""Number formats of a run, said plainly: of weights and products, a parameter's bytes, and what is rounded away.

precision = Precision.of(model, autocast=torch.bfloat16, optim=config.optim)
log.info("precision: %s", precision.told())
warn_of_lost_updates(model, config.optim)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from config.schema import OptimConfig
from src.adapters import count_parameters
from src.quantization import held_bytes, held_format
from utils.logging import get_logger

log = get_logger(__name__)

LOST_SHARE = 0.1
"""Share of the weights whose updates are rounded away from which a run is warned."""

SAMPLE = 4096
"""Numbers of each tensor that are tried for it, at most about twice as many."""

_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
"""Numbers in the format of its weight that an optimizer of torch keeps for each."""


@dataclass(frozen=True)
class Precision:
    """Formats, and mean bytes a parameter."""

    trained: str
    """Formats of the weights that train, such as `float32`."""
    trained_bytes: float
    frozen: str | None
    """Formats of the weights that do not; None: all train."""
    frozen_bytes: float
    products: str | None
    """Format of matrix products under autocast; None: that of their weights."""
    optimizer: str
    state_bytes: float | None
    """Bytes of optimizer state a trained parameter; None: not known before a step is taken."""

    @classmethod
    def of(cls, model: torch.nn.Module, *, autocast: torch.dtype | None, optim: OptimConfig) -> "Precision":
        """What a model trains in before the first step, in a process that holds it whole."""
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        counts = count_parameters(model)
        trained_bytes = _bytes(trained) / max(1, counts["trainable"])
        moments = _MOMENTS.get(optim.name)
        return cls(
            trained=_formats(trained),
            trained_bytes=trained_bytes,
            frozen=_formats(frozen) if frozen else None,
            frozen_bytes=_bytes(frozen) / max(1, counts["total"] - counts["trainable"]),
            products=str(autocast).removeprefix("torch.") if autocast is not None else None,
            optimizer=optim.name,
            state_bytes=None if moments is None else moments * trained_bytes,
        )

    def told(self) -> str:
        """The same in a line."""
        products = f"{self.products} (autocast)" if self.products else "the format of their weights"
        text = f"{self.trained} weights train, matrix products in {products}; "
        parts = f"weight {self.trained_bytes:.3g} + gradient {self.trained_bytes:.3g} + "
        if self.state_bytes is None:
            text += f"bytes a trained parameter: {parts}the state of {self.optimizer}"
        else:
            whole = 2 * self.trained_bytes + self.state_bytes
            text += f"{whole:.3g} bytes a trained parameter: {parts}optimizer state {self.state_bytes:.3g}"
        if self.frozen:
            text += f"; frozen weights in {self.frozen}, {self.frozen_bytes:.3g} bytes each"
        return text


def warn_of_lost_updates(model: torch.nn.Module, optim: OptimConfig) -> None:
    """Say how many of the bfloat16 weights that train would stay as they are, were they to change by the learning rate.

    Adam's update of a weight is about the learning rate. bfloat16 has 8 significant bits: between 2^k and 2^(k+1) its
    numbers are 2^(k-7) apart, and a change of less than half of that is rounded away, which is 1/512 to 1/256 of the
    weight. Adapters train in float32.
    """
    share = lost_share(model, optim.learning_rate)
    if share >= LOST_SHARE:
        log.warning(
            "updates of %.0f %% of the trained weights are rounded away: bfloat16 keeps 8 bits, so a weight does not "
            "change by less than 1/512 of its size, and at optim.learning_rate=%g an update is about as large as the "
            "rate, too small for weights above %.2g (512 x the rate), and for many above half of that; use "
            "model.dtype=float32 with training.precision=bf16, or a higher rate",
            100 * share,
            optim.learning_rate,
            512 * optim.learning_rate,
        )


@torch.no_grad()
def lost_share(model: torch.nn.Module, change: float) -> float:
    """Share of the weights that train, 0 to 1, which are bfloat16 and equal to themselves plus `change`."""
    lost = total = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        total += parameter.numel()
        if parameter.dtype == torch.bfloat16 and parameter.numel():
            sample = parameter.flatten()[:: max(1, parameter.numel() // SAMPLE)]
            stays = (sample.float() + change).bfloat16() == sample
            lost += parameter.numel() * stays.float().mean().item()
    return lost / max(1.0, total)


def _bytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(held_bytes(parameter) for parameter in parameters)


def _formats(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Formats by their share, the largest first; bitsandbytes' and torchao's by their own names."""
    sizes: dict[str, int] = {}
    for parameter in parameters:
        name = held_format(parameter)
        sizes[name] = sizes.get(name, 0) + held_bytes(parameter)
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name]))
