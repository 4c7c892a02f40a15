"""Whether the loss before the first step is what the vocabulary and the checkpoint suggest.

    loss = measure_start_loss(trainer, batch)
    findings = loss_findings(loss, model, starts_fresh=False)

A model's loss on its targets is held against that on the same targets in another order, which it knows as well as a
model can that knows nothing of the text but which tokens are frequent. A checkpoint that was loaded right gains by the
true order: stories260K gains 10.5 nats a token on its own texts, 5.2 on GSM8K, 5.9 on Shakespeare. Of the same weights
with rows of the embeddings in another order, or its layers, or layers of noise, little or nothing is left of it, and
the loss is far above that of a guess, ln(vocabulary). A fresh model gains nothing, and its loss follows from the size
of its logits.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from src.packing import IGNORED
from src.start_checks import StartFinding
from src.steps import Batch
from src.trainer import SFTTrainer

LEAST_TOKENS = 16
"""Supervised tokens from which a loss is judged."""

CERTAIN_EXCESS = 3.0
"""Nats above ln(vocabulary) from which a checkpoint that gains less than that is called broken. Weights that were never
trained are at most 1.4 above it with an initializer_range of 0.2, ten times the usual; those of stories260K with rows
or layers in another order 3 to 18, and intact ones at most 1 above it on text that they never saw."""

ERRORS = 4
"""Standard errors that a mean may be off by chance."""

SLACK = 0.1
"""Nats that are left to what the bound for a fresh model takes as exactly normal."""


@dataclass(frozen=True)
class StartLoss:
    """Means over the supervised tokens of the first micro-batch of every process, in nats a token."""

    loss: float
    gain: float
    """How much larger the loss is with the same targets in another order."""
    gain_error: float
    """Standard error of the gain."""
    tokens: int
    distinct_tokens: int
    """Of one process, the mean over them."""
    vocabulary: int
    """Tokens that a guess is made of."""

    @property
    def guess(self) -> float:
        """The loss of one that knows nothing, ln(vocabulary)."""
        return math.log(self.vocabulary)


def measure_start_loss(trainer: SFTTrainer, batch: Batch) -> StartLoss | None:
    """The loss of a micro-batch by the model as it stands; weights and random numbers stay as they are.

    Every process calls this.

    Args:
        batch: of this process, on its device.
    Returns:
        None where no token is supervised.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = [module for module in model.modules() if module.training]
    devices = [] if trainer.args.device.type == "cpu" else [trainer.args.device]
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices, device_type=trainer.args.device.type if devices else "cuda"),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):
            true_T = trainer.score(model, batch).nll.cpu().double()
            other_T = trainer.score(model, in_another_order(batch)).nll.cpu().double()
    finally:
        for module in training:
            module.training = True
    gain_T = other_T - true_T
    distinct = batch["labels"][batch["labels"] != IGNORED].unique().numel()
    parts = [true_T.sum(), gain_T.sum(), (gain_T**2).sum()]
    sums = torch.tensor([*map(float, parts), len(true_T), distinct], dtype=torch.float32).to(trainer.args.device)
    loss, gain, squares, tokens, distinct = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    if not tokens:
        return None
    variance = max(0.0, squares / tokens - (gain / tokens) ** 2)
    return StartLoss(
        loss=loss / tokens,
        gain=gain / tokens,
        gain_error=math.sqrt(variance / tokens),
        tokens=int(tokens),
        distinct_tokens=round(distinct / trainer.accelerator.num_processes),
        vocabulary=vocabulary_of(model),
    )


def in_another_order(batch: Batch) -> Batch:
    """A batch whose supervised labels changed places among each other, the same way each time."""
    labels = batch["labels"].clone()
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(places))).to(labels.device)
    labels.view(-1)[places] = labels.view(-1)[places[order]]
    return batch | {"labels": labels}


