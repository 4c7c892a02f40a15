"""What a model card says of what trained: weights or an adapter's method, and the lines that load what it needs.

method_text(config["adapter"], adapter_config_json)     # "LoRA of rank 16, alpha 32.0 (scale alpha / rank), ..."
beside_lines(["me/first"], launched_in)                 # Python for after `model` is loaded
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.hub import is_hub_id


def method_name(adapter: dict[str, Any], settings: dict[str, Any]) -> str:
    """What the saved adapter is, such as `LoRA` or `OFT`.

    Args:
        adapter: the run's config of it.
        settings: the saved adapter's adapter_config.json; empty where it is none.
    """
    kind = settings.get("peft_type", adapter.get("kind", "lora")).lower()
    return "LoRA" if kind == "lora" else kind.upper().replace("_", " ")


def method_text(adapter: dict[str, Any], settings: dict[str, Any]) -> str:
    """How it was trained, in a line."""
    modules = ", ".join(adapter.get("target_modules", ()))
    modules += f" in layers {adapter['layers']}" if adapter.get("layers") else ""
    modules = ", ".join([modules, *adapter.get("target_parameters", ())])
    if adapter.get("kind") == "lora":
        # PiSSA and its like are saved with twice the rank that they trained with.
        scale = "alpha / sqrt(rank)" if adapter.get("rslora") else "alpha / rank"
        rank, alpha = adapter.get("rank") or 16, adapter.get("alpha") or 32.0
        name = "DoRA" if adapter.get("dora") else "LoRA"
        text = f"{name} of rank {rank}, alpha {alpha} (scale {scale}), dropout {adapter.get('dropout') or 0.0}"
        text += f", started by {adapter['init']}" if adapter.get("init", "default") != "default" else ""
    else:
        text = adapter.get("kind", "").upper().replace("_", " ")
        given = {key: adapter.get(key) for key in ("rank", "alpha", "dropout") if adapter.get(key) is not None}
        text += "".join(f", {key} {value}" for key, value in (given | adapter.get("settings", {})).items())
        text += ", saved as LoRA" if settings.get("peft_type", "").upper() == "LORA" else ""
    text = f"{text}, on {modules}"
    if adapter.get("path"):
        text = f"{method_name(adapter, settings)}, going on from the adapter {Path(adapter['path']).name}"
    if saved := adapter.get("modules_to_save"):
        text += f"; in full: {', '.join(saved)}"
    if tokens := adapter.get("trainable_tokens"):
        text += f"; rows of the tokens {', '.join(tokens)}"
    return text


def weights_text(freeze: dict[str, Any], *, qat: str) -> str:
    """Which of the model's own weights trained, in a line.

    Args:
        freeze: the run's config of that.
        qat: rounding that they were trained for.
    """
    last = freeze.get("last_layers")
    parts = [f"the last {last} layers"] * bool(last) + list(freeze.get("train", ()))
    text = f"of the weights, {', '.join(parts)} train" if parts else "every weight trains"
    text += f", but not {', '.join(freeze['frozen'])}" if freeze.get("frozen") else ""
    return text + (f"; weights are rounded ({qat}), and need torchao to load" if qat != "none" else "")


def beside_lines(paths: Sequence[str], launched_in: Path) -> list[str]:
    """Python that puts the adapters that one needs beside it, after `model` is loaded; nothing if it needs none."""
    lines = []
    for number, path in enumerate(paths):
        shown, note = (path, "") if is_hub_id(path, launched_in) else (Path(path).name, "  # its folder")
        lines.append(f'model.load_adapter("{shown}", adapter_name="beside_{number}"){note}')
    names = ["default", *(f"beside_{number}" for number in range(len(paths)))]
    return [*lines, f"model.base_model.set_adapter({names})".replace("'", '"')] if paths else []
