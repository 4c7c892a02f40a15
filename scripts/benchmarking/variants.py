"""This project's trainer with one part of its training step taken away each, to see what that part gains.

variant = VARIANTS["dense mask"]
trainer = SFTTrainer(..., score=variant.score())

All train the same losses; `scripts/benchmarking/agreement.py` compares them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from config.schema import OptimConfig
from scripts.benchmarking.models import OPTIM
from src.attention import border_arguments
from src.loss import Scored, SupervisedLoss, next_token_targets, supervised_places
from src.packing import IGNORED

OWN = "smolfactory"


class WholeLogits(SupervisedLoss):
    """The loss as transformers' models compute it: logits at every position, stored whole."""

    def __call__(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Scored:
        """As `SupervisedLoss`."""
        given = {name: batch[name] for name in ("input_ids", "position_ids")}
        if "longest_document" in batch:
            given |= border_arguments(batch["document_borders"], batch["longest_document"])
        logits_KV = model(**given, use_cache=False).logits.float().flatten(end_dim=-2)
        targets_K = next_token_targets(batch["labels"]).flatten()
        loss_K = functional.cross_entropy(logits_KV, targets_K, ignore_index=IGNORED, reduction="none")
        places_T = supervised_places(batch["labels"])
        return Scored(loss_K.sum(), loss_K.detach()[places_T], places_T // batch["labels"].shape[1])


def _supervised_whole() -> SupervisedLoss:
    return SupervisedLoss(plain_elements=2**62)  # more than any batch has, so that none is chunked


@dataclass(frozen=True)
class Variant:
    """What takes the place of the project's own choice."""

    meaning: str
    attention: str = "auto"
    """`model.attention`."""

    score: Callable[[], SupervisedLoss] = SupervisedLoss
    optim: OptimConfig = field(default=OPTIM)
    recomputes: bool = False
    """Whether activations are computed again where the case does not say so."""


PLAIN_ADAMW = replace(OPTIM, name="adamw_torch")

VARIANTS: dict[str, Variant] = {
    OWN: Variant("nothing is taken away"),
    "dense mask": Variant("attention over the whole pack, with a mask between documents", attention="sdpa"),
    "supervised logits whole": Variant("logits of all supervised positions at once", score=_supervised_whole),
    "all logits whole": Variant("logits of every position at once", score=WholeLogits),
    "plain optimizer": Variant("torch's AdamW, not fused", optim=PLAIN_ADAMW),
    "recomputed": Variant("activations computed again in the backward pass", recomputes=True),
    "none of them": Variant(
        "a dense mask, logits of every position at once, and AdamW not fused",
        attention="sdpa",
        score=WholeLogits,
        optim=PLAIN_ADAMW,
    ),
}
"""By the name that `--contenders` takes."""
