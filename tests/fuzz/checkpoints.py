"""Readers of `src.checkpoints`, each format's valid inputs made by a writer of this project or of its tests."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import GPT2Config, LlamaConfig, Qwen2Config

from src.checkpoints.checkpoint import Checkpoint, ReadOptions, WriteOptions
from src.checkpoints.convert import SOURCES, convert, recognised_source
from tests import llama2c_reference, meta_reference, nanogpt_reference
from tests.fuzz.reader import Reader
from tests.test_checkpoints import made_up
from tests.test_llama2c_training import save_training
from tests.test_nanogpt_checkpoints import CHARACTERS, write_meta
from tests.test_nanogpt_checkpoints import save as save_nanogpt
from tests.toy_tokenizer import toy_tokenizer

SIZES = {"vocab_size": 320, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA = LlamaConfig(**SIZES, hidden_size=8, intermediate_size=16, max_position_embeddings=64)
QWEN = Qwen2Config(**SIZES, hidden_size=8, intermediate_size=16, max_position_embeddings=64, tie_word_embeddings=True)
GPT2 = GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2, n_positions=64)
TEXT = "Once upon a time, <s> naïve 日本\n"


def save(folder: Path, config: LlamaConfig | Qwen2Config | GPT2Config) -> None:
    """A random model of a family with a small byte-level tokenizer."""
    from tests.test_gguf_checkpoints import save

    save(folder, config, toy_tokenizer())


def exercise(checkpoint: Checkpoint) -> None:
    """Do what a conversion does with a source: load every tensor, and cut a text into tokens."""
    for name, tensor in checkpoint.tensors.items():
        loaded = tensor.load()
        assert tuple(loaded.shape) == tuple(tensor.shape), f"{name} is not of the shape that was told"
        assert loaded.dtype == tensor.dtype, f"{name} is not of the dtype that was told"
    known = checkpoint.characters
    checkpoint.encode(TEXT if known is None else "".join(filter(known.__contains__, TEXT)))
    if checkpoint.check_family is not None:
        checkpoint.check_family()


def _read(folder: Path, *, kind: str, entry: str = "", tokenizer: str | None = None, **options: object) -> None:
    path = folder / entry
    recognised_source(path)
    exercise(SOURCES[kind].read(path, ReadOptions(folder / tokenizer if tokenizer else None, **options)))


def _told_or_read(folder: Path, **options: object) -> None:
    """As `_read`, also where nothing recognises the format, as with --from."""
    from utils.errors import UserError

    try:
        _read(folder, **options)
    except UserError:
        kind, entry, tokenizer = options["kind"], options.get("entry", ""), options.get("tokenizer")
        rest = {name: value for name, value in options.items() if name not in ("kind", "entry", "tokenizer")}
        exercise(SOURCES[kind].read(folder / entry, ReadOptions(folder / tokenizer if tokenizer else None, **rest)))


def _converted(folder: Path, *, target: str, entry: str = "") -> None:
    """Convert and compare what can be without an evaluation."""
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    convert(folder / entry, folder.parent / "out", target, check="tensors")


def _llama2c(folder: Path, version: int) -> None:
    for tied in (True, False):
        place = folder / str(tied)
        place.mkdir()
        made_up(place, tied)
        if version:
            target = f"llama2c-v{version}"
            convert(
                place / "model.bin", place / "out", target, reading=ReadOptions(place / "tokenizer.bin"), check="none"
            )
            for name in ("model.bin", "tokenizer.bin"):
                shutil.move(place / "out" / name, place / name)
            shutil.rmtree(place / "out")


def _training(folder: Path) -> None:
    place = folder / "a"
    place.mkdir()
    model, _ = made_up(place, tied=False)
    save_training(place / "ckpt.pt", *llama2c_reference.read_legacy(model), hidden_dim=24)
    model.unlink()


def _nanogpt(folder: Path) -> None:
    for bias in (True, False):
        place = folder / str(bias)
        place.mkdir()
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
        weights = nanogpt_reference.arrays(len(CHARACTERS), bias, sizes=sizes)
        save_nanogpt(place / "ckpt.pt", weights, bias=bias, **sizes)
        write_meta(place / "meta.pkl")


def _meta(folder: Path, *, releases: tuple[tuple[str, int], ...]) -> None:
    for release, shards in releases:
        meta_reference.write(folder / f"{release}-{shards}", release, shards)


def _written_meta(folder: Path) -> None:
    """As this project writes it, with reading.json."""
    meta_reference.write(folder / "a", "3.1", 1)
    convert(folder / "a", folder / "b", "meta", reading=ReadOptions(meta_version="3.1", instruct=True), check="none")
    shutil.rmtree(folder / "a")
    (folder / "b" / "conversion.json").unlink()


def _gguf(folder: Path) -> None:
    for name, config, dtype in (("llama", LLAMA, "q8_0"), ("qwen", LLAMA, "float16")):
        save(folder / "a", config)
        convert(folder / "a", folder / name, "gguf", writing=WriteOptions(dtype=dtype), check="none")
        shutil.rmtree(folder / "a")
        (folder / name / "conversion.json").unlink()
    place = folder / "pieces"
    place.mkdir()
    model, tokenizer = made_up(place, tied=True)
    convert(model, place / "out", "gguf", reading=ReadOptions(tokenizer), check="none")
    shutil.move(place / "out" / "model.gguf", place / "model.gguf")
    shutil.rmtree(place / "out")
    model.unlink()
    tokenizer.unlink()


def _hf(folder: Path, *, config: LlamaConfig | Qwen2Config | GPT2Config = LLAMA, shard_bytes: int = 2**30) -> None:
    save(folder / "a", config)
    if shard_bytes < 2**30:
        convert(folder / "a", folder / "b", "hf", writing=WriteOptions(shard_bytes=shard_bytes), check="none")
        shutil.rmtree(folder / "a")
        (folder / "b" / "conversion.json").unlink()


def _pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    save(folder / "a", LLAMA)
    torch.save(load_file(folder / "a" / "model.safetensors"), folder / "a" / "pytorch_model.bin")
    (folder / "a" / "model.safetensors").unlink()


def _pieces_in_hf(folder: Path) -> None:
    """A Hugging Face folder with a tokenizer of scored pieces, for targets that take no other."""
    place = folder / "a"
    place.mkdir()
    model, tokenizer = made_up(place, tied=True)
    convert(model, folder / "b", "hf", reading=ReadOptions(tokenizer), check="none")
    shutil.rmtree(place)
    (folder / "b" / "conversion.json").unlink()


def _meta_in_hf(folder: Path) -> None:
    """A model of Meta's in Hugging Face's form, one of pieces and one of ranks."""
    for release, reading in (("2", ReadOptions(meta_version="2")), ("3", ReadOptions(instruct=False))):
        meta_reference.write(folder / "a", release, 1)
        convert(folder / "a", folder / release, "hf", reading=reading, check="none")
        shutil.rmtree(folder / "a")
        (folder / release / "conversion.json").unlink()


def _reader(name: str, seeds: Callable[[Path], None], share: int, **options: object) -> Reader:
    return Reader(name, seeds, functools.partial(_told_or_read, **options), share)


WEIGHTS = ("model.safetensors",)
READERS = (
    _reader(
        "llama2c v0",
        functools.partial(_llama2c, version=0),
        60,
        kind="llama2c",
        entry="model.bin",
        tokenizer="tokenizer.bin",
    ),
    _reader(
        "llama2c v1",
        functools.partial(_llama2c, version=1),
        60,
        kind="llama2c",
        entry="model.bin",
        tokenizer="tokenizer.bin",
    ),
    _reader(
        "llama2c v2",
        functools.partial(_llama2c, version=2),
        60,
        kind="llama2c",
        entry="model.bin",
        tokenizer="tokenizer.bin",
    ),
    _reader("llama2c-training", _training, 15, kind="llama2c-training", entry="ckpt.pt", tokenizer="tokenizer.bin"),
    _reader("nanogpt", _nanogpt, 20, kind="nanogpt", entry="ckpt.pt", activation="gelu"),
    _reader("meta pieces", functools.partial(_meta, releases=(("2", 1), ("2", 2))), 15, kind="meta", meta_version="2"),
    _reader(
        "meta ranks",
        functools.partial(_meta, releases=(("3", 1), ("3", 2))),
        10,
        kind="meta",
        instruct=False,
    ),
    _reader("meta with reading.json", _written_meta, 5, kind="meta"),
    _reader("gguf", _gguf, 15, kind="gguf", entry="model.gguf"),
    _reader("hf", _hf, 15, kind="hf"),
    _reader("hf shards", functools.partial(_hf, shard_bytes=4000), 10, kind="hf"),
    _reader("hf pickles", _pickled, 10, kind="hf"),
    _reader("hf gpt2", functools.partial(_hf, config=GPT2), 3, kind="hf"),
    Reader("hf to gguf", _hf, functools.partial(_converted, target="gguf"), 2, WEIGHTS),
    Reader("hf pieces to gguf", _pieces_in_hf, functools.partial(_converted, target="gguf"), 2, WEIGHTS),
    Reader("hf pieces to llama2c", _pieces_in_hf, functools.partial(_converted, target="llama2c"), 2, WEIGHTS),
    Reader("hf pieces to meta", _meta_in_hf, functools.partial(_converted, target="meta"), 2, WEIGHTS),
    Reader("gguf to hf", _gguf, functools.partial(_converted, target="hf", entry="model.gguf"), 2),
)
