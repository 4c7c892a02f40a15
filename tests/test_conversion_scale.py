"""A model of 1.2 billion weights is converted in the memory of one tensor, at half the speed of copying it or more.

pytest -m slow -s tests/test_conversion_scale.py    # prints the figures; takes 15 GB of disk and some minutes
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from src.checkpoints.architecture import LlamaArchitecture
from src.checkpoints.checkpoint import Checkpoint, Generation, LazyTensor, WriteOptions
from src.checkpoints.hf import write
from src.checkpoints.pieces import ScoredPieces
from utils.files import sha256_of_file

pytestmark = pytest.mark.slow

# Llama 3.2 1B's sizes, with the rotary base and the epsilon that llama2.c can hold: 2.5 GB in bfloat16.
SIZES = LlamaArchitecture(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
TURNS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model as a Hugging Face folder, made tensor by tensor."""

    def lazy(number, shape):
        def load():
            generator = torch.Generator().manual_seed(number)
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            return values if len(shape) == 2 else values + 1

        return LazyTensor(shape, torch.bfloat16, load)

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"▁~{number}" for number in range(SIZES.vocab_size - len(pieces))]
    folder = tmp_path_factory.mktemp("scale")
    made_up = Checkpoint(
        inputs=(),
        architecture=SIZES,
        tensors={name: lazy(number, shape) for number, (name, shape) in enumerate(SIZES.tensor_shapes().items())},
        tokenizer=ScoredPieces(tuple(pieces), tuple(-float(rank) for rank in range(len(pieces))), 0, 1, 2, 3),
        generation=Generation(1, (2, 1), 0),
        logits=None,
        encode=None,
    )
    (folder / "model").mkdir()
    write(made_up, folder / "model", WriteOptions())
    yield folder / "model"
    shutil.rmtree(folder)


def converted(model, target, certificate):
    output = model.parent / "converted"
    command = [sys.executable, "-m", "tests.conversion_process", str(model), str(output), target, certificate]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ})
    written = sum(path.stat().st_size for path in output.iterdir())
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1]) | {"bytes": written}


def copied(model):
    """Seconds in which `cp` copies the folder and the copies are hashed."""
    output = model.parent / "copied"
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(output)], check=True)
    for path in output.iterdir():
        sha256_of_file(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds


@pytest.mark.parametrize("target", ["hf", "llama2c"])
def test_a_conversion_takes_the_memory_of_a_tensor_and_twice_the_time_of_a_copy(target, model):
    copies, conversions = [], []
    for _ in range(TURNS):
        copies.append(copied(model))
        conversions.append(converted(model, target, "none"))
    read = sum(path.stat().st_size for path in model.iterdir())
    rates = [(read + found["bytes"]) / 2e6 / found["seconds"] for found in conversions]
    copy_rates = [read / 1e6 / seconds for seconds in copies]
    memory = max(found["anonymous_mib"] for found in conversions)
    print(f"\n{target}: {sorted(rates)} MB/s beside copies {sorted(copy_rates)} MB/s, {memory:.0f} MiB anonymous")
    assert memory <= 1536
    assert sorted(rates)[1] >= sorted(copy_rates)[1] / 2


@pytest.mark.parametrize("certificate", ["tensors", "logits"])
@pytest.mark.parametrize("target", ["hf", "llama2c"])
def test_a_certificate_takes_at_most_three_gib(target, certificate, model):
    found = converted(model, target, certificate)
    print(f"\n{target} {certificate}: {found}")
    assert found["anonymous_mib"] <= 3072
