"""Train a language model as a recipe says.

    accelerate launch train.py --config config/smol.py
    accelerate launch train.py --config config/smol.py --resume
    python train.py --config config/smol.py --optim.learning_rate 1e-3 --print-config
    python train.py --help
"""

import sys
import time
from pathlib import Path

from config.loader import CommandLine, ConfigError, format_config, read_command_line, to_dict
from utils.errors import UserError
from utils.launch import is_main_process
from utils.logging import get_logger, set_up_logging

log = get_logger("train")


def train(command: CommandLine) -> None:
    """Recipe -> run -> data -> model -> trainer -> result -> Hub."""
    # torch and its company take seconds to import: only once the recipe is known to be right.
    from src.adapters import add_adapter, count_parameters
    from src.callbacks import Answers, MetricsFile, Progress
    from src.data import build_datasets
    from src.model import check_length, load_model, load_settings, load_tokenizer
    from src.model_card import model_card
    from src.packing import PackedRows
    from src.publish import check_publishing, publish
    from src.run import open_run
    from src.trainer import SFTTrainer, training_arguments
    from utils.distributed import check_world
    from utils.reproducibility import environment

    started, config = time.perf_counter(), command.config
    run = open_run(config.output, resume=command.resume)
    check_publishing(config.hub)
    args = training_arguments(run.path, config)
    check_world(args.world_size)
    log.info("%d process(es) on %s; the run is written to %s", args.world_size, args.device.type, run.path)

    tokenizer = load_tokenizer(config.model)
    settings = load_settings(config.model, tokenizer)
    data = build_datasets(config.data, tokenizer, context_length=check_length(config.data, settings))
    packs = PackedRows(data.train, max_length=config.data.max_length, packing=config.data.packing)
    eval_packs = data.eval and PackedRows(data.eval, max_length=config.data.max_length, packing=config.data.packing)
    model = load_model(config.model, settings, tokenizer, trains_all=config.adapter.kind == "none")
    model = add_adapter(model, config.adapter)

    metrics = MetricsFile(run.path / "metrics.jsonl")
    answers = Answers(tokenizer, data.eval_conversations, config.evaluation, metrics, run.path / "samples.jsonl")
    trainer = SFTTrainer(
        model=model,
        args=args,
        tokenizer=tokenizer,
        train_packs=packs,
        eval_packs=eval_packs,
        keep_checkpoints=config.training.keep_checkpoints,
        callbacks=[Progress(), metrics, answers],
    )
    run.warn_of_changes(to_dict(config))
    run.record("config.json", to_dict(config))
    run.record("environment.json", environment(Path(__file__).parent))
    run.record("data.json", {**data.report, "packs": packs.describe(config.data.max_length)})

    trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
    run.export(trainer)
    seconds = time.perf_counter() - started
    result = run.result(trainer, seconds=seconds, parameters=count_parameters(trainer.model))
    run.record("result.json", result)
    run.write("README.md", model_card(run.path))
    ...


def main() -> int:
    """Exit codes: 0 when the run ended well, 2 when its recipe, data or machine must change first."""
    set_up_logging()
    try:
        command = read_command_line(sys.argv[1:])
        if command.print_config:
            print(format_config(command))
        else:
            train(command)
    except (ConfigError, UserError) as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
