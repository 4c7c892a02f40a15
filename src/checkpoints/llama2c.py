"""llama2.c's checkpoints: one file of weights and one of tokenizer pieces.

Three versions are read and written: 0 (float32 after a header of 7 integers, what run.c runs), 1 (float32 after a
header of 256 bytes) and 2 (8-bit integers in groups, what runq.c runs; its norms are float32). The format fixes what
its header leaves out: rotary base 10000, RMSNorm epsilon 1e-5, SiLU, no biases.

    checkpoint = read(Path("stories260K.bin"), Path("tok512.bin"))

Source: https://github.com/karpathy/llama2.c/blob/350e04fe35433e6d2941dce5a1f53308f87058eb/export.py
"""

import functools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from src.checkpoints.architecture import LlamaArchitecture, as_llama
from src.checkpoints.checkpoint import Checkpoint, Generation, LazyTensor, ReadOptions, Rounding, WriteOptions
from src.checkpoints.interleaved import from_hugging_face, interleaved_logits, to_hugging_face
from src.checkpoints.llama2c_tokenizer import read_pieces, write_pieces
from src.checkpoints.pieces import ScoredPieces
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = {0: 28, 1: 256, 2: 256}
ROPE_THETA = 10000.0
NORM_EPS = 1e-5
_COUNTS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_NORMS = ("attention_norm", "ffn_norm")
_LINEAR = (*(f"attention.w{letter}" for letter in "qkvo"), *(f"feed_forward.w{number}" for number in "123"))
_BLOCK = 2**24  # weights that are written at a time
_TABLES = ("freqs_cos", "freqs_sin")  # of version 0 only; run.c skips them


