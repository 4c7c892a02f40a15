"""What the weights of a base are held in: formats that a run asks for, and those that a checkpoint comes with.

    check_base(config.model, settings, trains_all=False)        # before anything takes time
    model = AutoModelForCausalLM.from_pretrained(path, **loading_options(config.model, settings, trains_all=False))
    finish_base(model, config.model)

bitsandbytes' formats and torchao's that round weights alone pass an exact gradient of their values to what is below
them. torchao's that round activations too do not: the rounding has no gradient, so adapters below would learn from next
to nothing. Such formats serve the other way round, as fake rounding while the weights themselves train (`model.qat`),
whose gradient is that of what is rounded (arXiv:1308.3432).
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from config.schema import ModelConfig
from utils.distributed import accelerator_name, shards_weights
from utils.errors import UserError
from utils.launch import processes_started
from utils.logging import get_logger

log = get_logger(__name__)

GROUP = 32
"""Weights of a row that share a scale in torchao's 4-bit formats."""

_PACKAGES = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",), "torchao": ("torchao",)}
"""What transformers needs to load formats that are in no requirements of ours."""

_TRAINABLE_TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
"""torchao's formats that transformers' Trainer takes, as a checkpoint names them."""

_TORCHAO_NAMES = {"Int8Tensor": "torchao int8", "IntxUnpackedToInt8Tensor": "torchao int4", "Float8Tensor": "float8"}


def check_base(config: ModelConfig, settings: PreTrainedConfig, *, trains_all: bool) -> None:
    """Make sure that a run can train on the format that its base will have, before the base is loaded.

    Args:
        trains_all: whether the weights themselves train, and no adapter.
    Raises:
        UserError: a package is missing, the checkpoint is quantized otherwise or in a way that nothing trains on, rows
            of weights do not part into groups, or several processes would have to share weights of torchao.
    """
    _check_own(config, settings, trains_all=trains_all)
    held = own_format(settings) or config.quantization
    if held.startswith("torchao") and processes_started() > 1:  # DDP, and FSDP when it shards, take views of weights
        raise UserError(
            f"weights in {held} cannot be sent between the {processes_started()} processes of this run; start one, or "
            "use model.quantization=nf4 or int8 on a checkpoint that is not quantized"
        )
    if config.quantization.startswith("torchao") or config.qat != "none":
        field = f"model.qat={config.qat}" if config.qat != "none" else f"model.quantization={config.quantization}"
        if importlib.util.find_spec("torchao") is None:
            raise UserError(
                f"{field} needs torchao, which is not installed; run `pip install -r requirements/quantization.txt`, "
                "or leave it out"
            )
        if config.qat != "none" or config.quantization == "torchao_int4":
            _check_groups(settings, field, trust_remote_code=config.trust_remote_code)


def own_format(settings: PreTrainedConfig) -> str | None:
    """The format that a checkpoint's weights come in: a name of `model.quantization`, or its quant_method; None: plain
    numbers."""
    own = _own(settings)
    if not own:
        return None
    if own.get("load_in_8bit"):
        return "int8"
    if own.get("load_in_4bit"):
        return own.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    return str(own.get("quant_method", "an unknown format"))


def _own(settings: PreTrainedConfig) -> dict[str, Any]:
    own = getattr(settings, "quantization_config", None) or {}
    return own if isinstance(own, dict) else own.to_dict()


def _check_own(config: ModelConfig, settings: PreTrainedConfig, *, trains_all: bool) -> None:
    name = own_format(settings)
    if name is None:
        return
    given = f"model.path={config.path} is quantized already, in {name}"
    if config.quantization not in ("none", name):
        raise UserError(
            f"{given}, and model.quantization={config.quantization} asks for another format; leave out "
            "model.quantization, or start from a checkpoint that is not quantized"
        )
    if config.qat != "none":
        raise UserError(f"{given}, and model.qat={config.qat} trains plain weights; start from a checkpoint of those")
    missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"{given}, which needs {' and '.join(missing)}, not installed here; run `pip install {' '.join(missing)}`, "
            "or start from a checkpoint that is not quantized, with model.quantization=nf4 to spare memory"
        )
    if name in ("mxfp4", "fp8"):
        return
    if name == "torchao":
        kind = _own(settings).get("quant_type", {}).get("default", {}).get("_type", "an unknown type")
        if kind not in _TRAINABLE_TORCHAO:
            raise UserError(
                f"{given} ({kind}), through which no adapter trains; start from the checkpoint that it was made of, "
                "with model.quantization=torchao_int8 to spare memory"
            )
    elif name not in ("nf4", "fp4", "int8", *_PACKAGES):
        raise UserError(
            f"{given}, which a run cannot train on; start from a checkpoint in nf4, fp4, int8, fp8, mxfp4, gptq, awq "
            "or torchao's int8 or float8, or from one that is not quantized"
        )
    if trains_all:
        raise UserError(
            f"{given}, whose weights do not train, and adapter.kind=none trains them; give adapter.kind=lora, or start "
            "from a checkpoint that is not quantized"
        )


