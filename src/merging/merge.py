"""An adapter merged into its base, without losing what it learned, and the proof of that.

record = merge(Path("outputs/run"), Path("outputs/merged"))

Where the base was held in 16 or 32 bit, the change is added to its weights in float32 and rounded once. Where it was
quantized, the adapter learned to make up for what that did to the weights too: the change is added to the dequantized
weights, and the sum is not quantized again, which would wipe out most of a change that is small beside the steps.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from src.checkpoints import certificate, hf
from src.checkpoints.checkpoint import Checkpoint, ReadOptions, WriteOptions
from src.merging.adapter import AdapterFolder, AdapterOptions, read_adapter
from src.merging.base import check_base
from src.merging.proof import LEAST_COSINE, Kept, kept_change, prove
from src.merging.renamed import module_tensors, write_stored
from src.merging.rows import rows_to_compare
from src.merging.trained import Trained, open_trained
from utils.digests import Digests
from utils.errors import UserError
from utils.files import whole_folder, write_json
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class MergeOptions:
    """What a person asks of a merge."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    dtype: str | None = None
    """Number format of the result, one of `hf.DTYPES`. None: the base's own 16 bit where that keeps the change, else
    float32."""
    rows: Path | None = None
    """File of held-out rows. None: the run's evaluation rows and fixed texts."""
    shard_bytes: int = WriteOptions.shard_bytes
    """Most bytes of a weight file."""


def merge(path: Path, output: Path, options: MergeOptions | None = None) -> dict[str, Any]:
    """Merge an adapter into its base; `output` appears whole, with a `conversion.json` of all figures, or not at all.

    Args:
        path: the adapter's folder, or its run's.
    Returns:
        The content of conversion.json.
    Raises:
        UserError: the output exists, or the adapter or its base cannot be read or do not belong together.
        CertificateError: the result does not do what the base with the adapter does.
    """
    options = options or MergeOptions()
    if output.exists():
        raise UserError(f"{output} exists; name a folder that does not, or remove it first")
    if options.dtype is not None and options.dtype not in hf.DTYPES:
        raise UserError(f"--dtype {options.dtype} is not for --merge; it is one of {', '.join(hf.DTYPES)}")
    adapter, digests = read_adapter(path, options.adapter), Digests()
    check_base(adapter, digests)
    trained = open_trained(adapter)
    if trained.unties:
        log.warning(
            "the base's head is its embedding, and the adapter changes them apart: tie_word_embeddings=false and a "
            "lm_head.weight of its own are written"
        )
    dtype, reason = choose_dtype(trained, adapter, options.dtype)
    log.info("%s; written in %s, as %s", how(adapter), dtype, reason)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(trained), local_files_only=True)
    sizes = trained.checkpoint.architecture
    rows = rows_to_compare(
        tokenizer,
        adapter.eval_sources,
        vocab_size=sizes.vocab_size,
        context=sizes.max_position_embeddings,
        file=options.rows,
    )
    with whole_folder(output) as folder, ThreadPoolExecutor(max_workers=1) as beside:
        inputs = beside.submit(_digests, trained.checkpoint.inputs, digests)
        with stored(trained, output.parent, dtype) as source:
            rounding = hf.write(source, folder, WriteOptions(dtype=dtype, shard_bytes=options.shard_bytes))
            written = sorted(file for file in folder.iterdir() if file.is_file())
            result = hf.read_back(folder)
            check = certificate.compare(source, result, rounding, "tensors")
        record = {
            "from": "adapter",
            "to": "hf",
            "base": adapter.named_base,
            "base_quantization": adapter.quantization,
            "base_quantization_told_by": adapter.told_by,
            "how": how(adapter),
            "dtype": dtype,
            "dtype_because": reason,
            "unties_embeddings": trained.unties,
            "check": check,
            "kept": prove(trained, result, rows, module_tensors(folder) if trained.renamed else None),
            "inputs_sha256": inputs.result(),
            "outputs_sha256": certificate.fingerprints(written),
            "versions": certificate.versions(),
        }
        write_json(folder / "conversion.json", record)
    return record


@contextlib.contextmanager
def stored(trained: Trained, beside: Path, dtype: str) -> Iterator[Checkpoint]:
    """The result's checkpoint with the names that its family stores.

    Args:
        beside: folder in which to set the tensors aside, where only a whole model can be renamed.
    """
    if not trained.renamed:
        yield trained.checkpoint
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".merge.") as name:
        fields = trained.checkpoint.architecture.config()
        settings = AutoConfig.for_model(**fields)
        write_stored(trained.merged, settings, Path(name), hf.DTYPES[dtype])
        renamed = hf.read(Path(name), ReadOptions(tokenizer=_tokenizer_folder(trained)))
        yield replace(trained.checkpoint, tensors=renamed.tensors)


def how(adapter: AdapterFolder) -> str:
    """The way in which an adapter is merged, in a line."""
    if adapter.quantization == "none":
        return "the change is added to the base's weights in float32 and rounded once"
    return (
        f"the change is added in float32 to the {adapter.quantization} weights that it was learned beside, which are "
        "dequantized for it and not quantized again"
    )


def choose_dtype(trained: Trained, adapter: AdapterFolder, asked: str | None) -> tuple[str, str]:
    """The number format to write, and the reason: that of a base in 16 bit where it keeps the change, else float32."""
    if asked is not None:
        return asked, "--dtype asks for it"
    own = max((tensor.dtype for tensor in trained.base.values()), key=lambda kind: kind.itemsize)
    if adapter.quantization != "none":
        own = torch.bfloat16
    if own.itemsize != 2:
        return "float32", "it is the base's own"
    name = str(own).removeprefix("torch.")
    kept: Kept = kept_change(trained, trained.merged, own)
    told = f"{name} keeps the change of each tensor with a cosine of at least {kept.least_cosine:.3f}"
    if kept.least_cosine >= LEAST_COSINE:
        return name, told
    return "float32", f"{told}, and {LEAST_COSINE} is needed"


def _digests(files: Sequence[Path], digests: Digests) -> dict[str, str]:
    """SHA-256 by folder and file name, as the base and the adapter have files of the same names."""
    return {f"{file.parent.name}/{file.name}": digests.sha256(file) for file in files}


def _tokenizer_folder(trained: Trained) -> Path:
    return trained.checkpoint.tokenizer.tokenizer_json.parent
