"""Each check of a start fires on what is really broken, stays silent on a run that is right, and can be forced."""

import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config.checks import CHECKS
from config.schema import EvaluationConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.attention import DOCUMENTS, register_documents
from src.checkpoints.convert import ReadOptions, convert
from src.packing import IGNORED, PackedRows
from src.rate_check import rate_findings, rate_range
from src.served_checks import IdsOfRow, bos_findings, stop_findings
from src.start_loss import StartLoss, fresh_bounds, loss_findings, measure_start_loss
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from tests.hub_server import HubServer
from tests.tiny_run import (
    ARCHITECTURE,
    ROOT,
    chat_rows,
    from_checkpoint,
    run_train,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import shared_file, toy_tokenizer

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def without_costs(monkeypatch):
    """A plan ends with a trial, which starts a process of its own and is the subject of tests/test_trial.py."""
    monkeypatch.setattr("train._show_costs", lambda config: None)


def findings_of(folder):
    plan = json.loads((folder / "outputs" / "run" / "plan.json").read_text(encoding="utf-8"))
    return {finding["check"]: finding for finding in plan["findings"]}


def refused(recipe, check, *told):
    """The run does not start, says why and how to start it, and leaves no step."""
    done = run_train("--config", recipe)
    assert done.code == 2
    for text in told:
        assert text in done.stderr
    assert f"`--force {check}` starts" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 1/" not in done.stderr


def test_a_run_that_is_right_has_no_finding(tmp_path):
    done = run_train("--config", write_recipe(tmp_path), "--plan")
    assert done.code == 0, done.stderr
    assert findings_of(tmp_path) == {}
    assert done.stdout.rstrip().endswith("none")


def test_a_broken_contract_that_is_forced_is_recorded_and_outlives_a_resume(tmp_path):
    rows = write_rows(tmp_path / "bad.jsonl", [*chat_rows(), {"messages": "nothing"}])
    recipe, run = write_recipe(tmp_path, data={"train": [{"path": str(rows)}]}), tmp_path / "outputs" / "run"
    refused(recipe, "data_contract", "malformed: 1 of 21 rows")
    forced = run_train("--config", recipe, "--force", "data_contract,disk_space")
    assert forced.code == 0, forced.stderr
    assert "warning: data_contract: malformed: 1 of 21 rows" in forced.stderr
    assert findings_of(tmp_path)["data_contract"]["forced"] is True
    assert json.loads((run / "result.json").read_text())["forced_checks"] == ["data_contract"], (
        "the other found nothing"
    )
    sentence = "It was trained although these checks would have stopped the run: data_contract."
    assert sentence in (run / "README.md").read_text()
    shutil.rmtree(run / "checkpoint-4")
    loose = ("--data.contract.malformed", "1.0")
    resumed = run_train("--config", recipe, "--resume", *loose)
    assert resumed.code == 0, resumed.stderr
    assert json.loads((run / "plan.json").read_text())["forced"] == ["data_contract"]
    assert sentence in (run / "README.md").read_text()


def test_rows_that_are_evaluated_on_have_a_check_of_their_own(tmp_path):
    seen = write_rows(tmp_path / "seen.jsonl", chat_rows()[:2])
    recipe = write_recipe(tmp_path, data={"eval": [{"path": str(seen)}]})
    refused(recipe, "eval_rows_seen", "leak: 2 of 20 rows")
    other = run_train("--config", recipe, "--force", "data_contract")
    assert other.code == 2, "another check was forced"


def test_the_first_window_of_a_stream_is_looked_at_before_the_run_starts(tmp_path):
    rows = write_rows(tmp_path / "bad.jsonl", [*chat_rows()[:3], {"messages": "nothing"}, *chat_rows()[3:]])
    data = {"train": [{"path": str(rows)}], "streaming": True, "stream_window_rows": 8}
    recipe = write_recipe(tmp_path, data=data)
    refused(recipe, "data_contract", "malformed: 1 of 8 rows")
    done = run_train("--config", recipe, "--force", "data_contract")
    assert done.code == 0, done.stderr
    assert findings_of(tmp_path)["data_contract"]["forced"] is True
    assert done.stderr.count("data_contract: malformed: 1 of 8 rows") == 1, "though the window is read more than once"


def test_a_stop_that_generation_goes_on_behind_ends_the_start(tmp_path):
    tokenizer = toy_tokenizer(special=("<|im_start|>", "<|call|>"))
    base = write_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    ends = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|call|>", "<|im_end|>")}
    for name, end in ends.items():
        folder = tmp_path / name.strip("<|>")
        rows = [
            {"input_ids": [65, 66, 67 + n, end], "labels": [IGNORED, IGNORED, 67 + n, end], "attention_mask": [1] * 4}
            for n in range(20)
        ]
        folder.mkdir()
        data = {"train": [{"path": str(write_rows(folder / "ids.jsonl", rows))}], "eval": []}
        recipe = write_recipe(folder, model=from_checkpoint(base), data=data)
        if name == "<|im_end|>":
            assert run_train("--config", recipe, "--plan").code == 0
            assert "stop_token" not in findings_of(folder)
        else:
            told = f"100% of the supervised turns that were looked at end with <|call|> ({end}), and generation_config"
            refused(recipe, "stop_token", told, "stops at <|im_end|> ")


def test_texts_that_never_stop_are_told_and_trained():
    tokenizer = toy_tokenizer()
    row = IdsOfRow(np.array([5, 6, 7]), np.array([IGNORED, 6, 7]))
    [finding] = stop_findings([row], GenerationConfig(eos_token_id=tokenizer.eos_token_id), tokenizer)
    assert (finding.check, finding.stops) == ("stop_token", False)
    assert stop_findings([row], GenerationConfig(eos_token_id=[9, 7]), tokenizer) == []


def test_a_bos_that_generation_config_names_otherwise_is_told():
    tokenizer = toy_tokenizer(bos="<|begin|>")
    assert bos_findings(GenerationConfig(bos_token_id=tokenizer.bos_token_id), tokenizer) == []
    assert bos_findings(GenerationConfig(), tokenizer) == []
    [finding] = bos_findings(GenerationConfig(bos_token_id=5), tokenizer)
    assert "(5) as BOS" in finding.found
    assert f"<|begin|> ({tokenizer.bos_token_id})" in finding.found


def test_a_token_that_the_base_never_saw_must_train_beside_an_adapter(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        model.get_input_embeddings().weight[start] = 0
    model.save_pretrained(base)
    changes = {"model": from_checkpoint(base), "adapter": {"kind": "lora", "rank": 2}}
    recipe = write_recipe(tmp_path, **changes)
    assert run_train("--config", recipe, "--plan").code == 0
    assert f"<|im_start|> ({start}) is new" in findings_of(tmp_path)["untrained_tokens"]["found"]
    for more in (["--adapter.trainable_tokens", "<|im_start|>"], ["--adapter.modules_to_save", "embed_tokens"]):
        assert run_train("--config", recipe, "--plan", *more).code == 0
        assert "untrained_tokens" not in findings_of(tmp_path)


def test_a_disk_that_is_too_small_for_all_that_stays_ends_the_start(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    assert run_train("--config", recipe, "--plan").code == 0
    needed = json.loads((tmp_path / "outputs" / "run" / "plan.json").read_text())["bytes"]["needed"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, needed - 1))
    refused(recipe, "disk_space", "2 checkpoints of ", "free some space, lower training.keep_checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, needed))
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr


def test_a_hub_that_cannot_be_written_ends_the_start_unless_it_is_forced(tmp_path):
    recipe = write_recipe(tmp_path)  # tests run offline
    done = run_train("--config", recipe, "--hub.repo_id", "me/tiny")
    assert done.code == 2
    assert "hub_access: hub.repo_id='me/tiny' asks for a push, but HF_HUB_OFFLINE" in done.stderr
    done = run_train("--config", recipe, "--hub.repo_id", "me/tiny", "--plan", "--force", "hub_access")
    assert done.code == 0, done.stderr
    assert "me/tiny (private): may not be written, see below" in done.stdout


@pytest.mark.slow
def test_a_hub_that_can_be_written_has_no_finding_and_gets_nothing_from_a_plan(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        command = [sys.executable, "train.py", "--config", str(write_recipe(tmp_path)), "--plan"]
        environment = hub.environment(tmp_path / "home", token="hf_secret")
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([*command, "--hub.repo_id", "me/tiny"], **options)
        assert done.returncode == 0, done.stderr
        assert "me/tiny (private): may be written" in done.stdout
        assert not hub.writes()
        done = subprocess.run([*command, "--hub.repo_id", "you/tiny"], **options)
        assert done.returncode == 2
        assert "hub_access: me may not write to you/" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("rate", "name", "adapter", "weights", "fresh", "told"),
    [
        (2e-5, "adamw_torch_fused", "none", 8_030_261_248, False, ""),  # Alpaca's
        (1e-3, "adamw_torch_fused", "none", 134_515_008, False, ""),  # SmolLM2-135M's
        (2e-4, "paged_adamw_8bit", "lora", 8_030_261_248, False, ""),  # QLoRA's
        (6e-4, "adamw_torch_fused", "none", 124_439_808, True, ""),  # GPT-3 125M's
        (6e-5, "adamw_torch_fused", "none", 175_000_000_000, True, ""),  # GPT-3 175B's
        (1e-2, "sgd", "none", 1_000_000_000, False, ""),  # of which nothing is claimed
        (2e-5, "adamw_torch_fused", "lora", 8_030_261_248, False, "far below what LoRA"),
        (1e-3, "adamw_torch_fused", "none", 8_030_261_248, False, "far above what training all weights"),
        (2e-3, "lion_32bit", "lora", 8_030_261_248, False, "far above what LoRA"),
        (1.0, "muon", "none", 1_000_000, True, "far above what training from random weights"),
        (1e-8, "adamw_torch", "none", 1_000_000_000, False, "far below what training all weights"),
    ],
)
def test_rates_of_published_runs_pass_and_those_of_another_method_are_told(rate, name, adapter, weights, fresh, told):
    optim = OptimConfig(name=name, learning_rate=rate)
    found = rate_findings(optim, adapter=adapter, weights=weights, starts_fresh=fresh)
    assert [told in finding.found and not finding.stops for finding in found] == ([True] if told else [])


def test_a_range_of_rates_has_an_end_above_its_start():
    for weights in (10**4, 10**7, 10**10, 10**12):
        for adapter, fresh in (("none", True), ("none", False), ("lora", False)):
            for name in ("adamw_torch_fused", "lion_8bit", "schedule_free_adamw", "muon"):
                optim = OptimConfig(name=name)
                low, high = rate_range(optim, adapter=adapter, weights=weights, starts_fresh=fresh)
                assert low < high


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """stories260K as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("stories") / "hf"
    source, tokenizer = (shared_file(f"weights/stories260K/{name}") for name in ("stories260K.bin", "tok512.bin"))
    convert(source, folder, "hf", reading=ReadOptions(tokenizer), check="none")
    return folder


def pieces_of(text, tokenizer, count=4, length=256):
    ids = tokenizer(text[: 8 * count * length], add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids[n * (length - 1) : (n + 1) * (length - 1)]] for n in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[IGNORED, *row[1:]] for row in rows]})


def trainer_of(model, tokenizer, rows, folder):
    register_documents()
    model.set_attn_implementation(DOCUMENTS)
    tokenizer.pad_token = "<unk>"
    training = TrainingConfig(max_steps=1, micro_batch_rows=4, precision="float32", save_every_steps=None)
    args = training_arguments(folder, OptimConfig(), training, EvaluationConfig(), TrackingConfig())
    packs = PackedRows(rows, max_length=256, packing=False)
    return SFTTrainer(model=model, args=args, train_packs=packs, tokenizer=tokenizer)


@torch.no_grad()
def break_it(model, how):
    torch.manual_seed(1)
    table, layers = model.get_input_embeddings().weight, model.model.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    if how == "embeddings in another order":
        table.copy_(table[torch.randperm(len(table))])
    elif how == "embeddings one row off":
        table.copy_(table.roll(1, 0))
    elif how == "layers of noise":
        for weight in matrices:
            weight.normal_(0, 0.02)
    elif how == "layers that are missing":
        for weight in matrices:
            weight.zero_()
    elif how == "layers in reverse":
        model.model.layers = torch.nn.ModuleList(reversed(layers))
    elif how == "a head of noise":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(table) * 0.02)
    elif how == "q and k in llama2.c's order":
        for layer in layers:
            for part, heads in ((layer.self_attn.q_proj, 8), (layer.self_attn.k_proj, 4)):
                halves = part.weight.unflatten(0, (heads, 2, -1))
                part.weight.copy_(halves.transpose(1, 2).flatten(end_dim=2).clone())
    elif how == "no numbers":
        matrices[0][0, 0] = math.nan


TEXTS = {
    "stories": "datasets/tinystories/tinystories.txt",
    "Shakespeare": "datasets/tinyshakespeare",
    "sums": "datasets/gsm8k/train.jsonl",
}


def text_of(name):
    path = shared_file(TEXTS[name])
    return (next(path.glob("*.txt")) if path.is_dir() else path).read_text(encoding="utf-8")


SEEN = {
    "whole": {"stories": [], "sums": [], "Shakespeare": []},
    "embeddings in another order": {"stories": [True], "sums": [True], "Shakespeare": [True]},
    "embeddings one row off": {"stories": [True], "sums": [True], "Shakespeare": [True]},
    "layers of noise": {"stories": [True], "sums": [True], "Shakespeare": [True]},
    "layers that are missing": {"stories": [True], "sums": [True], "Shakespeare": [True]},
    "layers in reverse": {"stories": [False], "sums": [True], "Shakespeare": [True]},
    "a head of noise": {"stories": [False], "sums": [False], "Shakespeare": [False]},
    "q and k in llama2.c's order": {"stories": [], "sums": [False], "Shakespeare": []},
}
"""Whether a finding stops the run; the last line shows the limit: what is a little wrong still knows much."""


@pytest.mark.parametrize("how", SEEN)
def test_the_loss_at_the_start_tells_a_broken_checkpoint_from_new_text(stories, tmp_path, how):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    break_it(model, how)
    seen = {}
    for text in TEXTS:
        trainer = trainer_of(model, tokenizer, pieces_of(text_of(text), tokenizer), tmp_path)
        start = measure_start_loss(trainer, trainer.first_batches(1)[0])
        print(f"{how}, {text}: loss {start.loss:.1f}, gain {start.gain:.1f} +- {start.gain_error:.1f}")
        seen[text] = [finding.stops for finding in loss_findings(start, model, starts_fresh=False)]
    assert seen == SEEN[how]


def test_weights_that_are_no_numbers_end_the_start(stories, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    break_it(model, "no numbers")
    trainer = trainer_of(model, tokenizer, pieces_of(text_of("stories"), tokenizer), tmp_path)
    start = measure_start_loss(trainer, trainer.first_batches(1)[0])
    [finding] = loss_findings(start, model, starts_fresh=False)
    assert finding.stops
    assert "is nan before any step" in finding.found


def test_measuring_changes_neither_weights_nor_random_numbers_nor_modes(stories, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    trainer = trainer_of(model, tokenizer, pieces_of(text_of("stories"), tokenizer), tmp_path)
    model.train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    start = measure_start_loss(trainer, trainer.first_batches(1)[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(np.random.get_state()[1], state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    rows = pieces_of(text_of("stories"), tokenizer)["input_ids"]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(stories, attn_implementation="eager")
        expected = plain(torch.tensor(rows), labels=torch.tensor(rows)).loss.item()
    assert start.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
def test_measuring_on_a_gpu_leaves_its_random_numbers_and_gives_the_loss_of_a_cpu(stories, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    rows = pieces_of(text_of("stories"), tokenizer)
    trainer = trainer_of(model, tokenizer, rows, tmp_path)
    random = torch.cuda.get_rng_state()
    start = measure_start_loss(trainer, trainer.first_batches(1)[0])
    assert torch.equal(torch.cuda.get_rng_state(), random)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(stories, attn_implementation="eager")
        expected = plain(torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["input_ids"])).loss.item()
    assert start.loss == pytest.approx(expected, rel=1e-3)  # products in TF32 have 11 bits


@pytest.mark.parametrize(("spread", "tied"), [(0.02, True), (0.02, False), (0.2, False), (0.2, True)])
def test_random_weights_begin_within_the_bounds_of_their_size(tmp_path, spread, tied):
    shape = {"initializer_range": spread, "tie_word_embeddings": tied}
    recipe = write_recipe(tmp_path, model={"architecture": ARCHITECTURE | shape})
    assert run_train("--config", recipe, "--plan").code == 0
    assert "start_loss" not in findings_of(tmp_path)


def test_a_fresh_model_that_knows_its_targets_is_told(stories):
    model = AutoModelForCausalLM.from_pretrained(stories)
    low, high = fresh_bounds(model, 100)
    for loss, told in ((low - 0.01, "sees its targets"), (high + 0.01, "first steps undo"), ((low + high) / 2, "")):
        found = loss_findings(StartLoss(loss, 0.0, 0.1, 1000, 100, 512), model, starts_fresh=True)
        assert [told in finding.why for finding in found] == ([True] if told else [])


def test_a_checkpoint_that_was_never_trained_is_told_and_trained(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    recipe = write_recipe(tmp_path, model=from_checkpoint(base))
    done = run_train("--config", recipe, "--plan")
    assert done.code == 0, done.stderr
    assert "the checkpoint knows nothing of it" in findings_of(tmp_path)["start_loss"]["found"]


def test_every_check_has_a_name_that_a_finding_carries():
    files = [*sorted((ROOT / "src").glob("*.py")), ROOT / "train.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert [name for name in CHECKS if f'"{name}"' not in text] == []
