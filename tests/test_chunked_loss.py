"""The loss and gradients from chunks are those of plain full logits in float64, in a tenth of their memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from src.chunked_loss import LogitTransform, Objective, chunked_loss
from tests.written_out_loss import FLOAT32, error, written_out

ROOT = Path(__file__).parent.parent
VOCABULARY, WIDTH, TOKENS = 301, 24, 50


def linear_head(*, bias=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def problem(seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = 8 * torch.randn(TOKENS, WIDTH, generator=generator)
    return hidden, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


OBJECTIVES = {
    "plain": {},
    "smoothing": {"smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft-cap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "all": {"smoothing": 0.2, "z_loss": 1e-2, "softcap": 7.0, "scale": 1.5},
}


def objective_of(settings):
    transform = LogitTransform(settings.get("scale", 1.0), settings.get("softcap"))
    return Objective(settings.get("smoothing", 0.0), settings.get("z_loss", 0.0), transform)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [7, None])
def test_loss_and_gradients_of_chunks_are_those_of_float64(name, bias, rows):
    settings, (hidden, targets), head = OBJECTIVES[name], problem(), linear_head(bias=bias)
    hidden.requires_grad_()
    total, nll = chunked_loss(head, hidden, targets, objective_of(settings), vocabulary=VOCABULARY, rows=rows)
    (total / TOKENS).backward()
    wide, exact = linear_head(bias=bias).double(), hidden.detach().double().requires_grad_()
    expected, expected_nll = written_out(wide(exact), targets, **settings)
    (expected / TOKENS).backward()
    assert error(total, expected) <= FLOAT32
    assert error(nll, expected_nll) <= FLOAT32
    assert not nll.requires_grad
    assert error(hidden.grad, exact.grad) <= FLOAT32
    for mine, theirs in zip(head.parameters(), wide.parameters(), strict=True):
        assert error(mine.grad, theirs.grad) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_products_under_autocast_cost_no_more_than_their_rounding(name, dtype):
    settings, (hidden, targets), head = OBJECTIVES[name], problem(), linear_head()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        total, _ = chunked_loss(head, hidden, targets, objective_of(settings), vocabulary=VOCABULARY, rows=7)
    total.backward()
    exact = hidden.detach().double().requires_grad_()
    wide = linear_head().double()
    expected, _ = written_out(wide(exact), targets, **settings)
    expected.backward()
    # bfloat16 has 8 bits: a logit of 10 is off by 0.02, and so is its probability, relatively.
    assert (total.dtype, head.weight.grad.dtype, hidden.grad.dtype) == (torch.float32,) * 3
    assert error(total, expected) <= 5e-3
    assert error(hidden.grad, exact.grad) <= 3e-2
    assert error(head.weight.grad, wide.weight.grad) <= 3e-2


def test_a_frozen_head_gets_no_gradient_and_no_product_for_one():
    (hidden, targets), head = problem(), linear_head().requires_grad_(False)
    flops = {}
    for trains in (True, False):
        head.requires_grad_(trains)
        with FlopCounterMode(display=False) as counter:
            total, _ = chunked_loss(head, hidden.requires_grad_(), targets, Objective(), vocabulary=VOCABULARY, rows=9)
            total.backward()
        flops[trains] = counter.get_total_flops()
        if trains:
            assert head.weight.grad is not None
            head.weight.grad = None
    assert head.weight.grad is None
    product = 2 * TOKENS * WIDTH * VOCABULARY
    assert flops == {True: 3 * product, False: 2 * product}


def test_without_gradients_the_loss_is_the_same_for_one_product():
    (hidden, targets), head = problem(), linear_head()
    hidden.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total, _ = chunked_loss(head, hidden, targets, Objective(0.1, 1e-3), vocabulary=VOCABULARY, rows=9)
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCABULARY
    expected, _ = written_out(head(hidden).double(), targets, smoothing=0.1, z_loss=1e-3)
    assert error(total, expected.detach()) <= FLOAT32


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    (hidden, targets), head = problem(), linear_head()
    total, _ = chunked_loss(head, hidden.requires_grad_(), targets, Objective(), vocabulary=VOCABULARY)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


PEAK = """
import torch
from pathlib import Path
from src.chunked_loss import Objective, chunked_loss

TOKENS, SOME, WIDTH, VOCABULARY = 16384, 4096, 16, 32000
head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
hidden, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (TOKENS,))

def peak():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])

def work(count, rows=None):
    chunked_loss(head, hidden[:count], targets[:count], Objective(), vocabulary=VOCABULARY, rows=rows)[0].backward()

work(64)  # buffers of the libraries
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
work(TOKENS)
chunks = peak() - before
work(SOME, rows=SOME)
print(chunks, peak() - before)
"""


def test_memory_of_the_loss_is_less_than_a_tenth_of_whole_logits():
    # Blocks above 64 KiB go back to the system when they are freed, so that the peak is that of live tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system keeps no peak of memory that can be started anew")
    assert done.returncode == 0, done.stderr
    chunks, whole = (int(number) for number in done.stdout.split())
    assert chunks < 16384 * 32000 * 4 / 10  # of 2.1 GB
    assert whole > 4096 * 32000 * 4  # the measure sees logits that are stored whole
