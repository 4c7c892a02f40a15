"""Decoder layers compiled by `torch.compile`: one compilation that all of them share, whatever a pack's length.

    check_compilation(config.training, args.device.type)
    ...
    trainer.add_callback(CompiledLayers(config.training.compile, trainer.score, trainer.data_collator))

Only the layers are compiled, each in its place: names of weights, hooks on the head and the adapters stay as they are.
The layers of a model are the same code, so the first of them is compiled and the others find it. accelerate's
`compile_regions` also compiles what stands beside the layers, such as the head, to which the loss gives other hooks at
each call.

Before the first step the compiled layers are proved: small packs of other lengths and numbers of documents must give
the loss and the gradient that the layers give without compiling, and the later ones must not be compiled again.

Source: docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from config.schema import TrainingConfig
from src.attention_choice import rounding
from src.loss import SupervisedLoss
from src.packing import IGNORED, PackCollator
from utils.distributed import shards_weights
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

PAYING_MICRO_BATCHES = 1000
"""Micro-batches of a process from which `auto` compiles on a CUDA GPU: an hour's run at some seconds each, beside which
a minute of compiling is little."""

PROVED_PACKS = ((8, 5), (41,), (26, 4, 7), (17, 3, 11, 9, 7))
"""Tokens in the documents of the packs that compiled layers are proved with."""

WARM_UP_PACKS = 2
"""The first of them, at which layers may be compiled. On a CPU attention gives a pack of one document in another layout
than one of several, and each is compiled."""


def check_compilation(training: TrainingConfig, device: str) -> None:
    """Make sure, before anything is loaded, that layers can be compiled where `training.compile=on` asks for it.

    Args:
        device: type of the device that trains.
    Raises:
        UserError: a compiler is missing, the weights will be sharded, or nothing of the layers would be compiled.
    """
    if training.compile != "on":
        return
    if device == "cpu" and training.gradient_checkpointing != "none":
        raise UserError(
            f"training.compile=on has no effect on a CPU with training.gradient_checkpointing="
            f"{training.gradient_checkpointing}, where attention is not compiled and layers that are computed again "
            "are compiled whole or not at all; turn off one of them"
        )
    if training.gradient_checkpointing == "selective":
        raise UserError(
            "training.compile=on does not go with training.gradient_checkpointing=selective, which chooses what is "
            "kept as operations run one by one; use full or none, or training.compile=off"
        )
    obstacle = _obstacle(device)
    if obstacle:
        raise UserError(f"training.compile=on cannot be had: {obstacle}, or set training.compile=off")


def _obstacle(device: str) -> str | None:
    """Why layers cannot be compiled here, and what to change; None if nothing is known to be in the way."""
    if shards_weights():
        return "layers whose weights are sharded over processes are not compiled; launch without FSDP and DeepSpeed"
    # What torch's inductor calls: a C++ compiler for a CPU, Triton and a C compiler for a GPU.
    default = "clang++" if sys.platform == "darwin" else "cl" if sys.platform == "win32" else "g++"
    compiler = os.environ.get("CXX", default)
    if device == "cpu" and shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}; install it (`apt-get install g++` on Debian), or name one in CXX"
    if device != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        return "Triton finds no C compiler; install one (`apt-get install gcc` on Debian), or name one in CC"
    return None


def compiles(requested: str, device: str, *, micro_batches: int) -> bool:
    """Whether a run compiles its layers.

    Args:
        requested: `training.compile`.
        micro_batches: those that each process takes in the whole run.
    """
    if requested != "auto":
        return requested == "on"
    if device != "cuda" or micro_batches < PAYING_MICRO_BATCHES:
        return False
    obstacle = _obstacle(device)
    if obstacle:
        log.info("layers are not compiled: %s", obstacle)
    return not obstacle


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformers model, in their order, within whatever is wrapped around it."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: torch.nn.Module, *, backend: str = "inductor") -> int:
    """Have every decoder layer compiled when it is next called.

    Args:
        backend: one that `torch.compile` knows.
    Returns:
        Number of layers.
    Raises:
        UserError: the model's code has no layers as transformers makes them.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"training.compile finds no layers in {type(model).__name__}, whose code is not made as transformers' own; "
            "set training.compile=off"
        )
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)  # sizes are unknowns from the start, not after a second length
    return len(layers)


