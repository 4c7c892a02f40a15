"""Checks of what a training step computes: its loss and its gradients.

verdict = packing()      # or SelftestError

Shapes: P numbers that train, T supervised tokens, H the model's width.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import utils as transformers_utils

from config.schema import OptimConfig, TrainingConfig
from src.attention import DOCUMENTS
from src.chunked_loss import LogitTransform, Objective, chunked_loss, token_losses
from src.loss import SupervisedLoss
from src.packing import PackedRows
from src.selftest.subjects import (
    PACK_TOKENS,
    VOCABULARY,
    batch_of,
    gradient_of,
    reference,
    relative,
    scored,
    tiny_model,
    trainer_of,
    uneven_rows,
    weights_of,
)
from src.selftest.verdict import FLOAT32, SelftestError, Verdict, judge
from utils.distributed import accelerator_name
from utils.errors import in_one_line

HALF = 0.05
"""Relative difference of bfloat16 gradients from float32's: some ten roundings of 2^-8."""

OBJECTIVES = ({}, {"label_smoothing": 0.1, "z_loss": 1e-3})


def packing() -> Verdict:
    """Loss and gradients of packs are those of each document alone."""
    rows, worst = uneven_rows(12), 0.0
    packs = PackedRows(rows, max_length=PACK_TOKENS, packing=True)
    alone = PackedRows(rows, max_length=PACK_TOKENS, packing=False)
    if not packs.packs_rows():
        raise SelftestError("no two rows share a pack, so packing has no effect; restore src/packing.py")
    for attention in (DOCUMENTS, "sdpa", "eager"):
        model, score = tiny_model(attention), SupervisedLoss()
        together = scored(model, [batch_of(model, [packs[index] for index in range(len(packs))])], score)
        apart = scored(model, [batch_of(model, [alone[index]]) for index in range(len(alone))], score)
        worst = max(worst, *map(relative, together, apart))
    return judge(
        "packing",
        worst,
        bound=FLOAT32,
        detail=f"loss, gradients of {len(packs)} packs and of their {len(rows)} documents alone, 3 attentions",
        meaning="Packed documents see each other, so packed training is not that of the documents; set "
        "data.packing=false until transformers and torch are of versions that pass this check",
    )


def accumulation(folder: Path) -> Verdict:
    """A step of 1 x 4 rows moves the weights as one of 4 x 1, and as the gradient of the four written out."""
    rows, rate, worst = uneven_rows(4), 0.1, 0.0
    optim = OptimConfig(name="sgd", learning_rate=rate, schedule="constant", max_grad_norm=None)
    supervised = sum(label >= 0 for row in rows for label in row["labels"])
    for index, objective in enumerate(OBJECTIVES):
        start = tiny_model()
        expected = -rate * reference(start, rows, **objective)[1] / supervised
        for micro_batch_rows in (4, 1):
            model = copy.deepcopy(start)
            training = TrainingConfig(
                max_steps=1,
                micro_batch_rows=micro_batch_rows,
                accumulation_steps=4 // micro_batch_rows,
                save_every_steps=None,
                precision="float32",
            )
            score = SupervisedLoss(**objective)
            trainer_of(folder / f"{index}-{micro_batch_rows}", model, rows, optim, training, score=score).train()
            worst = max(worst, relative(weights_of(model) - weights_of(start), expected))
    return judge(
        "accumulation",
        worst,
        bound=1e-4,  # the change is 0.6% of the weights, and is read off them with their rounding
        detail="change by a step of 1x4 rows, of 4x1, and by definition, smoothed or not",
        meaning="Accumulation changes what a step learns; set training.accumulation_steps=1 until transformers and "
        "accelerate are of versions that pass this check",
    )


def loss() -> Verdict:
    """The objective and its gradient are their definitions', computed in float64."""
    rows, model, worst = uneven_rows(8), tiny_model(), 0.0
    packs = PackedRows(rows, max_length=PACK_TOKENS, packing=False)
    for objective in OBJECTIVES:
        found = scored(
            model, [batch_of(model, [packs[index] for index in range(len(packs))])], SupervisedLoss(**objective)
        )
        worst = max(worst, *map(relative, found, reference(model, rows, **objective)))
    return judge(
        "loss",
        worst,
        bound=FLOAT32,
        detail=f"loss, gradients of {len(rows)} rows and by definition in float64, smoothed or not",
        meaning="The loss is not that of the supervised tokens, so every figure of a run is wrong; install torch and "
        "transformers as requirements/base.txt has them, and look for changes in src/loss.py",
    )


