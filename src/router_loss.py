"""The auxiliary loss by which routers of mixture-of-experts models learn to use all experts alike.

    router = RouterLoss.of(model, causal, weight=None, few=few)   # None without routers, or with a weight of 0
    output = model(**arguments, **router.arguments)
    loss = loss + router.weight * router.of_output(output, real_N)

As transformers' models define it: E x sum over experts e of f_e x P_e, where f_e is the number of assignments to e for
each token and P_e the mean probability that the router gives e, both over all tokens of all layers together.

It is a product of two means, so that it is not a sum over tokens: how a batch is split into micro-batches changes it a
little, unlike all else in the loss. A micro-batch counts by its share of the step's supervised tokens, so that a step's
loss is the mean over supervised tokens of what transformers computes for their micro-batch; one without any, as are the
fillers at an epoch's end, counts nothing.

Shapes: N tokens in all rows of a batch, padding included; E experts, of which K take a token.
Source: arXiv:2101.03961, equations 4 to 6.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

_REQUEST = "output_router_logits"
"""What models are asked by for their routers' logits."""

AGREEMENT, COARSE_AGREEMENT = 1e-4, 0.02
"""Share by which this computation may differ from the model's own, whose sums run in another order; and where router
logits are of 8 or 11 bits, in which some versions of transformers sum."""


def balance_loss(router_logits: Sequence[torch.Tensor], top_k: int, real_N: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly tokens go to experts: K where all get the same share, up to E where all tokens go to the same K.

    Args:
        router_logits: (N, E) of each layer.
        top_k: K.
        real_N: bool, the tokens that count. None: all.
    """
    assigned, probability, rows = 0, 0, 0
    for logits_NE in router_logits:
        shares_NE = torch.softmax(logits_NE, dim=-1)
        chosen_NE = torch.zeros_like(shares_NE, dtype=torch.float32)
        chosen_NE.scatter_(1, shares_NE.topk(top_k, dim=-1).indices, 1.0)
        counts_N1 = torch.ones_like(chosen_NE[:, :1]) if real_N is None else real_N[:, None].to(torch.float32)
        assigned = assigned + (chosen_NE * counts_N1).sum(dim=0)  # a product of matrices would be rounded by autocast
        probability = probability + (shares_NE.float() * counts_N1).sum(dim=0)
        rows = rows + counts_N1.sum()
    return len(assigned) * (assigned / rows * (probability / rows)).sum()


def _own(model: PreTrainedModel, name: str) -> float | int:
    """A number of a model's own auxiliary loss, which it has of its config; 0 where there is none."""
    return getattr(model, name, None) or getattr(model.config.get_text_config(), name, None) or 0


def has_routers(made: type[PreTrainedModel]) -> bool:
    """Whether a class of models tells its routers' logits."""
    return _REQUEST in inspect.signature(made.forward).parameters


def check_router_loss(made: type[PreTrainedModel] | None, weight: float | None) -> None:
    """
    Args:
        made: the class of the model, or None where it is not known before it loads.
        weight: `training.router_aux_loss`.
    Raises:
        UserError: a weight is given, and the model tells of no routers.
    """
    if weight and made is not None and not has_routers(made):
        raise UserError(
            f"training.router_aux_loss={weight} is given, and {made.__name__} has no routers that tell their choice; "
            "leave it out"
        )


@dataclass(frozen=True)
class RouterLoss:
    """The auxiliary loss of a model, which was compared with the model's own computation."""

    weight: float
    """What it is multiplied by in the loss."""

    top_k: int
    """Experts that take a token."""

    arguments: Mapping[str, Any] = field(default_factory=lambda: {_REQUEST: True})
    """What the model is called with besides."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: torch.nn.Module, causal: PreTrainedModel, given: float | None, few: Mapping[str, Any]
    ) -> "RouterLoss | None":
        """The loss of a model, or None if it has no routers or gives their loss no weight.

        Args:
            model: as it is wrapped; every process of a sharded model calls this together.
            causal: the transformers model inside.
            given: `training.router_aux_loss`; None: the model's own weight.
            few: arguments for a call with some tokens without padding.
        Raises:
            UserError: a weight is given, and the model tells of no routers, or its own loss is another one.
        """
        check_router_loss(type(causal), given)
        weight = float(_own(causal, "router_aux_loss_coef")) if given is None else given
        if not weight or not has_routers(type(causal)):
            return None
        output = model(**few, **{_REQUEST: True})
        if not output.router_logits:
            untold = (
                f"{type(causal).__name__} tells no router logits, as none of its layers has experts or the installed "
                "transformers collects none of this family"
            )
            if given:
                raise UserError(f"training.router_aux_loss={given} is given, and {untold}; leave it out")
            log.info("%s; no auxiliary loss is added", untold)
            return None
        found = cls(weight, top_k=int(_own(causal, "num_experts_per_tok")))
        own, ours = float(output.aux_loss), float(found.of_output(output))
        coarse = output.router_logits[0].dtype in (torch.float16, torch.bfloat16)
        if not abs(own - ours) <= (COARSE_AGREEMENT if coarse else AGREEMENT) * abs(own):
            raise UserError(
                f"{type(causal).__name__} computes another auxiliary loss of its routers ({own:.6g}) than this program "
                f"({ours:.6g}); set training.router_aux_loss=0"
            )
        log.info(
            "the routers' auxiliary loss is added %g times; it is computed in each micro-batch, so that unlike the "
            "loss of tokens it changes a little with their split",
            weight,
        )
        return found

    def of_output(self, output: Mapping[str, Any], real_N: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of a batch, without its weight: a scalar with a graph behind it.

        Args:
            output: what the model gave, with `router_logits`.
            real_N: bool, the tokens that are no padding. None: all.
        """
        assert output["router_logits"], "a model that told its routers' logits once does so again"
        return balance_loss(output["router_logits"], self.top_k, real_N)
