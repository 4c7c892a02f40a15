"""What a run writes, in bytes, and whether the disk takes it.

    sizes = Sizes.of(trainer, config.optim, training=config.training, steps=1096, run=Path("outputs/smol"))
    sizes.checkpoint, sizes.needed, sizes.free

The weights and the optimizer's state are all but the whole of a checkpoint; their bytes follow from the tensors. What
stands around them is known from files that were written.
"""

import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from config.schema import OptimConfig, TrainingConfig
from src.adapter_export import embeddings_to_save
from src.freezing import kinds_of_weights, state_bytes
from src.quantization import held_bytes
from src.start_checks import StartFinding
from src.trainer import SFTTrainer
from utils.checkpoint_record import size_of
from utils.checkpointing import checkpoints

SMALL_FILES = 27_000
"""Bytes of what does not grow: the random states of one process 14,500, the arguments 5,300, the scheduler 1,500, the
optimizer's frame 1,300, the settings of the model, the record of the files."""

ADAPTER_FILES = 6_500
"""Bytes of the settings and the README that PEFT writes beside an adapter."""

RANDOM_STATE = 14_500
"""Bytes of the random states of each further process."""

LOGGED_LINE = 320
"""Bytes of a logged line in trainer_state.json."""

TENSOR_IN_SAFETENSORS, TENSOR_IN_PT = 75, 215
"""Bytes around a tensor, beside its name in the first."""


@dataclass(frozen=True)
class Sizes:
    """Bytes on the disk."""

    checkpoint: int
    """Of one of them."""
    complete: bool
    """Whether the optimizer's state is known and counted."""
    checkpoints: int
    """Number that the run writes in all, from its first step to its last."""
    kept: int
    """Number that stays."""
    result: int
    needed: int
    """Most that the run takes beside what is there already."""
    free: int

    @classmethod
    def of(
        cls,
        trainer: SFTTrainer,
        optim: OptimConfig,
        training: TrainingConfig,
        *,
        steps: int,
        first_step: int,
        evaluations: int,
        run: Path,
    ) -> "Sizes":
        """What a run will write; the model must be whole in this process.

        Args:
            steps: of the whole run, of which `first_step` are taken.
            evaluations: that are logged.
            run: its directory, which need not exist.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer = _tokenizer_bytes(trainer.processing_class)
        weights = weights_bytes(model)
        state = optimizer_bytes(model, optim)
        every = training.save_every_steps
        lines = 1 + steps // training.log_every_steps + evaluations
        small = SMALL_FILES + RANDOM_STATE * (trainer.args.world_size - 1) + LOGGED_LINE * lines
        checkpoint = weights + (state or 0) + tokenizer + small if every else 0
        saves = -(-steps // every) if every else 0
        kept = min(saves, training.keep_checkpoints)
        left = -(-steps // every) - first_step // every if every else 0
        embeddings = embeddings_to_save(model) if isinstance(model, PeftModel) else "auto"
        result = weights_bytes(model, embeddings) + tokenizer
        there = size_of(checkpoints(run)) if run.is_dir() else 0
        most = max(min(kept + 1, saves) * checkpoint, kept * checkpoint + result)  # a new one stands before an old goes
        return cls(
            checkpoint=checkpoint,
            complete=state is not None or not every,
            checkpoints=saves,
            kept=kept,
            result=result,
            needed=max(0, most - there) if left or result else 0,
            free=shutil.disk_usage(_existing(run)).free,
        )

    def findings(self, run: Path) -> list[StartFinding]:
        """Whether the disk is too small."""
        if self.needed <= self.free:
            return []
        return [
            StartFinding(
                "disk_space",
                stops=True,
                found=f"the run writes up to {mib(self.needed)} beside {run} ({self.kept} checkpoints of "
                f"{mib(self.checkpoint)} that are kept, one more while it is written, and a result of "
                f"{mib(self.result)}), and {mib(self.free)} are free",
                why="it would end at the first checkpoint that does not fit",
                change="free some space, lower training.keep_checkpoints, set training.save_every_steps=None to keep "
                "the result alone, or give another output.folder",
            )
        ]


def mib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


def weights_bytes(model: torch.nn.Module, embeddings: str | bool = "auto") -> int:
    """Bytes of the weights' files: those of the model, or of its adapter alone with what stands beside it.

    Args:
        embeddings: whether an adapter's file has the embeddings whole; PEFT decides, if "auto", as for checkpoints.
    """
    with warnings.catch_warnings():  # of embeddings that grew, which checkpoints have whole
        warnings.simplefilter("ignore")
        tensors = (
            get_peft_model_state_dict(model, save_embedding_layers=embeddings)
            if isinstance(model, PeftModel)
            else model.state_dict()
        )
    once = {(tensor.data_ptr(), tensor.shape) if tensor.numel() else name: name for name, tensor in tensors.items()}
    beside = ADAPTER_FILES if isinstance(model, PeftModel) else 0
    return beside + sum(held_bytes(tensors[name]) + len(name) + TENSOR_IN_SAFETENSORS for name in once.values())


def optimizer_bytes(model: torch.nn.Module, optim: OptimConfig) -> int | None:
    """Bytes of the file of the optimizer's state; None for an optimizer of which that is not known."""
    kinds, total = kinds_of_weights(model), 0.0
    for name, weight in _trained(model):
        state = state_bytes(weight, optim.name, kind=kinds[name])
        if state is None:
            return None
        # beside each of the moments stands the number of steps, a tensor of its own
        moments = round(state / max(1, weight.numel() * weight.element_size()))
        total += state + TENSOR_IN_PT * (moments + 1) if state else 0
    return int(total)


def _trained(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return size_of([Path(folder)])


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
