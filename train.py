"""Train a language model as a recipe says.

accelerate launch train.py --config config/smol.py
accelerate launch train.py --config config/smol.py --resume
accelerate launch train.py --config config/smol.py --resume outputs/smol/checkpoint-100
python train.py --config config/smol.py --optim.learning_rate 1e-3 --print-config
python train.py --help
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from config.effects import effect_of, row_order_settings
from config.loader import CommandLine, ConfigError, format_config, read_command_line, to_dict
from config.schema import ModelConfig, RunConfig
from utils.errors import UserError
from utils.launch import is_main_process
from utils.logging import get_logger, set_up_logging

if TYPE_CHECKING:  # torch and its company take seconds to import: only once the recipe is known to be right
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.training_args import TrainingArguments

    from src.data import TokenizedData
    from src.formats import Conversation
    from src.packing import PackedRows
    from src.run import Run
    from src.streaming import RowStream
    from src.trainer import SFTTrainer

log = get_logger("train")

OTHERS_WAIT_S = 5
"""What stops the main process mostly stops the others too. It speaks first, and the launcher then ends them; what an
other process alone has met, such as a file that is missing on its machine, it says itself after this time."""


def train(command: CommandLine) -> None:
    """Recipe -> run -> data -> model -> trainer -> result -> Hub."""
    from transformers.utils.logging import disable_progress_bar

    from src.adapter_methods import check_method
    from src.adapter_starts import FIRST_BATCHES, start_from_batches
    from src.adapters import count_parameters
    from src.data import token_folder
    from src.new_tokenizer import keep_tokenizer, with_tokenizer
    from src.pack_report import pack_report
    from src.packing import PackedRows
    from src.run import open_run, publish
    from src.stopping import stoppable
    from utils.distributed import check_launch
    from utils.hub import check_access
    from utils.reproducibility import environment

    disable_progress_bar()
    check_launch()
    started, config = time.perf_counter(), command.config
    pushes = config.hub.repo_id is not None and is_main_process()
    check_method(config.adapter)
    run = open_run(config.output, resume=command.resume, resume_from=command.resume_from)
    if pushes:
        check_access(config.hub.repo_id, private=config.hub.private, create=False)
    args = _arguments(config, run)
    cache_folder = token_folder(config.data, config.output)
    own = with_tokenizer(
        config.model, config.data, cache_folder=cache_folder, kept=run.path if run.checkpoint else None
    )
    tokenizer, settings = _words(config, own)
    stream, data = _data(config, tokenizer, settings, cache_folder)
    model, start, packing = _model(config, own, tokenizer, settings, run, args)
    packs_config = replace(config.data, packing=packing)
    train_packs = stream.packed(packing) if stream else PackedRows.of(data.train, packs_config)
    eval_packs = PackedRows.of(data.eval, packs_config) if data.eval else None
    precision = _precision(config, model, args)
    trainer = _trainer(config, run, args, tokenizer, model, train_packs, eval_packs, data.eval_conversations)
    if pushes:
        check_access(config.hub.repo_id, private=config.hub.private)  # creates it: nothing else proves that it may be
    run.record("config.json", to_dict(config), matters=("",), effect=effect_of)
    if own.tokenizer != config.model.tokenizer and run.checkpoint is None and is_main_process():
        keep_tokenizer(own, run.path)
    run.record("environment.json", environment(Path(__file__).parent), matters=("world_size", "packages"))
    packs = pack_report(config.data, data.report, train=train_packs, eval=eval_packs)
    run.record("data.json", data.report | packs, matters=("sha256",))

    if config.adapter.init == "eva" and run.checkpoint is None:
        start_from_batches(trainer.accelerator.unwrap_model(trainer.model), trainer.first_batches(FIRST_BATCHES))
    parameters = count_parameters(model)
    with stoppable(trainer, config.training.grace_period_s):
        trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    if stream:  # what became of its rows is known only now
        run.record("data.json", train_packs.report(data.report, trainer.feed.mark.tallies) | packs)
    if eval_packs:
        trainer.evaluate_once()
    run.export(trainer, config.adapter, start=start, qat=config.model.qat)
    run.conclude(trainer, seconds=time.perf_counter() - started, parameters=parameters, precision=precision)
    if pushes:
        publish(run, config.hub)


def _arguments(config: RunConfig, run: "Run") -> "TrainingArguments":
    """Trainer's settings; the processes of a run find each other here."""
    from src.compilation import check_compilation
    from src.training_arguments import training_arguments
    from utils.distributed import check_world, use_cores

    args = training_arguments(
        run.path,
        config.optim,
        config.training,
        config.evaluation,
        config.tracking,
        run_name=config.output.name,
        evaluates=bool(config.data.eval or config.data.eval_fraction),
        autocasts=config.model.dtype not in ("float64", "float16"),
        resumes=run.checkpoint is not None,
    )
    check_world(args.world_size)
    check_compilation(config.training, args.device.type)
    threads = f", {use_cores(config.training.cpu_threads)} thread(s) each" if args.device.type == "cpu" else ""
    log.info("%d process(es) on %s%s; the run is written to %s", args.world_size, args.device.type, threads, run.path)
    return args


def _words(config: RunConfig, own: ModelConfig) -> "tuple[PreTrainedTokenizerBase, PreTrainedConfig]":
    """The tokenizer, and the model's settings, with all that can be refused before the data and the weights load.

    Args:
        own: `config.model` with the tokenizer that this run may have made.
    """
    from src.adapter_probe import probe_adapter
    from src.context import check_length
    from src.families import causal_class
    from src.model import load_settings, load_tokenizer
    from src.quantization import check_base
    from src.router_loss import check_router_loss

    tokenizer = load_tokenizer(own)
    settings = load_settings(own, tokenizer)
    check_base(config.model, settings, trains_all=config.adapter.kind == "none")
    probe_adapter(config.adapter, own, tokenizer)
    check_router_loss(causal_class(settings), config.training.router_aux_loss)
    check_length(settings, config.data.max_length)
    return tokenizer, settings


