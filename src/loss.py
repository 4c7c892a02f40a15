"""Next-token loss at supervised positions only; logits of other positions are never computed, and none stored whole.

    score = SupervisedLoss(label_smoothing=0.0, z_loss=0.0)
    scored = score(model, batch)
    loss = scored.total / supervised_tokens_in_the_global_step

The model is called as it is wrapped, with hooks on its head for the length of the call: one keeps of the hidden states
those before supervised tokens, the other makes the loss of them. So all that depends on a wrapper's forward still
runs (DDP's and DeepSpeed's gradient hooks, autocast, LoRA), and the loss is made where FSDP2 and ZeRO-3 have the head's
weights whole: inside its forward. The loss then leaves through the model's output, as their backward hooks need.

Shapes: B rows in a batch, L tokens in a row, T supervised tokens in the batch, H the model's width, V tokens in the
vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.nn import functional
from transformers import PreTrainedModel

from src.attention import border_arguments
from src.chunked_loss import LogitTransform, Objective, chunked_loss, token_losses, transforms_named_in
from src.packing import IGNORED
from src.router_loss import RouterLoss
from utils.logging import get_logger

log = get_logger(__name__)

PLAIN_ELEMENTS = 2**20
"""Logits up to which a batch is scored whole: 4 MiB in float32, where chunks would save nothing."""

PROBE_SPREAD = 40.0
"""Standard deviation of the logits that a model's transform of them is told by: soft-caps bend them well."""


@dataclass(frozen=True)
class Scored:
    """What the supervised tokens of a batch are scored with."""

    total: torch.Tensor
    """Sum of the objective over them, in nats: a scalar with a graph behind it, also where there are none."""

    nll: torch.Tensor
    """(T,), negative log-likelihood of each in nats, without smoothing, z-loss and graph; float32, or wider if logits
    are."""

    row: torch.Tensor
    """(T,), the row that each stands in, int64."""

    router: torch.Tensor | None = None
    """The routers' auxiliary loss, without its weight and graph, a scalar; None where it is not in `total`, which has
    it T times, so that a mean over supervised tokens has it once."""


