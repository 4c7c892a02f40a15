"""Conversion of a checkpoint from one format to another, through `Checkpoint`, with a certificate.

convert(Path("model.bin"), Path("outputs/model"), target="hf", reading=ReadOptions(tokenizer=Path("tokenizer.bin")))
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from src.checkpoints import certificate, gguf, hf, llama2c, llama2c_training, meta, nanogpt
from src.checkpoints.checkpoint import Checkpoint, ReadOptions, Rounding, WriteOptions
from utils.errors import UserError
from utils.files import whole_folder, write_json


@dataclass(frozen=True)
class Source:
    """A format that can be read."""

    read: Callable[[Path, ReadOptions], Checkpoint]
    recognises: Callable[[Path], bool]
    options: frozenset[str] = frozenset({"tokenizer"})
    """The fields of `ReadOptions` that it heeds."""


@dataclass(frozen=True)
class Target:
    """A format that can be written."""

    write: Callable[[Checkpoint, Path, WriteOptions], Rounding | None]
    """Fills the folder it is given, and tells how it rounded weights."""
    read_back: Callable[[Path], Checkpoint]
    """Reads that folder again, evaluated as the format's users would."""
    dtypes: tuple[str, ...] = ()
    """Number formats that `WriteOptions.dtype` may ask for."""
    options: frozenset[str] = frozenset()
    """Further fields of `WriteOptions` that it heeds."""


SOURCES = {
    "hf": Source(hf.read, hf.recognises),
    "llama2c": Source(llama2c.read, llama2c.recognises),
    "meta": Source(meta.read, meta.recognises, options=meta.OPTIONS),
    "llama2c-training": Source(llama2c_training.read, llama2c_training.recognises),
    "nanogpt": Source(nanogpt.read, nanogpt.recognises, frozenset({"tokenizer", "activation"})),
    "gguf": Source(gguf.read, gguf.recognises, options=frozenset()),
}
TARGETS = {
    "hf": Target(hf.write, hf.read_back, dtypes=tuple(hf.DTYPES), options=frozenset({"shard_bytes"})),
    "llama2c": Target(llama2c.write_version_0, llama2c.read_back),
    "llama2c-v1": Target(llama2c.write_version_1, llama2c.read_back),
    "meta": Target(meta.write, meta.read_back, dtypes=tuple(meta.DTYPES), options=frozenset({"shards"})),
    "llama2c-v2": Target(llama2c.write_version_2, llama2c.read_back),
    "gguf": Target(gguf.write, gguf.read_back, dtypes=tuple(gguf.DTYPES)),
}


DTYPES = tuple(dict.fromkeys(dtype for target in TARGETS.values() for dtype in target.dtypes))


def recognised_source(path: Path) -> str:
    """The name of the one format that `path` is in.

    Raises:
        UserError: the path is missing, or no format or several recognise it.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint's file or folder")
    names = [name for name, source in SOURCES.items() if source.recognises(path)]
    if len(names) != 1:
        raise UserError(
            f"{path} is recognised as {' and '.join(names) or 'none'} of {', '.join(SOURCES)}; name its format with "
            "--from"
        )
    return names[0]


def convert(
    source_path: Path,
    output: Path,
    target: str,
    source: str | None = None,
    reading: ReadOptions | None = None,
    writing: WriteOptions | None = None,
    check: certificate.Kind | Literal["none"] = "logits",
) -> dict[str, Any]:
    """Read a checkpoint, write it in another format, read that back and compare the two.

    `output` appears whole, with a `conversion.json` that records what was compared, or not at all.

    Args:
        target: a name in `TARGETS`.
        source: a name in `SOURCES`; None: told from the files.
        check: how what was written is compared; see `certificate`. `none`: it is not.
    Returns:
        The content of conversion.json.
    Raises:
        UserError: the output exists, the source cannot be read, the target cannot hold it, or an option is not one of
            theirs.
        CertificateError: what was written does not do what the source does.
    """
    reading, writing = reading or ReadOptions(), writing or WriteOptions()
    if output.exists():
        raise UserError(f"{output} exists; name a folder that does not, or remove it first")
    source = source or recognised_source(source_path)
    for name, known, option in ((source, SOURCES, "--from"), (target, TARGETS, "--to")):
        if name not in known:
            raise UserError(f"{option} {name} is unknown; it is one of {', '.join(known)}")
    _check_options(source, reading, target, writing)
    checkpoint = SOURCES[source].read(source_path, reading)
    with whole_folder(output) as folder, ThreadPoolExecutor(max_workers=1) as beside:
        inputs = beside.submit(certificate.fingerprints, checkpoint.inputs)
        with _told_when_full(output, folder):
            rounding = TARGETS[target].write(checkpoint, folder, writing)
        written = sorted(path for path in folder.iterdir() if path.is_file())
        figures = None
        if check != "none":
            figures = certificate.compare(checkpoint, TARGETS[target].read_back(folder), rounding, check)
        record = {
            "from": source,
            "to": target,
            "inputs_sha256": inputs.result(),
            "outputs_sha256": certificate.fingerprints(written),
            "versions": certificate.versions(),
            "check": figures,
        }
        write_json(folder / "conversion.json", record)
    return record


@contextlib.contextmanager
def _told_when_full(output: Path, folder: Path) -> Iterator[None]:
    """Raises: UserError, naming the file that could not be written, in place of what the libraries make of that."""
    try:
        yield
    except OSError as error:
        if error.filename and Path(error.filename).parent != folder:
            raise
        files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)  # a failed write names no file
        name = Path(error.filename).name if error.filename else files[-1].name if files else "its first file"
        raise UserError(
            f"{output} was not written: {name} could not be ({error.strerror}); free space on its disk, or name "
            "another folder"
        ) from error


def _check_options(source: str, reading: ReadOptions, target: str, writing: WriteOptions) -> None:
    """Raises: UserError, naming an option that the source or the target would not heed."""
    dtypes = TARGETS[target].dtypes
    if writing.dtype is not None and writing.dtype not in dtypes:
        known = f"one of {', '.join(dtypes)}" if dtypes else "fixed: leave --dtype out"
        raise UserError(f"--dtype {writing.dtype} is not for --to {target}, whose number format is {known}")
    heeded = SOURCES[source].options | TARGETS[target].options | {"dtype"}
    for given in (reading, writing):
        for option in fields(given):
            if getattr(given, option.name) != option.default and option.name not in heeded:
                raise UserError(
                    f"--{option.name.replace('_', '-')} has no meaning from {source} to {target}; leave it out"
                )
