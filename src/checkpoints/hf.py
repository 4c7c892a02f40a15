"""Hugging Face's checkpoints: a folder of config.json, weights, tokenizer files and generation_config.json.

    write(checkpoint, Path("outputs/stories260K"))
    AutoModelForCausalLM.from_pretrained("outputs/stories260K")

Weights are read from safetensors or from pickles of tensors, and written as safetensors, a shard at a time, so a model
larger than memory can be written. A Llama is read in typed fields; any other causal language model of transformers as
its config.json has it, for another Hugging Face folder.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from src.checkpoints.architecture import (
    LLAMA_FIELDS,
    Architecture,
    LlamaArchitecture,
    OtherArchitecture,
    beyond_llama,
)
from src.checkpoints.checkpoint import (
    Checkpoint,
    Generation,
    LazyTensor,
    ReadOptions,
    Rounding,
    TokenizerFiles,
    WriteOptions,
)
from src.checkpoints.evaluation import evaluation
from src.checkpoints.json_files import read_json_object
from src.checkpoints.pieces import ScoredPieces
from utils.errors import UserError
from utils.files import write_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES, _PICKLES_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model type."""
    return (path / "config.json").is_file() and "model_type" in read_json_object(path / "config.json")


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a folder; `options.tokenizer` names another folder to take the tokenizer from.

    Raises:
        UserError: a file is missing or damaged, or its pickles hold more than tensors.
    """
    settings = read_json_object(path / "config.json")
    files, tensors = _read_tensors(path)
    architecture, tensors = _read_architecture(path, settings, tensors)
    folder = options.tokenizer or path
    tokenizer_files = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    if folder / "tokenizer.json" not in tokenizer_files:
        raise UserError(f"{folder} has no tokenizer.json; name a folder that has one with --tokenizer FOLDER")
    descriptions = [file for file in (path / "config.json", path / "generation_config.json") if file.is_file()]
    checkpoint = Checkpoint(
        inputs=(*descriptions, *files, *tokenizer_files),
        architecture=architecture,
        tensors=tensors,
        tokenizer=TokenizerFiles(tokenizer_files),
        generation=read_generation(path),
        logits=evaluation(path, tensors),
        encode=_tokenization(folder),
    )
    checkpoint.check_tensors()
    return checkpoint


def _read_architecture(
    path: Path, settings: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[Architecture, dict[str, LazyTensor]]:
    """What the tensors compute, and the tensors without a head that is the embedding's own."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}/config.json is not one that transformers reads: {error}") from error
    if settings["model_type"] == "llama" and not beyond_llama(settings):
        sizes = LlamaArchitecture(**{name: getattr(config, name) for name in LLAMA_FIELDS})
        if sizes.tie_word_embeddings and "lm_head.weight" in tensors:
            head = tensors.pop("lm_head.weight").load()
            if not torch.equal(head, tensors["model.embed_tokens.weight"].load()):
                raise UserError(
                    f"{path}: tie_word_embeddings=true, but lm_head.weight differs from the embedding; fix one"
                )
        return sizes, tensors
    text = config.get_text_config()
    return OtherArchitecture(
        settings, text.vocab_size, getattr(text, "max_position_embeddings", 2**20), config.tie_word_embeddings
    ), tensors


def _read_tensors(path: Path) -> tuple[list[Path], dict[str, LazyTensor]]:
    """The weight files of a folder, and what they hold."""
    kinds = ((_WEIGHTS, _INDEX, _lazy_tensors), (_PICKLES, _PICKLES_INDEX, _pickled_tensors))
    for whole, index, read_file in kinds:
        if (path / index).is_file():
            names = set(read_json_object(path / index)["weight_map"].values())
            files = [path / name for name in sorted(names)]
        elif (path / whole).is_file():
            files = [path / whole]
        else:
            continue
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{path} lacks {missing}; give a folder with all of its weight files")
        tensors: dict[str, LazyTensor] = {}
        for file in files:
            tensors |= read_file(file)
        return files, tensors
    raise UserError(f"{path} lacks {_WEIGHTS}, {_INDEX} or their older .bin; give a folder with its weight files")


