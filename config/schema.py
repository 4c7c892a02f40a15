"""What a run is: the tree of dataclasses that every recipe fills in.

Each field's default is written here and nowhere else. The docstring under a field gives its meaning, unit and range,
and what None means; the same text is what `python train.py --help` prints. Ranges stand in the field's metadata under
pydantic's names (gt, ge, lt, le, min_length), where `config.validation` enforces them; pairs of fields that exclude
each other are in `config.constraints`. Only the standard library is imported.

    config = RunConfig(model=ModelConfig(path="meta-llama/Llama-3.2-1B"), adapter=AdapterConfig(kind="lora"))
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def _limited(default: Any, **limits: Any) -> Any:
    """A field with a default and pydantic's names of its limits."""
    return field(default=default, metadata=limits)


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
    """What trains: every weight, or a low-rank adapter beside frozen weights."""

    kind: Literal["none", "lora"] = "none"
    """`none` trains every weight; `lora` trains low-rank matrices beside the frozen ones (arXiv:2106.09685)."""

    rank: int = _limited(16, ge=1)
    """Rank of the LoRA matrices, at least 1."""

    alpha: float = _limited(32.0, gt=0)
    """LoRA scale: the update is multiplied by alpha / rank. Above 0."""

    dropout: float = _limited(0.0, ge=0, lt=1)
    """Share of a LoRA matrix's inputs that is dropped while training, from 0 to below 1."""

    target_modules: tuple[str, ...] = _limited(("all-linear",), min_length=1)
    """Modules that get LoRA matrices: name endings such as `q_proj`, or `all-linear` for every linear layer but the
    head. Each one must match at least one module."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it, such as `embed_tokens`. Empty: none."""

    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank), which keeps large ranks stable (arXiv:2312.03732)."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows."""

    path: str = ""
    """A json, jsonl, csv, parquet, arrow or txt file, which may be packed as .gz or .zst; a folder or a glob of them,
    such as `logs/*.jsonl`; a folder that `save_to_disk` wrote; or a Hub data set's id."""

    format: Literal[
        "auto", "messages", "prompt_completion", "question_answer", "alpaca", "sharegpt", "text", "tokenized"
    ] = "auto"
    """What a row holds. `auto`: told from the column names; a doubtful case is an error that lists them."""

    columns: dict[str, str] = field(default_factory=dict)
    """New names of columns, as expected name: name in the file, such as `prompt: question`. Empty: the file's own."""

    roles: dict[str, str] = field(default_factory=dict)
    """Roles of the speakers, as name in the file: role, such as `bot: assistant`. A role is `system`, `developer`,
    `user`, `assistant`, `tool`, or `function_call` for a tool call of the assistant as JSON. Empty: the usual ones."""

    subset: str | None = None
    """Configuration of a Hub data set. None: its default one."""

    split: str = "train"
    """Split of a Hub data set, such as `train` or `test[:10%]`; or of a folder, whose files' names say theirs. Of no
    meaning for a file."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set. None: its default branch."""

    max_rows: int | None = _limited(None, ge=1)
    """Most rows taken, from the start, at least 1. None: all."""

    epochs: int = _limited(1, ge=1)
    """Times that a row of this source may stand in one pass over the training rows, at least 1: each does, or with
    weights, each of the source that runs out first."""

    weight: float | None = _limited(None, gt=0)
    """Share of this source in the rows of a pass, over the sum of all weights; above 0, for all of data.train or none.
    The pass ends where the first source has given all its rows `epochs` times; of the others a choice by `data.seed`
    is taken. None: all rows of every source are taken."""


def _share(default: float = 0.0) -> Any:
    """A field that is a share of rows, from 0 to 1."""
    return _limited(default, ge=0, le=1)


