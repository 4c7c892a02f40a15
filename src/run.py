"""The run directory: the contract between the parts of a run, and between a run and its reader.

run = open_run(config.output, resume=False)
run.record("config.json", to_dict(config))
...
run.export(trainer)
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer

from config.schema import AdapterConfig, HubConfig, OutputConfig
from src.adapter_export import save_adapter
from src.callbacks import clock
from src.model_card import model_card
from src.quantization import save_rounded
from src.run_lock import FILE as LOCK
from src.run_lock import run_folder
from src.sharding import gathered_weights
from src.trainer import SFTTrainer
from utils.checkpoint_record import config_digest
from utils.checkpointing import last_checkpoint, newest_valid_checkpoint, step_of, valid_checkpoint, writing_to
from utils.errors import UserError
from utils.files import is_write_failure, sha256_of_file, whole_folder, write_json, write_text
from utils.hub import push_folder
from utils.json_text import read_json_file
from utils.launch import is_main_process
from utils.logging import get_logger
from utils.metrics import peak_memory
from utils.redaction import redacted
from utils.weights_digest import weights_sha256

log = get_logger(__name__)

PLAN = "plan.json"
"""The record of the preflight."""
CHANGES = "changes.json"
"""What a run was resumed with that it did not start with, in the order of the resumes."""


@dataclass(frozen=True)
class Run:
    """A run's directory, and the checkpoint that it goes on from, if any."""

    path: Path
    checkpoint: Path | None

    def record(
        self,
        name: str,
        content: Any,
        *,
        matters: Sequence[str] = (),
        effect: Callable[[str], str] | None = None,
    ) -> None:
        """Write a JSON file of the record, without secrets; the main process alone does.

        Args:
            matters: if the run goes on from a checkpoint, a value whose dotted name holds one of these is compared with
                that of the run's start, and a difference told; "" stands for all.
            effect: what a difference means, in words, by the dotted name. None: that is not said.
        """
        if not is_main_process():
            return
        path, content = self.path / name, redacted(content)
        if self.checkpoint is not None and path.is_file():
            before = _flat(read_json_file(path, "bring it back as it was, or start anew with another --output.name"))
            after = _flat(json.loads(json.dumps(content)))
            changed = [
                {"name": key, "before": before.get(key), "after": after.get(key)}
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key) and any(part in key for part in matters)
            ]
            for change in changed:
                key = change["name"]
                told = f"{key} was {change['before']!r} when this run started and is {change['after']!r} now"
                log.warning("%s", f"{told}; {effect(key)}" if effect else told)
            self._keep_changes(name, changed)
        with writing_to(path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(path, content)

    def _keep_changes(self, name: str, changed: list[dict[str, Any]]) -> None:
        """Add what has changed in a file of the record, which now forgets it, to those of earlier resumes.

        Of resumes from here, or from later on, no step is left: what they changed and this one takes back is no change.
        """
        path, step = self.path / CHANGES, step_of(self.checkpoint)
        known = read_json_file(path, "bring it back as it was", list) if path.is_file() else []
        undone = [one for one in known if one["file"] == name and one["step"] >= step]
        net: dict[str, dict[str, Any]] = {}
        for one in [*undone, *changed]:
            before = net.get(one["name"], one)["before"]
            net[one["name"]] = {**one, "step": step, "file": name, "before": before}
        content = [one for one in known if one not in undone]
        content += [one for one in net.values() if one["before"] != one["after"]]
        if content != known:
            with writing_to(path):
                write_json(path, content)

    def exists(self) -> bool:
        """Whether the directory holds a run, and not only a plan of one."""
        return self.path.is_dir() and any(path.name not in (PLAN, LOCK) for path in self.path.iterdir())

    def before(self, name: str) -> dict[str, Any]:
        """A file of the record as the start before left it; empty where the run does not go on, or there is none."""
        path = self.path / name
        if self.checkpoint is None or not path.is_file():
            return {}
        return read_json_file(path, "bring it back, or remove it to go on without what it tells of the start", dict)

    def export(
        self,
        trainer: Trainer,
        adapter: AdapterConfig | None = None,
        *,
        start: dict[str, torch.Tensor] | None = None,
        qat: str = "none",
    ) -> None:
        """Write the model or adapter with its tokenizer to `model/`, whole or not at all; every process calls this.

        Args:
            adapter: what the run was asked for. None: plain LoRA, if there is an adapter.
            start: what was taken out of the base for it, from `src.adapter_export`.
            qat: rounding that the weights were trained for and are written in, as `model.qat`.
        Raises:
            UserError: the disk is full, or a file cannot be written.
        """
        # A sharded model is gathered on the main process, to which every process contributes.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = gathered_weights(trainer) if sharded else None
        if not is_main_process():
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        try:
            with whole_folder(self.path / "model") as folder:
                if isinstance(model, PeftModel):
                    save_adapter(model, folder, adapter or AdapterConfig(kind="lora"), start=start, state_dict=weights)
                elif qat != "none":
                    save_rounded(model, folder, qat, weights)
                else:
                    model.save_pretrained(folder, state_dict=weights)
                trainer.processing_class.save_pretrained(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_write_failure(error):
                raise
            last = last_checkpoint(self.path)
            way_out = (
                f"free some space, then use --resume: {last.name} is complete" if last else "there is no checkpoint"
            )
            raise UserError(f"{self.path / 'model'} could not be written ({error}); {way_out}") from error

    def conclude(self, trainer: SFTTrainer, *, seconds: float, parameters: dict[str, int], precision: str) -> None:
        """Write result.json and the model card, and say what came of the run.

        Args:
            seconds: since the program began.
            parameters: numbers that train and in all.
            precision: number formats and the bytes of a parameter, in a line.
        """
        if not is_main_process():
            return
        result = self._result(trainer, seconds=seconds) | {"parameters": parameters, "precision": precision}
        self.record("result.json", result)
        with writing_to(self.path / "README.md"):
            write_text(self.path / "README.md", model_card(self.path))
        for name, label in (("loss", "eval loss"), ("exact_match", "exact match")):
            if name in result["before"] and name in result["after"]:
                before, after = (_told(result[when][name]) for when in ("before", "after"))
                log.info("%s: %s before, %s after", label, before, after)
        memory = result["peak_memory"].get("cuda_mib", result["peak_memory"]["resident_mib"])
        since = f" (since step {result['seconds_since_step']})" if self.checkpoint else ""
        log.info("%d steps in %s%s, %s MiB at most", result["steps"], clock(seconds), since, f"{memory:,}")
        log.info("the result is in %s; try it:", self.path / "model")
        log.info('  python scripts/generate.py %s --prompt "..."', self.path / "model")

    def _result(self, trainer: SFTTrainer, *, seconds: float) -> dict[str, Any]:
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        metrics = [json.loads(line) for line in lines]
        steps = trainer.state.global_step
        losses = [line["loss"] for line in metrics if line.get("loss") is not None]
        return {
            "steps": steps,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": round(seconds, 1),
            "seconds_since_step": step_of(self.checkpoint) if self.checkpoint else 0,
            "skipped_steps": trainer.numbers.skipped,
            "best": trainer.best.record(),
            "attention": trainer.model.config._attn_implementation,
            "packing": trainer.train_dataset.packs_rows(),
            "first_loss": next(iter(losses), None),  # a run that goes on from its last step may have lost its lines
            "last_loss": next(reversed(losses), None),
            "before": _evaluations(metrics, 0),
            "after": _evaluations(metrics, steps),
            "peak_memory": peak_memory(),
            "forced_checks": json.loads((self.path / PLAN).read_text(encoding="utf-8"))["forced"],
            "weights_sha256": weights_sha256(self.path / "model"),
        }


def _told(figure: float | None) -> str:
    return "not finite" if figure is None else f"{figure:.4f}"


def _evaluations(metrics: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The evaluation figures of a step, under their names without `eval_`."""
    wanted = ("eval_loss", "eval_exact_match", "eval_answers")
    return {
        name.removeprefix("eval_"): line[name]
        for line in metrics
        if line["step"] == step
        for name in wanted
        if name in line
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists as dotted names and their values."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    return {name: value for key, part in items for name, value in _flat(part, f"{prefix}.{key}".lstrip(".")).items()}


def open_run(config: OutputConfig, *, resume: bool, resume_from: Path | None = None, plans: bool = False) -> Run:
    """Find the directory of a run that starts, or the checkpoint of one that goes on. Nothing is written.

    Each process reads the checkpoint's files, once more than it loads them, so that all come to the same one.

    Args:
        resume: whether the run goes on.
        resume_from: the checkpoint that it then goes on from. None: the newest whose files are as they were written.
        plans: whether the run is only planned, so that another may be there.
    Raises:
        UserError: a run that starts would overwrite another, one that should go on has no checkpoint or a damaged one,
            or nothing can be written there.
    """
    path = run_folder(config)
    if resume:
        checkpoint = valid_checkpoint(path, resume_from) if resume_from else newest_valid_checkpoint(path)
        if checkpoint is None:
            raise UserError(
                f"--resume found no complete checkpoint in {path}; leave --resume out to start"
                + (f", with another --output.name or without the folder {path}" if path.exists() else "")
            )
        _tell_other_settings(path, checkpoint)
        return Run(path, checkpoint)
    run = Run(path, None)
    if is_main_process() and run.exists():
        way_out = "go on with it by --resume" if last_checkpoint(path) else f"it has no checkpoint: remove {path}"
        told = f"{path} holds a run already; {way_out}, or start another beside it by --output.name NAME"
        if not plans:
            raise UserError(told)
        log.warning("%s", told)
    return run


def add_costs(config: OutputConfig, costs: dict[str, Any]) -> None:
    """Record what a planned run was measured to cost beside its plan; the record of a run that is there stays."""
    run = Run(Path(config.folder) / config.name, None)
    path = run.path / PLAN
    if path.is_file() and not run.exists():
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"costs": costs})


def _tell_other_settings(path: Path, checkpoint: Path) -> None:
    """Say where the settings on record are not those that a checkpoint was written under, so that a comparison with
    them misses what changed before."""
    written, record = config_digest(checkpoint), path / "config.json"
    if written is not None and record.is_file() and sha256_of_file(record) != written:
        log.warning(
            "%s has changed since %s was written; what that checkpoint was trained with is not compared",
            record,
            checkpoint.name,
        )


def publish(run: Run, config: HubConfig) -> None:
    """Push a finished run to the Hub; the main process alone calls this.

    Raises:
        UserError: the push failed; it says where the result stands and how to push it again.
    """
    if config.license is None:
        log.warning("the model card states no license; name it with hub.license before the model is made public")
    url = push_folder(run.path, config.repo_id, private=config.private, message=f"Upload {run.path.name}")
    log.info("pushed to %s", url)
