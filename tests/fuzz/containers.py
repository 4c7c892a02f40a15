"""Changes inside of files that hold others: what is packed is changed, and packed again as its format asks.

INSIDE["safetensors"](content, Random(7))      # the header's JSON is changed, its length put right

A change of plain bytes mostly breaks a checksum or a length, and never comes to the code behind it.
"""

import contextlib
import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from tests.fuzz.mutations import (
    FLOATS,
    INTEGERS,
    TEXTS,
    VALUES,
    WORDS,
    changed_bytes,
    changed_json,
    changed_text,
    changed_tree,
)


def _safetensors(data: bytes, random: Random) -> bytes:
    """A file whose header was changed, with its right length, or the length of another."""
    if len(data) < 8 or len(data) < 8 + (length := struct.unpack_from("<Q", data)[0]):
        return changed_bytes(data, random)
    header = changed_json(data[8 : 8 + length], random)
    wrong = random.choice(INTEGERS) % 2**64 if random.random() < 0.1 else len(header)
    return struct.pack("<Q", wrong) + header + data[8 + length :]


def _saved(data: bytes, random: Random) -> bytes:
    """What torch.save wrote: other settings, other tensors, or another pickle in the same archive."""
    if random.random() < 0.4:
        return _archive(data, random)
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # noqa: BLE001 - it was changed before, and may raise anything
        return changed_bytes(data, random)
    holder: Any = content
    while isinstance(holder, dict) and holder:
        key = random.choice(list(holder))
        if isinstance(holder[key], dict) and random.random() < 0.9:
            holder = holder[key]
            continue
        way = random.randrange(4)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder[key], torch.Tensor):
            holder[key] = _other_tensor(holder[key], random)
        elif way == 2:
            holder[random.choice((*TEXTS, 1, None, ("a", 1), "layers.99.x", "norm"))] = holder.pop(key)
        else:
            holder[key] = random.choice((*VALUES, *INTEGERS, torch.tensor(1.0)))
        break
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


def _other_tensor(tensor: torch.Tensor, random: Random) -> torch.Tensor:
    return random.choice(
        (
            lambda: tensor[..., :-1].clone() if tensor.dim() else tensor,
            lambda: tensor.to(random.choice((torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16))),
            lambda: tensor.reshape(-1).clone(),
            lambda: tensor[None].clone(),
            lambda: torch.empty(0),
            lambda: tensor.to_sparse(),
            lambda: torch.tensor(3),
            lambda: torch.full_like(tensor, random.choice(FLOATS)) if tensor.is_floating_point() else tensor,
            lambda: tensor[..., :1].expand(*tensor.shape) if tensor.dim() else tensor,
            lambda: torch.empty(2**40, device="meta"),
        )
    )()


def _archive(data: bytes, random: Random) -> bytes:
    """A zip archive with one of its files changed, left out, or under another name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, KeyError, EOFError, struct.error):
        return changed_bytes(data, random)
    name = random.choice(list(files))
    if random.random() < 0.7:
        name = next((each for each in files if each.endswith("data.pkl")), name)
    way = random.randrange(8)
    if way == 0:
        del files[name]
    elif way == 1:
        files[random.choice(("../../x", "/x", "archive/data.pkl", "x"))] = files.pop(name)
    elif way == 2 and name.endswith("data.pkl"):
        files[name] = _numbers(files[name], random)
    else:
        files[name] = changed_bytes(files[name], random)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return written.getvalue()


def _numbers(data: bytes, random: Random) -> bytes:
    """A pickle with one of its small integers made large, as sizes and strides of tensors are."""
    places = [at for at, byte in enumerate(data[:-2]) if byte == ord("K")]
    if not places:
        return changed_bytes(data, random)
    at = random.choice(places)
    large = random.choice(
        (b"J" + struct.pack("<i", random.choice((-1, 2**31 - 1, 2**24))), b"\x8a\x06" + b"\x00" * 5 + b"\x01")
    )
    return data[:at] + large + data[at + 2 :]


class _Plain(pickle.Unpickler):
    """Runs nothing that a changed pickle may come to name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(name)


def _pickled(data: bytes, random: Random) -> bytes:
    """A plain pickle with a value changed."""
    with contextlib.suppress(Exception):
        return pickle.dumps(changed_tree(_Plain(io.BytesIO(data)).load(), random))
    return changed_bytes(data, random)


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's values by their type; 8 is a text and 9 a list."""


def _end_of_value(data: bytes, kind: int, at: int) -> int:
    if kind == 8:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind != 9:
        return at + _WIDTHS[kind]
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _WIDTHS:
        return at + count * _WIDTHS[inner]
    for _ in range(min(count, len(data))):
        at = _end_of_value(data, inner, at)
    return at


