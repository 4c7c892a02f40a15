"""Hugging Face's checkpoints: a folder of config.json, weights, tokenizer files and generation_config.json.

    write(checkpoint, Path("outputs/stories260K"))
    AutoModelForCausalLM.from_pretrained("outputs/stories260K")

Weights are read from safetensors or from pickles of tensors, and written as safetensors, a shard at a time, so a model
larger than memory can be written. A Llama is read in typed fields; any other causal language model of transformers as
its config.json has it, for another Hugging Face folder.
"""

import errno
import functools
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from src.checkpoints.architecture import (
    LLAMA_FIELDS,
    Architecture,
    LlamaArchitecture,
    OtherArchitecture,
    beyond_llama,
    check_config_layers,
)
from src.checkpoints.characters import only_characters
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
from src.checkpoints.hf_tokenizer import made_tokenizer
from src.checkpoints.json_files import read_json_object
from src.checkpoints.pickles import pickled_tensors
from utils.errors import UserError, in_one_line, some
from utils.files import write_json, write_text
from utils.logging import get_logger

log = get_logger(__name__)

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
    tokenizer = tokenizer_files(folder)
    backend = backend_of(tokenizer)
    _check_ids(backend, tokenizer, path, architecture.vocab_size)
    descriptions = [file for file in (path / "config.json", path / "generation_config.json") if file.is_file()]
    checkpoint = Checkpoint(
        inputs=(*descriptions, *files, *tokenizer.paths),
        architecture=architecture,
        tensors=tensors,
        tokenizer=tokenizer,
        generation=read_generation(path),
        logits=evaluation(path, tensors),
        encode=tokenization(folder),
        characters=only_characters(backend),
        check_family=None if isinstance(architecture, LlamaArchitecture) else functools.partial(_check_loading, path),
    )
    checkpoint.check_tensors()
    return checkpoint


def _read_architecture(
    path: Path, settings: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[Architecture, dict[str, LazyTensor]]:
    """What the tensors compute, and the tensors without a head that is the embedding's own."""
    check_config_layers(f"{path}/config.json", settings, len(tensors))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each family computes with its settings in its own way, and checks few of them
        raise UserError(f"{path}/config.json is not one that transformers reads: {in_one_line(error)}") from error
    if settings["model_type"] == "llama" and not beyond_llama(settings):
        sizes = LlamaArchitecture(**{name: getattr(config, name) for name in LLAMA_FIELDS})
        if sizes.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
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


def _check_loading(path: Path) -> None:
    """Let transformers match the stored names and shapes with its model, without weights.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    try:
        _, report = AutoModelForCausalLM.from_pretrained(
            path, device_map="meta", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # as above: a model's code computes with whatever config.json says
        raise UserError(f"transformers does not load {path}: {' '.join(str(error).split())[-600:]}") from error
    if report["missing_keys"]:
        raise UserError(f"{path} lacks the tensors {sorted(report['missing_keys'])[:4]}; give all of its weight files")
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{path}: {name} has shape {tuple(found)}, config.json asks for {tuple(wanted)}; mend one")


def _read_tensors(path: Path) -> tuple[list[Path], dict[str, LazyTensor]]:
    """The weight files of a folder, and what they hold."""
    kinds = ((_WEIGHTS, _INDEX, _lazy_tensors), (_PICKLES, _PICKLES_INDEX, _pickled_tensors))
    for whole, index, read_file in kinds:
        places: dict[str, str] | None = None
        if (path / index).is_file():
            places = _read_index(path / index)
            files = [path / name for name in sorted(set(places.values()))]
        elif (path / whole).is_file():
            files = [path / whole]
        else:
            continue
        if missing := [file.name for file in files if not os.path.isfile(file)]:  # is_file() raises at a long name
            raise UserError(f"{path} lacks {some(missing)}; give a folder with all of its weight files")
        tensors: dict[str, LazyTensor] = {}
        for file in files:
            found = read_file(file)
            if places is not None:
                _check_shard(file, found.keys(), {name for name, place in places.items() if place == file.name}, index)
            tensors |= found
        return files, tensors
    raise UserError(f"{path} lacks {_WEIGHTS}, {_INDEX} or their older .bin; give a folder with its weight files")


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor, without what `_is_left_out`.

    Raises:
        UserError: the index has no such map.
    """
    places = read_json_object(path).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(place, str) and place == Path(place).name for place in places.values()
    ):
        raise UserError(f"{path} has no weight_map of file names beside it by tensor; fetch it again")
    return {name: place for name, place in places.items() if not _is_left_out(name)}


def _check_shard(file: Path, found: Collection[str], wanted: Collection[str], index: str) -> None:
    """Raises: UserError if a file holds other tensors than the index puts there."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise UserError(
            f"{file} lacks {len(missing)} tensors {missing[:4]} that {index} puts there and has {len(unknown)} "
            f"{unknown[:4]} that it does not; give the files of one model"
        )


def _is_left_out(name: str) -> bool:
    """Whether a tensor is one of the rotary frequencies that early Llama checkpoints store."""
    return name.endswith(".rotary_emb.inv_freq")


def _pickled_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that `torch.save` wrote; they stay in it, and no code of it is run."""
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in pickled_tensors(file).items()
        if not _is_left_out(name)
    }


