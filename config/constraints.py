"""What a run's fields must satisfy together: pairs that exclude, need or contradict each other.

Limits of a single field stand in `config.schema`; here is what no field can say alone. Each message names both fields
and the way out. Nothing is read but the configuration and, for `model.path`, whether a folder of that name exists.

    check_constraints(config)
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from config.adapter_constraints import adapter_problems
from config.base_constraints import base_problems
from config.model_constraints import model_problems
from config.schema import OptimConfig, RunConfig, SourceConfig, TrackingConfig, TrainingConfig
from config.trust import is_folder, trust_problems

FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".gz", ".zst")
"""Endings that make a source's path local files; any other path is a folder or a Hub data set's id."""

SOURCE_ROLES = ("system", "developer", "user", "assistant", "tool", "function_call")
"""What a speaker's name in a file can stand for."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_ADAM_FIELDS = ("beta1", "beta2", "eps")
_NO_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "lomo", "adalomo", "galore", "grokadamw", "schedule_free_sgd")
_NO_WEIGHT_DECAY = ("lomo", "adalomo", "galore", "apollo")


class ConfigError(ValueError):
    """A configuration that cannot be used: what was given, what is allowed, what to change.

    Commands print it without a traceback and exit with 2.

    Attributes:
        problems: one sentence for each thing to mend; the message lists them all.
    """

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        """Join `problems` into one message, after `where` (such as a recipe's path) if it is given."""
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        prefix = f"{where}: " if where else ""
        if len(self.problems) == 1:
            message = prefix + self.problems[0]
        else:
            message = f"{prefix}{len(self.problems)} problems:" + "".join(f"\n- {problem}" for problem in self.problems)
        super().__init__(message)


def check_constraints(config: RunConfig) -> None:
    """Check every rule that joins fields of a configuration whose single fields are already valid.

    Raises:
        ConfigError: at least one rule is broken; every broken one is listed.
    """
    checks = (_blanks(config), _model(config), _precision(config), adapter_problems(config), _data(config))
    problems = [problem for check in checks for problem in check]
    problems += [*base_problems(config), *_activations(config.training), *_micro_batches(config), *_optim(config)]
    problems += [*_evaluation(config), *_services(config)]
    if problems:
        raise ConfigError(problems)


def is_local_file(source: SourceConfig) -> bool:
    """Whether a source is a file on this machine, by the ending of its path, and not a Hub data set."""
    return source.path.lower().endswith(FILE_SUFFIXES)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each text and number below `value`, with its dotted name."""
    if dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _leaves(getattr(value, part.name), f"{name}.{part.name}" if name else part.name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    else:
        yield name, value


def _blanks(config: RunConfig) -> Iterator[str]:
    """Texts that hold nothing and numbers that are none."""
    for name, value in _leaves(config, ""):
        if isinstance(value, str) and not value.strip():
            if re.fullmatch(r"data\.(train|eval)\.\d+\.path", name):
                yield f"{name} is empty; give a file or a Hub data set's id, or take that source out"
            else:
                yield f"{name} is empty; give it a value, or leave it out"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value} is no finite number; give one"


def _changed(section: Any, names: Sequence[str]) -> list[str]:
    """Those of a section's fields that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _model(config: RunConfig) -> Iterator[str]:
    model, architecture = config.model, config.model.architecture
    if model.path is None and not architecture:
        yield (
            "model.path and model.architecture are both left out; give model.path to start from a checkpoint, or "
            "model.architecture to start from random weights"
        )
    if model.path is not None and architecture:
        yield (
            f"model.path={model.path} and model.architecture exclude each other; leave out model.architecture to train "
            "the checkpoint, or model.path to start from random weights"
        )
    if model.revision is not None and (model.path is None or is_folder(model.path)):
        subject = "no model.path" if model.path is None else f"model.path={model.path}, a folder on this machine"
        yield (
            f"model.revision={model.revision} is given with {subject}; leave out model.revision, or give a Hub id as "
            "model.path"
        )
    if architecture and "size" not in architecture and "model_type" not in architecture:
        yield (
            "model.architecture has no model_type; add model.architecture.model_type, such as llama, or "
            "model.architecture.size, such as smollm2-135m"
        )
    if architecture and model.tokenizer is None:
        yield (
            "model.architecture needs model.tokenizer, since there is no checkpoint to take one from; give "
            "model.tokenizer a folder, a Hub id or a tokenizer.json file, or train"
        )
    yield from model_problems(config)
    yield from trust_problems(model)
    if architecture and config.adapter.kind != "none":
        yield (
            f"adapter.kind={config.adapter.kind} saves the adapter alone, and model.architecture starts from random "
            "weights, which nobody could load again; give model.path instead, or adapter.kind=none"
        )


