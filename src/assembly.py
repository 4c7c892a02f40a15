"""The parts of a run, each made from its settings, in the order in which train.py needs them.

    args = trainer_arguments(config, run)
    tokenizer, settings = load_words(config, own)
    stream, data = load_data(config, tokenizer, settings, cache_folder, checks)
    model, start, packing = build_model(config, own, tokenizer, settings, run, args, checks)
    trainer = build_trainer(config, run, args, tokenizer, model, train_packs, eval_packs, data.eval_conversations)

Unlike other modules these take the whole of the settings, as they hand each part to those that need it.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.training_args import TrainingArguments

from config.effects import row_order_settings
from config.loader import to_dict
from config.schema import ModelConfig, RunConfig
from src.activations import recompute_activations
from src.adapter_export import starting_weights
from src.adapter_probe import probe_adapter
from src.adapters import add_adapter, count_parameters
from src.attention_choice import prove_attention
from src.callbacks import Answers, Intervals, MetricsFile, Progress
from src.chat_setup import check_stop_trains
from src.compilation import CompiledLayers, check_compilation
from src.context import check_length, context_length
from src.data import TokenizedData, build_datasets
from src.families import causal_class
from src.formats import Conversation
from src.freezing import freeze_weights
from src.loss import SupervisedLoss
from src.model import load_model, load_settings, load_tokenizer
from src.packing import PackedRows
from src.precision import Precision, warn_of_lost_updates
from src.quantization import check_base
from src.router_loss import check_router_loss
from src.run import Run
from src.start_checks import StartChecks
from src.streaming import RowStream, stream_datasets
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from src.trial import TrialTrainer
from utils.distributed import accelerator_name, check_shared_folder, check_world, shards_weights, use_cores
from utils.engines import Sharded, check_engine, check_parallelism
from utils.logging import get_logger
from utils.redaction import redacted

log = get_logger(__name__)


def trainer_arguments(config: RunConfig, run: Run) -> TrainingArguments:
    """Trainer's settings; the processes of a run find each other here."""
    check_engine(accelerator_name())
    check_parallelism(packing=config.data.packing)
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
    if config.training.save_every_steps:
        check_shared_folder(run.path, args.device)
    check_compilation(config.training, args.device.type)
    threads = f", {use_cores(config.training.cpu_threads)} thread(s) each" if args.device.type == "cpu" else ""
    log.info("%d process(es) on %s%s; the run is written to %s", args.world_size, args.device.type, threads, run.path)
    return args


def load_words(config: RunConfig, own: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer, and the model's settings, with all that can be refused before the data and the weights load.

    Args:
        own: `config.model` with the tokenizer that this run may have made.
    """
    tokenizer = load_tokenizer(own)
    settings = load_settings(own, tokenizer)
    check_base(config.model, settings, trains_all=config.adapter.kind == "none")
    probe_adapter(config.adapter, own, tokenizer)
    check_router_loss(causal_class(settings), config.training.router_aux_loss)
    check_length(settings, config.data.max_length)
    return tokenizer, settings


def load_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: PreTrainedConfig,
    cache_folder: Path,
    checks: StartChecks,
) -> tuple[RowStream | None, TokenizedData]:
    """The stream of training rows, if they are one, and the rows that are prepared."""
    limits = {"context_length": context_length(settings), "cache_folder": cache_folder}
    if config.data.streaming:
        stream, data = stream_datasets(config.data, tokenizer, look_at=checks.look_at_rows, **limits)
    else:
        stream, data = None, build_datasets(config.data, tokenizer, **limits)
    checks.look_at_rows(data.findings)
    return stream, data


def build_model(
    config: RunConfig,
    own: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: PreTrainedConfig,
    run: Run,
    args: TrainingArguments,
    checks: StartChecks,
) -> tuple[PreTrainedModel | PeftModel, dict[str, torch.Tensor] | None, bool]:
    """The model with what trains of it, what its adapter took out of the base, and whether it takes packed rows."""
    known_rows = settings.get_text_config().vocab_size  # before they grow
    autocast, trains_all = _autocast(args), config.adapter.kind == "none"
    set_seed(config.training.seed)
    model = load_model(own, settings, tokenizer, trains_all=trains_all, autocasts=autocast is not None)
    checks.attempt("untrained_tokens", partial(check_stop_trains, model, tokenizer, known_rows, config.adapter))
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


def _autocast(args: TrainingArguments) -> torch.dtype | None:
    """Number format of the matrix products of float32 weights; None: their own."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def tell_precision(config: RunConfig, model: PreTrainedModel | PeftModel, args: TrainingArguments) -> str:
    """Tell what trains and in which number formats, and return the latter."""
    parameters = count_parameters(model)
    log.info("%s parameters, of which %s train", f"{parameters['total']:,}", f"{parameters['trainable']:,}")
    precision = Precision.of(model, autocast=_autocast(args), optim=config.optim).told()
    log.info("precision: %s", precision)
    if not shards_weights():  # which may hold weights in float32 of its own accord
        warn_of_lost_updates(model, config.optim)
    return precision


def build_trainer(
    config: RunConfig,
    run: Run,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PeftModel,
    train_packs: PackedRows | RowStream,
    eval_packs: PackedRows | None,
    conversations: Sequence[Conversation],
    *,
    tries: bool = False,
) -> SFTTrainer:
    """The trainer and what watches it.

    Args:
        tries: whether it is that of a trial, which measures.
    """
    training = config.training
    metrics = MetricsFile(run.path / "metrics.jsonl")
    answers = Answers(tokenizer, conversations, config.evaluation, metrics, run.path / "samples.jsonl")
    score = SupervisedLoss(
        label_smoothing=training.label_smoothing, z_loss=training.z_loss, router_aux_loss=training.router_aux_loss
    )
    trainer = (TrialTrainer if tries else SFTTrainer)(
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
        order_settings=redacted(row_order_settings(to_dict(config))),
        max_bad_steps=training.max_bad_steps,
        patience=config.evaluation.patience,
        callbacks=[Sharded(), Intervals(), Progress(), metrics, answers],
    )
    answers.stops_early = lambda: trainer.best.out_of_patience
    trainer.add_callback(CompiledLayers(training.compile, score, trainer.data_collator))
    if run.checkpoint is not None:
        trainer.restore_order(run.checkpoint)
    return trainer