def _check_groups(settings: PreTrainedConfig, field: str, *, trust_remote_code: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    for name, module in model.named_modules():
        if _rounds(model, module) and module.in_features % GROUP:
            raise UserError(
                f"{field} rounds weights in groups of {GROUP}, and {name} has rows of {module.in_features}, no "
                "multiple of that; use model.quantization=torchao_int8 with an adapter, or leave it out"
            )


def _rounds(model: PreTrainedModel, module: torch.nn.Module) -> bool:
    """Whether torchao rounds a module: a linear layer that is not the head, as transformers chooses them."""
    return isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()


def loading_options(
    config: ModelConfig, settings: PreTrainedConfig, *, trains_all: bool, dtype: torch.dtype | str
) -> dict[str, Any]:
    """What `from_pretrained` is to be told of the format.

    Args:
        dtype: of the weights that are not quantized; `auto` is the checkpoint's own.
    """
    placed = {"device_map": {"": _device_index()}}
    own = own_format(settings)
    if own == "mxfp4":  # its kernels have no backward pass
        log.info("%s: weights are dequantized from mxfp4", config.path)
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if own == "fp8":
        if trains_all or not _fp8_has_gradient():
            log.info("%s: weights are dequantized from fp8", config.path)
            return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
        return placed
    if own is not None:
        return placed
    if config.quantization in ("none", "torchao_int4"):
        return {}
    if config.quantization.startswith("torchao"):
        return {"quantization_config": TorchAoConfig(_torchao_settings(config.quantization)), **placed}
    return {"quantization_config": _bitsandbytes(config, settings, dtype), **placed}


def _fp8_has_gradient() -> bool:
    """Whether the installed transformers passes gradients through fp8 layers, and this machine computes in fp8."""
    from transformers.integrations import finegrained_fp8

    return hasattr(finegrained_fp8, "FP8LinearFunction") and accelerator_name() == "cuda"


def _device_index() -> int | str:
    """The device that quantized weights are made on, which is the one that trains them."""
    return torch.accelerator.current_device_index() if accelerator_name() != "cpu" else "cpu"


def _bitsandbytes(config: ModelConfig, settings: PreTrainedConfig, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    half = torch.bfloat16 if accelerator_name() != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    # FSDP shards the weights of a layer as one tensor of one type, so the packed bytes must be of the others' type.
    rest = settings.get_text_config().dtype or torch.float32 if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=half,
        bnb_4bit_quant_storage=rest if shards_weights() else torch.uint8,
    )


def _torchao_settings(kind: str) -> Any:
    """torchao's settings of a format of `model.quantization` or `model.qat`."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    if kind == "torchao_int8":
        return quantization.Int8WeightOnlyConfig()
    if kind == "torchao_float8":
        return quantization.Float8WeightOnlyConfig()
    if kind in ("torchao_int4", "int4"):
        return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    assert kind == "int8_int4", kind
    return quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)
    )


def hold_dequantized(model: PreTrainedModel, options: dict[str, Any], dtype: torch.dtype | str) -> None:
    """Hold weights that came from mxfp4 in the format that was asked for, as transformers 5.17 leaves them in bfloat16.

    Args:
        options: from `loading_options`.
        dtype: as given to it.
    """
    if isinstance(options.get("quantization_config"), Mxfp4Config) and dtype != "auto":
        for weight in model.parameters():
            if weight.dtype == torch.bfloat16:
                weight.data = weight.data.to(dtype)


def finish_base(model: PreTrainedModel, config: ModelConfig) -> None:
    """Quantize what transformers does not or would not train, have weights rounded while they train, and keep 4-bit
    weights in a layout that has a gradient."""
    _keep_differentiable(model)
    if config.quantization != "torchao_int4" and config.qat == "none":
        return
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    if config.qat != "none":
        rounding, device = QATConfig(_torchao_settings(config.qat), step="prepare"), None
    else:  # transformers would quantize it too, but its Trainer refuses what it does not know to have a gradient
        rounding, device = _torchao_settings(config.quantization), accelerator_name()
    quantize_(model, rounding, filter_fn=lambda module, name: _rounds(model, module), device=device)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Forbid a layout of 4-bit weights through which no gradient flows.

    On CPUs with AVX512-BF16, bitsandbytes lays weights out anew at the first evaluation, for a faster product without a
    backward, and keeps to it: a run that is evaluated before it trains would learn from wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def save_rounded(
    model: PreTrainedModel, folder: Path, kind: str, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model that was trained to be rounded as the rounded model that it stands for.

    Args:
        folder: gets the files; beside it, the plain weights stand meanwhile.
        kind: of `model.qat`, not `none`.
        weights: gathered from all processes, where they are sharded.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as plain:
        model.save_pretrained(plain, state_dict=weights)
        rounding = TorchAoConfig(_torchao_settings(kind))
        rounded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=rounding, dtype=model.dtype)
        rounded.save_pretrained(folder)


def held_format(parameter: torch.Tensor) -> str:
    """The name of the format that a parameter is held in: bitsandbytes' and torchao's own, or its dtype's."""
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return parameter.quant_type
    return {"Int8Params": "int8", **_TORCHAO_NAMES}.get(kind) or str(parameter.dtype).removeprefix("torch.")


def held_bytes(parameter: torch.Tensor) -> int:
    """Bytes that a parameter takes; bitsandbytes' without their scales, which are no part of it."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.numel() * parameter.element_size()
    names, _ = parameter.__tensor_flatten__()
    return sum(held_bytes(getattr(parameter, name)) for name in names)
