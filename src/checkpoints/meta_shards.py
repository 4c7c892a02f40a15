"""Meta's `consolidated.NN.pth`: each file holds a slice of every matrix, for one of the processes that share a model.

    shards = open_shards(Path("Llama3.1-8B"))
    tensors = joined(shards, architecture)           # whole tensors by Meta's names, joined as they are loaded

Projections into heads or the wide layer, and the head, are cut by rows; those back from it by columns; norms stand
whole in every file. Llama 1 and 2 cut the embedding by columns, Llama 3 and later by rows.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py and, for the embedding of Llama 1
and 2, https://github.com/meta-llama/llama/blob/main/llama/model.py
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from src.checkpoints.architecture import LlamaArchitecture
from src.checkpoints.checkpoint import LazyTensor
from src.checkpoints.interleaved import shapes_by_meta_name
from src.checkpoints.pickles import pickled_tensors
from utils.errors import UserError
from utils.files import is_write_failure

_FILE = re.compile(r"consolidated\.(\d+)\.pth")
_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("wo", "w2")
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_ROTARY = "rope.freqs"  # in some files of Llama 1 and 2; computed anew by every reader


@dataclass(frozen=True)
class Shard:
    """One file, whose tensors stay in it until they are used."""

    path: Path
    tensors: Mapping[str, torch.Tensor]


def shard_files(folder: Path) -> list[Path]:
    """The folder's files of weights in the order of their numbers."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def open_shards(folder: Path) -> list[Shard]:
    """Open all files of weights.

    Raises:
        UserError: there is none, one is missing or damaged, or one has tensors that another lacks.
    """
    files = shard_files(folder)
    names = [path.name for path in files]
    expected = [f"consolidated.{number:02}.pth" for number in range(max(1, len(files)))]
    if names != expected:
        raise UserError(
            f"{folder} lacks {sorted(set(expected) - set(names))} and has {names}; give a folder with all of its shards"
        )
    shards = [
        Shard(path, {name: tensor for name, tensor in pickled_tensors(path).items() if not name.endswith(_ROTARY)})
        for path in files
    ]
    for shard in shards:
        if apart := sorted(shard.tensors.keys() ^ shards[0].tensors.keys()):
            raise UserError(
                f"{shard.path} and {files[0].name} do not hold the same tensors ({apart[:4]} are in one alone); give "
                "the shards of one model"
            )
    return shards


def tensor_of(shard: Shard, name: str) -> torch.Tensor:
    """Raises: UserError if the file lacks the tensor, or it is no matrix."""
    tensor = shard.tensors.get(name)
    if tensor is None or tensor.dim() != 2:
        found = "lacks" if tensor is None else f"has in another shape than a matrix's, {tuple(tensor.shape)},"
        raise UserError(f"{shard.path} {found} {name}; give a complete checkpoint of Meta's")
    return tensor


def embedding_axis(shards: Sequence[Shard], dim: int) -> int:
    """The axis by which the embedding is cut: 1 (columns) in Llama 1 and 2, 0 (rows) from Llama 3 on; 0 if it is whole.

    Raises:
        UserError: its columns are neither all of `dim` nor a shard's part of it.
    """
    columns = tensor_of(shards[0], EMBEDDING).shape[1]
    if columns == dim:
        return 0
    if columns * len(shards) == dim:
        return 1
    raise UserError(
        f"{shards[0].path}: {EMBEDDING} has {columns} columns; of dim={dim} in params.json, each of {len(shards)} "
        "shards holds all or an equal part: a shard is missing, or params.json is of another model"
    )


def _axis(name: str, of_embedding: int) -> int | None:
    """The axis by which a tensor is cut; None: it is whole in every shard."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if name == EMBEDDING:
        return of_embedding
    return 0 if kind in _ROWS else 1 if kind in _COLUMNS else None


def has_tied_head(shards: Sequence[Shard], of_embedding: int) -> bool:
    """Whether the head is the embedding, value for value, or left out; compared slice by slice."""
    if HEAD not in shards[0].tensors:
        return True
    tables, heads = [[tensor_of(shard, name) for shard in shards] for name in (EMBEDDING, HEAD)]
    if of_embedding == 0:
        return all(torch.equal(table, head) for table, head in zip(tables, heads, strict=True))
    rows, columns = heads[0].shape[0], tables[0].shape[1]
    return all(
        torch.equal(table[row * rows : (row + 1) * rows], head[:, column * columns : (column + 1) * columns])
        for row, head in enumerate(heads)
        for column, table in enumerate(tables)
    )


def joined(shards: Sequence[Shard], architecture: LlamaArchitecture) -> dict[str, LazyTensor]:
    """The model's tensors by Meta's names, each joined from its slices when it is loaded.

    Where there are more shards than key heads, each shard has one head, and neighbours the same one.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or dtype than its description and the number of
            shards ask for; norms differ between shards; or, when a key projection is loaded, copies of a head differ.
    """
    of_embedding = embedding_axis(shards, architecture.hidden_size)
    shapes = shapes_by_meta_name(architecture)
    held = shards[0].tensors.keys() - ({HEAD} if architecture.tie_word_embeddings else set())
    if held != shapes.keys():
        raise UserError(
            f"{shards[0].path} lacks the tensors {sorted(shapes.keys() - held)[:4]} and has "
            f"{sorted(held - shapes.keys())[:4]}, which params.json does not allow; give a complete Llama of Meta's"
        )
    return {
        name: _joined(shards, name, shape, _axis(name, of_embedding), _copies(name, architecture, len(shards)))
        for name, shape in shapes.items()
    }


def _copies(name: str, architecture: LlamaArchitecture, shards: int) -> int:
    """Shards that hold the same slice of a tensor."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return max(1, shards // architecture.num_key_value_heads) if kind in ("wk", "wv") else 1