class CompiledLayers(TrainerCallback):
    """Compiles and proves the layers when training begins, if the run asks for it or is long enough for `auto`."""

    def __init__(self, requested: str, score: SupervisedLoss, collator: PackCollator) -> None:
        """
        Args:
            requested: `training.compile`.
            score, collator: the trainer's own, so that the layers are proved as they are called.
        """
        self.requested = requested
        self.score = score
        self.collator = collator

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """
        Raises:
            UserError: `on` is asked for, and the layers cannot be compiled or compute something else.
        """
        micro_batches = state.max_steps * args.gradient_accumulation_steps
        if not compiles(self.requested, args.device.type, micro_batches=micro_batches):
            return
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        began = time.perf_counter()
        try:
            layers = compile_layers(model)
            with torch.autocast(args.device.type, dtype=autocast, enabled=autocast is not None):
                prove_compiled(model, self.score, self.collator, rows=args.per_device_train_batch_size)
        except UserError as error:
            if self.requested == "on":
                raise
            torch.compiler.set_stance("force_eager")
            log.warning("layers are not compiled, so steps take longer: %s", error)
            return
        log.info("%d layers share a compilation, which took %.0f s", layers, time.perf_counter() - began)


def prove_compiled(model: PreTrainedModel, score: SupervisedLoss, collator: PackCollator, *, rows: int = 1) -> None:
    """Compare what compiled layers give for small packs with what they give without compiling.

    Args:
        model: on the device that trains it; its mode, its gradients and the random state stay as they are.
        rows: packs in a micro-batch.
    Raises:
        UserError: a loss or a gradient differs by more than rounding explains, the layers cannot be compiled, or they
            are compiled for each pack anew.
    """
    batches = list(_batches(model, collator, rows))
    allowed, training = rounding(model), model.training
    model.train()
    with torch.random.fork_rng():
        with torch.compiler.set_stance("force_eager"):
            once, again = (_loss_and_gradient(model, score, batches[0]) for _ in range(2))
            if not torch.equal(once, again):
                model.eval()  # dropout: what is compiled draws other numbers
            expected = [_loss_and_gradient(model, score, batch) for batch in batches]
        try:
            found = [_loss_and_gradient(model, score, batch) for batch in batches[:WARM_UP_PACKS]]
            with torch.compiler.set_stance("fail_on_recompile"):
                found += [_loss_and_gradient(model, score, batch) for batch in batches[WARM_UP_PACKS:]]
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:500]
            raise UserError(
                f"the layers of {type(model).__name__} could not be compiled once for all packs ({reason}); set "
                "training.compile=off"
            ) from error
    model.train(training)
    worst = max(
        ((one - other).norm() / other.norm()).item()
        for pair in zip(found, expected, strict=True)
        for one, other in zip(*(values.tensor_split([1]) for values in pair), strict=True)
    )
    if not worst <= allowed:
        raise UserError(
            f"compiled layers of {type(model).__name__} compute something else: the loss or the gradient differs by "
            f"{worst:.2g} of its norm (allowed {allowed:.2g}); set training.compile=off"
        )


def _batches(model: PreTrainedModel, collator: PackCollator, rows: int) -> Iterator[dict[str, torch.Tensor | int]]:
    """A micro-batch of random tokens for each of `PROVED_PACKS`."""
    random = np.random.default_rng(0)
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    for lengths in PROVED_PACKS:
        ids = random.integers(vocabulary, size=sum(lengths))
        labels = ids.copy()
        labels[0] = IGNORED
        pack = {"input_ids": ids, "labels": labels, "lengths": np.array(lengths)}
        yield send_to_device(collator([pack] * min(rows, 2)), device)


def _loss_and_gradient(
    model: PreTrainedModel, score: SupervisedLoss, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The loss of a batch, and after it the gradient of its embeddings, (1 + B * L * H,) in float32 or wider."""
    embedded = []

    def cut(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            total = score(model, batch).total
            [gradient] = torch.autograd.grad(total, embedded[-1:])
    finally:
        hook.remove()
    return torch.cat([total.detach()[None], gradient.flatten()]).to(torch.promote_types(total.dtype, torch.float32))