def _pickled_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that `torch.save` wrote; they stay in it, and no code of it is run."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        raise UserError(
            f"{file} is no whole file of tensors alone ({' '.join(str(error).split())[:300]}); give safetensors, or "
            "a file that torch 1.6 or later saved"
        ) from error
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in content.items()
        if not name.endswith(".rotary_emb.inv_freq")
    }


def _lazy_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, without the rotary frequencies that early Llama checkpoints store."""
    try:
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if not name.endswith(".rotary_emb.inv_freq")]  # noqa: SIM118
            return {name: _lazy(file, name, content.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); fetch it again") from error


def _lazy(file: Path, name: str, piece: "safe_open") -> LazyTensor:
    def load() -> torch.Tensor:
        with safe_open(file, "pt") as content:
            return content.get_tensor(name)

    return LazyTensor(tuple(piece.get_shape()), piece[:0].dtype, load)


def read_generation(path: Path) -> Generation:
    """What a folder's generation_config.json says, or where there is none, its config.json."""
    if (path / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(path)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, local_files_only=True))
    ends = settings.eos_token_id
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
    return Generation(
        bos_token_id=settings.bos_token_id,
        stop_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        pad_token_id=settings.pad_token_id,
        sampling={name: value for name, value in settings.to_diff_dict().items() if name not in ids},
    )


def _tokenization(folder: Path) -> Callable[[str], list[int]]:
    """AutoTokenizer's ids; the tokenizer is loaded at the first call."""
    tokenizer = functools.cache(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return lambda text: tokenizer()(text, verbose=False).input_ids  # quiet about texts beyond the context


def write(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Rounding | None:
    """Write a checkpoint into `folder`, which exists; every tensor keeps its dtype, unless `options.dtype` is another.

    Returns:
        How weights were rounded; None if they were not.
    """
    generation = checkpoint.generation
    stops = list(generation.stop_token_ids)
    dtype = DTYPES[options.dtype] if options.dtype else None
    held = dtype or max((t.dtype for t in checkpoint.tensors.values()), key=lambda kind: kind.itemsize)
    settings = checkpoint.architecture.config() | {
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": stops[0] if stops else None,
        "pad_token_id": generation.pad_token_id,
    }
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(held).removeprefix("torch.")
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=generation.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=generation.pad_token_id,
        **generation.sampling,
    ).save_pretrained(folder)
    _write_tensors(checkpoint, folder, dtype, options.shard_bytes)
    if isinstance(checkpoint.tokenizer, TokenizerFiles):
        for path in checkpoint.tokenizer.paths:
            shutil.copyfile(path, folder / path.name)
    else:
        _write_pieces(checkpoint.tokenizer, generation, checkpoint.architecture.max_position_embeddings, folder)
    return None if dtype is None else lambda name, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_tensors(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Write the shards one after the other; only one is in memory."""

    def kept(held: torch.dtype) -> torch.dtype:
        return dtype if dtype and held.is_floating_point else held

    outlines = {
        name: torch.empty(tensor.shape, dtype=kept(tensor.dtype), device="meta")
        for name, tensor in checkpoint.tensors_in_order().items()
    }
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        # No name holds the shard, which would keep it in memory while the next one is read.
        save_file(
            {name: checkpoint.tensors[name].load().to(outlines[name].dtype).contiguous() for name in names},
            folder / filename,
            metadata={"format": "pt"},
        )
        (folder / filename).chmod(0o644)  # safetensors makes files that only their owner may read
    if split.is_sharded:
        write_json(folder / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_pieces(pieces: ScoredPieces, generation: Generation, context: int, folder: Path) -> None:
    """Write tokenizer.json and its config.

    The class is PreTrainedTokenizerFast, which takes tokenizer.json as it stands, its begin token in front included;
    LlamaTokenizer would replace its normalizer by one that drops the added space of a text that begins with a space.
    """
    pieces.to_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos": pieces.bos_id, "eos": pieces.eos_id, "unk": pieces.unk_id, "pad": generation.pad_token_id}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": pieces.pieces[index] for name, index in names.items() if index is not None},
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )


def read_back(folder: Path) -> Checkpoint:
    """Read what `write` wrote, evaluated by transformers."""
    return read(folder, ReadOptions())
