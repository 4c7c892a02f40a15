"""The model card: what a run's own record says of its result, as a README.md for the Hub.

    (run_directory / "README.md").write_text(model_card(run_directory))

A figure that the record does not hold is left out, never guessed. Of local files and folders only the name is told.
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from config.architectures import expanded
from src.adapter_card import beside_lines, method_name, method_text, weights_text
from utils.hub import is_hub_id, launch_folder
from utils.redaction import public_record

_METRICS = {"loss": "Loss", "exact_match": "Exact match"}
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class _Source:
    """One source of rows, as the card shows it."""

    name: str
    """A Hub id, or a file's name."""
    on_hub: bool
    use: str
    """`train` or `eval`."""
    details: dict[str, Any]
    """What the record says of it: format, rows, sha256, revision, split."""


@dataclass(frozen=True)
class _Run:
    """A run directory's record, and what follows from it."""

    config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    result: dict[str, Any]
    name: str
    location: str
    """What `from_pretrained` is given: the repository, or the folder that the run wrote."""
    adapter_settings: dict[str, Any]
    """The saved adapter's own; empty where a whole model was saved."""
    launched_in: Path
    has_chat_template: bool
    base: str | None
    """Hub id or folder name of the model that the run started from; None: random weights."""
    base_on_hub: bool
    sources: tuple[_Source, ...]

    @property
    def adapter(self) -> bool:
        """Whether an adapter was saved."""
        return bool(self.adapter_settings)

    def get(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted path."""
        found: Any = self.config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return default if found is None else found


def model_card(run_directory: Path, *, repo_id: str | None = None) -> str:
    """The text of a run's README.md: metadata for the Hub, then what the model is, how to use it, what it learned
    from, how it was trained, what was measured, its limits, and how to make it again.

    Args:
        run_directory: holds config.json and model/; environment.json, data.json and result.json where known.
        repo_id: repository that the card is for. None: the config's `hub.repo_id`, or none.
    Raises:
        FileNotFoundError: there is no config.json.
    """
    run = _read_run(run_directory, repo_id)
    sections = (_summary, _use, _data, _training, _results, _limits, _reproduction)
    body = "\n\n".join(section(run) for section in sections)
    return str(ModelCard(f"---\n{_metadata(run).to_yaml()}\n---\n\n{body}\n"))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_run(directory: Path, repo_id: str | None) -> _Run:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    data = _read_json(directory / "data.json")
    model, output = directory / "model", config.get("output", {})
    repo_id = repo_id or config.get("hub", {}).get("repo_id")
    name = output.get("name", directory.resolve().name)
    below = Path(output.get("folder", "outputs"))
    local = Path(name, "model") if below.is_absolute() else below / name / "model"
    base = config.get("model", {}).get("path")
    launched_in = launch_folder(directory)
    base_on_hub = base is not None and is_hub_id(base, launched_in)
    tokenizer = _read_json(model / "tokenizer_config.json")
    return _Run(
        config=config,
        environment=_read_json(directory / "environment.json"),
        data=data,
        result=_read_json(directory / "result.json"),
        name=repo_id.split("/")[-1] if repo_id else name,
        location=repo_id or local.as_posix(),
        adapter_settings=_read_json(model / "adapter_config.json"),
        launched_in=launched_in,
        has_chat_template=(model / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template")),
        base=base if base is None or base_on_hub else Path(base).name,
        base_on_hub=base_on_hub,
        sources=tuple(_sources(config.get("data", {}), data, launched_in)),
    )


def _sources(config: dict[str, Any], record: dict[str, Any], launched_in: Path) -> Iterable[_Source]:
    """What data.json says of each source, with the config's settings of that path; else the config alone."""
    settings = {source["path"]: source for use in ("train", "eval") for source in config.get(use, ())}
    for use in ("train", "eval"):
        for account in (record.get(use) or {}).get("sources") or config.get(use, ()):
            path = account["path"]
            known = {key: value for key, value in account.items() if value is not None}
            on_hub = not account.get("sha256") and is_hub_id(path, launched_in)
            yield _Source(path if on_hub else Path(path).name, on_hub, use, {**settings.get(path, {}), **known})


def _metadata(run: _Run) -> ModelCardData:
    results = _eval_results(run)
    return ModelCardData(
        base_model=run.base if run.base_on_hub else None,
        base_model_relation=("adapter" if run.adapter else "finetune") if run.base_on_hub else None,
        datasets=list(dict.fromkeys(source.name for source in run.sources if source.on_hub)) or None,
        eval_results=results or None,
        library_name="peft" if run.adapter else "transformers",
        license=run.get("hub.license"),
        metrics=["exact_match"] if any(result.metric_type == "exact_match" for result in results) else None,
        model_name=run.name if results else None,
        pipeline_tag="text-generation",
        tags=["sft", *([run.adapter_settings["peft_type"].lower()] if run.adapter else []), "smolfactory"],
    )


def _eval_results(run: _Run) -> list[EvalResult]:
    after = run.result.get("after") or {}
    source = next((source for use in ("eval", "train") for source in run.sources if source.use == use), None)
    if source is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.name if source.on_hub else _BUILDERS.get(Path(source.name).suffix, "other"),
            dataset_name=_evaluated_on(run),
            dataset_revision=source.details.get("revision") if source.on_hub else None,
            dataset_split=source.details.get("split") if source.on_hub else None,
            metric_type=metric,
            metric_name=label,
            metric_value=round(after[metric], 6),
        )
        for metric, label in _METRICS.items()
        if after.get(metric) is not None
    ]


