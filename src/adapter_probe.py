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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from config.schema import AdapterConfig, ModelConfig
from src.adapter_methods import peft_fields
from src.adapters import add_adapter
from src.model import load_model, vocabulary_size
from utils.distributed import accelerator_name
from utils.errors import UserError

WIDTH = 256
"""Of the small layer: a multiple of the blocks that methods cut weights into by default."""

RANK = 8

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
    """Take a step with the adapter beside small weights of the run's format.

    Args:
        tokenizer: of the run.
    Raises:
        UserError: it fails beside these, and not beside plain ones, which tells that the format is the reason.
    """
    if config.kind == "none" or model.quantization == "none" or config.path is not None:
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
        if failure is None or (small.init != "loftq" and _failure(small, _plain(base), tokenizer)):
            return  # it works, or the small layer itself does not suit the settings, and the model must tell
    raise UserError(
        f"adapter.kind={config.kind}{_variant(config)} does not train beside model.quantization={model.quantization} "
        f"on this {accelerator_name()}: {failure}; use another adapter, or model.quantization=none"
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


def _plain(model: ModelConfig) -> ModelConfig:
    return replace(model, quantization="none", dtype="float32")


def _failure(config: AdapterConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What goes wrong in a step, in a line; None if nothing does."""
    try:
        return _step(config, model, tokenizer)
    except _FAILURES as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _step(config: AdapterConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    settings = LlamaConfig.from_pretrained(model.path)
    base = load_model(model, settings, tokenizer, trains_all=False, autocasts=False)
    adapted = add_adapter(base.to(accelerator_name()), config)
    trained = {name: values for name, values in adapted.named_parameters() if values.requires_grad}
    frozen = {name: values.detach().clone() for name, values in adapted.named_parameters() if name not in trained}
    before = {name: values.detach().clone() for name, values in trained.items()}
    ids = (torch.arange(16, device=accelerator_name())[None] * 7) % settings.vocab_size
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    adapted.train()
    with torch.autocast(accelerator_name(), torch.bfloat16, enabled=accelerator_name() != "mps"):
        logits = adapted(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    optimizer.step()
    if not all(torch.isfinite(values).all() for values in trained.values()):
        return "its gradients are not finite"
    if not any((before[name] != values).any() for name, values in trained.items()):
        return "no gradient reaches it"
    after = dict(adapted.named_parameters())
    if moved := [name for name, values in frozen.items() if not torch.equal(values, after[name])]:
        return f"the frozen {moved[0]} changed"
    return None


def _variant(config: AdapterConfig) -> str:
    parts = [f"adapter.{name}=true" for name in ("rslora", "dora") if getattr(config, name)]
    parts += [f"adapter.init={config.init}"] if config.init != "default" else []
    return " with " + ", ".join(parts) if parts else ""
