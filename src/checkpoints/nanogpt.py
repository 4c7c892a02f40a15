"""nanoGPT's training checkpoints: `ckpt.pt`, as GPT-2 in Hugging Face's form.

    checkpoint = read(Path("out/ckpt.pt"), ReadOptions(Path("data/shakespeare_char/meta.pkl")))

The layers are GPT-2's. Hugging Face stores the weights of GPT-2's projections transposed, and always has biases: zeros
stand for those of a model trained without.

nanoGPT's feed-forward layers computed GELU by its tanh approximation until June 2023 and exactly since then (pull
request 274), and nothing in a file tells which. The exact one is taken; `gelu_new` is the older one.

The embedding has more rows than the tokenizer has ids where the vocabulary was padded (50,304 for GPT-2's 50,257). The
rows stay. No text ever trained one as a target, but nothing forbids a model to choose it, and nanoGPT's own decoding
then fails: the ids stand in `suppress_tokens` of the generation settings, so `generate` never gives one.

Source: https://github.com/karpathy/nanoGPT/blob/master/model.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from src.checkpoints.architecture import OtherArchitecture, check_layers
from src.checkpoints.characters import Characters, read_characters
from src.checkpoints.checkpoint import Checkpoint, Generation, LazyTensor, ReadOptions, TokenizerFiles
from src.checkpoints.hf import backend_of, id_count, tokenization, tokenizer_files
from src.checkpoints.nanogpt_evaluation import NORM_EPS, TRANSPOSED, NanoGPT
from src.checkpoints.pickles import check_shapes, finite_number, has_settings, read_training, whole_number
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

ACTIVATIONS = ("gelu", "gelu_new")
_COUNTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions store; no bias has these names
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_MOST_PADDING = 127  # rows beyond the tokenizer's ids: vocabularies are padded to a multiple of 64 or 128
_END = "<|endoftext|>"


def recognises(path: Path) -> bool:
    """Whether `path` is a training checkpoint with nanoGPT's settings."""
    return path.is_file() and has_settings(path, set(_COUNTS))


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a `ckpt.pt` with its tokenizer: `options.tokenizer` is a `meta.pkl` or the folder of a Hugging Face
    tokenizer; None: the `meta.pkl` beside the file.

    Raises:
        UserError: the file is damaged or holds code, its tensors are not those that its settings describe, or the
            tokenizer is missing, damaged or of another size.
    """
    stored, settings = read_training(path, _BUFFERS)
    counts = {name: whole_number(path, settings, name) for name in _COUNTS}
    check_layers(f"{path}: n_layer", counts["n_layer"], len(stored))
    if counts["n_embd"] % counts["n_head"]:
        raise UserError(f"{path}: n_head={counts['n_head']} does not divide n_embd={counts['n_embd']}; mend model_args")
    biases = settings.get("bias", True)  # models from before the setting have biases
    stored.setdefault(_HEAD, stored.get(_EMBEDDING, torch.empty(0)))
    check_shapes(path, stored, _shapes(counts, biases))
    tied = torch.equal(stored[_HEAD], stored[_EMBEDDING])  # until January 2023 they were not
    if tied:
        del stored[_HEAD]
    activation = options.activation or _assumed_activation(path)
    vocabulary = _read_vocabulary(path, options.tokenizer, counts["vocab_size"])
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in stored.items()
    }
    model = NanoGPT(counts["n_layer"], counts["n_head"], activation == "gelu", tensors)
    return Checkpoint(
        inputs=(path, *vocabulary.files),
        architecture=_architecture(path, counts, settings, activation, tied),
        tensors=_hugging_face(tensors, _shapes(counts, True), tied),
        tokenizer=vocabulary.tokenizer,
        generation=vocabulary.generation,
        logits=model.logits,
        encode=vocabulary.encode,
        characters=vocabulary.characters,
    )


def _assumed_activation(path: Path) -> str:
    log.warning(
        "%s does not tell how its GELU is computed; the exact one is taken, as nanoGPT has it since June 2023: a model "
        "of an older version needs --activation gelu_new, or its logits are slightly off",
        path,
    )
    return "gelu"


def _shapes(counts: dict[str, int], biases: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor that nanoGPT stores, with its shape."""
    width, rows = counts["n_embd"], counts["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (rows, width),
        "transformer.wpe.weight": (counts["block_size"], width),
    }
    of_layer = {
        "ln_1": (width,),
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    modules = {
        f"transformer.h.{layer}.{name}": shape for layer in range(counts["n_layer"]) for name, shape in of_layer.items()
    }
    for name, shape in (modules | {"transformer.ln_f": (width,)}).items():
        shapes[f"{name}.weight"] = shape
        if biases:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes | {_HEAD: (rows, width)}


def _hugging_face(
    tensors: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], tied: bool
) -> dict[str, LazyTensor]:
    """The tensors as GPT2LMHeadModel names and turns them, zeros for biases that are not there."""
    dtype = tensors[_EMBEDDING].dtype

    def converted(name: str) -> LazyTensor:
        tensor = tensors.get(name)
        if tensor is None:
            return LazyTensor(shapes[name], dtype, lambda: torch.zeros(shapes[name], dtype=dtype))
        if not name.endswith(TRANSPOSED):
            return tensor
        return LazyTensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T)

    return {name: converted(name) for name in shapes if not (tied and name == _HEAD)}


