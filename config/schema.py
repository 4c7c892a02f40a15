"""What a run is: the tree of dataclasses that every recipe fills in.

Each field's default is written here and nowhere else; the parts about models and about data stand in
`config.model_schema` and `config.data_schema`. The docstring under a field gives its meaning, unit and range, and what
None means; the same text is what `python train.py --help` prints. Ranges stand in the field's metadata under pydantic's
names (gt, ge, lt, le, min_length), where `config.validation` enforces them; pairs of fields that exclude each other are
in `config.constraints`. Only the standard library is imported.

    config = RunConfig(model=ModelConfig(path="meta-llama/Llama-3.2-1B"), adapter=AdapterConfig(kind="lora"))
"""

from dataclasses import dataclass, field
from typing import Literal

from config.data_schema import ContractConfig, DataConfig, SourceConfig
from config.fields import limited
from config.model_schema import AdapterConfig, FreezeConfig, ModelConfig, TokenizerConfig

__all__ = [
    "AdapterConfig",
    "ContractConfig",
    "DataConfig",
    "EvaluationConfig",
    "FreezeConfig",
    "HubConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "RunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainingConfig",
]


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated."""

    name: str = limited("adamw_torch_fused", min_length=1)
    """Optimizer, by its transformers name, or `muon`. `muon`: the matrices of the layers train by Muon, all else by
    AdamW (arXiv:2502.16982). The 8-bit and paged ones are made for GPUs; some need a package of their own."""

    learning_rate: float = limited(2e-5, gt=0)
    """Peak learning rate, above 0."""

    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """Course of the learning rate after warmup: held, lowered along a line or a half cosine, or held and then lowered
    over the last `decay_fraction` of the steps."""

    min_lr_fraction: float = limited(0.0, ge=0, lt=1)
    """Share of the peak learning rate that the schedule ends at, from 0 to below 1. With `warmup_stable_decay`, warmup
    starts there too."""

    decay_fraction: float = limited(0.2, gt=0, le=1)
    """Share of all steps over which `warmup_stable_decay` lowers the learning rate, as 1 - sqrt of their progress
    (arXiv:2405.18392); above 0, to 1."""

    warmup_fraction: float | None = limited(None, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0, from 0 to below 1. None: see `warmup_steps`."""

    warmup_steps: int | None = limited(None, ge=0)
    """Steps over which the learning rate rises from 0. None: see `warmup_fraction`; both None: no warmup."""

    lora_plus_ratio: float = limited(1.0, ge=1)
    """Learning rate of LoRA's B matrices over that of all else, at least 1. LoRA+ advises 16 (arXiv:2402.12354)."""

    weight_decay: float = limited(0.0, ge=0)
    """Weight decay of matrices, 0 or above; norms, biases and embeddings have none."""

    beta1: float = limited(0.9, ge=0, lt=1)
    """Adam's decay of the mean gradient, from 0 to below 1."""

    beta2: float = limited(0.999, ge=0, lt=1)
    """Adam's decay of the mean squared gradient, from 0 to below 1."""

    eps: float = limited(1e-8, gt=0)
    """Adam's term that keeps the denominator above 0."""

    max_grad_norm: float | None = limited(1.0, gt=0)
    """Norm that the whole gradient is clipped to, above 0. None: no clipping."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, how precise."""

    epochs: float = limited(1.0, gt=0)
    """Passes over the training rows, above 0. `max_steps` overrides it."""

    max_steps: int | None = limited(None, ge=1)
    """Optimizer steps, at least 1. None: as many as `epochs` needs."""

    micro_batch_rows: int = limited(1, ge=1)
    """Rows (packs, with packing) that one device takes at once, at least 1."""

    tokens_per_micro_batch: int | None = limited(None, ge=8)
    """Most tokens that one device takes at once, padding included, at least `data.max_length`; rows of about the same
    length then stand together, few long ones or many short ones. None: see `micro_batch_rows`."""

    accumulation_steps: int = limited(1, ge=1)
    """Micro-batches a device adds up before an optimizer step, at least 1. The loss is divided by the supervised tokens
    of all of them, so this never changes the gradient of a given global batch."""

    label_smoothing: float = limited(0.0, ge=0, lt=1)
    """Share of a token's target that is spread evenly over the vocabulary, from 0 to below 1. The reported loss is
    without it."""

    z_loss: float = limited(0.0, ge=0)
    """Weight of the squared log of the softmax's denominator, which keeps logits small (arXiv:2204.02311); 1e-4 is
    usual. 0 or above; the reported loss is without it."""

    router_aux_loss: float | None = limited(None, ge=0)
    """Weight of the loss by which routers of mixture-of-experts models learn to use all experts alike
    (arXiv:2101.03961), 0 or above; it is computed in each micro-batch, and the reported loss is without it. None: what
    the model's config says, which is nothing for models without experts."""

    neftune_alpha: float | None = limited(None, gt=0)
    """Size of the noise on the embeddings of training rows (NEFTune, arXiv:2310.05914), above 0; 5 is usual. None: no
    noise."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Number format of the matrix products while float32 weights train (autocast). `auto`: bf16 on a GPU that has it,
    float32 elsewhere."""

    gradient_checkpointing: Literal["none", "full", "selective"] = "none"
    """What is computed again in the backward pass, to save memory: `none`; `full`, each decoder layer, of which only
    the input is kept, for about a third more time; or `selective`, all of a layer but its matrix products and fused
    attention, whose results are kept."""

    activation_offload: bool = False
    """Whether activations wait in host memory for the backward pass, on a CUDA GPU. With `gradient_checkpointing=full`
    only the inputs of layers travel; with `none` all that layers keep does."""

    compile: Literal["auto", "on", "off"] = "off"
    """Whether the model's layers are compiled by `torch.compile`: all share a compilation, which takes a minute or more
    before the first step, and again at the first evaluation. `auto`: on a CUDA GPU in runs of at least 1,000
    micro-batches, where they can be; never on a CPU. A compiled run's losses differ by rounding."""

    cpu_threads: int | None = limited(None, ge=1)
    """Threads that each process computes with on a CPU, at least 1. None: its share of the cores under
    `accelerate launch`, which would use one thread; else what OMP_NUM_THREADS or torch says."""

    max_bad_steps: int = limited(10, ge=0)
    """Steps in a row, 0 or more, that may be left out as their loss or gradient is not finite; one more ends the run. A
    step that is left out changes neither weights nor the optimizer's state, and its rows are named."""

    seed: int = limited(42, ge=0)
    """Seed of new weights, dropout and the order of rows, 0 or above."""

    log_every_steps: int = limited(10, ge=1)
    """Steps between two lines of progress and metrics, at least 1."""

    save_every_steps: int | None = limited(500, ge=1)
    """Steps between two checkpoints, at least 1; one more is written at the end. None: no checkpoints, only the
    result."""

    keep_checkpoints: int = limited(2, ge=1)
    """Newest checkpoints kept on disk, at least 1."""

    grace_period_s: float = limited(30.0, gt=0)
    """Seconds from the signal that ends a job to its kill, above 0: 30 is what Slurm (KillWait), Kubernetes and
    Google's spot machines give. A run that needs more to finish its step and save says so."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured beside the training loss."""

    every_steps: int | None = limited(None, ge=1)
    """Steps between two evaluations, at least 1. None: only before and after training."""

    patience: int | None = limited(None, ge=1)
    """Evaluations that are not better than the best one, at least 1, after which the run stops; the best one's
    checkpoint is kept, and its weights are the result. None: the run does not stop, and the last weights are."""

    micro_batch_rows: int = limited(8, ge=1)
    """Rows (packs, with packing) that one device evaluates at once, at least 1."""

    exact_match: bool = False
    """Whether greedy answers to the evaluation rows are compared with the references, before and after training."""

    max_new_tokens: int = limited(64, ge=1)
    """Most tokens in a generated answer, at least 1."""

    samples: int = limited(3, ge=0)
    """Answers printed at each evaluation, to the first questions of the evaluation rows, 0 or above."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside the run directory's metrics.jsonl."""

    report_to: tuple[Literal["trackio", "tensorboard", "wandb"], ...] = ()
    """Trackers, which must be installed: `pip install -r requirements/tracking.txt`. Empty: none."""

    project: str = limited("smolfactory", min_length=1)
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

    folder: str = limited("outputs", min_length=1)
    """Folder that holds the run directories."""

    name: str = limited("run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory: letters, digits, `.`, `_` and `-`."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is trained, and its tokenizer."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What trains: every weight, or a low-rank adapter."""

    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    """Which of the model's own weights train, where no adapter does."""

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
