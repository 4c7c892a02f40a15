"""An adapter's folder: what it was trained on, as far as it and its run's record say.

adapter = read_adapter(Path("outputs/run"), AdapterOptions())
adapter.base, adapter.quantization       # Path("/models/llama"), "nf4"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from config.schema import ModelConfig
from src.checkpoints.json_files import read_json_object
from utils.errors import UserError

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it was; the others move part of it into the adapter."""


@dataclass(frozen=True)
class AdapterOptions:
    """What a person says of an adapter that its folder does not."""

    base: Path | None = None
    """Folder of the base, where it is not at the path that the adapter names."""
    quantization: str | None = None
    """One of `QUANTIZATIONS`, in which the base was held while the adapter trained."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter, and what it was trained on."""

    path: Path
    config: PeftConfig
    base: Path
    """Folder of the base's checkpoint."""
    named_base: str
    """The base as the adapter names it."""
    quantization: str
    """One of `QUANTIZATIONS`."""
    told_by: str
    """What tells the quantization."""
    model: ModelConfig
    """How the base was loaded to be trained, as far as that is known."""
    eval_sources: tuple[dict[str, Any], ...]
    """The run's `data.eval`; empty where it had none, or is not known."""

    @property
    def weights(self) -> Path:
        """The file of what was learned."""
        return self.path / WEIGHTS

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the adapter was read from."""
        return (self.path / CONFIG, self.weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors, by name."""
        with safe_open(self.weights, "pt") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file."""
        with safe_open(self.weights, "pt") as content:
            return content.get_tensor(name)


def is_adapter(path: Path) -> bool:
    """Whether `path` is the folder of an adapter, or of a run that trained one."""
    return any((folder / CONFIG).is_file() for folder in (path, path / "model"))


def read_adapter(path: Path, options: AdapterOptions) -> AdapterFolder:
    """Read what an adapter's folder, or that of its run, says.

    Raises:
        UserError: a file is missing or damaged; nothing tells what the base is or how it was held, or two things do
            that differ.
    """
    if not is_adapter(path):
        raise UserError(f"--merge {path} has no {CONFIG}; give an adapter's folder, or the run's that trained it")
    folder = path if (path / CONFIG).is_file() else path / "model"
    config = _read_config(folder)
    _check_weights(folder)
    record = _run_record(folder)
    model = record.get("model", {})
    named = config.base_model_name_or_path or model.get("path")
    if model.get("path") and config.base_model_name_or_path and not _same(model["path"], named):
        raise UserError(
            f"{folder / CONFIG} names the base {named}, the run's config.json {model['path']}; they do not belong "
            "together: give the adapter's own run"
        )
    quantization, told_by = _quantization(folder, model, options)
    base = options.base or _base_folder(folder, named, config.revision)
    if "quantization_config" in read_json_object(base / "config.json"):
        raise UserError(
            f"the base {base} is stored quantized; give the checkpoint that it was quantized from with "
            "--base-model, and its format with --base-quantization, or keep the adapter beside it"
        )
    known = {name: model[name] for name in ("dtype", "trust_remote_code") if name in model}
    return AdapterFolder(
        path=folder,
        config=config,
        base=base,
        named_base=str(named),
        quantization=quantization,
        told_by=told_by,
        model=ModelConfig(path=str(base), quantization=quantization, **known),
        eval_sources=tuple(record.get("data", {}).get("eval") or ()),
    )


def _read_config(folder: Path) -> PeftConfig:
    settings = read_json_object(folder / CONFIG)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is not one that PEFT reads ({error}); fetch it again") from error
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UserError(
            f"{folder / CONFIG} has init_lora_weights={start}, which moves part of the base into the adapter, and its "
            "file does not tell which; save it again by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    return config


def _check_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        hint = f"; load and save it with PEFT, as it has {PICKLE}" if (folder / PICKLE).is_file() else "; fetch it"
        raise UserError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or cut short ({error}); fetch it again") from error


def _run_record(folder: Path) -> dict[str, Any]:
    """The config.json of the run that the folder is part of; empty where there is none."""
    path = folder.absolute().parent / "config.json"
    record = read_json_object(path) if path.is_file() else {}
    return record if isinstance(record.get("model"), dict) and "adapter" in record else {}


def _quantization(folder: Path, model: dict[str, Any], options: AdapterOptions) -> tuple[str, str]:
    """The base's format while the adapter trained, and what tells it."""
    recorded, given = model.get("quantization"), options.quantization
    if recorded and given and recorded != given:
        raise UserError(
            f"--base-quantization {given} was given, but the run's config.json has model.quantization={recorded}; "
            "leave the option out"
        )
    if recorded:
        return recorded, "the run's config.json"
    if given:
        return given, "--base-quantization"
    raise UserError(
        f"nothing beside {folder} tells in which number format its base was held while it trained, and an adapter "
        f"merged into another one loses what it learned; say it with --base-quantization "
        f"{'|'.join(QUANTIZATIONS)}, where none is 16 or 32 bit"
    )


def _base_folder(folder: Path, named: str | None, revision: str | None) -> Path:
    """The folder of the base, which is fetched where it is on the Hub."""
    if named is None:
        raise UserError(f"{folder / CONFIG} names no base; give its folder with --base-model")
    if Path(named).is_dir():
        return Path(named)
    try:
        return Path(
            snapshot_download(named, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.bin"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{folder / CONFIG} names the base {named}, which is no folder here and could not be fetched "
            f"({' '.join(str(error).split())[:200]}); give its folder with --base-model"
        ) from error


def _same(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(first).resolve() == Path(second).resolve())
