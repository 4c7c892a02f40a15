"""Hugging Face's checkpoints: a folder of config.json, safetensors, tokenizer files and generation_config.json.

    write(checkpoint, Path("outputs/stories260K"))
    AutoModelForCausalLM.from_pretrained("outputs/stories260K")

Weights are written a shard of at most 1 GiB at a time, so a model larger than memory can be written; the check
afterwards holds it once, in float32.
"""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedModel

from src.checkpoints.checkpoint import Checkpoint, Generation, LazyTensor, LlamaArchitecture, TokenizerFiles
from src.checkpoints.json_files import read_json_object
from src.checkpoints.pieces import ScoredPieces
from utils.errors import UserError
from utils.files import write_json

SHARD_BYTES = 2**30
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FIELDS = tuple(LlamaArchitecture.__dataclass_fields__)
# Settings of config.json that change nothing in what the tensors compute when they are evaluated.
_WITHOUT_EFFECT = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
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


def read(path: Path, tokenizer: Path | None) -> Checkpoint:
    """Read a folder of a Llama; `tokenizer` names another folder to take the tokenizer from.

    Raises:
        UserError: a file is missing, the model is no Llama, or a setting of config.json is beyond `LlamaArchitecture`.
    """
    architecture, config = _read_architecture(path)
    files = _safetensors_files(path)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= _lazy_tensors(file)
    if architecture.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight").load()
        if not torch.equal(head, tensors["model.embed_tokens.weight"].load()):
            raise UserError(f"{path}: tie_word_embeddings=true, but lm_head.weight differs from the embedding; fix one")
    folder = tokenizer or path
    tokenizer_files = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    if folder / "tokenizer.json" not in tokenizer_files:
        raise UserError(f"{folder} has no tokenizer.json; name a folder that has one with --tokenizer FOLDER")
    settings = [file for file in (path / "config.json", path / "generation_config.json") if file.is_file()]
    checkpoint = Checkpoint(
        inputs=(*settings, *files, *tokenizer_files),
        architecture=architecture,
        tensors=tensors,
        tokenizer=TokenizerFiles(tokenizer_files),
        generation=_read_generation(path, config),
        logits=_evaluation(path),
        encode=_tokenization(folder),
    )
    checkpoint.check_tensors()
    return checkpoint


def _read_architecture(path: Path) -> tuple[LlamaArchitecture, LlamaConfig]:
    raw = read_json_object(path / "config.json")
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: model_type={raw.get('model_type')}; only llama can be converted")
    unknown = raw.keys() - set(_FIELDS) - _WITHOUT_EFFECT - {"rope_theta", "rope_scaling"}
    if unknown:
        given = {name: raw[name] for name in sorted(unknown)}
        raise UserError(f"{path}/config.json sets {given}, which no conversion carries over; remove what has no effect")
    config = LlamaConfig.from_pretrained(path)
    return LlamaArchitecture(**{name: getattr(config, name) for name in _FIELDS}), config


def _safetensors_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        names = set(read_json_object(path / _INDEX)["weight_map"].values())
        files = [path / name for name in sorted(names)]
    else:
        files = [path / _WEIGHTS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} lacks {missing}; give a folder with all of its safetensors files")
    return files


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


def _read_generation(path: Path, config: LlamaConfig) -> Generation:
    if (path / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(path)
    else:
        settings = GenerationConfig.from_model_config(config)
    ends = settings.eos_token_id
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
    return Generation(
        bos_token_id=settings.bos_token_id,
        stop_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        pad_token_id=settings.pad_token_id,
        sampling={name: value for name, value in settings.to_diff_dict().items() if name not in ids},
    )


def _evaluation(folder: Path) -> Callable[[Sequence[int]], torch.Tensor]:
    """transformers' own evaluation of the folder in float32; the model is loaded at the first call."""

    @functools.cache
    def model() -> PreTrainedModel:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        # Tensors beyond the architecture's were refused or left out on purpose when the folder was read.
        faults = {name: keys for name, keys in report.items() if keys and name != "unexpected_keys"}
        assert not faults, f"transformers did not load {folder} as it is: {faults}"
        return loaded.eval()

    @torch.no_grad()
    def logits(token_ids: Sequence[int]) -> torch.Tensor:
        return model()(torch.tensor([list(token_ids)])).logits[0]

    return logits


def _tokenization(folder: Path) -> Callable[[str], list[int]]:
    """AutoTokenizer's ids; the tokenizer is loaded at the first call."""
    tokenizer = functools.cache(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return lambda text: tokenizer()(text, verbose=False).input_ids  # quiet about texts beyond the context


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint into `folder`, which exists; every tensor keeps its dtype."""
    sizes, generation = checkpoint.architecture, checkpoint.generation
    stops = list(generation.stop_token_ids)
    LlamaConfig(
        **{name: getattr(sizes, name) for name in _FIELDS if name != "rope_parameters"},
        rope_parameters=dict(sizes.rope_parameters),
        bos_token_id=generation.bos_token_id,
        eos_token_id=stops[0] if stops else None,
        pad_token_id=generation.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype=checkpoint.tensors["model.embed_tokens.weight"].dtype,
    ).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=generation.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=generation.pad_token_id,
        **generation.sampling,
    ).save_pretrained(folder)
    _write_tensors(checkpoint, folder)
    if isinstance(checkpoint.tokenizer, TokenizerFiles):
        for path in checkpoint.tokenizer.paths:
            shutil.copyfile(path, folder / path.name)
    else:
        _write_pieces(checkpoint.tokenizer, generation, sizes.max_position_embeddings, folder)


def _write_tensors(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the shards one after the other; only one is in memory."""
    outlines = {
        name: torch.empty(checkpoint.tensors[name].shape, dtype=checkpoint.tensors[name].dtype, device="meta")
        for name in checkpoint.architecture.tensor_shapes()
    }
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=SHARD_BYTES)
    for filename, names in split.filename_to_tensors.items():
        # No name holds the shard, which would keep it in memory while the next one is read.
        save_file(
            {name: checkpoint.tensors[name].load().contiguous() for name in names},
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
    return read(folder, None)
