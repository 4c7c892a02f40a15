"""Readers of what a run finds on resuming, and of the checkpoint that it starts from."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from config.effects import effect_of
from config.loader import to_dict
from config.recipe import load_recipe
from config.schema import ModelConfig, OutputConfig
from src.accounting import Tally
from src.cache import COMPLETE, ShardWriter, _is_complete, read_account
from src.callbacks import MetricsFile
from src.chat import ChatTemplate
from src.model import load_model, load_settings, load_tokenizer
from src.run import open_run
from src.streaming import Mark, Place, StreamFeed
from tests.fuzz.checkpoints import GPT2, LLAMA, QWEN, WEIGHTS
from tests.fuzz.reader import Reader
from tests.toy_tokenizer import toy_tokenizer
from utils.checkpoint_record import config_digest, write_record
from utils.digests import Digests
from utils.files import write_json

CONFIG = Path("config/smol.yaml")


def _run(folder: Path, *, recorded: bool) -> None:
    """A run's directory with two checkpoints, as training leaves it."""
    run = folder / "a"
    for step in (2, 4):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file({"a": torch.ones(2)}, checkpoint / "model.safetensors")
        state = {"global_step": step, "epoch": 0.5, "max_steps": 8, "log_history": [{"step": step, "loss": 1.0}]}
        write_json(checkpoint / "trainer_state.json", state)
    write_json(run / "config.json", to_dict(load_recipe(CONFIG)))
    write_json(run / "environment.json", {"world_size": 1, "packages": {"torch": "2.13.0"}})
    lines = [{"step": step, "loss": 1.0 / step, "learning_rate": 1e-3} for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if recorded:
        for checkpoint in run.glob("checkpoint-*"):
            write_record(checkpoint, step=int(checkpoint.name[11:]), config=run / "config.json")


def resume(folder: Path) -> None:
    """Go through what a resumed run reads before its first step; twice, as the second finds what the first wrote."""
    for _ in range(2):
        run = open_run(OutputConfig(folder=str(folder.parent), name=folder.name), resume=True)
        config_digest(run.checkpoint)
        run.record("config.json", to_dict(load_recipe(CONFIG)), matters=("",), effect=effect_of)
        run.record("environment.json", {"world_size": 1}, matters=("world_size",))
        state = SimpleNamespace(is_world_process_zero=True, global_step=4)
        MetricsFile(run.path / "metrics.jsonl").on_train_begin(None, state, None)


def _stream(folder: Path) -> None:
    tallies = (Tally(rows=3, tokens=40, examples={"leak": ["a line 1"]}),)
    row = (torch.arange(3).int().numpy(), torch.arange(3).int().numpy())
    feed = StreamFeed.__new__(StreamFeed)
    feed.mark = Mark(7, 2, Place(1, 2, (30,), tallies, (row,)), tallies)
    (folder / "a").mkdir()
    write_json(folder / "a" / "stream.json", feed.state())


def load_stream(folder: Path) -> None:
    """Take up the place of a stream, and tell it again."""
    feed = StreamFeed.__new__(StreamFeed)
    feed.mark = Mark(0, 0, Place(0, 0, (0,), (Tally(),)), (Tally(),))
    feed.load_state_from(folder / "stream.json")
    json.dumps(feed.state())


def _cache(folder: Path) -> None:
    place = folder / "a"
    shard = place / "source-000" / "shard-000000"
    shard.mkdir(parents=True)
    ShardWriter(shard).close({"rows_read": 3})
    write_json(place / COMPLETE, {"shards": ["source-000/shard-000000"]})
    (place / "rows.jsonl").write_text("{}\n", "utf-8")
    write_json(place / "digests.json", {"/a/rows.jsonl": [3, 1, 1, 1, 1, "ab" * 32]})


def read_cache(folder: Path) -> None:
    """Ask whether token rows of an earlier run are whole, and what its files were."""
    _is_complete(folder)
    for shard in folder.glob("source-*/shard-*"):
        read_account(shard)
    digests = Digests(folder / "digests.json")
    if (folder / "rows.jsonl").is_file():
        digests.sha256(folder / "rows.jsonl")
    digests.save()


def _bases(folder: Path) -> None:
    from tests.test_gguf_checkpoints import save

    for name, config in (("llama", LLAMA), ("qwen2", QWEN), ("gpt2", GPT2)):
        save(folder / name, config, toy_tokenizer())


def load_base(folder: Path) -> None:
    """Load a checkpoint as training does."""
    config = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(config)
    settings = load_settings(config, tokenizer)
    model = load_model(config, settings, tokenizer, trains_all=True)
    if tokenizer.chat_template:
        ChatTemplate.of(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


READERS = (
    Reader("resume", functools.partial(_run, recorded=True), resume, 20, WEIGHTS),
    Reader("resume without record", functools.partial(_run, recorded=False), resume, 8, WEIGHTS),
    Reader("stream.json", _stream, load_stream, 60),
    Reader("token cache", _cache, read_cache, 60),
    Reader("base checkpoint", _bases, load_base, 4, ("model.safetensors",)),
    Reader("base weights", _bases, load_base, 2),
)
