"""An adapter as others load it: beside its plain base, with all that it needs in its folder.

    start = starting_weights(model, config.adapter)     # before the first step
    save_adapter(model, folder, config.adapter, start=start)

A checkpoint within a run is PEFT's own, from which the run goes on; this is the result.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, save_as_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from config.adapter_constraints import CHANGES_BASE
from config.schema import AdapterConfig
from src.adapter_paths import NEW
from utils.logging import get_logger

log = get_logger(__name__)

BESIDE_FILE = "beside.json"
"""Beside an adapter's files: the adapters that must be active with it, as `adapter.beside` named them."""

LORA_ENERGY = 1 - 1e-6
"""Share of an update's squared norm that its LoRA keeps: an error of at most 0.1% of the update's norm."""

WEIGHTS = "adapter_model.safetensors"


def starting_weights(model: PeftModel, config: AdapterConfig) -> dict[str, torch.Tensor] | None:
    """Copies of the matrices that were taken out of the base at the start, on the host; None if none were.

    A run that is resumed takes the same ones out of the same base again.
    """
    if not config.init.startswith(CHANGES_BASE):
        return None
    weights = get_peft_model_state_dict(model, adapter_name=NEW, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items() if _is_matrix(name)}


def save_adapter(
    model: PeftModel,
    folder: Path,
    config: AdapterConfig,
    *,
    start: dict[str, torch.Tensor] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter that trained.

    Args:
        start: from `starting_weights`.
        state_dict: all weights, where the model's own are spread over processes.
    """
    if config.export_as_lora:
        _save_as_lora(model, folder)
    else:
        # PEFT saves a head that is a target whole, which without its start fits no other base.
        whole = embeddings_to_save(model) if start is None else False
        model.save_pretrained(folder, selected_adapters=[NEW], state_dict=state_dict, save_embedding_layers=whole)
    if start is not None:
        _subtract_start(model, folder, start)
    if config.beside:
        (folder / BESIDE_FILE).write_text(json.dumps(list(config.beside), indent=2) + "\n", encoding="utf-8")


def needed_beside(source: str) -> list[str]:
    """The adapters that must be active with one that was saved, in a folder or on the Hub."""
    found = cached_file(source, BESIDE_FILE, _raise_exceptions_for_missing_entries=False)
    return [] if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _is_matrix(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def embeddings_to_save(model: PeftModel) -> str | bool:
    """Whether embeddings are saved whole: PEFT says, unless what changed of them is in the adapter anyway.

    Rows that were added are new wherever the base is grown again, and the adapter's own rows then take their place.
    """
    sides = [side for side in (model.get_input_embeddings(), model.get_output_embeddings()) if side is not None]
    held = all(isinstance(side, TrainableTokensWrapper | ModulesToSaveWrapper) for side in sides)
    return False if held else "auto"


def _subtract_start(model: PeftModel, folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Make an adapter for a base without its start into one for the whole base, of twice the rank.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], with the same scale s. PEFT's own conversion leaves out what trains in
    full beside the matrices. A weight with fewer directions than the rank has matrices of so many, which zeros fill.
    """
    weights = load_file(folder / WEIGHTS)
    ranks = {name: module.r[NEW] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, tensor in weights.items():
        if name in start:
            first = start[name].to(tensor.dtype)
            side, sign = (0, 1) if ".lora_A." in name else (1, -1)
            shape = list(first.shape)
            shape[side] = 2 * (ranks[name.rsplit(".lora_", 1)[0]] - shape[side])
            weights[name] = torch.cat((tensor, sign * first, first.new_zeros(shape)), side)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    settings = LoraConfig.from_pretrained(folder)
    growth = 2**0.5 if settings.use_rslora else 2  # of alpha, which is divided by the rank or its root
    settings.init_lora_weights = True
    settings.r *= 2
    settings.lora_alpha *= growth
    settings.rank_pattern = {name: 2 * rank for name, rank in settings.rank_pattern.items()}
    settings.alpha_pattern = {name: growth * alpha for name, alpha in settings.alpha_pattern.items()}
    settings.save_pretrained(folder)


@torch.no_grad()
def _save_as_lora(model: PeftModel, folder: Path) -> None:
    """Write what the adapter adds to each weight as LoRA, and tell how much of it is lost."""
    save_as_lora(folder, model, rank=LORA_ENERGY, adapter_name=NEW)
    own, settings = model.peft_config[NEW], PeftConfig.from_pretrained(folder)
    settings.task_type, settings.revision = own.task_type, own.revision
    settings.base_model_name_or_path = own.base_model_name_or_path or model.get_base_model().name_or_path
    settings.inference_mode = True
    settings.save_pretrained(folder)
    weights, lost = load_file(folder / WEIGHTS), 0.0
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and f"{name}.lora_A.weight" in weights:
            update = module.get_delta_weight(NEW).float().cpu()
            kept = weights[f"{name}.lora_B.weight"].float() @ weights[f"{name}.lora_A.weight"].float()
            lost = max(lost, float((update - kept).norm() / update.norm().clamp(min=1e-30)))
    log.info("saved as LoRA; at most %.2g of an update's norm is lost", lost)
