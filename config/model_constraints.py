"""What the fields of a model must satisfy together: its sizes, its context and its tokenizer.

problems = list(model_problems(config))       # for config.constraints, which says what such a rule is
"""

import difflib
from collections.abc import Iterator
from typing import Any

from config.architectures import ARCHITECTURES, expanded
from config.model_schema import TRAIN
from config.schema import ModelConfig, RunConfig, TokenizerConfig

ROPE_FIELDS = {
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
"""What `model.rope_scaling` takes beside `rope_type`, `factor` and the context that is scaled, by its `rope_type`."""

ORIGINAL = "original_max_position_embeddings"
COMMON_ROPE_FIELDS = ("rope_type", "factor", ORIGINAL)


def model_problems(config: RunConfig) -> Iterator[str]:
    """Sentences on fields of the model that contradict each other or the data's lengths."""
    yield from _size_name(config.model)
    yield from _rope(config.model)
    yield from _rope_of_adapter(config)
    yield from _sizes(config)
    yield from _tokenizer(config)


def _size_name(model: ModelConfig) -> Iterator[str]:
    size = model.architecture.get("size")
    if size is None and "size" not in model.architecture:
        return
    if size not in ARCHITECTURES:
        near = difflib.get_close_matches(str(size), ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]}? Known" if near else "known"
        yield f"model.architecture.size={size} is not known; {hint} are {', '.join(sorted(ARCHITECTURES))}"
    elif model.architecture.get("model_type", kind := ARCHITECTURES[size]["model_type"]) != kind:
        yield (
            f"model.architecture.size={size} is a {kind}, and model.architecture.model_type="
            f"{model.architecture['model_type']}; leave out one of them"
        )


def _rope(model: ModelConfig) -> Iterator[str]:
    scaling = model.rope_scaling
    if not scaling:
        return
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if kind not in ROPE_FIELDS:
        given = "has no rope_type" if kind is None else f"rope_type={kind} is not known"
        yield f"model.rope_scaling {given}; give model.rope_scaling.rope_type as one of {', '.join(ROPE_FIELDS)}"
        return
    allowed = (*COMMON_ROPE_FIELDS, *ROPE_FIELDS[kind])
    for name in scaling.keys() - set(allowed):
        yield f"model.rope_scaling.{name} is nothing that rope_type={kind} takes; it takes {', '.join(allowed)}"
    if type(factor) not in (int, float):
        yield f"model.rope_scaling.factor={factor} is no number; give the factor above 1 that the context grows by"
    elif factor <= 1:
        yield (
            f"model.rope_scaling.factor={factor} would not lengthen the context; give a factor above 1, or leave out "
            "model.rope_scaling"
        )
    if kind == "llama3":
        yield from _bands(scaling)


def _rope_of_adapter(config: RunConfig) -> Iterator[str]:
    if config.model.rope_scaling and config.adapter.kind != "none":
        yield (
            f"adapter.kind={config.adapter.kind} saves the adapter alone, and its base would be loaded again without "
            "model.rope_scaling; give adapter.kind=none, or leave it out and write the scaling into the "
            "config.json of a copy of the base"
        )


def _bands(scaling: dict[str, Any]) -> Iterator[str]:
    """The two limits between which llama3's scaling changes from none to whole."""
    bands = {
        "low_freq_factor": scaling.get("low_freq_factor", 1),
        "high_freq_factor": scaling.get("high_freq_factor", 4),
    }
    wrong = [name for name, value in bands.items() if type(value) not in (int, float)]
    for name in wrong:
        yield f"model.rope_scaling.{name}={bands[name]} is no number; give one, or leave it out"
    if not wrong and bands["low_freq_factor"] >= bands["high_freq_factor"]:
        yield (
            f"model.rope_scaling.low_freq_factor={bands['low_freq_factor']} is not below "
            f"model.rope_scaling.high_freq_factor={bands['high_freq_factor']}; change one of them"
        )


def _sizes(config: RunConfig) -> Iterator[str]:
    """Sizes that an architecture names and that must fit each other, and the rows."""
    architecture = expanded(config.model.architecture)
    sizes = {key: value for key, value in architecture.items() if type(value) is int and value > 0}
    name = "n_positions" if "n_positions" in sizes else "max_position_embeddings"
    context, scaling = sizes.get(name), config.model.rope_scaling
    if context is not None and config.data.max_length > context and not scaling:
        yield (
            f"data.max_length={config.data.max_length} exceeds model.architecture.{name}={context}; "
            f"lower data.max_length to {context} or less, or raise the model's context"
        )
    width, heads, kv_heads = (sizes.get(f) for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width and heads and width % heads and "head_dim" not in architecture:
        yield (
            f"model.architecture.hidden_size={width} is no multiple of model.architecture.num_attention_heads={heads}; "
            "change one of them, or give model.architecture.head_dim"
        )
    if heads and kv_heads and heads % kv_heads:
        yield (
            f"model.architecture.num_attention_heads={heads} is no multiple of "
            f"model.architecture.num_key_value_heads={kv_heads}; change one of them"
        )


def _tokenizer(config: RunConfig) -> Iterator[str]:
    model = config.model
    trains = model.tokenizer == TRAIN
    if trains and model.path is not None:
        yield (
            f"model.tokenizer=train makes other tokens than those that model.path={model.path} knows; leave out "
            "model.tokenizer, or give model.architecture in place of model.path"
        )
    if not trains and model.new_tokenizer != TokenizerConfig():
        yield (
            f"model.new_tokenizer is given with model.tokenizer={model.tokenizer}; give model.tokenizer=train, or "
            "leave out model.new_tokenizer"
        )
    if trains and model.new_tokenizer.vocab_size < 256 + len(model.new_tokenizer.special_tokens):
        yield (
            f"model.new_tokenizer.vocab_size={model.new_tokenizer.vocab_size} has no room for 256 bytes and "
            f"{len(model.new_tokenizer.special_tokens)} special tokens; raise it"
        )
    if trains and "vocab_size" in model.architecture:
        yield (
            f"model.architecture.vocab_size={model.architecture['vocab_size']} and model.tokenizer=train exclude each "
            "other, as the tokenizer's size decides; give model.new_tokenizer.vocab_size"
        )
