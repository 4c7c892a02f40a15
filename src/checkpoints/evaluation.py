"""transformers' own evaluation of a Hugging Face folder in float32: whole where that is small, else layer by layer.

    logits = evaluation(Path("outputs/model"), tensors)
    logits([[1, 403, 407]])[0].argmax(dim=-1)

A small model is loaded with `from_pretrained`, as its users load it. A large one is built without weights, and each
module takes its own from `tensors` for the length of its call, so that memory holds one of them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import cpu_offload, init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src.checkpoints.checkpoint import LazyTensor, Logits, Rounding
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

WHOLE_BYTES = 3 * 2**29
"""Float32 weights up to which a model is loaded whole."""


def evaluation(folder: Path, tensors: Mapping[str, LazyTensor]) -> Logits:
    """The evaluation of a folder; its weights are read at the first call, and kept if the model is small.

    Args:
        tensors: those of the folder, by the names that they have there.
    """
    size = 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())
    whole = functools.cache(lambda: _whole(folder))

    @torch.no_grad()
    def logits(rows: Sequence[Sequence[int]], rounding: Rounding | None = None) -> list[torch.Tensor]:
        if size > WHOLE_BYTES and (model := _outline(folder, tensors)) is not None:
            cpu_offload(model, torch.device("cpu"), state_dict=_Weights(model, tensors, rounding))
        elif rounding is None:
            model = whole()
        else:
            model = _whole(folder)
            for name, weight in model.named_parameters():
                weight.copy_(rounding(name, weight))
        return evaluate_rows(model, rows)

    return logits


def evaluate_rows(
    model: torch.nn.Module, rows: Sequence[Sequence[int]], device: torch.device | None = None
) -> list[torch.Tensor]:
    """A causal language model's logits for rows of token ids, (tokens, vocabulary) each, on the CPU.

    Rows are evaluated together; what stands behind the end of a shorter one is never seen by it.
    """
    longest = max(map(len, rows))
    together = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
    logits = model(together, use_cache=False).logits.cpu()
    return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]


def _whole(folder: Path) -> PreTrainedModel:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    faults = {name: keys for name, keys in report.items() if keys and name != "unexpected_keys"}
    if faults:
        raise UserError(f"transformers does not load {folder} as it is ({faults}); fetch or convert it again")
    return loaded.eval()


def _outline(folder: Path, tensors: Mapping[str, LazyTensor]) -> PreTrainedModel | None:
    """The model without weights; None where its parameters have other names than the folder's tensors."""
    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.tie_weights()
    if {name for name, _ in model.named_parameters()} - tensors.keys():
        log.warning("%s is loaded whole to be evaluated, as its tensors' names are not those of its modules", folder)
        return None
    return model.eval()


class _Weights(Mapping[str, torch.Tensor]):
    """The weights of a model in float32, by each name that it has for them, read anew each time."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, LazyTensor], rounding: Rounding | None) -> None:
        first = {id(weight): name for name, weight in model.named_parameters()}
        self._names = {name: first[id(weight)] for name, weight in model.named_parameters(remove_duplicate=False)}
        self._tensors, self._rounding = tensors, rounding

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._tensors[self._names[name]].load()
        return (self._rounding(self._names[name], weight) if self._rounding else weight).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