@dataclass(frozen=True)
class _Header:
    version: int
    architecture: LlamaArchitecture
    group: int | None
    """Weights that share a scale in version 2."""


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    group: int | None

    @property
    def bytes(self) -> int:
        count = math.prod(self.shape)
        return 4 * count if self.group is None else count + 4 * (count // self.group)


def recognises(path: Path) -> bool:
    """Whether `path` is a file whose first bytes are a llama2.c header."""
    try:
        _read_header(path)
    except UserError:
        return False
    return True


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a llama2.c checkpoint of version 0, 1 or 2 with its tokenizer; 8-bit weights become float32.

    A text ends at `</s>` and also at `<s>`: models that saw stories one after another write `<s>` between two of them,
    and run.c stops there. `<unk>` pads: byte pieces spell every character, so no text ever holds it.

    Raises:
        UserError: the file is not llama2.c's or its size is not what its header asks for, version 0's rotary tables
            are of another base than 10000, or the tokenizer is missing, damaged or of another size.
    """
    header = _read_header(path)
    _check_layers(path, header)
    stored = _stored_tensors(header)
    end = max(place.offset + place.bytes for place in stored.values())
    if path.stat().st_size != end:
        raise UserError(
            f"{path} holds {path.stat().st_size} bytes, but its header (llama2.c version {header.version}) asks for "
            f"{end}; fetch or export the file again"
        )
    _check_tables(path, stored)
    tokenizer, pieces = tokenizer_of(path, options, header.architecture.vocab_size)
    tensors = {
        name: LazyTensor(place.shape, torch.float32, _loader(path, place))
        for name, place in stored.items()
        if name not in _TABLES
    }
    return checkpoint_of((path, tokenizer), header.architecture, tensors, pieces)


def tokenizer_of(path: Path, options: ReadOptions, vocab_size: int) -> tuple[Path, ScoredPieces]:
    """The tokenizer's file and what it holds.

    Raises:
        UserError: none was named, or it is damaged or of another size.
    """
    if options.tokenizer is None:
        raise UserError(f"{path} has no tokenizer in it; name llama2.c's tokenizer file with --tokenizer FILE.bin")
    return options.tokenizer, read_pieces(options.tokenizer, vocab_size)


def checkpoint_of(
    inputs: tuple[Path, ...], architecture: LlamaArchitecture, tensors: dict[str, LazyTensor], pieces: ScoredPieces
) -> Checkpoint:
    """A checkpoint that llama2.c's own files describe.

    Args:
        tensors: by Meta's names, with rotary pairs side by side.
    Raises:
        UserError: the tensors are not those of the architecture.
    """
    checkpoint = Checkpoint(
        inputs=inputs,
        architecture=architecture,
        tensors=to_hugging_face(architecture, tensors),
        tokenizer=pieces,
        generation=Generation(pieces.bos_id, (pieces.eos_id, pieces.bos_id), pieces.unk_id),
        logits=functools.partial(interleaved_logits, architecture, tensors),
        encode=pieces.encode,
    )
    checkpoint.check_tensors()
    return checkpoint


def _read_header(path: Path) -> _Header:
    """Raises: UserError if no llama2.c header of a known version stands at the file's start."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; name a llama2.c checkpoint such as model.bin")
    with open(path, "rb") as file:
        start = file.read(64).ljust(64, b"\0")
    magic, version = struct.unpack_from("<Ii", start)
    if magic == MAGIC:
        if version not in (1, 2):
            raise UserError(f"{path} is llama2.c version {version}; versions 0, 1 and 2 are read: export it as one")
        counts = dict(zip(_COUNTS, struct.unpack_from("<7i", start, 8), strict=True))
        tied = start[36] != 0
        group = struct.unpack_from("<i", start, 37)[0] if version == 2 else None
    else:
        version, group = 0, None
        counts = dict(zip(_COUNTS, struct.unpack_from("<7i", start), strict=True))
        tied = counts["vocab_size"] > 0  # version 0 marks a head of its own by a negative vocabulary size
        counts["vocab_size"] = abs(counts["vocab_size"])
    _check_counts(path, counts, group)
    architecture = LlamaArchitecture(
        vocab_size=counts["vocab_size"],
        hidden_size=counts["dim"],
        intermediate_size=counts["hidden_dim"],
        num_hidden_layers=counts["n_layers"],
        num_attention_heads=counts["n_heads"],
        num_key_value_heads=counts["n_kv_heads"],
        head_dim=counts["dim"] // counts["n_heads"],
        max_position_embeddings=counts["max_seq_len"],
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    return _Header(version, architecture, group)


def _check_counts(path: Path, counts: dict[str, int], group: int | None) -> None:
    heads, dim = counts["n_heads"], counts["dim"]
    sound = all(0 < count < 2**24 for count in counts.values())
    sound = sound and dim % (2 * heads) == 0 and heads % counts["n_kv_heads"] == 0
    if not sound:
        raise UserError(
            f"{path} is no llama2.c checkpoint: it has neither the magic number {MAGIC:#x} nor a version 0 header that "
            f"makes sense (read as {counts}); give a .bin file written by llama2.c's export.py"
        )
    if group is not None and (group < 1 or dim % group):
        raise UserError(f"{path} has a group size of {group}, which does not divide dim={dim}; export it again")


def _check_layers(path: Path, header: _Header) -> None:
    """Raises: UserError if the file is too short for the norms of as many layers as its header claims: 16 million of
    them would otherwise each be given names and places first."""
    sizes, held = header.architecture, path.stat().st_size
    if sizes.num_hidden_layers * 8 * sizes.hidden_size > held:
        raise UserError(
            f"{path} holds {held} bytes, too few for the {sizes.num_hidden_layers} layers of its header (llama2.c "
            f"version {header.version}); fetch or export the file again"
        )


def _layout(header: _Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, as Meta has them, and shapes in the order of the file."""
    sizes = header.architecture
    dim, wide, keys = sizes.hidden_size, sizes.intermediate_size, sizes.num_key_value_heads * sizes.head_dim
    linear_shapes = ((dim, dim), (keys, dim), (keys, dim), (dim, dim), (wide, dim), (dim, wide), (wide, dim))
    shapes = dict.fromkeys(_NORMS, (dim,)) | dict(zip(_LINEAR, linear_shapes, strict=True))
    embedding = ("tok_embeddings.weight", (sizes.vocab_size, dim))

    def layers(*names: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in names:
            for layer in range(sizes.num_hidden_layers):
                yield f"layers.{layer}.{name}.weight", shapes[name]

    if header.version == 0:
        yield embedding
        yield from layers("attention_norm", *_LINEAR[:4], "ffn_norm", *_LINEAR[4:])
        yield "norm.weight", (dim,)
        for name in _TABLES:
            yield name, (sizes.max_position_embeddings, sizes.head_dim // 2)
    else:
        yield from layers(*_NORMS)
        yield "norm.weight", (dim,)
        yield embedding
        yield from layers(*_LINEAR)
    if not sizes.tie_word_embeddings:
        yield "output.weight", (sizes.vocab_size, dim)


def _stored_tensors(header: _Header) -> dict[str, _Stored]:
    places: dict[str, _Stored] = {}
    offset = HEADER_BYTES[header.version]
    for name, shape in _layout(header):
        places[name] = _Stored(offset, shape, header.group if len(shape) == 2 else None)
        offset += places[name].bytes
    return places


def _loader(path: Path, place: _Stored) -> Callable[[], torch.Tensor]:
    """A function that reads one tensor as float32; a group's 8-bit weights are multiplied by its scale."""

    def load() -> torch.Tensor:
        count = math.prod(place.shape)
        if place.group is None:
            values = np.fromfile(path, "<f4", count, offset=place.offset)
        else:
            small = np.fromfile(path, "i1", count, offset=place.offset).reshape(-1, place.group)
            scales = np.fromfile(path, "<f4", count // place.group, offset=place.offset + count)
            values = small.astype(np.float32) * scales[:, None]
        return torch.from_numpy(values.reshape(place.shape))

    return load


def _rotary_tables(architecture: LlamaArchitecture) -> dict[str, np.ndarray]:
    """Cosines and sines of version 0's tables, float32 (context, head_dim / 2), computed as export.py does."""
    size = architecture.head_dim
    frequencies = 1.0 / (ROPE_THETA ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(architecture.max_position_embeddings).float(), frequencies)
    return dict(zip(_TABLES, (angles.cos().numpy(), angles.sin().numpy()), strict=True))


def _check_tables(path: Path, stored: dict[str, _Stored]) -> None:
    """Compare the first angles with those of base 10000; tables of zeros count as left out."""
    for name, function in zip(_TABLES, (np.cos, np.sin), strict=True):
        if name not in stored or stored[name].shape[0] < 2:
            continue
        half = stored[name].shape[1]
        row = np.fromfile(path, "<f4", half, offset=stored[name].offset + 4 * half)  # the angles at position 1
        if row.any() and not np.allclose(row, function(ROPE_THETA ** (-np.arange(half) / half)), atol=1e-5):
            raise UserError(
                f"{path}: {name} is not the table of rope_theta={ROPE_THETA:g}, the only one that llama2.c computes; "
                "convert from the checkpoint that this file was exported from"
            )


def _refuse_what_cannot_be_held(checkpoint: Checkpoint) -> None:
    """Raises: UserError, naming the first field whose value a llama2.c file cannot express."""
    sizes = as_llama(checkpoint.architecture, "llama2c")
    allowed = {
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
    }
    for name, value in allowed.items():
        given = getattr(sizes, name)
        if (dict(given) if name == "rope_parameters" else given) != value:
            raise UserError(
                f"{name}={given} cannot be held by llama2.c, which fixes it at {value}; choose another --to"
            )
    if not set(checkpoint.generation.stop_token_ids) <= {1, 2}:
        raise UserError(
            f"generation.stop_token_ids={checkpoint.generation.stop_token_ids} cannot be held by llama2c, where <s> "
            "(1) and </s> (2) end a text; choose another --to"
        )
    if checkpoint.generation.sampling:
        log.warning("llama2c holds no sampling settings; give %s to run.c", dict(checkpoint.generation.sampling))
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is {tensor.dtype}, which float32 cannot hold exactly; choose another --to")


def _write(checkpoint: Checkpoint, folder: Path, version: int) -> None:
    _refuse_what_cannot_be_held(checkpoint)
    sizes = as_llama(checkpoint.architecture, "llama2c")
    header = _Header(version, sizes, group_size(sizes) if version == 2 else None)
    counts = [sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers, sizes.num_attention_heads]
    counts += [sizes.num_key_value_heads, sizes.vocab_size, sizes.max_position_embeddings]
    if version == 0:
        counts[5] *= 1 if sizes.tie_word_embeddings else -1
        start = struct.pack("<7i", *counts)
    else:
        start = struct.pack("<Ii7iB", MAGIC, version, *counts, sizes.tie_word_embeddings)
        start += b"" if header.group is None else struct.pack("<i", header.group)
    tables = _rotary_tables(sizes) if version == 0 else {}
    write_pieces(checkpoint.tokenizer, folder / "tokenizer.bin", sizes.vocab_size)
    with open(folder / "model.bin", "wb") as file:
        file.write(start.ljust(HEADER_BYTES[version], b"\0"))
        for name, shape in _layout(header):
            if name in tables:
                file.write(np.ascontiguousarray(tables[name], "<f4").data)
            elif header.group is not None and len(shape) == 2:
                _write_groups(file, from_hugging_face(sizes, name, checkpoint.tensors), header.group)
            else:
                for block in _blocks(from_hugging_face(sizes, name, checkpoint.tensors)):
                    file.write(np.ascontiguousarray(block.float().numpy(), "<f4").data)


def _blocks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's rows in blocks of about `_BLOCK` weights, so that little of a large one is in memory as float32."""
    return iter(weight.split(max(1, _BLOCK // math.prod(weight.shape[1:]))))


def _write_groups(file: BinaryIO, weight: torch.Tensor, group: int) -> None:
    """The integers of a whole tensor, then its scales."""
    scales = []
    for block in _blocks(weight):
        integers, of_block = quantized(block, group)
        file.write(integers.numpy().data)
        scales.append(of_block)
    file.write(np.ascontiguousarray(torch.cat(scales).numpy(), "<f4").data)


def quantized(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a tensor as llama2.c's export.py does.

    Args:
        group: neighbouring weights that share a scale; it divides their number.
    Returns:
        int8 (groups, group) in -127..127, and float32 scales (groups,): the largest magnitude over 127. A group of
        zeros has scale 0.
    """
    groups = weight.float().reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127.0
    shares = groups / torch.where(scales > 0, scales, 1.0)[:, None]
    return shares.round().to(torch.int8), scales


def group_size(sizes: LlamaArchitecture) -> int:
    """The largest of 64, 32, 16 ... that divides the rows of every matrix.

    export.py looks at `dim` alone; where `hidden_dim` is no multiple of its choice, groups cross the ends of rows, and
    runq.c, which multiplies whole groups of a row, leaves the last weights of each out.
    """
    return math.gcd(64, sizes.hidden_size, sizes.intermediate_size)


def _as_groups(group: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What version 2 keeps of a tensor. Reordering whole rows moves no weight to another group."""
    if tensor.dim() == 1:
        return tensor
    integers, scales = quantized(tensor, group)
    return (integers.float() * scales[:, None]).reshape(tensor.shape)


def write_version_0(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> None:
    """Write `model.bin` as run.c reads it, and `tokenizer.bin`, into `folder`; one tensor in memory at a time.

    Raises:
        UserError: a field or the tokenizer is beyond the format; the field is named.
    """
    _write(checkpoint, folder, 0)


def write_version_1(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> None:
    """Write `model.bin` in version 1, and `tokenizer.bin`, as `write_version_0` does."""
    _write(checkpoint, folder, 1)


def write_version_2(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Rounding:
    """Write `model.bin` in version 2 with int8 weights, and `tokenizer.bin`, as `write_version_0` does."""
    _write(checkpoint, folder, 2)
    return functools.partial(_as_groups, group_size(as_llama(checkpoint.architecture, "llama2c")))


def read_back(folder: Path) -> Checkpoint:
    """Read what `write_version_0`, `write_version_1` or `write_version_2` wrote."""
    return read(folder / "model.bin", ReadOptions(folder / "tokenizer.bin"))
