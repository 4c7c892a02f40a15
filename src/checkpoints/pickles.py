"""Pickles that others wrote, read as plain values and tensors; no code in them is run.

content = read_saved(Path("out/ckpt.pt"))       # what torch.save wrote; its tensors stay in the file
meta = read_plain(Path("data/meta.pkl"))        # dicts, lists, texts, numbers
"""

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.errors import UserError, in_one_line

LARGEST = 1e30
"""Of the numbers among settings, such as a dropout or an epsilon."""


def read_saved(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote; tensors are mapped, so memory holds what is touched of them.

    Raises:
        UserError: the file is missing, cut short, older than torch 1.6, holds something else than a dictionary, or
            names an object that is neither a plain value nor a tensor.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; name a checkpoint that torch.save wrote, such as ckpt.pt")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        named = found[1] if found else " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} holds {named}, which is neither a plain value nor a tensor and is not loaded, as it could run "
            "code; save the checkpoint again without it"
        ) from error
    except Exception as error:  # a damaged pickle fails in whatever its bytes happen to ask for
        raise UserError(
            f"{path} is no whole file that torch 1.6 or later saved ({' '.join(str(error).split())[:200]}); fetch or "
            "save it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not tensors or settings by name; give a whole checkpoint"
        )
    return content


def pickled_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights by name; they stay in it until they are used.

    Raises:
        UserError: the file is not what `read_saved` reads, or holds something else than tensors by name.
    """
    content = read_saved(path)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, no tensor; give a file of weights alone")
        _check_plain(path, name, value)
    return content


def _check_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises: UserError if a tensor is none of plain numbers in memory, such as a sparse, quantized or meta one."""
    kinds = (("layout", tensor.layout, torch.strided), ("device", tensor.device, torch.device("cpu")))
    for what, found, wanted in (*kinds, ("is_quantized", tensor.is_quantized, False)):
        if found != wanted:
            raise UserError(f"{path}: the tensor {name} has {what}={found}, must be {wanted}; save it again as that")


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain values alone: every class and function that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_plain(path: Path) -> Any:
    """The plain value that a pickle holds.

    Raises:
        UserError: the file is missing or cut short, or names a class or a function.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name the file that the data was prepared with") from error
    except Exception as error:  # a damaged pickle fails in whatever its bytes happen to ask for
        raise UserError(
            f"{path} is no pickle of plain values ({in_one_line(error)}); prepare the data again"
        ) from error


def read_training(path: Path, buffers: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights under `model`, without the prefix of compiled models, and the settings under `model_args`.

    Args:
        buffers: endings of names to leave out, such as those of masks.
    Raises:
        UserError: the file is not what `read_saved` reads, or either part is missing or of another kind.
    """
    content = read_saved(path)
    weights, settings = content.get("model"), content.get("model_args")
    if not isinstance(weights, dict) or not isinstance(settings, dict):
        raise UserError(
            f"{path} has no model and model_args dictionaries, but {sorted(map(str, content))}; give the ckpt.pt of "
            "a training run"
        )
    tensors = {
        str(name).removeprefix("_orig_mod."): value
        for name, value in weights.items()
        if not str(name).endswith(buffers)
    }
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{path}: model[{name!r}] is {kind}, not a tensor of floats; save it again")
        _check_plain(path, name, value)
    return tensors, settings


def has_settings(path: Path, names: set[str]) -> bool:
    """Whether `path` is a training checkpoint whose `model_args` have all of `names`."""
    try:
        return names <= read_training(path, ())[1].keys()
    except UserError:
        return False


def whole_number(path: Path, settings: dict[str, Any], name: str) -> int:
    """A positive integer among `model_args`.

    Raises:
        UserError: it is missing or something else.
    """
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: model_args[{name!r}]={value!r} is no positive integer; mend the checkpoint")
    return value


def finite_number(path: Path, settings: dict[str, Any], name: str, default: float) -> float:
    """A number among `model_args`, or the default where there is none.

    Raises:
        UserError: it is something else, or not finite.
    """
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise UserError(f"{path}: model_args[{name!r}]={str(value)[:40]!r} is no finite number; mend the checkpoint")
    return float(value)


def check_shapes(path: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises: UserError, naming tensors that are missing, unknown, or of another shape than `shapes` asks for."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise UserError(
            f"{path} lacks {len(missing)} tensors {missing[:4]} and has {len(unknown)} {unknown[:4]} that its "
            "model_args do not allow; mend model_args, or give a complete checkpoint"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, its model_args ask for {shape}; mend one"
            )