def loss_findings(start: StartLoss | None, model: torch.nn.Module, *, starts_fresh: bool) -> list[StartFinding]:
    """What is wrong with the loss at step 0.

    Args:
        start: None: it was not measured.
        model: tells the vocabulary, and of a fresh model the size of its logits.
        starts_fresh: whether its weights are random.
    """
    if start is None:
        return []
    if not math.isfinite(start.loss):
        return [
            StartFinding(
                "start_loss",
                stops=True,
                found=f"the loss of the first micro-batch is {start.loss} before any step",
                why="weights that are no numbers, or products that overflow, teach nothing",
                change="load or convert the checkpoint again, or use float32 as training.precision and model.dtype",
            )
        ]
    if start.tokens < LEAST_TOKENS:
        return []
    return _fresh(start, model) if starts_fresh else _trained(start)


def vocabulary_of(model: torch.nn.Module) -> int:
    """Rows of the head."""
    return model.config.get_text_config().vocab_size


def _trained(start: StartLoss) -> list[StartFinding]:
    guess = start.guess
    measured = f"{start.loss:.2f} nats a token before any step, and a guess among {start.vocabulary:,} has {guess:.2f}"
    knows = start.gain > ERRORS * start.gain_error
    gain = f"the true order of the targets gains {start.gain:.2f} +- {start.gain_error:.2f} over another one"
    mend = "load or convert the checkpoint again, with the tokenizer that it was trained with as model.tokenizer"
    if start.loss - guess > max(CERTAIN_EXCESS, start.gain + ERRORS * start.gain_error):
        return [
            StartFinding(
                "start_loss",
                stops=True,
                found=f"the loss of the first micro-batch is {measured}; {gain}",
                why="so sure and so wrong is no model on text of any kind, but weights that do not belong together",
                change=mend,
            )
        ]
    if not knows:
        return [
            StartFinding(
                "start_loss",
                stops=False,
                found=f"the loss of the first micro-batch is {measured}; {gain}: the checkpoint knows nothing of it",
                why="random weights, or weights in another order than the model's, are like this",
                change=f"{mend}, unless it was never trained",
            )
        ]
    if start.loss > guess:
        return [
            StartFinding(
                "start_loss",
                stops=False,
                found=f"the loss of the first micro-batch is {measured}; {gain}",
                why="text that is new to a model can be like this, and so can a checkpoint that was converted wrong",
                change=f"if the text is of a kind that the checkpoint was trained on, {mend}",
            )
        ]
    return []


def _fresh(start: StartLoss, model: torch.nn.Module) -> list[StartFinding]:
    low, high = fresh_bounds(model, start.distinct_tokens)
    if low <= start.loss <= high:
        return []
    below = start.loss < low
    return [
        StartFinding(
            "start_loss",
            stops=False,
            found=f"the loss of the first micro-batch is {start.loss:.2f} nats a token before any step, and random "
            f"weights of this size give {low:.2f} to {high:.2f} with a vocabulary of {start.vocabulary:,}",
            why="a model that has learned nothing sees its targets" if below else "its first steps undo its start",
            change="look whether rows repeat one token" if below else "lower model.architecture.initializer_range",
        )
    ]


def fresh_bounds(model: torch.nn.Module, distinct_tokens: int) -> tuple[float, float]:
    """The least and the largest loss of random weights, in nats a token.

    A last norm leaves hidden states of the length sqrt(H), so that logits are normal with the standard deviation
    s = w sqrt(H), w that of the head's weights. Then the softmax's denominator is V e^(s^2/2) and the mean loss
    ln V + s^2/2, of which a batch of few distinct targets may be off by s / sqrt(their number). A head that is tied to
    the embeddings gives the token that stands there, which is seldom the target, a logit of at most w H more.
    """
    head = model.get_output_embeddings().weight.detach()
    width, vocabulary = head.shape[-1], vocabulary_of(model)
    size = float(head.float().std())
    spread = size * math.sqrt(width)
    chance = ERRORS * spread / math.sqrt(max(1, distinct_tokens)) + SLACK
    tied = head.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    own = max(0.0, size * width - math.log(vocabulary)) + math.log(2) if tied else 0.0
    guess = math.log(vocabulary)
    return guess - chance, guess + spread**2 / 2 + own + chance