@dataclass(frozen=True)
class ContractConfig:
    """The largest share of a source's rows, from 0 to 1, that may have each defect. With more a run does not start."""

    malformed: float = _share()
    """Rows that are not what their format says. Such rows are left out, as are those of the next eight kinds."""

    masked: float = _share()
    """Rows in which nothing would be trained."""

    untrained_stop: float = _share()
    """Rows with a trained turn that no stop token ends, from which a model does not learn to stop."""

    doubled_bos: float = _share()
    """Rows that begin with two BOS tokens."""

    missing_bos: float = _share()
    """Rows without the BOS token that their tokenizer puts first."""

    role_order: float = _share()
    """Rows of which the chat template refuses or leaves out a message because of its role or place."""

    content_lost: float = _share()
    """Rows of which the chat template leaves out a part of a message, or the tools."""

    unaligned: float = _share()
    """Rows of which the chat template's output does not show where a turn is."""

    answer_truncated: float = _share()
    """Rows of which nothing that is trained is left once they are cut to `data.max_length`."""

    too_long: float = _share(0.1)
    """Rows left out because they have more than `data.max_length` tokens."""

    leak: float = _share()
    """Rows of data.train that stand in data.eval too. They are left out of training."""

    duplicates: float = _share(0.05)
    """Rows that are equal to one before them."""

    prompt_not_prefix: float = _share()
    """Rows with a trained turn before which the chat template writes other text than a server would; with
    `data.unlike_served=drop` they are not counted."""

    null_padded_tools: float = _share()
    """Rows whose tools or tool calls held keys without a value, as a table writes them; such keys are taken out."""

    date_drift: float = _share()
    """Rows into which the chat template may write the clock's date, so that they differ from day to day."""


