"""What a run trains: the model, its tokenizer, and what of it learns.

    model = ModelConfig(path="meta-llama/Llama-3.2-1B")
    adapter = AdapterConfig(kind="lora", rank=8)

Part of the tree in `config.schema`, which says how fields are written, and from which all is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from config.fields import limited

TRAIN = "train"
"""The value of `model.tokenizer` that asks for a new one, made from the data."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that `model.tokenizer=train` makes: byte-level BPE, which gives any text tokens and back."""

    vocab_size: int = limited(8192, ge=300)
    """Tokens in all, special ones among them, at least 300; a multiple of 64 suits GPUs. The 256 bytes are the first,
    after the special ones. Data with too few repeated words give fewer."""

    special_tokens: tuple[str, ...] = limited(("<|endoftext|>", "<|pad|>"), min_length=1)
    """Special tokens, in the order of their ids. `<|endoftext|>` ends texts and `<|pad|>` pads unless
    `model.special_tokens` says otherwise; those of a named chat template are added to them."""

    min_count: int = limited(2, ge=1)
    """Times that two tokens must stand together in the data to become one, at least 1."""

    max_rows: int | None = limited(100_000, ge=1)
    """Rows of each source of `data.train` that are read for it, from the start, at least 1. None: all."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained, and its tokenizer."""

    path: str | None = None
    """Checkpoint to start from: a local folder or a Hub id. None: start from random weights, as `architecture` says."""

    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint. None: its default branch."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """Model to build from random weights: settings of a transformers config with its `model_type`; or `size`, the name
    of a published one (`gpt2-124m`, `llama3.2-1b`, `smollm2-135m`, ...: config/architectures.py), and settings that
    differ from it. `vocab_size` left out means the tokenizer's size, or with a `size` its own, raised to a multiple of
    64 where the tokenizer has more. Empty: the checkpoint at `path` decides."""

    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Longer context for a model with rotary positions: `rope_type` (`linear`, `yarn`, `llama3`, or for generation only
    `dynamic`), the `factor` above 1 that the context grows by, and what else that type takes. Empty: the model's own
    context."""

    tokenizer: str | None = None
    """Tokenizer: a folder, a Hub id, or a `tokenizer.json` file (`openai-community/gpt2` is tiktoken's GPT-2 encoding);
    or `train`, for one made from the rows of `data.train` as `new_tokenizer` says. None: the one beside the
    checkpoint."""

    new_tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer that `tokenizer=train` makes."""

    chat_template: str | None = None
    """Chat template to use instead of the tokenizer's: a file with one in Jinja; `chatml`, whose special tokens are
    added and end the turns; or `plain`, which needs none. None: the tokenizer's own; for a tokenizer made by this run
    from conversations, `chatml`."""

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

    quantization: Literal["none", "nf4", "fp4", "int8", "torchao_int8", "torchao_int4", "torchao_float8"] = "none"
    """Format of the frozen weights. 4-bit (`nf4`, `fp4`) or 8-bit (`int8`) of bitsandbytes, or torchao's, which round
    weights alone; each needs an adapter. A checkpoint that is quantized already keeps its own."""

    double_quant: bool = True
    """Whether scales of 4-bit weights are quantized too. That takes 0.516 bytes a weight in place of 0.563
    (arXiv:2305.14314)."""

    qat: Literal["none", "int4", "int8_int4"] = "none"
    """Rounding that weights learn with. The result is written in it, by torchao: 4-bit weights (`int4`), or
    beside them 8-bit activations (`int8_int4`). Trains without an adapter."""

    trust_remote_code: bool = False
    """Whether code that ships with the checkpoint at `path` may run on this machine. Of a Hub checkpoint, `revision`
    must then be the full hash of a commit; in a folder, the code that stands there runs."""


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


@dataclass(frozen=True)
class FreezeConfig:
    """Which of the model's own weights train, where no adapter does."""

    train: tuple[str, ...] = ()
    """Weights that train. `norms`; `all_but_embeddings`, which leaves out the head too; or globs of parameter names,
    such as `lm_head.*`, of which each must match. Empty: all, or those of `last_layers` alone."""

    last_layers: int | None = limited(None, ge=1)
    """Layers nearest the head that train, at least 1. The norm after them does too, head and embeddings do not. None:
    as `train` says."""

    frozen: tuple[str, ...] = ()
    """Globs of names that do not train. They go before what `train` names; each must match. Empty: none."""