def _data(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", settings: "PreTrainedConfig", cache_folder: Path
) -> "tuple[RowStream | None, TokenizedData]":
    """The stream of training rows, if they are one, and the rows that are prepared."""
    from src.context import context_length
    from src.contract import enforce
    from src.data import build_datasets
    from src.streaming import stream_datasets

    limits = {"context_length": context_length(settings), "cache_folder": cache_folder}
    if config.data.streaming:
        stream, data = stream_datasets(config.data, tokenizer, **limits)
    else:
        stream, data = None, build_datasets(config.data, tokenizer, **limits)
    enforce(data.findings)
    return stream, data


def _model(
    config: RunConfig,
    own: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: "PreTrainedConfig",
    run: "Run",
    args: "TrainingArguments",
) -> "tuple[PreTrainedModel | PeftModel, dict[str, torch.Tensor] | None, bool]":
    """The model with what trains of it, what its adapter took out of the base, and whether it takes packed rows."""
    from transformers import set_seed

    from src.activations import recompute_activations
    from src.adapter_export import starting_weights
    from src.adapters import add_adapter
    from src.attention_choice import prove_attention
    from src.chat_setup import check_stop_trains
    from src.freezing import freeze_weights
    from src.model import load_model

    known_rows = settings.get_text_config().vocab_size  # before they grow
    autocast, trains_all = _autocast(args), config.adapter.kind == "none"
    set_seed(config.training.seed)
    model = load_model(own, settings, tokenizer, trains_all=trains_all, autocasts=autocast is not None)
    check_stop_trains(model, tokenizer, known_rows, config.adapter)
    packing = prove_attention(
        model, config.model.attention, packing=config.data.packing, device=args.device, autocast=autocast
    )
    if config.training.gradient_checkpointing != "none":
        recompute_activations(model, config.training.gradient_checkpointing)
    if trains_all:
        freeze_weights(model, config.freeze, config.optim)
    grown = known_rows < model.get_input_embeddings().weight.shape[0]
    model = add_adapter(
        model,
        config.adapter,
        revision=config.model.revision,
        tokenizer=tokenizer,
        first_new_row=known_rows if grown else None,
        checkpoint=run.checkpoint,
    )
    return model, starting_weights(model, config.adapter), packing


def _autocast(args: "TrainingArguments") -> "torch.dtype | None":
    """Number format of the matrix products of float32 weights; None: their own."""
    import torch

    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _precision(config: RunConfig, model: "PreTrainedModel | PeftModel", args: "TrainingArguments") -> str:
    """Tell what trains and in which number formats, and return the latter."""
    from src.adapters import count_parameters
    from src.precision import Precision, warn_of_lost_updates
    from utils.distributed import shards_weights

    parameters = count_parameters(model)
    log.info("%s parameters, of which %s train", f"{parameters['total']:,}", f"{parameters['trainable']:,}")
    precision = Precision.of(model, autocast=_autocast(args), optim=config.optim).told()
    log.info("precision: %s", precision)
    if not shards_weights():  # which may hold weights in float32 of its own accord
        warn_of_lost_updates(model, config.optim)
    return precision


def _trainer(
    config: RunConfig,
    run: "Run",
    args: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel | PeftModel",
    train_packs: "PackedRows | RowStream",
    eval_packs: "PackedRows | None",
    conversations: "Sequence[Conversation]",
) -> "SFTTrainer":
    """The trainer and what watches it."""
    from src.callbacks import Answers, MetricsFile, Progress
    from src.compilation import CompiledLayers
    from src.loss import SupervisedLoss
    from src.trainer import SFTTrainer

    training = config.training
    metrics = MetricsFile(run.path / "metrics.jsonl")
    answers = Answers(tokenizer, conversations, config.evaluation, metrics, run.path / "samples.jsonl")
    score = SupervisedLoss(
        label_smoothing=training.label_smoothing, z_loss=training.z_loss, router_aux_loss=training.router_aux_loss
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        tokenizer=tokenizer,
        train_packs=train_packs,
        eval_packs=eval_packs,
        keep_checkpoints=training.keep_checkpoints,
        tokens_per_micro_batch=training.tokens_per_micro_batch,
        optim=config.optim,
        neftune_alpha=training.neftune_alpha,
        activation_offload=training.activation_offload,
        score=score,
        order_settings=row_order_settings(to_dict(config)),
        callbacks=[Progress(), metrics, answers],
    )
    trainer.add_callback(CompiledLayers(training.compile, score, trainer.data_collator))
    if run.checkpoint is not None:
        trainer.restore_order(run.checkpoint)
    return trainer


def _trained(command: CommandLine) -> int:
    """Train, and return the exit code."""
    from src.stopping import StoppedError
    from utils.distributed import leave_group

    code = 0
    try:
        train(command)
    except StoppedError as stopped:
        log.info("%s", stopped)
        code = stopped.exit_code
    leave_group()
    return code


def main() -> int:
    """Exit codes: 0 when the run ended well, 2 when its recipe, data or machine must change first, and 128 and a
    signal's number when that has ended it."""
    set_up_logging()
    try:
        command = read_command_line(sys.argv[1:])
        if command.print_config:
            print(format_config(command))
        else:
            return _trained(command)
    except (ConfigError, UserError) as error:
        if not is_main_process():
            time.sleep(OTHERS_WAIT_S)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: SIGINT ended the run outside of its training steps; nothing was saved for it", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
