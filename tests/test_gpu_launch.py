"""Runs that Accelerate shards, which it does on accelerators only: as many processes as there are GPUs, or one.

pytest -m gpu tests/test_gpu_launch.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_run import ROOT, from_checkpoint, metrics_of, stop_after, weights_of, write_checkpoint, write_recipe

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="Accelerate shards over GPUs only")]


def launch(file: str, *arguments: str | Path, processes: int = GPUS) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"config/accelerate/{file}.yaml"]
    done = subprocess.run(
        [*command, "--num_processes", str(processes), "train.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


@pytest.mark.parametrize("file", ["fsdp2", "fsdp2_full_state"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_sharded_run_has_the_losses_of_a_whole_one(tmp_path, file, adapter):
    # Both with bf16 products, whose 8 bits differ by the order of sums; see BOUNDS of tests/gpu_runs.py.
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(write_checkpoint(tmp_path / "base")),
        adapter={"kind": adapter},
        training={"max_steps": 10, "precision": "bf16", "micro_batch_rows": 2, "accumulation_steps": 2},
    )
    launch("ddp", "--config", recipe, "--output.name", "whole", processes=1)
    launch(file, "--config", recipe, "--output.name", "sharded")
    whole, sharded = (losses_of(tmp_path / "outputs" / name) for name in ("whole", "sharded"))
    assert len(whole) == 10
    if GPUS == 1:  # else the global batch is larger
        assert sharded == pytest.approx(whole, rel=1e-3)
    assert sharded[-1] < 0.9 * sharded[0]
    names = [weights_of(tmp_path / "outputs" / name / "model").keys() for name in ("whole", "sharded")]
    assert names[0] == names[1]


@pytest.mark.parametrize("file", ["fsdp2", "fsdp2_full_state"])
def test_a_sharded_run_goes_on_from_its_checkpoint(tmp_path, file):
    recipe = write_recipe(tmp_path, training={"precision": "bf16", "max_steps": 6, "save_every_steps": 3})
    run = tmp_path / "outputs" / "run"
    launch(file, "--config", recipe)
    whole = losses_of(run)
    stop_after(run, 3)
    launch(file, "--config", recipe, "--resume")
    assert losses_of(run) == pytest.approx(whole, rel=1e-3)


def test_four_bit_weights_are_sharded_with_the_others(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = from_checkpoint(write_checkpoint(tmp_path / "base"), quantization="nf4", dtype="bfloat16")
    recipe = write_recipe(tmp_path, model=model, adapter={"kind": "lora"}, training={"max_steps": 10})
    done = launch("fsdp2_qlora", "--config", recipe)
    assert "Excluding from FSDP2 sharding" not in done.stderr  # what Accelerate says of 4-bit weights stored as uint8
    losses = losses_of(tmp_path / "outputs" / "run")
    assert losses[-1] < losses[0]