def _evaluated_on(run: _Run) -> str:
    names = ", ".join(source.name for source in run.sources if source.use == "eval")
    if run.get("data.eval"):
        return names
    names = names or ", ".join(source.name for source in run.sources)
    return f"{names} (a held-out share of {run.get('data.eval_fraction', 0):.4g})"


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _linked_base(run: _Run) -> str:
    if run.base_on_hub:
        revision = run.get("model.revision")
        return f"[{run.base}](https://huggingface.co/{run.base})" + (f" at `{revision}`" if revision else "")
    return f"`{run.base}`, a local folder"


def _summary(run: _Run) -> str:
    if run.base is None:
        model_type = expanded(run.get("model.architecture", {})).get("model_type", "causal")
        kind = f"A language model ({model_type}) trained from random weights"
    elif run.adapter:
        kind = f"{_adapter_name(run)} for {_linked_base(run)}"
    else:
        kind = f"A fine-tuned version of {_linked_base(run)}"
    names = list(dict.fromkeys(f"`{source.name}`" for source in run.sources if source.use == "train"))
    learned = f", by supervised fine-tuning on {', '.join(names)}" if names else ", by supervised fine-tuning"
    return f"# {run.name}\n\n{kind}{learned}."


def _adapter_name(run: _Run) -> str:
    name = method_name(run.get("adapter", {}), run.adapter_settings)
    others = [
        Path(path).name if not is_hub_id(path, run.launched_in) else path for path in run.get("adapter.beside", ())
    ]
    needs = f", to be used with the adapters {', '.join(f'`{other}`' for other in others)}," if others else ""
    article = "An" if name[0] in "AIO" else "A"
    return f"{article} {name} adapter{needs}"