@dataclass(frozen=True)
class DataConfig:
    """What the model learns from, and what is measured on."""

    train: tuple[SourceConfig, ...] = ()
    """Sources of the training rows, one after the other. At least one is needed to train."""

    eval: tuple[SourceConfig, ...] = ()
    """Sources of the evaluation rows. Empty: `eval_fraction` of the training rows, or no evaluation."""

    eval_fraction: float = _limited(0.0, ge=0, le=0.5)
    """Share of the training rows set aside for evaluation, from 0 to 0.5; chosen by each row's content, so that equal
    rows always fall on the same side."""

    seed: int = _limited(42, ge=0)
    """Seed of what is chosen from sources with a weight, and of their order, 0 or above."""

    max_length: int = _limited(2048, ge=8)
    """Most tokens in a row and in a pack of rows, at least 8 and at most the model's context."""

    too_long: Literal["auto", "drop", "truncate", "split", "error"] = "auto"
    """What happens to a row of more than `max_length` tokens: left out, cut at the end (where no EOS is put), split
    into pieces (texts only), or an error. `auto`: texts are split, other rows left out. The number of rows and of
    supervised tokens lost is always told."""

    streaming: bool = False
    """Whether the training rows are read while the run goes on and kept nowhere, as sources larger than the disk need:
    files are read line by line, Hub data sets from the Hub. Needs `training.max_steps`, and `data.eval` in place of
    `eval_fraction`. Rows are packed and shuffled within windows of `stream_window_rows`, and equal ones are not found.
    Weights are then shares of the rows that are read, and each epoch reads the same ones."""

    stream_window_rows: int = _limited(10_000, ge=1)
    """Rows of a stream that are read, packed and shuffled together, at least 1; so many are held in memory, and read
    before the first step."""

    packing: bool = True
    """Whether rows share packs of `max_length` tokens. Attention never crosses from one row to another, so the loss is
    the same; only padding is saved."""

    supervise: Literal["assistant", "last_turn", "completion", "all"] = "assistant"
    """Tokens that the loss counts. `assistant`: the assistant's turns with the token that ends each; `last_turn`: only
    the last of them; `completion`: those of the completion (the answer, the output), or where the format does not part
    it from the prompt, those after the last user message, with their tool calls; `all`: all tokens but a row's
    first."""

    template_date: str | None = "2024-07-26"
    """Date that a chat template gets which writes one, as YYYY-MM-DD, so that a row is the same on every day. None:
    the clock's."""

    unlike_served: Literal["train_as_served", "drop", "error"] = "train_as_served"
    """What happens to a conversation in which the chat template writes other text before a supervised turn than a
    server would. `train_as_served`: trained, each turn with what a server gives before it, if need be as a row of its
    own; what is unlike all the same, such as a prompt that opens reasoning which the row has not, is trained as it is
    written. `drop`: left out; `error`: the run ends. Their number is always told. Apart from that, a conversation is
    trained as a row for each turn wherever the template writes an answer in another way once more messages follow it,
    such as without its reasoning."""

    allow_special_tokens_in_content: bool = False
    """Whether a special token's text inside a message, such as `<|im_end|>` in a question, becomes that token. Else it
    is read as plain text."""

    contract: ContractConfig = field(default_factory=ContractConfig)
    """What must hold for the rows of every source before a step is taken."""

    cache_folder: str | None = None
    """Folder where prepared token rows are kept, for runs with the same rows, tokenizer and settings. None: `.data` in
    output.folder. It can be deleted at any time between runs."""

    cache_gib: float | None = _limited(32.0, gt=0)
    """Most GiB that prepared token rows may take in the cache folder, above 0. Where there are more, those not used for
    the longest time are removed, but never this run's own, nor any that another run reads. None: no limit."""

    workers: int | None = _limited(None, ge=1)
    """Processes that tokenize, at least 1. None: one, whose threads use two to four cores."""


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated."""

    name: str = _limited("adamw_torch_fused", min_length=1)
    """Optimizer, by its transformers name, or `muon`. `muon`: the matrices of the layers train by Muon, all else by
    AdamW (arXiv:2502.16982). The 8-bit and paged ones are made for GPUs; some need a package of their own."""

    learning_rate: float = _limited(2e-5, gt=0)
    """Peak learning rate, above 0."""

    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """Course of the learning rate after warmup: held, lowered along a line or a half cosine, or held and then lowered
    over the last `decay_fraction` of the steps."""

    min_lr_fraction: float = _limited(0.0, ge=0, lt=1)
    """Share of the peak learning rate that the schedule ends at, from 0 to below 1. With `warmup_stable_decay`, warmup
    starts there too."""

    decay_fraction: float = _limited(0.2, gt=0, le=1)
    """Share of all steps over which `warmup_stable_decay` lowers the learning rate, as 1 - sqrt of their progress
    (arXiv:2405.18392); above 0, to 1."""

    warmup_fraction: float | None = _limited(None, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0, from 0 to below 1. None: see `warmup_steps`."""

    warmup_steps: int | None = _limited(None, ge=0)
    """Steps over which the learning rate rises from 0. None: see `warmup_fraction`; both None: no warmup."""

    lora_plus_ratio: float = _limited(1.0, ge=1)
    """Learning rate of LoRA's B matrices over that of all else, at least 1. LoRA+ advises 16 (arXiv:2402.12354)."""

    weight_decay: float = _limited(0.0, ge=0)
    """Weight decay of matrices, 0 or above; norms, biases and embeddings have none."""

    beta1: float = _limited(0.9, ge=0, lt=1)
    """Adam's decay of the mean gradient, from 0 to below 1."""

    beta2: float = _limited(0.999, ge=0, lt=1)
    """Adam's decay of the mean squared gradient, from 0 to below 1."""

    eps: float = _limited(1e-8, gt=0)
    """Adam's term that keeps the denominator above 0."""

    max_grad_norm: float | None = _limited(1.0, gt=0)
    """Norm that the whole gradient is clipped to, above 0. None: no clipping."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, how precise."""

    epochs: float = _limited(1.0, gt=0)
    """Passes over the training rows, above 0. `max_steps` overrides it."""

    max_steps: int | None = _limited(None, ge=1)
    """Optimizer steps, at least 1. None: as many as `epochs` needs."""

    micro_batch_rows: int = _limited(1, ge=1)
    """Rows (packs, with packing) that one device takes at once, at least 1."""

    tokens_per_micro_batch: int | None = _limited(None, ge=8)
    """Most tokens that one device takes at once, padding included, at least `data.max_length`; rows of about the same
    length then stand together, few long ones or many short ones. None: see `micro_batch_rows`."""

    accumulation_steps: int = _limited(1, ge=1)
    """Micro-batches a device adds up before an optimizer step, at least 1. The loss is divided by the supervised tokens
    of all of them, so this never changes the gradient of a given global batch."""

    label_smoothing: float = _limited(0.0, ge=0, lt=1)
    """Share of a token's target that is spread evenly over the vocabulary, from 0 to below 1. The reported loss is
    without it."""

    z_loss: float = _limited(0.0, ge=0)
    """Weight of the squared log of the softmax's denominator, which keeps logits small (arXiv:2204.02311); 1e-4 is
    usual. 0 or above; the reported loss is without it."""

    neftune_alpha: float | None = _limited(None, gt=0)
    """Size of the noise on the embeddings of training rows (NEFTune, arXiv:2310.05914), above 0; 5 is usual. None: no
    noise."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Number format of the matrix products while float32 weights train (autocast). `auto`: bf16 on a GPU that has it,
    float32 elsewhere."""

    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which saves memory for about a third more time."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the model's layers are compiled by `torch.compile`: all share a compilation, which takes a minute or more
    before the first step, and again at the first evaluation. `auto`: on a CUDA GPU in runs of at least 1,000
    micro-batches, where they can be; never on a CPU. A compiled run's losses differ by rounding."""

    cpu_threads: int | None = _limited(None, ge=1)
    """Threads that each process computes with on a CPU, at least 1. None: its share of the cores under
    `accelerate launch`, which would use one thread; else what OMP_NUM_THREADS or torch says."""

    seed: int = _limited(42, ge=0)
    """Seed of new weights, dropout and the order of rows, 0 or above."""

    log_every_steps: int = _limited(10, ge=1)
    """Steps between two lines of progress and metrics, at least 1."""

    save_every_steps: int | None = _limited(500, ge=1)
    """Steps between two checkpoints, at least 1; one more is written at the end. None: no checkpoints, only the
    result."""

    keep_checkpoints: int = _limited(2, ge=1)
    """Newest checkpoints kept on disk, at least 1."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured beside the training loss."""

    every_steps: int | None = _limited(None, ge=1)
    """Steps between two evaluations, at least 1. None: only before and after training."""

    micro_batch_rows: int = _limited(8, ge=1)
    """Rows (packs, with packing) that one device evaluates at once, at least 1."""

    exact_match: bool = False
    """Whether greedy answers to the evaluation rows are compared with the references, before and after training."""

    max_new_tokens: int = _limited(64, ge=1)
    """Most tokens in a generated answer, at least 1."""

    samples: int = _limited(3, ge=0)
    """Answers printed at each evaluation, to the first questions of the evaluation rows, 0 or above."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside the run directory's metrics.jsonl."""

    report_to: tuple[Literal["trackio", "tensorboard", "wandb"], ...] = ()
    """Trackers, which must be installed: `pip install -r requirements/tracking.txt`. Empty: none."""

    project: str = _limited("smolfactory", min_length=1)
    """Project that a tracker files the run under."""


@dataclass(frozen=True)
class HubConfig:
    """The Hub repository that gets the result."""

    repo_id: str | None = None
    """Repository to push to after training, as `owner/name`. None: nothing is pushed."""

    private: bool = True
    """Whether the repository is private: a new one is made so, and an existing public one is refused."""

    license: str | None = None
    """License of the result in its model card, by the Hub's name for it, such as `apache-2.0`. None: not stated."""


@dataclass(frozen=True)
class OutputConfig:
    """Where the run is written."""

    folder: str = _limited("outputs", min_length=1)
    """Folder that holds the run directories."""

    name: str = _limited("run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory: letters, digits, `.`, `_` and `-`."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is trained, and its tokenizer."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What trains: every weight, or a low-rank adapter."""

    data: DataConfig = field(default_factory=DataConfig)
    """What the model learns from, and what is measured on."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """How weights are updated."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, how large, how precise."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured beside the training loss."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go beside the run directory."""

    hub: HubConfig = field(default_factory=HubConfig)
    """The Hub repository that gets the result."""

    output: OutputConfig = field(default_factory=OutputConfig)
    """Where the run is written."""
