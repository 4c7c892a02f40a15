"""The one type that every checkpoint format is read to and written from.

A reader gives a `Checkpoint`: a description in plain fields, tensors by their Hugging Face names that are loaded one by
one on demand, a tokenizer, generation settings, and the source's own evaluation, which the certificate of a conversion
compares with that of what was written. A writer takes a `Checkpoint` and refuses, by name, a field that its format
cannot hold.

    checkpoint = llama2c.read(Path("model.bin"), Path("tokenizer.bin"))
    checkpoint.tensors["model.norm.weight"].load()
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from src.checkpoints.architecture import Architecture, LlamaArchitecture
from src.checkpoints.characters import Characters
from src.checkpoints.pieces import ScoredPieces
from src.checkpoints.tiktoken_ranks import TiktokenRanks
from utils.errors import UserError, some


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    """Reads the tensor anew at each call, so that the caller alone decides how long it stays in memory."""

    @property
    def size_in_bytes(self) -> int:
        """Memory that the loaded tensor takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Rounding = Callable[[str, torch.Tensor], torch.Tensor]
"""A tensor by its Hugging Face name -> the values that a target keeps of it, in any dtype that holds them."""


class Logits(Protocol):
    """An evaluation of a whole model in float32."""

    def __call__(self, rows: Sequence[Sequence[int]], rounding: Rounding | None = None) -> list[torch.Tensor]:
        """
        Args:
            rows: token ids, each row of at least one and at most as many as the model's context.
            rounding: what every weight goes through first. None: weights as they are.
        Returns:
            For each row float32 logits of shape (tokens, vocabulary).
        """


def rounded(
    tensors: Mapping[str, LazyTensor], rounding: Rounding | None, name_of: Callable[[str], str] = str
) -> Mapping[str, LazyTensor]:
    """The tensors, each rounded when it is loaded.

    Args:
        name_of: a tensor's Hugging Face name by its name in `tensors`.
    """
    if rounding is None:
        return tensors

    def wrapped(name: str, tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, load=lambda: rounding(name_of(name), tensor.load()))

    return {name: wrapped(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in Hugging Face's own files, which only need copying to another Hugging Face folder."""

    paths: tuple[Path, ...]

    @property
    def tokenizer_json(self) -> Path:
        """The file that holds vocabulary, merges and every step of tokenization."""
        return next(path for path in self.paths if path.name == "tokenizer.json")


@dataclass(frozen=True)
class MadeTokenizer:
    """A tokenizer in Hugging Face's own files that another format's vocabulary was made into."""

    texts: Mapping[str, str] = field(hash=False)
    """The content of tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja by these names."""

    @property
    def tokenizer_json(self) -> dict[str, Any]:
        """Vocabulary, merges and every step of tokenization."""
        return json.loads(self.texts["tokenizer.json"])


AnyTokenizer = ScoredPieces | TiktokenRanks | Characters | TokenizerFiles | MadeTokenizer


@dataclass(frozen=True)
class Generation:
    """How text is drawn from the model: the ids of the tokens that bound it."""

    bos_token_id: int | None
    stop_token_ids: tuple[int, ...]
    """Tokens that end a text, the tokenizer's own end token first."""
    pad_token_id: int | None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further settings, such as `temperature`, by transformers' names."""


@dataclass(frozen=True)
class ReadOptions:
    """What a person says of a source beside its path."""

    tokenizer: Path | None = None
    """The tokenizer's file or folder, where the source does not hold it."""
    meta_version: str | None = None
    """Which Llama a folder of Meta's is: 1, 2, 3, 3.1 or 3.2. None: what its files say, where they do."""
    instruct: bool | None = None
    """Whether a folder of Meta's is the model that answers (True) or the base (False). None: as its files say."""
    chat_template: Path | None = None
    """A file of Jinja, where the source holds no chat template."""
    activation: str | None = None
    """transformers' name of the feed-forward layers' activation, where the source does not tell it."""


@dataclass(frozen=True)
class WriteOptions:
    """What a person asks of a target."""

    dtype: str | None = None
    """Number format of the weights, by the target's name for it. None: the source's own, or the target's only one."""
    shard_bytes: int = 2**30
    """Most bytes of a weight file, where the target can have several."""
    shards: int = 1
    """Weight files that each hold a slice of every matrix, for as many processes."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in no particular format."""

    inputs: tuple[Path, ...]
    """The files it was read from."""
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    """By Hugging Face name, with rotary pairs in halves as transformers has them."""
    tokenizer: AnyTokenizer
    generation: Generation
    logits: Logits
    """The source's own evaluation."""
    encode: Callable[[str], list[int]]
    """The source's own tokenization, with the begin token in front."""
    chat_template: str | None = None
    """The Jinja of a tokenizer that is not in files of its own."""
    characters: frozenset[str] | None = None
    """The only characters that a text may have; None: any."""
    check_family: Callable[[], None] | None = None
    """Raises UserError where the tensors are not those of a family that `check_tensors` leaves to transformers."""

    def tensors_in_order(self) -> Mapping[str, LazyTensor]:
        """The tensors in the model's order, where its architecture tells that, else in the source's."""
        if not isinstance(self.architecture, LlamaArchitecture):
            return self.tensors
        return {name: self.tensors[name] for name in self.architecture.tensor_shapes()}

    def check_tensors(self) -> None:
        """Compare the tensors of a Llama with what its architecture needs; transformers compares those of others when
        it loads them.

        Raises:
            UserError: a tensor is missing, is not one of the architecture's, or has another shape.
        """
        if not isinstance(self.architecture, LlamaArchitecture):
            return
        shapes = self.architecture.tensor_shapes()
        missing, unknown = shapes.keys() - self.tensors.keys(), self.tensors.keys() - shapes.keys()
        if missing or unknown:
            raise UserError(
                f"{self.inputs[0]} lacks the tensors {some(missing)} and has {some(unknown)}, which its "
                "description does not allow; give a complete Llama checkpoint"
            )
        for name, shape in shapes.items():
            if tuple(self.tensors[name].shape) != shape:
                raise UserError(
                    f"{self.inputs[0]}: {name} has shape {tuple(self.tensors[name].shape)}, its description asks for "
                    f"{shape}; mend the description or the tensor"
                )