def _use(run: _Run) -> str:
    remote = ", trust_remote_code=True" if run.get("model.trust_remote_code") else ""
    explicit_base = run.adapter and (not run.base_on_hub or run.get("model.revision"))
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", f'location = "{run.location}"']
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(location{remote})"]
    if explicit_base:
        lines[0] = "from peft import PeftModel\n" + lines[0]
        revision = f', revision="{run.get("model.revision")}"' if run.get("model.revision") else ""
        here = "" if run.base_on_hub else "  # the folder of the base model"
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{run.base}"{revision}{remote}){here}']
        lines += ["if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:"]
        lines += ["    base.resize_token_embeddings(len(tokenizer))"]
        lines += ["model = PeftModel.from_pretrained(base, location)"]
    elif run.adapter:
        lines[0] = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        lines += [f"model = AutoPeftModelForCausalLM.from_pretrained(location{remote})"]
    else:
        lines += [f"model = AutoModelForCausalLM.from_pretrained(location{remote})"]
    lines += beside_lines(run.get("adapter.beside", ()), run.launched_in)
    if run.has_chat_template:
        lines += ['messages = [{"role": "user", "content": "What can you do?"}]']
        lines += ["inputs = tokenizer.apply_chat_template("]
        lines += ['    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"', ")"]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    lines += ["answer = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]"]
    lines += ["print(tokenizer.decode(answer, skip_special_tokens=True))"]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _data(run: _Run) -> str:
    rows = []
    for source in run.sources:
        name = (
            f"[{source.name}](https://huggingface.co/datasets/{source.name})" if source.on_hub else f"`{source.name}`"
        )
        parts = [str(source.details[key]) for key in ("subset", "split") if source.on_hub and source.details.get(key)]
        kept = source.details.get("rows_kept", "")
        rows.append(
            (" ".join([name, *parts]), source.use, source.details.get("format", ""), kept, _fingerprint(source))
        )
    text = "## Data\n\n" + _table(("source", "use", "format", "rows", "fingerprint"), rows)
    for use, verb in (("train", "Trained"), ("eval", "Measured")):
        report = run.data.get(use) or {}
        counts = [(key, report.get(key)) for key in ("rows_kept", "tokens", "supervised_tokens")]
        told = ", ".join(f"{count:,} {key.replace('_kept', '').replace('_', ' ')}" for key, count in counts if count)
        text += f"\n\n{verb} on {told}." if told else ""
        if dropped := {reason: count for reason, count in report.get("dropped", {}).items() if count}:
            text += " Left out: " + ", ".join(f"{count:,} rows ({reason})" for reason, count in dropped.items()) + "."
        if truncated := report.get("truncated"):
            text += f" Cut at {run.get('data.max_length')} tokens: {truncated:,} rows."
    supervised = {"assistant": "the assistant's turns alone", "all": "every token but a row's first"}
    return text + f"\n\nThe loss counts {supervised.get(run.get('data.supervise'), 'supervised tokens')}."


def _fingerprint(source: _Source) -> str:
    digests = list((source.details.get("sha256") or {}).values())
    if len(digests) > 1:
        return f"sha256 of {len(digests)} files in data.json"
    if digests:
        return f"sha256 `{digests[0]}`"
    return f"revision `{source.details['revision']}`" if source.details.get("revision") else "not recorded"


def _training(run: _Run) -> str:
    rows = [("method", _method(run)), ("optimizer", _optimizer(run)), ("learning rate", _learning_rate(run))]
    micro, length = run.get("training.micro_batch_rows", 1), run.get("data.max_length", 0)
    steps, processes = run.get("training.accumulation_steps", 1), run.environment.get("world_size", 1)
    product = f"micro-batch {micro} x length {length} x accumulation {steps} x processes {processes}"
    rows += [("tokens a step", f"{product} = {micro * length * steps * processes:,} at most")]
    if (taken := run.result.get("steps")) is not None:
        rows += [("steps", taken)]
    else:
        rows += [("epochs", str(run.get("training.epochs")))]
    if parameters := run.result.get("parameters"):
        rows += [("parameters", f"{parameters['trainable']:,} of {parameters['total']:,} train")]
    packing = run.result.get("packing", run.get("data.packing"))
    rows += [("packing", "yes, attention never crosses rows" if packing else "no")]
    asked = f"{run.get('training.precision')}, weights held in {run.get('model.dtype')}"
    rows += [("precision", run.result.get("precision", asked))]
    attention = run.result.get("attention", run.get("model.attention"))
    rows += [("attention", attention), ("seed", str(run.get("training.seed")))]
    if run.base is None:
        shape = ", ".join(f"{key} {value}" for key, value in run.get("model.architecture", {}).items())
        rows.insert(0, ("architecture", shape))
    return "## Training\n\n" + _table(("setting", "value"), [row for row in rows if row[1] is not None])


def _method(run: _Run) -> str:
    if run.get("adapter.kind", "none") == "none":
        return weights_text(run.get("freeze", {}), qat=run.get("model.qat", "none"))
    text = method_text(run.get("adapter"), run.adapter_settings)
    if (quantization := run.get("model.quantization", "none")) != "none":
        text += f"; the frozen weights were held in {quantization}"
    return text if run.adapter else text + "; merged into the base model's weights"


def _optimizer(run: _Run) -> str:
    name, clip = run.get("optim.name", ""), run.get("optim.max_grad_norm")
    betas = ("beta1", "beta2") if "adam" in name or name == "muon" else ()
    parts = [name, *(f"{beta} {run.get(f'optim.{beta}')}" for beta in betas)]
    parts += [f"weight decay {run.get('optim.weight_decay')}"]
    if (ratio := run.get("optim.lora_plus_ratio", 1.0)) != 1:
        parts += [f"LoRA's B matrices at {ratio:g} times the learning rate"]
    return ", ".join([*parts, f"gradient norm at most {clip}"] if clip else parts)


