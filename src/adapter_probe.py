"""Whether an adapter trains beside quantized weights on this device, found by doing it before a model is loaded.

    probe_adapter(config.adapter, config.model, tokenizer)

The two meet in a library's layer, and which pairs work changes with its versions. So a model of one small layer is
quantized and given the adapter, and takes one step.
"""

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from config.schema import AdapterConfig, ModelConfig
from src.adapter_methods import peft_fields
from src.adapters import add_adapter
from src.chat_setup import vocabulary_size
from src.model import load_model
from utils.distributed import accelerator_name
from utils.errors import UserError
from utils.launch import is_main_process

WIDTH = 256
"""Of the small layer: a multiple of the blocks that methods cut weights into by default."""

RANK = 8

LEAST_LIKENESS = 0.9
"""Of gradients beside quantized and float32 weights of the same value: products in bfloat16 leave 0.99 and more, bytes
that are read as weights less than a half."""

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What libraries raise where they do not go together; `UserError` is among them."""


def probe_adapter(config: AdapterConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take a step with the adapter beside small weights of the run's format; the main process alone does, as of several
    transformers lets only the first write a checkpoint.

    Args:
        tokenizer: of the run.
    Raises:
        UserError: it fails beside these, and not beside plain ones, which tells that the format is the reason.
    """
    plain = config.kind == "none" or model.quantization == "none" or config.path is not None
    if plain or not is_main_process():
        return
    small = replace(
        config,
        rank=RANK if config.rank is not None and "rank" in peft_fields(config.kind) else None,
        target_modules=("all-linear",),
        layers=None,
        target_parameters=(),
        modules_to_save=(),
        trainable_tokens=(),
        beside=(),
        export_as_lora=False,
        init="default" if config.init == "eva" else config.init,
    )
    if config.kind == "trainable_tokens":
        return
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _write_model(Path(folder), vocabulary_size(tokenizer))
        base = replace(model, path=folder, revision=None, architecture={}, attention="sdpa", trust_remote_code=False)
        failure = _failure(small, base, tokenizer)
    if failure is not None:
        raise UserError(
            f"adapter.kind={config.kind}{_variant(config)} does not train beside model.quantization="
            f"{model.quantization} on this {accelerator_name()}: {failure}; use another adapter, or "
            "model.quantization=none"
        )


def _write_model(folder: Path, vocabulary: int) -> None:
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,  # so that a large vocabulary is written once
        pad_token_id=None,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)


def _failure(config: AdapterConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What goes wrong beside quantized weights, in a line; None if nothing does.

    Some methods read the quantized bytes as if they were the weights, which raises nothing: so what trains must get
    about the gradients that it gets beside the same weights in float32.
    """
    settings = LlamaConfig.from_pretrained(model.path)
    bases = [load_model(model, settings, tokenizer, trains_all=False, autocasts=False) for _ in range(2)]
    expected = None
    if config.init != "loftq":  # which starts from quantized weights alone
        try:
            expected = _gradients(config, bases[1].dequantize().float())
        except _FAILURES:
            return None  # the small layer itself does not suit the settings: the run's model must tell
    try:
        found = _gradients(config, bases[0])
    except _FAILURES as error:
        cause = error.__cause__ or error  # what PEFT said, without what `add_adapter` advises
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
    if not found.isfinite().all():
        return "its gradients are not finite"
    if expected is None or not expected.any():
        return None
    if found.shape != expected.shape:
        return f"it has {len(found):,} parameters, and {len(expected):,} beside the same weights in float32"
    likeness = float(torch.cosine_similarity(found, expected, dim=0))
    if likeness < LEAST_LIKENESS:
        return f"its gradients are not those that it gets beside the same weights in float32 (cosine {likeness:.2f})"
    return None


def _gradients(config: AdapterConfig, base: PreTrainedModel) -> torch.Tensor:
    """All gradients of an adapter as one vector, in the second step, which sees what the first one changed.

    Raises:
        UserError: the base changed.
    """
    torch.manual_seed(0)  # of what the adapter starts from
    device = accelerator_name()
    if base.device.type != device:  # quantized weights are made there, and some refuse to be moved
        base = base.to(device)
    adapted = add_adapter(base, config).train()
    trained = [values for values in adapted.parameters() if values.requires_grad]
    frozen = [(name, values) for name, values in adapted.named_parameters() if not values.requires_grad]
    ids = (torch.arange(16, device=device)[None] * 7) % base.config.vocab_size
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        before = [values.detach().clone() for _, values in frozen]
        optimizer.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.autocast(device, torch.bfloat16, enabled=device != "mps"):
            logits = adapted(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        gradients = [torch.zeros_like(values) if values.grad is None else values.grad for values in trained]
        optimizer.step()
        for (name, values), old in zip(frozen, before, strict=True):
            if values.shape == old.shape and not torch.equal(_bits(values), _bits(old)):
                raise UserError(f"the frozen {name} changed")
    return torch.cat([gradient.detach().flatten().float() for gradient in gradients])


def _bits(values: torch.Tensor) -> torch.Tensor:
    """What a tensor holds as bytes: 4-bit weights that stand in one of floats, as FSDP needs them, are NaNs in part,
    which equal nothing."""
    return values.detach().flatten().view(torch.uint8)


def _variant(config: AdapterConfig) -> str:
    parts = [f"adapter.{name}=true" for name in ("rslora", "dora") if getattr(config, name)]
    parts += [f"adapter.init={config.init}"] if config.init != "default" else []
    return " with " + ", ".join(parts) if parts else ""