def _lazy_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file."""
    try:
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if not _is_left_out(name)]  # noqa: SIM118
            return {name: _lazy(file, name, content.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); fetch it again") from error


def _lazy(file: Path, name: str, piece: "safe_open") -> LazyTensor:
    def load() -> torch.Tensor:
        with safe_open(file, "pt") as content:
            return content.get_tensor(name)

    return LazyTensor(tuple(piece.get_shape()), piece[:0].dtype, load)


def read_generation(path: Path) -> Generation:
    """What a folder's generation_config.json says, or where there is none, its config.json.

    Raises:
        UserError: a value is none that transformers takes, or an id is no integer.
    """
    file = path / "generation_config.json"
    try:
        if file.is_file():
            settings = GenerationConfig.from_pretrained(path)
        else:
            settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, local_files_only=True))
        sampling = settings.to_diff_dict()
    except Exception as error:  # transformers checks few of the values that it computes with
        raise UserError(f"{file} is not one that transformers reads: {in_one_line(error)}; mend it") from error
    ends = settings.eos_token_id
    for name, given in (("bos_token_id", settings.bos_token_id), ("pad_token_id", settings.pad_token_id)):
        if given is not None and type(given) is not int:
            raise UserError(f"{file}: {name}={given!r} is no id; mend it")
    if ends is not None and not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise UserError(f"{file}: eos_token_id={ends!r} is neither an id nor a list of some; mend it")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
    return Generation(
        bos_token_id=settings.bos_token_id,
        stop_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        pad_token_id=settings.pad_token_id,
        sampling={name: value for name, value in sampling.items() if name not in ids},
    )


def tokenizer_files(folder: Path) -> TokenizerFiles:
    """The tokenizer of a folder.

    Raises:
        UserError: it has no tokenizer.json.
    """
    files = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    if folder / "tokenizer.json" not in files:
        raise UserError(f"{folder} has no tokenizer.json; name a folder that has one with --tokenizer FOLDER")
    return TokenizerFiles(files)


def _check_ids(backend: Tokenizer, tokenizer: TokenizerFiles, path: Path, rows: int) -> None:
    """Raises: UserError if a token has no row in an embedding of `rows` rows."""
    ids = id_count(backend)
    if ids > rows:
        raise UserError(
            f"{tokenizer.tokenizer_json} has {ids} ids, but the embedding of {path} has {rows} rows; give the "
            "tokenizer that the model was trained with"
        )
    if ids < rows:
        log.info("%s has %d ids, the embedding %d rows: the rest is padding", tokenizer.tokenizer_json, ids, rows)


def id_count(backend: Tokenizer) -> int:
    """Rows that an embedding needs for every id: the largest and one."""
    return max(backend.get_vocab().values(), default=-1) + 1


def backend_of(tokenizer: TokenizerFiles) -> Tokenizer:
    """What tokenizer.json holds.

    Raises:
        UserError: the file is no tokenizer.
    """
    path = tokenizer.tokenizer_json
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more particular
        raise UserError(f"{path} is no tokenizer ({error}); fetch it again") from error


def tokenization(folder: Path) -> Callable[[str], list[int]]:
    """AutoTokenizer's ids; the tokenizer is loaded at the first call."""

    @functools.cache
    def tokenizer() -> PreTrainedTokenizerBase:
        try:
            made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            made("a", verbose=False)  # what the files say is put to use
            return made
        except Exception as error:  # the files' values reach code that expects others
            raise UserError(
                f"no tokenizer could be loaded from {folder}: {in_one_line(error)}; mend its files"
            ) from error

    return lambda text: tokenizer()(text, verbose=False).input_ids  # quiet about texts beyond the context


def write(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Rounding | None:
    """Write a checkpoint into `folder`, which exists; every tensor keeps its dtype, unless `options.dtype` is another.

    Returns:
        How weights were rounded; None if they were not.
    """
    if checkpoint.check_family is not None:
        checkpoint.check_family()
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
        for name, text in made_tokenizer(checkpoint).texts.items():
            write_text(folder / name, text)
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
        try:
            save_file(
                {name: checkpoint.tensors[name].load().to(outlines[name].dtype).contiguous() for name in names},
                folder / filename,
                metadata={"format": "pt"},
            )
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(folder / filename)) from error
        (folder / filename).chmod(0o644)  # safetensors makes files that only their owner may read
    if split.is_sharded:
        write_json(folder / _INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def read_back(folder: Path) -> Checkpoint:
    """Read what `write` wrote, evaluated by transformers."""
    return read(folder, ReadOptions())