def _learning_rate(run: _Run) -> str:
    fraction, steps = run.get("optim.warmup_fraction"), run.get("optim.warmup_steps")
    warmup = f"{steps} steps" if steps is not None else f"{fraction:.4g} of the steps" if fraction else "none"
    course = run.get("optim.schedule")
    if floor := run.get("optim.min_lr_fraction"):
        course += f" to {floor:g} of it"
    return f"{run.get('optim.learning_rate'):.4g} at its peak, {course}, warmup: {warmup}"


def _results(run: _Run) -> str:
    before, after = run.result.get("before") or {}, run.result.get("after") or {}
    rows = [
        (label, "" if before.get(metric) is None else float(before[metric]), float(after[metric]))
        for metric, label in _METRICS.items()
        if after.get(metric) is not None
    ]
    lines = ["## Results"]
    if rows:
        lines += [f"On {_evaluated_on(run)}:", _table(("measure", "before", "after"), rows)]
    if after.get("answers"):
        lines += [f"Exact match is the share of {after['answers']:,} greedy answers that equal the reference."]
    losses = [run.result.get("first_loss"), run.result.get("last_loss")]
    if None not in losses and losses[0] != losses[1]:
        lines += [f"Training loss, first and last logged: {losses[0]:.4f} and {losses[1]:.4f}."]
    facts = [f"{run.result[key]:,} {key}" for key in ("tokens", "seconds") if run.result.get(key) is not None]
    since = f" since step {step:,}" if (step := run.result.get("seconds_since_step")) else ""
    lines += [f"Training took {', '.join(facts)}{since}."] if facts else []
    return "\n\n".join(lines if len(lines) > 1 else [*lines, "None were recorded."])


def _limits(run: _Run) -> str:
    after = run.result.get("after") or {}
    if any(after.get(metric) is not None for metric in _METRICS):
        lines = [f"The figures are for {_evaluated_on(run)}. They say nothing of other tasks, languages or prompts."]
    else:
        lines = ["It was not evaluated: how good its answers are is not known."]
    if run.base is None:
        lines += ["It knows only what its training rows say, and was not made safe in any way."]
    else:
        lines += [
            "It keeps the limits and biases of its base model. Nothing was done to make its answers safe or true."
        ]
    if run.base is not None and not run.base_on_hub:
        lines += [f"Its base model was a local folder, `{run.base}`, which this card cannot point to."]
    if run.get("data.max_length"):
        lines += [f"It saw no row of more than {run.get('data.max_length'):,} tokens."]
    if run.adapter and run.get("model.quantization", "none") != "none":
        quantization = run.get("model.quantization")
        lines += [f"It was trained on {quantization} weights; on unquantized ones its answers may differ slightly."]
    if not run.has_chat_template:
        lines += ["It has no chat template: it continues text, and is not made for conversations."]
    if forced := run.result.get("forced_checks"):
        lines += [f"It was trained although these checks would have stopped the run: {', '.join(forced)}."]
    if run.get("hub.license") is None:
        origins = "the data" if run.base is None else "the base model and of the data"
        lines += [f"No license is stated here; the licenses of {origins} apply."]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _reproduction(run: _Run) -> str:
    command = [public_record(part) for part in run.environment.get("command", [])]
    lines = ["## Reproduce", "The run's record is in `run/` of the repository, its resolved settings in `config.json`."]
    if command:
        commit, _, dirty = (run.environment.get("git_commit") or "").partition("-")
        steps = ([f"git checkout {commit}"] if commit else []) + [shlex.join(["python", *command])]
        lines += ["```sh\n" + "\n".join(steps) + "\n```"]
        if dirty:
            lines += ["The code had changes that are in no commit, so this may not give the same result."]
    versions = {"python": run.environment.get("python"), **run.environment.get("packages", {})}
    if told := ", ".join(f"{name} {version}" for name, version in versions.items() if version):
        lines += [f"Versions: {told}."]
    hardware = public_record(run.environment.get("hardware", {}))
    parts = [f"{key} {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in hardware.items()]
    processes = run.environment.get("world_size", 1)
    if parts:
        lines += [f"Hardware: {'; '.join(parts)}; {processes} {'process' if processes == 1 else 'processes'}."]
    return "\n\n".join(lines)
