"""Train a language model as a recipe says.

accelerate launch train.py --config config/smol.py
accelerate launch train.py --config config/smol.py --resume
accelerate launch train.py --config config/smol.py --resume outputs/smol/checkpoint-100
python train.py --config config/smol.py --optim.learning_rate 1e-3 --print-config
python train.py --config config/smol.py --plan
python train.py --reproduce outputs/smol
python train.py --help
"""

import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.effects import effect_of
from config.loader import CommandLine, ConfigError, format_config, read_command_line, to_dict
from config.schema import HubConfig, ModelConfig, RunConfig
from src.run_lock import run_lock
from utils.errors import UserError, tell_error
from utils.failures import OTHERS_WAIT_S, name_failing_process
from utils.launch import is_main_process, this_process
from utils.logging import get_logger, set_up_logging
from utils.memory import fix_allocator
from utils.signals import keep_interrupts, raise_lost_interrupt

if TYPE_CHECKING:  # torch and its company take seconds to import: only once the recipe is known to be right
    import torch

    from src.plan import Plan
    from src.run import Run
    from src.start_checks import StartChecks
    from src.trainer import SFTTrainer

log = get_logger("train")


def train(command: CommandLine) -> None:
    """Recipe -> run -> data -> model -> trainer -> result -> Hub; or a trial of that."""
    from transformers.utils.logging import disable_progress_bar

    from src.adapter_starts import FIRST_BATCHES, start_from_batches
    from src.assembly import build_model, build_trainer, load_data, load_words, tell_precision, trainer_arguments
    from src.data import token_folder
    from src.new_tokenizer import with_tokenizer
    from src.pack_report import pack_report
    from src.packing import PackedRows
    from src.plan import make_plan
    from src.run import open_run
    from src.start_checks import StartChecks
    from src.stopping import stoppable
    from src.trial import run_trial

    disable_progress_bar()
    started, config = time.perf_counter(), command.config
    _check_start(config)
    checks = StartChecks(command.force, plans=command.plan)
    run = open_run(config.output, resume=command.resume, resume_from=command.resume_from, plans=command.plan)
    _check_hub(config.hub, checks, create=False)
    args = trainer_arguments(config, run)
    cache_folder = token_folder(config.data, config.output)
    own = with_tokenizer(
        config.model, config.data, cache_folder=cache_folder, kept=run.path if run.checkpoint else None
    )
    tokenizer, settings = load_words(config, own)
    stream, data = load_data(config, tokenizer, settings, cache_folder, checks)
    known_rows = settings.get_text_config().vocab_size  # before they grow
    model, start, packing = build_model(config, own, tokenizer, settings, run, args, checks)
    packs_config = replace(config.data, packing=packing)
    train_packs = stream.packed(packing) if stream else PackedRows.of(data.train, packs_config)
    eval_packs = PackedRows.of(data.eval, packs_config) if data.eval else None
    precision = tell_precision(config, model, args)
    trainer = build_trainer(
        config, run, args, tokenizer, model, train_packs, eval_packs, data.eval_conversations, tries=bool(command.trial)
    )
    if command.trial:
        return run_trial(trainer, run, config, start=start, qat=config.model.qat)
    raise_lost_interrupt()
    packs = pack_report(config.data, data.report, train=train_packs, eval=eval_packs)
    plan = make_plan(config, run, trainer, data.report | packs, checks, known_rows=known_rows, precision=precision)
    if command.plan:
        return _show(plan, run, checks)
    checks.enforce()
    _check_hub(config.hub, checks, create=True)  # nothing else proves that it may be
    run.record("plan.json", plan.as_json(checks, before=run.before("plan.json")))
    _record(config, own, run, data.report | packs, cache_folder)

    if config.adapter.init == "eva" and run.checkpoint is None:
        start_from_batches(trainer.accelerator.unwrap_model(trainer.model), trainer.first_batches(FIRST_BATCHES))
    with stoppable(trainer, config.training.grace_period_s):
        trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    if stream:  # what became of its rows is known only now
        run.record("data.json", train_packs.report(data.report, trainer.feed.mark.tallies) | packs)
    if eval_packs:
        trainer.evaluate_once()
        trainer.keep_best()
    _finish(config, run, trainer, start, plan, seconds=time.perf_counter() - started)


def _check_start(config: RunConfig) -> None:
    """Refuse what neither the processes as they were started nor the libraries can do, before anything loads."""
    from src.adapter_methods import check_method
    from src.sharding import check_sharding
    from utils.distributed import check_launch

    check_launch()
    check_method(config.adapter)
    check_sharding(config.model, config.adapter, config.optim)


