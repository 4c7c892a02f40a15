"""FSDP2 as `accelerate launch` starts it, on GPUs: with one, its parts are whole and all of its code runs.

pytest -m gpu tests/test_gpu_sharding.py
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.gpu_runs import HAS_GPU
from tests.test_sharding import BASE, EPOCHS, TIED, steps_of
from tests.tiny_run import ROOT, from_checkpoint, stop_after, weights_of, write_checkpoint, write_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="Accelerate shards on accelerators only")]

GPUS = torch.cuda.device_count()
on_one_and_two = pytest.mark.parametrize(
    "processes",
    [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, and {GPUS} are here"))],
)

FLOAT32 = {"precision": "float32", "log_every_steps": 1}


def started(*arguments, processes=0):
    """A run on so many GPUs with FSDP2; with 0 as `python train.py`, on one and without."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "config/accelerate/fsdp2.yaml"]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    command = [sys.executable, *(launcher if processes else []), "train.py", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(max(1, processes))))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(run, other):
    """Both took the same steps, but for the order of sums in float32, in other kernels: ten times what a CPU's
    differ by."""
    for line, other_line in zip(steps_of(run), steps_of(other), strict=True):
        assert other_line == pytest.approx(line, rel=1e-4)
    weights, others = weights_of(run / "model"), weights_of(other / "model")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)


@on_one_and_two
def test_fsdp_takes_the_steps_of_one_gpu_and_resumes(tmp_path, processes):
    recipe = write_recipe(tmp_path, training=EPOCHS | FLOAT32, evaluation={"samples": 0}, model=TIED)
    outputs, accumulation = tmp_path / "outputs", ("--training.accumulation_steps", str(2 // processes))
    started("--config", recipe, "--output.name", "alone")
    started("--config", recipe, "--output.name", "sharded", *accumulation, processes=processes)
    assert (outputs / "sharded" / "checkpoint-4" / "optimizer_0" / f"__{processes - 1}_0.distcp").is_file()
    assert_close(outputs / "alone", outputs / "sharded")
    shutil.copytree(outputs / "sharded", outputs / "resumed")
    stop_after(outputs / "resumed", 4)
    started("--config", recipe, "--output.name", "resumed", "--resume", *accumulation, processes=processes)
    assert_close(outputs / "sharded", outputs / "resumed")


@on_one_and_two
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_under_fsdp_takes_the_steps_of_one_gpu(tmp_path, processes, quantization):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    base = from_checkpoint(write_checkpoint(tmp_path / "base", vocabulary=304), quantization=quantization)
    recipe = write_recipe(tmp_path, training=EPOCHS | FLOAT32, evaluation={"samples": 0}, model=base)
    accumulation = ("--training.accumulation_steps", str(2 // processes))
    started("--config", recipe, "--output.name", "alone", *BASE)
    started("--config", recipe, "--output.name", "sharded", *BASE, *accumulation, processes=processes)
    assert_close(tmp_path / "outputs" / "alone", tmp_path / "outputs" / "sharded")