def _precision(config: RunConfig) -> Iterator[str]:
    """Number formats of weights, products and attention kernels that do not go together."""
    dtype, precision, attention = config.model.dtype, config.training.precision, config.model.attention
    full = config.adapter.kind == "none"
    if dtype == "float16" and full:
        yield (
            "model.dtype=float16 with adapter.kind=none would train float16 weights, whose updates and optimizer state "
            "underflow; use model.dtype=float32 with training.precision=fp16, or model.dtype=bfloat16"
        )
    elif dtype == "bfloat16" and full and precision == "fp16":
        yield (
            "training.precision=fp16 scales gradients, which needs float32 weights, and model.dtype=bfloat16 has none; "
            "use model.dtype=float32, or training.precision=bf16"
        )
    if dtype == "float64" and precision in ("bf16", "fp16"):
        yield (
            f"training.precision={precision} has no effect on model.dtype=float64; use model.dtype=float32, or "
            "training.precision=float32"
        )
    if attention.startswith("flash_attention"):
        whole = dtype == "float32" or (dtype == "auto" and full)
        if dtype == "float64" or (whole and precision == "float32"):
            yield (
                f"model.attention={attention} computes in half precision only, and model.dtype={dtype} with "
                f"training.precision={precision} gives it none; use training.precision=bf16 with model.dtype=float32, "
                "or model.attention=auto"
            )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.train:
        yield "data.train is empty; name at least one source, such as data.train.0.path=rows.jsonl"
    if data.eval and data.eval_fraction:
        yield (
            f"data.eval and data.eval_fraction={data.eval_fraction} exclude each other; leave out data.eval_fraction, "
            "or the sources of data.eval"
        )
    yield from _streaming(config)
    for part, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _source(source, f"data.{part}.{index}")
    weightless = [f"data.train.{index}" for index, source in enumerate(data.train) if source.weight is None]
    if 0 < len(weightless) < len(data.train):
        yield f"{', '.join(weightless)} has no weight and others have; give each source of data.train one, or none"
    for index, source in enumerate(data.eval):
        for key in _changed(source, ("epochs", "weight")):
            yield (
                f"data.eval.{index}.{key}={getattr(source, key)} is given, and evaluation rows are measured once each; "
                "leave it out"
            )


def _streaming(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.streaming:
        for key in _changed(data, ("stream_window_rows",)):
            yield f"data.{key}={getattr(data, key)} has no meaning without data.streaming; set that, or leave it out"
        return
    if config.training.max_steps is None:
        yield (
            "data.streaming does not know how many rows there are, so training.epochs tells no end; give "
            "training.max_steps"
        )
    if data.eval_fraction:
        yield (
            f"data.eval_fraction={data.eval_fraction} sets rows aside before training, and data.streaming reads them "
            "while it goes on; name sources in data.eval instead"
        )


def _source(source: SourceConfig, name: str) -> Iterator[str]:
    changed = _changed(source, ("subset", "split", "revision"))
    if changed and is_local_file(source):
        given = ", ".join(f"{name}.{key}={getattr(source, key)}" for key in changed)
        yield (
            f"{given} given with {name}.path={source.path}, a local file, which has no such thing; leave it "
            f"out, or give a Hub data set's id as {name}.path"
        )
    for speaker, role in source.roles.items():
        if role not in SOURCE_ROLES:
            yield f"{name}.roles: {speaker}: {role} is no role; allowed are {', '.join(SOURCE_ROLES)}"


def _activations(training: TrainingConfig) -> Iterator[str]:
    if training.activation_offload and training.gradient_checkpointing == "selective":
        yield (
            "training.activation_offload=true would leave what training.gradient_checkpointing=selective keeps on the "
            "device, which is most of it; use training.gradient_checkpointing=full or none with it, or leave it out"
        )


def _micro_batches(config: RunConfig) -> Iterator[str]:
    training, max_length = config.training, config.data.max_length
    tokens = training.tokens_per_micro_batch
    if tokens is None:
        return
    if _changed(training, ("micro_batch_rows",)):
        yield (
            f"training.tokens_per_micro_batch={tokens} and training.micro_batch_rows={training.micro_batch_rows} "
            "exclude each other; leave one of them out"
        )
    if tokens < max_length:
        yield (
            f"training.tokens_per_micro_batch={tokens} has no room for a row of data.max_length={max_length} tokens; "
            "raise it, or lower data.max_length"
        )


def _optim(config: RunConfig) -> Iterator[str]:
    optim, max_steps = config.optim, config.training.max_steps
    if optim.warmup_steps is not None and optim.warmup_fraction is not None:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_fraction={optim.warmup_fraction} exclude each "
            "other; leave one of them out"
        )
    if optim.warmup_steps is not None and max_steps is not None and optim.warmup_steps >= max_steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} is not below training.max_steps={max_steps}, so the learning "
            "rate would never reach its peak; lower it, or give optim.warmup_fraction instead"
        )
    yield from _schedule(optim)
    yield from _optimizer(config)