def _joined(shards: Sequence[Shard], name: str, shape: tuple[int, ...], axis: int | None, copies: int) -> LazyTensor:
    parts = len(shards) // copies
    expected = shape if axis is None else (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])
    slices = [shard.tensors[name] for shard in shards]
    for shard, part in zip(shards, slices, strict=True):
        whole = axis is None or (len(shards) % copies == 0 and shape[axis] % parts == 0)
        if not whole or tuple(part.shape) != expected or part.dtype != slices[0].dtype:
            raise UserError(
                f"{shard.path}: {name} is {part.dtype} of {tuple(part.shape)}; as one of {len(shards)} shards of "
                f"{shape} it must be {slices[0].dtype} of {expected}: a shard is missing, or params.json is of "
                "another model"
            )
    if axis is None:
        _check_equal(name, shards)

    def load() -> torch.Tensor:
        if axis is None or len(slices) == 1:
            return slices[0]
        for first in range(0, len(shards), copies):
            _check_equal(name, shards[first : first + copies])
        return torch.cat(slices[::copies], dim=axis)

    return LazyTensor(shape, slices[0].dtype, load)


def _check_equal(name: str, shards: Sequence[Shard]) -> None:
    first = shards[0].tensors[name]
    for shard in shards[1:]:
        if not torch.equal(shard.tensors[name], first):
            raise UserError(
                f"{shard.path}: {name} differs from that of {shards[0].path.name}, though both must hold the same; "
                "fetch both again"
            )


def check_split(architecture: LlamaArchitecture, shards: int, of_embedding: int) -> None:
    """Raises: UserError, naming what cannot be cut into as many equal parts."""
    counts = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "intermediate_size": architecture.intermediate_size,
        "vocab_size": architecture.vocab_size,
    }
    counts |= {"hidden_size": architecture.hidden_size} if of_embedding else {}
    for name, count in counts.items():
        if shards < 1 or count % shards:
            raise UserError(f"{name}={count} cannot be cut into --shards {shards} equal parts; choose a divisor of it")


def write_shards(
    folder: Path, tensors: Mapping[str, Callable[[], torch.Tensor]], shards: int, of_embedding: int
) -> None:
    """Write whole tensors by Meta's names as `shards` files.

    `torch.save` takes a file's tensors all at once, so they are first cut onto the disk, one whole tensor in memory at
    a time, and saved from there; for that, the disk needs room for the model once more.

    Raises:
        UserError: the disk does not take a file.
    """
    with tempfile.TemporaryDirectory(prefix=".slices.", dir=folder) as slices:
        places = [Path(slices, str(shard)) for shard in range(shards)]
        stored: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in places]
        for place in places:
            place.mkdir()
        for name, load in tensors.items():
            axis = _axis(name, of_embedding)
            whole = load()
            parts = [whole] * shards if axis is None else whole.chunk(shards, dim=axis)
            for place, part, described in zip(places, parts, stored, strict=True):
                described[name] = (tuple(part.shape), part.dtype)
                with _told(folder, name), open(place / name, "wb") as file:
                    file.write(part.contiguous().view(torch.uint8).numpy().data)
            del whole, parts
        for shard, place in enumerate(places):
            file = folder / f"consolidated.{shard:02}.pth"
            content = {
                name: torch.from_file(
                    str(place / name), shared=False, size=torch.Size(shape).numel(), dtype=dtype
                ).view(shape)
                for name, (shape, dtype) in stored[shard].items()
            }
            with _told(folder, file.name):
                torch.save(content, file)
            del content
            shutil.rmtree(place)


@contextlib.contextmanager
def _told(folder: Path, name: str) -> Iterator[None]:
    """Turn a failure to write into one that names what was written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise UserError(f"{name} cannot be written below {folder.parent} ({error}); make room on the disk") from error