def _check_hub(config: HubConfig, checks: "StartChecks", *, create: bool) -> None:
    """Make sure that the result may be pushed, if it is to be; the main process alone does."""
    from utils.hub import check_access

    if config.repo_id is not None and is_main_process():
        checks.attempt("hub_access", partial(check_access, config.repo_id, private=config.private, create=create))


def _show(plan: "Plan", run: "Run", checks: "StartChecks") -> None:
    """Print a plan, and record it where there is no run yet that it could disturb.

    Raises:
        UserError: the run would not start.
    """
    from src.start_checks import told_together

    if is_main_process():
        if not run.exists():
            run.record("plan.json", plan.as_json(checks))
        print("\n".join(plan.lines(checks)))
    if found := checks.stopping():
        raise UserError(told_together(found))


def _record(config: RunConfig, own: ModelConfig, run: "Run", report: dict[str, Any], cache_folder: Path) -> None:
    """Write what the run is, where it runs, what it starts from and what it learns from."""
    from src.inputs import record_origins
    from src.new_tokenizer import keep_tokenizer

    run.record("config.json", to_dict(config), matters=("",), effect=effect_of)
    if own.tokenizer != config.model.tokenizer and run.checkpoint is None and is_main_process():
        keep_tokenizer(own, run.path)
    record_origins(run, config, own, cache_folder)
    run.record("data.json", report, matters=("sha256",))


def _finish(
    config: RunConfig,
    run: "Run",
    trainer: "SFTTrainer",
    start: "dict[str, torch.Tensor] | None",
    plan: "Plan",
    *,
    seconds: float,
) -> None:
    """Result -> model card -> Hub."""
    from src.run import publish

    run.export(trainer, config.adapter, start=start, qat=config.model.qat)
    run.conclude(trainer, seconds=seconds, parameters=plan.parameters, precision=plan.precision)
    if config.hub.repo_id is not None and is_main_process():
        publish(run, config.hub)


def _run(command: CommandLine) -> int:
    """Train, or plan or repeat a run, and return the exit code."""
    from src.reproduction import as_it_was, is_equal
    from src.stopping import StoppedError
    from src.trial import begin_trial, trial_config
    from utils.distributed import leave_group
    from utils.peers import lost_processes_told

    if command.reproduce:
        command = as_it_was(command)
    if command.trial:
        command = replace(command, config=trial_config(command.config, command.trial))
        begin_trial(command.trial)
    output, code = command.config.output, 0
    apart = command.plan or command.trial is not None  # they write nothing where a run may be at work
    try:
        with nullcontext() if apart else run_lock(output), lost_processes_told(Path(output.folder) / output.name):
            train(command)
            if command.plan:
                _show_costs(command.config)
    except StoppedError as stopped:
        log.info("%s", stopped)
        code = stopped.exit_code
    leave_group()
    if command.reproduce and is_main_process() and not code:
        code = 0 if is_equal(command) else 1
    return code


def _show_costs(config: RunConfig) -> None:
    """Measure what a planned run will cost, which all processes do together, print it, and record it where there is no
    run yet.

    By now the plan's own model is gone, whose memory the run will have.
    """
    from src.run import add_costs
    from src.stopping import too_short_grace
    from src.trial_process import measure_costs

    costs = measure_costs(config, Path(__file__))
    if not is_main_process():
        return
    print("\n".join(costs.lines()))
    add_costs(config.output, costs.to_dict())
    if (found := costs.projection) is not None:
        grace_s = config.training.grace_period_s
        if said := too_short_grace(found.step_s, found.checkpoint_s, grace_s, found.evaluation_s):
            log.warning("%s", said)


def main() -> int:
    """Exit codes: 0 when the run ended well, 1 when it repeated another and its weights differ, 2 when its recipe, data
    or machine must change first, or another of its processes was lost, and 128 and a signal's number when that has
    ended it."""
    fix_allocator()
    set_up_logging()
    name_failing_process()
    keep_interrupts()
    try:
        command = read_command_line(sys.argv[1:])
        if not command.print_config:
            return _run(command)
        print(format_config(command))
    except (ConfigError, UserError) as error:
        who = "" if is_main_process() else f" ({this_process()})"
        if who:
            time.sleep(OTHERS_WAIT_S)
        tell_error(f"{error}{who}")
        return 2
    except KeyboardInterrupt:
        tell_error("SIGINT ended the run outside of its training steps; nothing was saved for it")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