def next_token_targets(labels_BL: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts: that of the token after it, and -100 at the last position. (B, L)."""
    return functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)


def supervised_places(labels_BL: torch.Tensor) -> torch.Tensor:
    """Positions before supervised tokens, (T,), counted through all rows. On a GPU this waits for the device."""
    return (next_token_targets(labels_BL).flatten() != IGNORED).nonzero()[:, 0]


def _places(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Those of a batch: as the collator counted them where it did, which spares the wait."""
    given = batch.get("supervised_places")
    return supervised_places(batch["labels"]) if given is None else given


def supervised_nll(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every supervised token, each with a graph, and the row that it stands in.

    Their logits are stored whole: `SupervisedLoss` needs far less memory.

    Args:
        model: a causal language model, wrapped or not.
        batch: `input_ids`, `labels` (-100 where not supervised) and `position_ids`, each (B, L); if they are
            known `supervised_places`, (T,); with `longest_document` in it, attention is told that and
            `document_borders`.
    Returns:
        `nll_T` in nats, float32 or the model's own wider type; `row_T`, int64, the row of each.
    """
    places_T = _places(batch)
    targets_T = next_token_targets(batch["labels"]).flatten()[places_T]
    logits_TV, _ = _supervised_logits(model, batch, places_T)
    loss_T, _ = token_losses(logits_TV, targets_T, Objective())
    return loss_T, places_T // batch["labels"].shape[1]


class SupervisedLoss:
    """Scores the supervised tokens of batches; what the model does to its logits is learned at the first of them."""

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        router_aux_loss: float | None = None,
        plain_elements: int = PLAIN_ELEMENTS,
    ) -> None:
        """
        Args:
            label_smoothing: share of a target's weight that is spread over the whole vocabulary.
            z_loss: weight of logsumexp(logits)^2, which keeps logits from drifting (arXiv:2204.02311).
            router_aux_loss: weight of the auxiliary loss of routers, where gradients are asked for; see
                `src.router_loss`. None: the model's own.
            plain_elements: logits up to which a batch is scored whole.
        """
        self.objective = Objective(label_smoothing, z_loss)
        self.router_aux_loss = router_aux_loss
        self.plain_elements = plain_elements
        self.chunks: bool | None = None
        """Whether chunks give this model's loss; None before it was asked."""
        self.router: RouterLoss | None = None
        """What is added for this model's routers; None too before it was asked."""

    def __call__(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Scored:
        """Score a batch. Every process of a sharded model calls this together.

        Args:
            model, batch: as `supervised_nll` takes them; where rows are padded, with their tokens `row_tokens`, (B,).
        Raises:
            UserError: the model's routers have no auxiliary loss that can be added as asked for.
        """
        if self.chunks is None:
            self._learn(model, batch)
        places_T = _places(batch)
        vocabulary = _causal_model(model).config.get_text_config().vocab_size
        score = self._in_chunks if self.chunks and len(places_T) * vocabulary > self.plain_elements else self._whole
        router = self.router if torch.is_grad_enabled() else None
        if router is None:
            return score(model, batch, places_T)[0]
        scored, output = score(model, batch, places_T, **router.arguments)
        auxiliary = router.of_output(output, _real_tokens(batch)).to(scored.total.dtype)
        return replace(
            scored, total=scored.total + router.weight * len(places_T) * auxiliary, router=auxiliary.detach()
        )

    def _whole(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], places_T: torch.Tensor, **asked: bool
    ) -> tuple[Scored, Mapping[str, Any]]:
        targets_T = next_token_targets(batch["labels"]).flatten()[places_T]
        logits_TV, output = _supervised_logits(model, batch, places_T, **asked)
        loss_T, nll_T = token_losses(logits_TV, targets_T, self.objective.of_final_logits())
        return Scored(loss_T.sum(), nll_T, places_T // batch["labels"].shape[1]), output

    def _in_chunks(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], places_T: torch.Tensor, **asked: bool
    ) -> tuple[Scored, Mapping[str, Any]]:
        targets_T = next_token_targets(batch["labels"]).flatten()[places_T]
        scored: list[tuple[torch.Tensor, torch.Tensor]] = []

        def score(head: torch.nn.Module, hidden_TH: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
            scored.append(chunked_loss(head, hidden_TH, targets_T, self.objective, vocabulary=nothing.shape[-1]))
            return nothing.detach() + scored[0][0]  # no rows, and yet the loss's way out through the wrappers' hooks

        with _at_head(_head_of(model), places_T, score):
            output = model(**model_arguments(batch), **asked)
        (total, nll_T), *_ = scored
        # A sum over nothing adds 0, and makes the backward pass start where the wrappers wait for it.
        return Scored(total + output.logits.sum(), nll_T, places_T // batch["labels"].shape[1]), output

    @torch.no_grad()
    def _learn(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        """Find what the model does to its logits, and prove that chunks give the loss of its own logits.

        The random state stays as it is: dropout is off meanwhile.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            transform = _transform_of(model, batch)
            if transform is not None:
                self.objective = replace(self.objective, transform=transform)
            self.chunks = transform is not None and self._agrees(model, batch)
            few = model_arguments(_few_tokens(batch))
            self.router = RouterLoss.of(model, _causal_model(model), self.router_aux_loss, few)
        finally:
            for module in training:
                module.training = True
        if not self.chunks:
            log.warning(
                "what %s does to its logits is unknown, so those of a whole batch's supervised tokens are stored at "
                "once: with a large vocabulary that takes much memory; fewer training.micro_batch_rows take less",
                type(_causal_model(model)).__name__,
            )

    def _agrees(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> bool:
        """Whether the chunked loss of a few tokens is that of the model's full logits."""
        few = _few_tokens(batch)
        logits_TV = model(**model_arguments(few)).logits.flatten(end_dim=-2)
        targets_T = next_token_targets(few["labels"]).flatten()
        places_T = _places(few)
        loss_T, nll_T = token_losses(logits_TV[places_T], targets_T[places_T], self.objective.of_final_logits())
        scored, _ = self._in_chunks(model, few, places_T)
        coarse = 0.02 if _is_coarse(logits_TV) else 1e-4
        return bool(torch.isclose(scored.total, loss_T.sum(), rtol=coarse)) and bool(
            torch.allclose(scored.nll, nll_T, rtol=coarse, atol=coarse)
        )


def model_arguments(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the model is called with."""
    arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if "longest_document" in batch:
        arguments |= border_arguments(batch["document_borders"], batch["longest_document"])
    return arguments


def _causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _head_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that makes logits; None where the model names none."""
    head = _causal_model(model).get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapter]  # PEFT's trained copy, a layer like the original
    return head


def _is_coarse(tensor: torch.Tensor) -> bool:
    """Whether numbers of 8 or 11 bits went into it."""
    return tensor.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(tensor.device.type)


@contextmanager
def _at_head(
    head: torch.nn.Module | None,
    places_T: torch.Tensor,
    score: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Let a head see the hidden states at some places only, while the context lasts.

    Args:
        places_T: positions, counted through all rows.
        score: makes the head's output of the head, the hidden states and an output without rows (1, 0, V), which is
            then all that the head itself computes. None: the head makes logits, (1, T, V).
    Returns:
        The hidden states of each call, (T, H); empty if the head was not called.
    """
    seen: list[torch.Tensor] = []

    def gather(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0].flatten(end_dim=-2).index_select(0, places_T))
        return (seen[-1][None] if score is None else seen[-1][None, :0], *args[1:])

    def put(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return score(module, seen[-1], output)

    handles = [] if head is None else [head.register_forward_pre_hook(gather)]
    if head is not None and score is not None:
        handles.append(head.register_forward_hook(put, prepend=True))  # before a wrapper's hook parts the weights again
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _supervised_logits(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], places_T: torch.Tensor, **asked: bool
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Final logits at some places, (T, V), through the model's own forward, and all of its output.

    Args:
        asked: arguments of the model, by which it is asked for more.
    """
    with _at_head(_head_of(model), places_T) as seen:
        output = model(**model_arguments(batch), **asked)
    logits_KV = output.logits.flatten(end_dim=-2)
    return (logits_KV if seen else logits_KV.index_select(0, places_T)), output


def _real_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Whether each token of a batch is one of its rows', bool, (B * L,), or None where all are."""
    if "row_tokens" not in batch:
        return None
    length = batch["input_ids"].shape[1]
    places_L = torch.arange(length, device=batch["input_ids"].device)
    return (places_L < batch["row_tokens"][:, None]).flatten()


def _few_tokens(batch: Mapping[str, torch.Tensor], tokens: int = 16) -> dict[str, torch.Tensor]:
    """Some tokens of the vocabulary's start as one document, all supervised but the first."""
    device = batch["input_ids"].device
    ids = torch.arange(1, 1 + tokens, device=device)[None] % 7
    labels = ids.clone()
    labels[0, 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(tokens, device=device)[None]}


def _transform_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> LogitTransform | None:
    """What a model does to its head's output, told from both; None where no known transform does that.

    The head is given random numbers in place of hidden states, so large that a soft-cap shows.
    """
    few, head, raw = _few_tokens(batch), _head_of(model), []
    if head is None:
        return None
    generator = torch.Generator().manual_seed(0)

    def spread(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        noise = torch.randn(args[0].shape, generator=generator).to(args[0])
        first = module.forward(noise, *args[1:])
        return (noise * (PROBE_SPREAD / first.float().std().clamp(min=1e-6)).to(noise.dtype), *args[1:])

    handles = [
        head.register_forward_pre_hook(spread),
        head.register_forward_hook(lambda module, args, output: raw.append(output)),
    ]
    try:
        final = model(**model_arguments(few)).logits.cpu().double()  # some devices have no float64
    finally:
        for handle in handles:
            handle.remove()
    if len(raw) != 1 or raw[0].shape != final.shape:
        return None
    # Some roundings of the largest logit, in the coarsest format that it passed through.
    allowed = 8 * torch.finfo(raw[0].dtype).eps * final.abs().max()
    settings = _causal_model(model).config.get_text_config().to_dict()
    given = raw[0].cpu().double()
    distances = [((transform(given) - final).abs().max(), transform) for transform in transforms_named_in(settings)]
    distance, nearest = min(distances, key=lambda pair: pair[0])  # bfloat16 allows more than a scale near 1 does
    return nearest if bool(distance <= allowed) else None