def chunks() -> Verdict:
    """The loss in chunks, fused with the head, is that of logits stored whole."""
    rows, worst = uneven_rows(8), _chunks_of_few_rows()
    packs = PackedRows(rows, max_length=PACK_TOKENS, packing=True)
    for tied in (False, True):
        model = tiny_model(tied=tied)
        batch = batch_of(model, [packs[index] for index in range(len(packs))])
        for objective in OBJECTIVES:
            chunked, whole = (SupervisedLoss(plain_elements=limit, **objective) for limit in (0, 2**30))
            found, expected = scored(model, [batch], chunked), scored(model, [batch], whole)
            if not chunked.chunks:
                raise SelftestError(
                    "the loss in chunks was given up for a plain Llama, so training stores all logits at once; install "
                    "torch and transformers as requirements/base.txt has them"
                )
            worst = max(worst, *map(relative, found, expected))
    return judge(
        "chunks",
        worst,
        bound=FLOAT32,
        detail="loss, gradients in chunks and of whole logits, tied or not, smoothed or not",
        meaning="Batches of a large vocabulary train on another loss than small ones; install torch as "
        "requirements/base.txt has it, and look for changes in src/chunked_loss.py",
    )


def _chunks_of_few_rows() -> float:
    """The largest difference of a head's loss and gradients in several chunks: a tiny batch alone would be one."""
    generator, worst, capped = torch.Generator().manual_seed(0), 0.0, LogitTransform(scale=0.5, softcap=5.0)
    for objective in (Objective(), Objective(label_smoothing=0.1, z_loss=1e-3, transform=capped)):
        head = torch.nn.Linear(32, VOCABULARY, device=accelerator_name())
        hidden_TH = torch.randn(70, 32, generator=generator).to(head.weight).requires_grad_()
        targets_T = torch.randint(VOCABULARY, (70,), generator=generator).to(hidden_TH.device)
        found, _ = chunked_loss(head, hidden_TH, targets_T, objective, vocabulary=VOCABULARY, rows=16)
        expected = token_losses(head(hidden_TH), targets_T, objective)[0].sum()
        inputs = (hidden_TH, head.weight, head.bias)
        pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True)
        worst = max(worst, relative(found[None], expected[None]), *(relative(*pair) for pair in pairs))
    return worst


def attention() -> Verdict:
    """Each attention that this device has gives eager's gradients, which has a model and a config of its own."""
    eager, packs = tiny_model("eager"), PackedRows(uneven_rows(8), max_length=PACK_TOKENS, packing=True)
    whole = [packs[index] for index in range(len(packs))]
    expected = scored(eager, [batch_of(eager, whole)], SupervisedLoss())
    shares: dict[str, float] = {}
    for name, dtype in _attentions(eager):
        told = f"{name} {str(dtype).removeprefix('torch.')}"
        try:
            found = _by_attention(name, dtype, whole)
        except Exception as error:  # a kernel that is installed and cannot run fails in its own way
            raise SelftestError(
                f"{told} fails here: {type(error).__name__}: {in_one_line(error)}. Set model.attention to another"
            ) from error
        if eager.config._attn_implementation != "eager":
            raise SelftestError("a second model's attention changed the first's; install another transformers")
        # In units of the number format's bound, so that one figure tells the worst.
        bound = FLOAT32 if dtype == torch.float32 else HALF
        shares[told] = max(map(relative, found, expected)) / bound
    worst = max(shares, key=shares.__getitem__)
    return judge(
        "attention",
        shares[worst],
        bound=1.0,
        detail=f"{', '.join(shares)}, each beside eager, as a share of its bound",
        meaning=f"{worst} does not compute attention here; set model.attention to another",
    )


def _by_attention(
    name: str, dtype: torch.dtype, packs: Sequence[Mapping[str, np.ndarray]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of packs, (1,), and its gradient, (P,), both in float64 on the host."""
    model = tiny_model(name)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        total = SupervisedLoss()(model, batch_of(model, packs)).total
    total.backward()
    return total.detach().cpu().double()[None], gradient_of(model)


def _attentions(model: PreTrainedModel) -> list[tuple[str, torch.dtype]]:
    """What this device can compute, with the number formats that it is used in."""
    on_gpu = model.device.type == "cuda"
    names = [(DOCUMENTS, torch.float32), ("sdpa", torch.float32)]
    if on_gpu and torch.cuda.is_bf16_supported():
        names += [(DOCUMENTS, torch.bfloat16), ("sdpa", torch.bfloat16)]
        installed = {
            f"flash_attention_{version}": getattr(transformers_utils, f"is_flash_attn_{version}_available", bool)()
            for version in (2, 3, 4)
        }
        names += [(name, torch.bfloat16) for name, stands in installed.items() if stands]
    if on_gpu and model._supports_flex_attn:  # on a CPU it needs a compiler, and is chosen on GPUs only
        names.append(("flex_attention", torch.float32))
    return names
