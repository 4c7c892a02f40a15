"""The self-test passes on a clean stack, and each check finds a bug of the kind that it is for; six are upstream's own.

Bugs are put back by patching the library or the seam that they were in, which no other test of the project may do.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, masking_utils

from scripts.selftest import report
from src import attention, loss
from src.packing import IGNORED, PackCollator
from src.selftest.checks import CHECKS, run_check
from src.selftest.subjects import relative
from src.selftest.verdict import SelftestError, judge
from src.trainer import SFTTrainer
from tests.gpu_runs import ON_GPU

ROOT = Path(__file__).parent.parent


def test_every_check_holds_on_a_clean_stack():
    done = subprocess.run([sys.executable, "scripts/selftest.py"], cwd=ROOT, capture_output=True, text=True)
    *lines, total = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]
    assert total.startswith(f"{len(CHECKS)} of {len(CHECKS)} checks hold on ")
    assert done.returncode == 0


def test_a_check_that_a_library_breaks_is_told_and_the_others_still_run(capsys):
    with mock.patch.object(PreTrainedTokenizerBase, "apply_chat_template", side_effect=OSError("no template today")):
        code = report(["masks", "merge"])
    failed, held, total = capsys.readouterr().out.splitlines()
    assert re.match("FAIL masks: OSError: no template today.*requirements/base.txt", failed)
    assert held.startswith("ok   merge ")
    assert total.startswith("1 of 2 checks hold")
    assert code == 1


def test_a_difference_that_is_not_a_number_is_no_pass():
    with pytest.raises(SelftestError, match=r"difference is nan, allowed is 1\. Reinstall"):
        judge("loss", float("nan"), bound=1.0, detail="losses", meaning="Reinstall")
    assert relative(torch.tensor([float("nan")]), torch.ones(1)) == math.inf


def loss_divided_twice():
    """Trainer divided a mean over the global step by the accumulation steps as well.

    Source: https://github.com/huggingface/transformers/pull/35207
    """
    own = Trainer.training_step

    def training_step(self, *args, **kwargs):
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False
        return own(self, *args, **kwargs)

    return mock.patch.object(Trainer, "training_step", training_step)


def smoothing_by_micro_batch():
    """Trainer's LabelSmoother took the mean of each micro-batch, whatever tokens the global step has.

    Source: https://github.com/huggingface/transformers/issues/46731
    """
    own = SFTTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.score.objective.label_smoothing:
            here = len(inputs["supervised_places"]) * self.args.gradient_accumulation_steps
            num_items_in_batch = torch.full_like(num_items_in_batch, here)
        return own(self, model, inputs, return_outputs, num_items_in_batch)

    return mock.patch.object(SFTTrainer, "compute_loss", compute_loss)


def mask_without_borders():
    """Masks of sdpa and eager that do not look for documents in positions.

    Source: https://github.com/huggingface/transformers/pull/46634
    """
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", torch.zeros_like)


def attention_without_borders():
    """A kernel that is given borders and takes each row as one document."""
    return mock.patch.object(
        attention, "_borders", lambda given, positions, rows, tokens: list(range(0, rows * tokens + 1, tokens))
    )


def eos_masked_as_padding():
    """A collator that masks every token with the padding's id, eos too where they are one.

    Source: https://github.com/huggingface/transformers/issues/23530
    """
    own = PackCollator.__call__

    def collate(self, packs):
        batch = own(self, packs)
        batch["labels"][batch["input_ids"] == self.pad_token_id] = IGNORED
        return batch

    return mock.patch.object(PackCollator, "__call__", collate)


def schedule_a_step_late():
    """A checkpoint whose schedule was saved before it made its last step.

    Source: https://github.com/Lightning-AI/pytorch-lightning/issues/1772
    """
    own = torch.optim.lr_scheduler.LambdaLR.load_state_dict

    def load_state_dict(self, state):
        own(self, state | {"last_epoch": state["last_epoch"] - 1})

    return mock.patch.object(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", load_state_dict)


def tied_head_lost():
    """One of two tied weights is saved, beside a config that no longer says so."""
    own = PreTrainedModel.save_pretrained

    def save_pretrained(self, save_directory, *args, **kwargs):
        own(self, save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))

    return mock.patch.object(PreTrainedModel, "save_pretrained", save_pretrained)


def labels_not_shifted():
    """Each position is scored with its own token."""
    return mock.patch.object(loss, "next_token_targets", lambda labels_BL: labels_BL.clamp(min=0))


def last_chunk_alone():
    """A product that overwrites the sum over chunks that it should add to."""
    return mock.patch.object(torch, "addmm", lambda total, left, right, *, out: torch.mm(left, right, out=out))


def attention_in_half_precision():
    """A kernel that computes in fewer bits than its inputs have."""
    own = functional.scaled_dot_product_attention

    def attend(query, key, value, *args, **kwargs):
        halves = (tensor.bfloat16() for tensor in (query, key, value))
        return own(*halves, *args, **kwargs).to(query.dtype)

    return mock.patch.object(functional, "scaled_dot_product_attention", attend)


def adapter_merged_twice():
    """A merge that adds twice what the adapter adds when it is not merged."""
    own = LoraLinear.get_delta_weight
    return mock.patch.object(LoraLinear, "get_delta_weight", lambda self, adapter: 2 * own(self, adapter))


@pytest.mark.parametrize(
    ("bug", "name", "meaning"),
    [
        (loss_divided_twice, "accumulation", "training.accumulation_steps=1"),
        (smoothing_by_micro_batch, "accumulation", "training.accumulation_steps=1"),
        (mask_without_borders, "packing", "data.packing=false"),
        (attention_without_borders, "packing", "data.packing=false"),
        (eos_masked_as_padding, "masks", "never to stop"),
        (schedule_a_step_late, "resume", r"learning rates .* became .*--resume"),
        (tied_head_lost, "save", "weights are lost or made anew"),
        (labels_not_shifted, "loss", "src/loss.py"),
        (last_chunk_alone, "chunks", "src/chunked_loss.py"),
        (attention_in_half_precision, "attention", "set model.attention to another"),
        (adapter_merged_twice, "merge", "not what was trained"),
    ],
)
def test_a_bug_is_found_by_the_check_for_it(bug, name, meaning):
    with bug(), pytest.raises(SelftestError, match=meaning):
        run_check(name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_GPU) for name in CHECKS])
def test_a_check_holds_on_a_gpu(name):
    assert run_check(name).name == name
