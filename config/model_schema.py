"""What a run trains: the model, its tokenizer, and what of it learns.

    model = ModelConfig(path="meta-llama/Llama-3.2-1B")
    adapter = AdapterConfig(kind="lora", rank=8)

Part of the tree in `config.schema`, which says how fields are written, and from which all is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from config.fields import limited


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained, and its tokenizer."""

    path: str | None = None
    """Checkpoint to start from: a local folder or a Hub id. None: start from random weights, as `architecture` says."""

    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint. None: its default branch."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Settings of a transformers config to build from random weights, with its `model_type`; `vocab_size` left out
    means the tokenizer's size. Empty: the checkpoint at `path` decides."""

    tokenizer: str | None = None
    """Tokenizer: a folder, a Hub id, or a `tokenizer.json` file. None: the one beside the checkpoint."""

    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's. None: the tokenizer's own."""

    special_tokens: dict[str, str] = field(default_factory=dict)
    """Names of special tokens to set on the tokenizer, such as `eos_token: <|im_end|>`. Empty: those it comes with."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Number format the weights are held in. `auto`: float32 where all weights train, else the checkpoint's own."""

    attention: Literal[
        "auto",
        "documents",
        "sdpa",
        "eager",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
    ] = "auto"
    """Attention implementation: `documents`, which attends in each row of a pack alone and needs no extra package, or a
    transformers name. `auto`: `documents` where it serves the model and the device, else the fastest that does."""

    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """bitsandbytes format of the frozen weights: 4-bit (`nf4`, `fp4`) or 8-bit (`int8`). Needs an adapter."""

    trust_remote_code: bool = False
    """Whether code that ships with a Hub checkpoint may run on this machine."""


@dataclass(frozen=True)
class AdapterConfig:
    """What trains: every weight, or an adapter beside frozen weights."""

    kind: str = "none"
    """`none` trains every weight; `lora` trains low-rank matrices beside the frozen ones (arXiv:2106.09685). Any other
    PEFT method goes by its lower-case name, such as `oft`, `vera` or `ia3`. An unknown name lists them all."""

    rank: int | None = limited(None, ge=1)
    """Rank of the adapter's matrices, at least 1. None: 16 for LoRA, else the method's own default."""

    alpha: float | None = limited(None, gt=0)
    """Scale of the update, which LoRA multiplies by alpha / rank. Above 0. None: 32 for LoRA, else the method's own
    default."""

    dropout: float | None = limited(None, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped, from 0 to below 1. None: the method's own default, 0 for LoRA."""

    target_modules: tuple[str, ...] = limited(("all-linear",), min_length=1)
    """Modules that get an adapter. Name endings such as `q_proj`, patterns such as `layers.*.mlp.*_proj` in which `*`
    stands for any text without a dot, or `all-linear` for every linear layer but the head (for `ia3` and `ln_tuning`:
    PEFT's own choice for the model). Each one must match at least one module."""

    layers: str | None = None
    """Layers that get an adapter, from 0. `0-7`, `8-`, `3,5` or `last 4`; modules outside of the layers, such as
    `lm_head`, are not affected. None: all."""

    target_parameters: tuple[str, ...] = ()
    """Parameters outside of linear layers that get LoRA matrices. The ends of their names, such as
    `mlp.experts.gate_up_proj`; they take no dropout. Empty: none."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it, such as `embed_tokens`. Embeddings that are tied to
    the head stay one with it. Empty: none."""

    trainable_tokens: tuple[str, ...] = ()
    """Tokens whose embeddings train beside LoRA, as text. Their rows of the head do too; alone with
    `kind=trainable_tokens`. Tokens that this run adds train so by themselves. Empty: only those."""

    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank), which keeps large ranks stable (arXiv:2312.03732)."""

    dora: bool = False
    """Whether LoRA learns direction and length of each weight's rows apart (arXiv:2402.09353)."""

    init: str = "default"
    """What LoRA matrices start from. `default`, `gaussian`, `orthogonal`; `olora`, `pissa` or `pissa_niter_N` (a fast
    SVD of N steps): the weight's own main directions; `eva`: those of the first training batches; `loftq`: those of
    the error of 4-bit weights. The saved adapter fits the plain base in each case."""

    path: str | None = None
    """Trained adapter to go on from. A folder or a Hub id, which decides rank, targets and the rest. None: a new
    one."""

    beside: tuple[str, ...] = ()
    """Trained LoRA adapters that stay active under the new one. Folders or Hub ids; they stay frozen, and the new one,
    which is saved alone, needs them. Empty: none."""

    export_as_lora: bool = False
    """Whether another method's adapter is saved as LoRA. Of the rank that keeps 99.9999% of each update's squared norm,
    for servers that take LoRA alone; few methods can be."""

    settings: dict[str, Any] = field(default_factory=dict)
    """More fields of the method's PEFT config. By PEFT's names, such as `oft_block_size: 16`. Empty: its defaults."""
