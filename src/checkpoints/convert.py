"""Conversion of a checkpoint from one format to another, through `Checkpoint`, with a certificate.

convert(Path("model.bin"), Path("outputs/model"), target="hf", tokenizer=Path("tokenizer.bin"))
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.checkpoints import certificate, hf, llama2c
from src.checkpoints.checkpoint import Checkpoint
from utils.errors import UserError
from utils.files import whole_folder, write_json


@dataclass(frozen=True)
class Source:
    """A format that can be read."""

    read: Callable[[Path, Path | None], Checkpoint]
    """Takes the checkpoint's path and that of a separate tokenizer, if one was named."""
    recognises: Callable[[Path], bool]


@dataclass(frozen=True)
class Target:
    """A format that can be written."""

    write: Callable[[Checkpoint, Path], None]
    """Fills the folder it is given."""
    read_back: Callable[[Path], Checkpoint]
    """Reads that folder again, evaluated as the format's users would."""


SOURCES = {
    "hf": Source(hf.read, hf.recognises),
    "llama2c": Source(llama2c.read, llama2c.recognises),
}
TARGETS = {
    "hf": Target(hf.write, hf.read_back),
    "llama2c": Target(llama2c.write_version_0, llama2c.read_back),
    "llama2c-v1": Target(llama2c.write_version_1, llama2c.read_back),
}


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
    tokenizer: Path | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint, write it in another format, read that back and compare the two.

    `output` appears whole, with a `conversion.json` that records what was compared, or not at all.

    Args:
        target: a name in `TARGETS`.
        source: a name in `SOURCES`; None: told from the files.
        tokenizer: the tokenizer's file or folder, where the source does not hold it.
        check: whether what was written is read back and compared.
    Returns:
        The content of conversion.json.
    Raises:
        UserError: the output exists, the source cannot be read, or the target cannot hold it.
        CertificateError: what was written does not do what the source does.
    """
    if output.exists():
        raise UserError(f"{output} exists; name a folder that does not, or remove it first")
    source = source or recognised_source(source_path)
    for name, known, option in ((source, SOURCES, "--from"), (target, TARGETS, "--to")):
        if name not in known:
            raise UserError(f"{option} {name} is unknown; it is one of {', '.join(known)}")
    checkpoint = SOURCES[source].read(source_path, tokenizer)
    with whole_folder(output) as folder:
        TARGETS[target].write(checkpoint, folder)
        written = sorted(path for path in folder.iterdir() if path.is_file())
        record = {
            "from": source,
            "to": target,
            "inputs_sha256": certificate.fingerprints(checkpoint.inputs),
            "outputs_sha256": certificate.fingerprints(written),
            "versions": certificate.versions(),
            "check": certificate.compare(checkpoint, TARGETS[target].read_back(folder)) if check else None,
        }
        write_json(folder / "conversion.json", record)
    return record
