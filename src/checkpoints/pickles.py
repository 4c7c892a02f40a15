"""Files that `torch.save` wrote, read as tensors alone.

pickled_tensors(Path("consolidated.00.pth"))["norm.weight"]
"""

from pathlib import Path
from pickle import UnpicklingError

import torch

from utils.errors import UserError


def pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; they stay in it until they are used, and no code of it is run.

    Raises:
        UserError: the file is damaged, of torch before 1.6, or holds something else than tensors by name.
    """
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        raise UserError(
            f"{file} is no whole file of tensors alone ({' '.join(str(error).split())[:300]}); give safetensors, or "
            "a file that torch 1.6 or later saved"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not tensors by name; give a file of weights")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{file}: {name} is a {type(value).__name__}, no tensor; give a file of weights alone")
    return content