def _gguf_value(data: bytes, random: Random) -> bytes:
    """A GGUF file with one value of its metadata of another type or size, left out, or given twice."""
    try:
        count, at, entries = struct.unpack_from("<Q", data, 16)[0], 24, []
        for _ in range(count):
            start, length = at, struct.unpack_from("<Q", data, at)[0]
            value = at + 12 + length
            at = _end_of_value(data, struct.unpack_from("<I", data, value - 4)[0], value)
            entries.append((start, value - 4, at))
    except (struct.error, KeyError, OverflowError, RecursionError):
        return changed_bytes(data, random)
    if not entries or at > len(data):
        return changed_bytes(data, random)
    start, value, end = random.choice(entries)
    number, text = random.choice(INTEGERS), random.choice(TEXTS).encode("utf-8", "surrogatepass")
    texts = b"".join(struct.pack("<Q", len(word)) + word for word in (text, b"a", b"b"))
    numbers = struct.pack("<3i", 1, 6, random.choice((-1, 3, 99)))
    others = (
        struct.pack("<Ii", 5, number % 2**31 - random.choice((0, 2**31))),
        struct.pack("<IQ", 10, number % 2**64),
        struct.pack("<If", 6, random.choice((*FLOATS[:5], 0.5, 3e38))),
        struct.pack("<I?", 7, True),
        struct.pack("<IQ", 8, len(text)) + text,
        struct.pack("<IIQ", 9, 8, 3) + texts,
        struct.pack("<IIQ", 9, 5, 3) + numbers,
        struct.pack("<IIQ", 9, 5, 0),
        b"",
    )
    other = random.choice(others)
    entry = data[start:value] + other if other else b""
    entry += data[start:end] if other and random.random() < 0.1 else b""
    added = len(entry) - (end - start)
    shifted = data[:start] + entry + data[end:at]
    rest = data[at:]
    count += -1 if not entry else len(entry) > len(data[start:value] + other)
    # Tensors then begin elsewhere in a block of 32 bytes, and are other numbers; enough bytes follow for all of them.
    return shifted[:16] + struct.pack("<Q", count) + shifted[24:] + rest + bytes(-added % 32)


def _gguf(data: bytes, random: Random) -> bytes:
    return (_gguf_value if random.random() < 0.6 else _gguf_number)(data, random)


def _gguf_number(data: bytes, random: Random) -> bytes:
    """A GGUF file with one of its numbers or lengths changed: the start holds nearly all of them."""
    out = bytearray(data)
    if len(out) < 64:
        return changed_bytes(data, random)
    mark = random.choice(
        (b"general.", b"llama.", b"qwen2.", b"tokenizer.ggml.", b"blk.0.", b".weight", b"token_embd", b"rope")
    )
    places = [at for at in range(len(out)) if out.startswith(mark, at)][:60]
    at = (random.choice(places) if places else 0) + random.randrange(-8, 48)
    at = min(max(at, 0), len(out) - 8)
    size = random.choice((1, 4, 8))
    value = random.choice((*range(14), *INTEGERS)) % 2 ** (8 * size)
    out[at : at + size] = value.to_bytes(size, "little")
    return bytes(out)


def _sentencepiece(data: bytes, random: Random) -> bytes:
    """A SentencePiece model, or a file of ranks, with a piece or a setting changed."""
    from sentencepiece import sentencepiece_model_pb2

    if b"\n" in data[:20] and b" 0\n" in data[:20]:
        return changed_text(data, random, WORDS["text"])
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        part = random.choice((random.choice(model.pieces), model.trainer_spec, model.normalizer_spec))
        field = random.choice(part.DESCRIPTOR.fields)
        value = random.choice((*INTEGERS[:12], *FLOATS, "", "a", "<0x00>", "é", b"\xff", True, 3, 6))
        setattr(part, field.name, value)
        if random.random() < 0.3:
            del model.pieces[random.randrange(len(model.pieces))]
        return model.SerializeToString()
    except Exception:  # noqa: BLE001 - a value of another type, or a file that was changed before
        return changed_bytes(data, random)


def _gzip(data: bytes, random: Random) -> bytes:
    try:
        inside = gzip.decompress(data)
    except (OSError, EOFError, ValueError, struct.error, ArithmeticError):
        return changed_bytes(data, random)
    except Exception:  # noqa: BLE001 - zlib.error
        return changed_bytes(data, random)
    return gzip.compress(_text(inside, random), mtime=0)


def _zstd(data: bytes, random: Random) -> bytes:
    import zstandard

    try:
        inside = zstandard.ZstdDecompressor().decompress(data, max_output_size=2**20)
    except zstandard.ZstdError:
        return changed_bytes(data, random)
    return zstandard.ZstdCompressor().compress(_text(inside, random))


def _text(data: bytes, random: Random) -> bytes:
    return random.choice((changed_bytes, changed_json, lambda text, source: changed_text(text, source, WORDS["text"])))(
        data, random
    )


def _weights(data: bytes, random: Random) -> bytes:
    """`.bin` is torch.save's ending as well as llama2.c's."""
    return (_saved if data.startswith(b"PK") else changed_bytes)(data, random)


INSIDE: dict[str, Callable[[bytes, Random], bytes]] = {
    "safetensors": _safetensors,
    "bin": _weights,
    "pt": _saved,
    "pth": _saved,
    "pkl": _pickled,
    "gguf": _gguf,
    "model": _sentencepiece,
    "gz": _gzip,
    "zst": _zstd,
}
"""By the ending of a file's name."""