def _architecture(
    path: Path, counts: dict[str, int], settings: dict[str, Any], activation: str, tied: bool
) -> OtherArchitecture:
    dropout = finite_number(path, settings, "dropout", 0.0)
    described = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": counts["block_size"],
        "activation_function": activation,
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": tied,
        **{name: counts[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout),
    }
    return OtherArchitecture(described, counts["vocab_size"], counts["block_size"], tied)


@dataclass(frozen=True)
class _Vocabulary:
    """What `Checkpoint` needs to know of a tokenizer."""

    files: tuple[Path, ...]
    tokenizer: Characters | TokenizerFiles
    generation: Generation
    encode: Callable[[str], list[int]]
    characters: frozenset[str] | None


def _read_vocabulary(path: Path, given: Path | None, rows: int) -> _Vocabulary:
    """Raises: UserError if there is no tokenizer, or it does not fit an embedding of `rows` rows."""
    beside = path.parent / "meta.pkl"
    if given is None and not beside.is_file():
        raise UserError(
            f"{path} holds no tokenizer and {beside} does not exist; name the data set's meta.pkl, or the folder of a "
            "Hugging Face tokenizer such as gpt2's, with --tokenizer"
        )
    found = given or beside
    if found.is_dir():
        return _byte_level(found, rows)
    characters = read_characters(found)
    if len(characters.characters) != rows:
        raise UserError(
            f"{found} has {len(characters.characters)} characters, but {_EMBEDDING} of {path} has {rows} rows; give "
            "the meta.pkl of the data that the model was trained on"
        )
    known = frozenset(characters.characters)
    return _Vocabulary((found,), characters, Generation(None, (), None), characters.encode, known)


def _byte_level(folder: Path, rows: int) -> _Vocabulary:
    """The tokenizer of a Hugging Face folder; `<|endoftext|>`, where it has one, bounds texts as in nanoGPT's data."""
    files = tokenizer_files(folder)
    backend = backend_of(files)
    ids = id_count(backend)
    if not 0 <= rows - ids <= _MOST_PADDING:
        raise UserError(
            f"{files.tokenizer_json} has {ids} ids, but {_EMBEDDING} has {rows} rows, where {ids} to "
            f"{ids + _MOST_PADDING} would fit; give the tokenizer that the model was trained with"
        )
    end = backend.token_to_id(_END)
    padding = {"suppress_tokens": list(range(ids, rows))} if rows > ids else {}
    generation = Generation(end, () if end is None else (end,), None, padding)
    return _Vocabulary(files.paths, files, generation, tokenization(folder), None)