def _schedule(optim: OptimConfig) -> Iterator[str]:
    """The course of the learning rate."""
    name, fraction = optim.schedule, optim.decay_fraction
    if optim.min_lr_fraction and name == "constant":
        yield (
            f"optim.min_lr_fraction={optim.min_lr_fraction} given with optim.schedule=constant, which lowers no "
            "learning rate; leave it out, or give optim.schedule=cosine"
        )
    if name != "warmup_stable_decay" and _changed(optim, ("decay_fraction",)):
        yield (
            f"optim.decay_fraction={fraction} given with optim.schedule={name}; leave it out, or give "
            "optim.schedule=warmup_stable_decay"
        )
    if name == "warmup_stable_decay" and (optim.warmup_fraction or 0) + fraction > 1 + 1e-9:
        yield (
            f"optim.warmup_fraction={optim.warmup_fraction} and optim.decay_fraction={fraction} are more than all "
            "steps; lower one of them"
        )
    if optim.name.startswith("schedule_free"):
        if name != "constant":
            yield f"optim.name={optim.name} replaces a schedule; give optim.schedule=constant"
        if optim.warmup_fraction:
            yield (
                f"optim.name={optim.name} warms up by itself, over a number of steps; give optim.warmup_steps in "
                f"place of optim.warmup_fraction={optim.warmup_fraction}"
            )


def _optimizer(config: RunConfig) -> Iterator[str]:
    """What an optimizer does not have or cannot do."""
    optim, training, default = config.optim, config.training, OptimConfig().name
    unused = _ADAM_FIELDS if optim.name.startswith(_NO_ADAM) else ("eps",) if "lion" in optim.name else ()
    unused += ("weight_decay",) if optim.name.startswith(_NO_WEIGHT_DECAY) else ()
    if changed := _changed(optim, unused):
        names = ", ".join(f"optim.{name}" for name in changed)
        yield f"{names} given with optim.name={optim.name}, which has none; leave out, or give optim.name={default}"
    if optim.lora_plus_ratio != 1 and config.adapter.kind != "lora":
        yield (
            f"optim.lora_plus_ratio={optim.lora_plus_ratio} needs LoRA's B matrices, and adapter.kind="
            f"{config.adapter.kind} has none; give adapter.kind=lora, or leave it out"
        )
    if not (optim.name.endswith("_layerwise") or optim.name in ("lomo", "adalomo")):
        return
    # Each weight is updated within the backward pass, by an optimizer that checkpoints do not hold.
    for name, given, wanted in (
        ("training.accumulation_steps", training.accumulation_steps, 1),
        ("training.save_every_steps", training.save_every_steps, None),
        ("optim.max_grad_norm", optim.max_grad_norm, None),
        ("optim.lora_plus_ratio", optim.lora_plus_ratio, 1),
    ):
        if given != wanted:
            shown = "null" if wanted is None else wanted
            yield (
                f"{name}={given} cannot be kept with optim.name={optim.name}, which updates each weight within the "
                f"backward pass; give {name}={shown}, or optim.name={default}"
            )


def _evaluation(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.patience and not evaluation.every_steps:
        yield (
            f"evaluation.patience={evaluation.patience} counts evaluations, and evaluation.every_steps is left out; "
            "give it, or leave out evaluation.patience"
        )
    if evaluation.patience and not config.training.save_every_steps:
        yield (
            f"evaluation.patience={evaluation.patience} keeps the checkpoint of the best evaluation, and "
            "training.save_every_steps=null writes none; give it, or leave out evaluation.patience"
        )
    if config.data.eval or config.data.eval_fraction:
        return
    for name in ("exact_match", "every_steps"):
        value = getattr(evaluation, name)
        if value:
            yield (
                f"evaluation.{name}={value} needs evaluation rows, and data.eval and data.eval_fraction give none; "
                f"name sources in data.eval, set data.eval_fraction, or leave out evaluation.{name}"
            )


def _services(config: RunConfig) -> Iterator[str]:
    """Trackers and the Hub."""
    tracking, repo_id = config.tracking, config.hub.repo_id
    if tracking.project != TrackingConfig().project and not tracking.report_to:
        yield (
            f"tracking.project={tracking.project} is given with an empty tracking.report_to; name a tracker in "
            "tracking.report_to, or leave out tracking.project"
        )
    if len(set(tracking.report_to)) < len(tracking.report_to):
        yield f"tracking.report_to={', '.join(tracking.report_to)} names a tracker twice; name each once"
    if repo_id is not None and not _HUB_NAME.fullmatch(repo_id):
        yield f"hub.repo_id={repo_id} is no repository's name; give owner/name, such as my-team/my-model"
