"""GGUF's container: one file of named values and named tensors in number formats of ggml.

    content = read_content(Path("model.gguf"))
    content.metadata["general.architecture"], content.tensors["output_norm.weight"].load()

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from src.checkpoints.checkpoint import LazyTensor
from utils.errors import UserError

MAGIC = b"GGUF"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""ggml's number formats that torch has too."""
BLOCK = 32  # weights that share a scale in Q8_0
CHUNK = 2**22  # weights that are converted at once: 16 MiB in float32


def gguf_package() -> ModuleType:
    """The `gguf` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf, which is absent; pip install -r requirements/convert.txt"
        ) from error
    return gguf


@dataclass(frozen=True)
class Content:
    """What a GGUF file holds."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    """By their names in the file; formats that torch does not have are loaded as float32."""

    def value(self, key: str, *kinds: type) -> Any:
        """The value under a key, float32 as the shortest decimal that names it.

        Raises:
            UserError: it is absent or not one of `kinds`.
        """
        value = self.metadata.get(key)
        if not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.path}: {key} is {value!r}, must be {names}; give a whole GGUF model file")
        return float(str(np.float32(value))) if isinstance(value, float) else value


def read_content(path: Path) -> Content:
    """Read a file's values; its tensors stay in it until they are loaded.

    Raises:
        UserError: it is no whole GGUF file, is one of several parts, or has a tensor in a format that cannot be read.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        # Whatever breaks in the reader is a fault of the file: it indexes into bytes that may end anywhere.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole GGUF file ({error}); fetch or convert it again") from error
    if reader.byte_order != "I":
        raise UserError(f"{path} is in the byte order of other machines; convert it again on one like this")
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path} is one of {metadata['split.count']} parts; join them with llama.cpp's llama-gguf-split --merge"
        )
    tensors = {tensor.name: _lazy(path, tensor) for tensor in reader.tensors}
    return Content(path, metadata, tensors)


def _lazy(path: Path, tensor: Any) -> LazyTensor:
    """A tensor of `gguf.GGUFReader`, without a reference to the reader."""
    kind, offset, size = tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes)
    shape = tuple(int(length) for length in reversed(tensor.shape))
    name, plain = tensor.name, PLAIN.get(kind.name)
    if offset + size > path.stat().st_size:
        raise UserError(f"{path} is cut short within {name}; fetch it again")
    if plain is None:
        _check_readable(path, name, kind)

    def load() -> torch.Tensor:
        if path.stat().st_size < offset + size:
            raise UserError(f"{path} is cut short within {name}; fetch it again")
        if plain is not None:
            return torch.from_numpy(np.fromfile(path, np.uint8, size, offset=offset)).view(plain).reshape(shape)
        # Blocks stay in the file, so that memory holds the float32 weights alone.
        blocks = np.asarray(np.memmap(path, np.uint8, "r", offset, (size,)))
        return torch.from_numpy(dequantized(blocks, kind)).reshape(shape)

    return LazyTensor(shape, plain or torch.float32, load)


def _check_readable(path: Path, name: str, kind: Any) -> None:
    gguf = gguf_package()
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise UserError(f"{path}: {name} is in {kind.name}, which the package gguf cannot read ({error})") from error


def dequantized(content: np.ndarray, kind: Any) -> np.ndarray:
    """Bytes of whole blocks in a format of ggml -> their weights in float32, a part at a time."""
    gguf = gguf_package()
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = content.reshape(-1, size)
    out = np.empty((len(blocks), weights), np.float32)
    step = max(CHUNK // weights, 1)
    for start in range(0, len(blocks), step):
        out[start : start + step] = gguf.quants.dequantize(blocks[start : start + step], kind)
    return out.ravel()


def encoded(weight: torch.Tensor, kind: str) -> Iterator[np.ndarray]:
    """A tensor's bytes in `F32`, `F16`, `BF16` or `Q8_0`, a part at a time.

    Args:
        weight: of any floating dtype; a multiple of 32 weights a row for `Q8_0`.
    """
    gguf = gguf_package()
    for part in weight.contiguous().flatten().split(CHUNK):
        if kind in PLAIN:
            yield part.to(PLAIN[kind]).view(torch.uint8).numpy()
        else:
            blocks = part.float().numpy().reshape(-1, BLOCK)
            yield gguf.quants.quantize(blocks, gguf.GGMLQuantizationType[kind]).ravel()


def kept(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What a format keeps of a tensor: the values that a reader of `encoded` finds."""
    if kind in PLAIN:
        return weight.to(PLAIN[kind])
    stored = np.concatenate(list(encoded(weight, kind)))
    return torch.from_numpy(dequantized(stored, gguf_package().GGMLQuantizationType[kind])).reshape(weight.shape)


@dataclass(frozen=True)
class Stored:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """`F32`, `F16`, `BF16` or `Q8_0`."""
    load: Callable[[], torch.Tensor]

    @property
    def size_in_bytes(self) -> int:
        """Bytes that it takes in the file, without padding."""
        weights, size = gguf_package().GGML_QUANT_SIZES[gguf_package().GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // weights * size


def write_content(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    """Write a file, one tensor in memory at a time.

    Args:
        architecture: llama.cpp's name of the family.
        metadata: bools, integers, floats, texts, and lists of one of them, by key.
    Raises:
        UserError: a float16 cannot hold a weight, or the disk is full; the tensor is named.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_in_bytes, kind)
    name = "its metadata"
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "ab") as file:
            for tensor in tensors:
                name = tensor.name
                file.write(bytes(-file.tell() % writer.data_alignment))
                weight = tensor.load()
                _check_range(tensor, weight)
                for part in encoded(weight, tensor.kind):
                    file.write(part.data)
            file.write(bytes(-file.tell() % writer.data_alignment))
    except OSError as error:
        raise UserError(f"{path}: {name} could not be written ({error}); make room or name another folder") from error


def _check_range(tensor: Stored, weight: torch.Tensor) -> None:
    """A scale of Q8_0 is a float16 too, of a 127th of the largest weight."""
    most = {"F16": 1, "Q8_0": 127}.get(tensor.kind, math.inf) * torch.finfo(torch.float16).max
    largest = max(abs(float(end)) for end in weight.aminmax()) if weight.numel() else 0.0
    if not largest <= most:
        raise UserError(
            f"{tensor.name} has a weight of {largest:.3g}, and {tensor.kind} holds up to {most:.3g}; choose --dtype "
            "bfloat16 or float32, or mend the weights"
        )


def _add_value(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[list] = writer.add_array
    kinds[type(value)](key, value)
