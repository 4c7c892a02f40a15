"""llama2.c's training checkpoints: `ckpt.pt`, from which its export.py makes the files that run.c runs.

    checkpoint = read(Path("out/ckpt.pt"), ReadOptions(Path("tok512.bin")))

Tensors have Meta's names, rotary pairs stand side by side, and the head is the embedding's own. nanoGPT calls its file
the same; the settings tell them apart.

Source: https://github.com/karpathy/llama2.c/blob/350e04fe35433e6d2941dce5a1f53308f87058eb/train.py
"""

from pathlib import Path
from typing import Any

import torch

from src.checkpoints.architecture import LlamaArchitecture, check_layers
from src.checkpoints.checkpoint import Checkpoint, LazyTensor, ReadOptions
from src.checkpoints.interleaved import hugging_face_name
from src.checkpoints.llama2c import NORM_EPS, ROPE_THETA, checkpoint_of, tokenizer_of
from src.checkpoints.pickles import check_shapes, finite_number, has_settings, read_training, whole_number
from utils.errors import UserError

_COUNTS = ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")
_BUFFERS = (".attention.mask", "freqs_cos", "freqs_sin", "freqs_cis")  # tables that some versions store
_HEAD, _EMBEDDING = "output.weight", "tok_embeddings.weight"


def recognises(path: Path) -> bool:
    """Whether `path` is a training checkpoint with llama2.c's settings."""
    return path.is_file() and has_settings(path, set(_COUNTS))


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a `ckpt.pt`; `options.tokenizer` is llama2.c's tokenizer file.

    Raises:
        UserError: the file is damaged or holds code, its tensors are not those that its settings describe, or the
            tokenizer is missing, damaged or of another size.
    """
    stored, settings = read_training(path, _BUFFERS)
    stored.setdefault(_HEAD, stored.get(_EMBEDDING, torch.empty(0)))
    sizes = _architecture(path, settings, tied=False)
    check_layers(f"{path}: n_layers", sizes.num_hidden_layers, len(stored))
    check_shapes(path, stored, _shapes(sizes, stored))
    if torch.equal(stored[_HEAD], stored[_EMBEDDING]):
        del stored[_HEAD]
        sizes = _architecture(path, settings, tied=True)
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in stored.items()
    }
    tokenizer, pieces = tokenizer_of(path, options, sizes.vocab_size)
    return checkpoint_of((path, tokenizer), sizes, tensors, pieces)


def _shapes(sizes: LlamaArchitecture, stored: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """What the settings ask for, by the file's own names; a stored name that no Llama has stays out."""
    wanted = sizes.tensor_shapes()
    names = dict(zip(wanted, wanted, strict=True))  # a tensor that the file lacks is told by Hugging Face's name
    for name in stored:
        try:
            names[hugging_face_name(name)] = name
        except (KeyError, IndexError):
            continue
    return {names[name]: shape for name, shape in wanted.items()}


def _architecture(path: Path, settings: dict[str, Any], *, tied: bool) -> LlamaArchitecture:
    counts = {name: whole_number(path, settings, name) for name in _COUNTS}
    heads = counts["n_heads"]
    keys = heads if settings.get("n_kv_heads") is None else whole_number(path, settings, "n_kv_heads")
    if counts["dim"] % (2 * heads) or heads % keys:
        raise UserError(
            f"{path}: n_heads={heads} must divide dim={counts['dim']} into even sizes, and be a multiple of "
            f"n_kv_heads={keys}; mend model_args"
        )
    return LlamaArchitecture(
        vocab_size=counts["vocab_size"],
        hidden_size=counts["dim"],
        intermediate_size=_hidden_dim(path, settings),
        num_hidden_layers=counts["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=counts["dim"] // heads,
        max_position_embeddings=counts["max_seq_len"],
        rms_norm_eps=finite_number(path, settings, "norm_eps", NORM_EPS),
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )


def _hidden_dim(path: Path, settings: dict[str, Any]) -> int:
    """Given, or two thirds of 4 x dim, rounded up to a multiple of `multiple_of`."""
    if settings.get("hidden_dim") is not None:
        return whole_number(path, settings, "hidden_dim")
    multiple = whole_number(path, {"multiple_of": 256, **settings}, "multiple_of")
    return -(-(8 * whole_number(path, settings, "dim") // 3) // multiple) * multiple
