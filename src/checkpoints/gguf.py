"""GGUF: the one file that llama.cpp runs, with weights in float32, float16, bfloat16 or 8-bit blocks (Q8_0).

    write(checkpoint, Path("outputs/model"), WriteOptions(dtype="q8_0"))   # outputs/model/model.gguf
    read(Path("outputs/model/model.gguf"), ReadOptions())

Families and their fields stand in `gguf_families`, tokenizers in `gguf_tokenizer` and `gguf_vocabulary`, the container
in `gguf_files`. What was read is evaluated by `interleaved`, which shares no code with transformers.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.checkpoints.checkpoint import Checkpoint, LazyTensor, ReadOptions, Rounding, WriteOptions
from src.checkpoints.gguf_families import (
    FREQUENCY_FACTORS,
    family_of,
    frequency_factors,
    from_file,
    meta_name,
    metadata,
    read_architecture,
    tensor_names,
    to_file,
)
from src.checkpoints.gguf_files import BLOCK, MAGIC, PLAIN, Stored, kept, read_content, write_content
from src.checkpoints.gguf_tokenizer import to_metadata
from src.checkpoints.gguf_vocabulary import from_metadata
from src.checkpoints.interleaved import hugging_face_name, interleaved_logits
from utils.errors import UserError, some
from utils.logging import get_logger

log = get_logger(__name__)

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
"""ggml's number formats by the names of `--dtype`."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type: the format of most weights
_FILE = "model.gguf"


def recognises(path: Path) -> bool:
    """Whether `path` is a file that begins with GGUF's mark."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a file; weights in blocks become float32 when they are loaded.

    Raises:
        UserError: the file is damaged, or its family, tokenizer, rotary scaling or number format is not served.
    """
    if not recognises(path):
        raise UserError(f"{path} is no file that begins with GGUF; name a .gguf file")
    content = read_content(path)
    family, sizes, architecture = read_architecture(content)
    tensors, in_pairs = from_file(family, sizes, content)
    tokenizer, generation, encode = from_metadata(content, sizes.vocab_size)
    checkpoint = Checkpoint(
        inputs=(path,),
        architecture=architecture,
        tensors=tensors,
        tokenizer=tokenizer,
        generation=generation,
        logits=functools.partial(interleaved_logits, sizes, in_pairs),
        encode=encode,
    )
    checkpoint.check_tensors()
    return checkpoint


def write(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Rounding | None:
    """Write `model.gguf` into `folder`, one tensor in memory at a time.

    Vectors stay float32, as llama.cpp adds and multiplies in it. In Q8_0, a matrix whose rows are no multiple of 32
    weights stays float16.

    Returns:
        How weights were rounded; None where `options.dtype` is and each keeps its own.
    Raises:
        UserError: the family, a field, the tokenizer or a tensor is beyond the format; it is named.
    """
    family, sizes = family_of(checkpoint.architecture)
    names = {name: hugging_face_name(meta_name(name)) for name in tensor_names(family, sizes)}
    missing, unknown = set(names.values()) - checkpoint.tensors.keys(), checkpoint.tensors.keys() - set(names.values())
    if missing or unknown:
        raise UserError(
            f"{checkpoint.inputs[0]} lacks the tensors {some(missing)} and has {some(unknown)}, which gguf does "
            f"not hold for a {family.name}; give a complete checkpoint"
        )
    kinds = _kinds(checkpoint.tensors, options.dtype)
    tensors = [
        Stored(
            name,
            checkpoint.tensors[own].shape,
            kinds[own],
            functools.partial(to_file, family, sizes, name, checkpoint.tensors),
        )
        for name, own in names.items()
    ]
    if (factors := frequency_factors(sizes)) is not None:
        tensors.insert(0, Stored(FREQUENCY_FACTORS, tuple(factors.shape), "F32", lambda: factors))
    matrices = [kinds[own] for own, tensor in checkpoint.tensors.items() if len(tensor.shape) > 1]
    values: dict[str, Any] = {
        "general.file_type": _FILE_TYPES[max(matrices, key=matrices.count)],
        **({"general.quantization_version": 2} if "Q8_0" in matrices else {}),
        **metadata(family, sizes),
        **to_metadata(checkpoint, sizes.vocab_size),
    }
    if checkpoint.generation.sampling:
        log.warning("gguf holds no sampling settings; give %s to llama.cpp", dict(checkpoint.generation.sampling))
    write_content(folder / _FILE, family.name, values, tensors)
    return None if options.dtype is None else lambda name, weight: kept(weight, kinds[name])


def _kinds(tensors: Mapping[str, LazyTensor], dtype: str | None) -> dict[str, str]:
    """ggml's number format of each tensor.

    Raises:
        UserError: a tensor is of a dtype that GGUF does not have.
    """
    own = {dtype: name for name, dtype in PLAIN.items()}
    kinds: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in own:
            raise UserError(f"{name} is {tensor.dtype}, which gguf cannot hold here; convert it to float32 first")
        kinds[name] = DTYPES[dtype] if dtype else own[tensor.dtype]
        if len(tensor.shape) == 1:
            kinds[name] = "F32"
        elif kinds[name] == "Q8_0" and tensor.shape[-1] % BLOCK:
            kinds[name] = "F16"
    if dtype == "q8_0" and (left := [name for name, kind in kinds.items() if kind == "F16"]):
        log.warning("%s stay float16: their rows are no multiple of %d weights", ", ".join(left), BLOCK)
    return kinds


def read_back(folder: Path) -> Checkpoint:
    """Read what `write` wrote, evaluated without transformers."""
    return read(folder / _FILE, ReadOptions())
