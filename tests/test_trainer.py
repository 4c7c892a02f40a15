"""No way of splitting, packing or padding a global batch changes what a step learns."""

import itertools
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config.schema import AdapterConfig, EvaluationConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.adapters import add_adapter
from src.attention import DOCUMENTS, register_documents
from src.loss import SupervisedLoss, supervised_nll
from src.packing import IGNORED, PackCollator, PackedRows
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from tests.processes import launch_processes
from utils.errors import UserError

VOCABULARY, LENGTH = 61, 32


def tiny_model(dtype=torch.float32, seed=0, attention=DOCUMENTS):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    register_documents()
    model = LlamaForCausalLM(config).to(dtype)
    model.set_attn_implementation(attention)
    return model


def tiny_tokenizer():
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2")


def uneven_rows(count=40, seed=0, supervise_all=False):
    """Rows of 3 to 20 tokens whose supervised share differs much from row to row, so that a mean of means is wrong."""
    random = np.random.default_rng(seed)
    ids, labels = [], []
    for index in range(count):
        row = random.integers(3, VOCABULARY, size=int(random.integers(3, 21))).tolist()
        first = 1 if supervise_all else int(random.integers(1, len(row)))
        ids.append(row)
        labels.append([IGNORED] * first + row[first:] if index % 7 else [IGNORED, *row[1:]])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def reference_loss(model, rows):
    """Mean loss a supervised token, one row at a time, from the full logits: what every layout must give."""
    eager = tiny_model(attention="eager").to(next(model.parameters()).dtype)
    eager.load_state_dict(model.state_dict())
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = eager(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            total += functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
            tokens += int((labels != IGNORED).sum())
    return total / tokens


def train(
    folder,
    model,
    rows,
    *,
    micro=1,
    tokens=None,
    accumulation=1,
    packing=False,
    optimizer="sgd",
    steps=10,
    rate=0.1,
    eval_rows=None,
    score=None,
    kind=None,
):
    """Losses of each step, with the same global batches for the same product of `micro` and `accumulation`."""
    args = training_arguments(
        folder,
        OptimConfig(name=optimizer, learning_rate=rate, schedule="constant", max_grad_norm=None),
        TrainingConfig(
            max_steps=steps,
            micro_batch_rows=micro,
            accumulation_steps=accumulation,
            log_every_steps=1,
            save_every_steps=None,
            precision="float32",
        ),
        EvaluationConfig(),
        TrackingConfig(),
    )
    trainer = (kind or SFTTrainer)(
        model=model,
        args=args,
        tokenizer=tiny_tokenizer(),
        train_packs=PackedRows(rows, max_length=LENGTH, packing=packing),
        eval_packs=eval_rows and PackedRows(eval_rows, max_length=LENGTH, packing=packing),
        tokens_per_micro_batch=tokens,
        score=score,
    )
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights_of(model):
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def relative_change(model, reference):
    return ((weights_of(model) - weights_of(reference)).norm() / weights_of(reference).norm()).item()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("supervise_all", [True, False])
@pytest.mark.parametrize("plain_elements", [0, 2**30])
@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa"])
def test_loss_of_packed_and_padded_rows_is_that_of_each_row_alone(packing, supervise_all, plain_elements, attention):
    model, rows = tiny_model(attention=attention), uneven_rows(supervise_all=supervise_all)
    packs = PackedRows(rows, max_length=LENGTH, packing=packing)
    total, tokens, score = 0.0, 0, SupervisedLoss(plain_elements=plain_elements)
    for start in range(0, len(packs), 4):
        collator = PackCollator(0, tells_longest=attention == DOCUMENTS)
        batch = collator([packs[index] for index in range(start, min(start + 4, len(packs)))])
        with torch.no_grad():
            scored = score(model, batch)
        assert int(scored.row.max()) < len(batch["input_ids"])
        assert scored.nll.sum().item() == pytest.approx(scored.total.item(), rel=1e-6)
        total, tokens = total + scored.nll.double().sum().item(), tokens + len(scored.nll)
    assert total / tokens == pytest.approx(reference_loss(model, rows), rel=1e-6)


def test_flat_batches_give_the_loss_of_padded_ones():
    model, rows = tiny_model(), uneven_rows()
    packs = PackedRows(rows, max_length=LENGTH, packing=True)
    items = [packs[index] for index in range(4)]
    with torch.no_grad():
        flat = supervised_nll(model, PackCollator(0, flat=True)(items))[0].sum()
        padded = supervised_nll(model, PackCollator(0)(items))[0].sum()
    assert flat.item() == pytest.approx(padded.item(), rel=1e-6)


def test_documents_that_ran_together_would_fail_the_comparison():
    model, rows = tiny_model(), uneven_rows()
    packs = PackedRows(rows, max_length=LENGTH, packing=True)
    batch = PackCollator(0)([packs[index] for index in range(len(packs))])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    with torch.no_grad():
        nll, _ = supervised_nll(model, batch)
    assert nll.double().mean().item() != pytest.approx(reference_loss(model, rows), rel=1e-4)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adamw_torch_fused", 1e-3)])
def test_rows_by_accumulation_changes_neither_losses_nor_weights(tmp_path, optimizer, rate):
    layouts = [(8, 1), (4, 2), (1, 8)]
    for dtype, loss_bound, weight_bound in ((torch.float32, 1e-6, 1e-6), (torch.float64, 1e-12, 1e-12)):
        runs = [
            train(tmp_path, tiny_model(dtype), uneven_rows(), micro=m, accumulation=a, optimizer=optimizer, rate=rate)
            for m, a in layouts
        ]
        for (trainer, losses), (other, other_losses) in itertools.pairwise(runs):
            assert len(losses) == 10
            np.testing.assert_allclose(losses, other_losses, rtol=loss_bound)
            assert relative_change(trainer.model, other.model) <= weight_bound
        assert relative_change(runs[0][0].model, tiny_model(dtype)) > 1e-4


@pytest.mark.parametrize("plain_elements", [0, 2**30])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.01)])
def test_a_step_is_that_of_plain_torch_on_the_same_rows(tmp_path, plain_elements, smoothing, z_loss):
    rows = uneven_rows(8)
    score = SupervisedLoss(label_smoothing=smoothing, z_loss=z_loss, plain_elements=plain_elements)
    trainer, losses = train(tmp_path, tiny_model(torch.float64), rows, micro=2, accumulation=4, steps=1, score=score)
    reference = tiny_model(torch.float64, attention="sdpa")  # eager attention has its softmax in float32
    nll, objective, tokens = 0.0, 0.0, 0
    for row in rows:
        logits = reference(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        nll = nll + functional.cross_entropy(logits, labels, reduction="sum")
        objective = objective + functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        objective = objective + z_loss * logits.logsumexp(dim=-1).square().sum()
        tokens += len(labels)
    (objective / tokens).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert relative_change(trainer.model, reference) <= 1e-12
    assert losses == [pytest.approx(nll.item() / tokens, rel=1e-12)]
    told = next(line for line in trainer.state.log_history if "loss" in line)
    assert told.get("objective") == (pytest.approx(objective.item() / tokens, rel=1e-12) if smoothing else None)


class MeanOfMeans(SFTTrainer):
    """The fault that the comparisons must see: each micro-batch divided by its own tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        nll, _ = supervised_nll(model, inputs)
        return nll.mean() / self.args.gradient_accumulation_steps


def test_a_wrong_scale_of_the_loss_is_seen(tmp_path, monkeypatch):
    right = [train(tmp_path, tiny_model(), uneven_rows(), micro=m, accumulation=8 // m)[0] for m in (8, 1)]
    monkeypatch.setitem(train.__globals__, "SFTTrainer", MeanOfMeans)
    wrong = [train(tmp_path, tiny_model(), uneven_rows(), micro=m, accumulation=8 // m)[0] for m in (8, 1)]
    assert relative_change(right[0].model, right[1].model) <= 1e-6
    assert relative_change(wrong[0].model, wrong[1].model) > 1e-4


def test_a_last_global_batch_that_is_not_full_is_trained_on_exactly(tmp_path):
    # 10 rows in global batches of 8: the second step holds 2 rows and 6 fillers, whatever the layout.
    runs = [
        train(tmp_path, tiny_model(torch.float64), uneven_rows(10), micro=m, accumulation=8 // m, steps=4)
        for m in (8, 2)
    ]
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-12)
    assert relative_change(runs[0][0].model, runs[1][0].model) <= 1e-12
    assert runs[0][0].state.epoch == 2.0


def test_a_step_of_token_limited_micro_batches_is_that_of_its_rows_at_once(tmp_path):
    # Four micro-batches hold all rows of 7 to 9 tokens, four a micro-batch of at most 36: one step is the whole epoch.
    rows = uneven_rows(400)
    rows = rows.select([index for index, ids in enumerate(rows["input_ids"]) if 7 <= len(ids) <= 9][:16])
    limited, losses = train(tmp_path, tiny_model(torch.float64), rows, tokens=36, accumulation=4, steps=1)
    at_once, expected = train(tmp_path, tiny_model(torch.float64), rows, micro=16, steps=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert relative_change(limited.model, at_once.model) <= 1e-12
    assert limited.state.epoch == 1.0


def test_evaluation_loss_is_the_mean_over_supervised_tokens(tmp_path):
    rows = uneven_rows(13, seed=5)
    for packing in (True, False):
        trainer, _ = train(tmp_path, tiny_model(), uneven_rows(8), packing=packing, steps=1, eval_rows=rows)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(reference_loss(trainer.model, rows), rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before = weights_of(model)
    with pytest.raises(UserError, match=r"in any of 2 step\(s\), so all were skipped and nothing was learned"):
        train(tmp_path, model, uneven_rows(8), steps=2)
    with pytest.raises(UserError, match=r"not finite in 11 step\(s\) in a row, up to step 11"):
        train(tmp_path, model, uneven_rows(8), steps=12)
    assert torch.equal(weights_of(model).nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_model_whose_documents_see_each_other_is_refused(tmp_path):
    model = tiny_model()
    model.config._attn_implementation = "unmasked"
    from transformers import AttentionInterface

    def unmasked(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        out = functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True, scale=scaling
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("unmasked", unmasked)
    with pytest.raises(UserError, match="documents of a pack see each other in LlamaForCausalLM"):
        train(tmp_path, model, uneven_rows(), packing=True, steps=1)


CASES = [
    (dtype, optimizer, rate, packing)
    for dtype in ("float32", "float64")
    for optimizer, rate in (("sgd", 0.1), ("adamw_torch_fused", 1e-3))
    for packing in (False, True)
]
TOKEN_CASES = [("float32", "sgd", 0.1, False), ("float64", "adamw_torch_fused", 1e-3, True)]
ADAPTER_CASES = [(dtype, "adamw_torch_fused", 1e-3, True) for dtype in ("float32", "float64")]


class ForgetsProcesses(SFTTrainer):
    """The fault that only two processes show: gradients are averaged over them, and the loss is not multiplied."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss / self.accelerator.num_processes


def train_cases(folder):
    """Train each case in this process's share of the run, and save what came out as `folder`/<processes>.pt."""
    world, results = int(os.environ["WORLD_SIZE"]), []
    for dtype, optimizer, rate, packing in CASES:
        trainer, losses = train(
            folder,
            tiny_model(getattr(torch, dtype)),
            uneven_rows(45),
            micro=2,
            accumulation=4 // world,
            packing=packing,
            optimizer=optimizer,
            rate=rate,
            eval_rows=uneven_rows(13, seed=5),
        )
        assert trainer.args.world_size == world
        results.append((losses, trained_weights(trainer), trainer.evaluate()["eval_loss"]))
    split = {"accumulation": 4 // world}
    for dtype, optimizer, rate, packing in TOKEN_CASES:
        settings = split | {"packing": packing, "optimizer": optimizer, "rate": rate}
        trainer, losses = train(folder, tiny_model(getattr(torch, dtype)), uneven_rows(45), tokens=48, **settings)
        results.append((losses, trained_weights(trainer), None))
    for dtype, optimizer, rate, packing in ADAPTER_CASES:
        settings = split | {"packing": packing, "optimizer": optimizer, "rate": rate}
        torch.manual_seed(0)
        model = add_adapter(tiny_model(getattr(torch, dtype)), AdapterConfig(kind="lora", rank=4))
        trainer, losses = train(folder, model, uneven_rows(45), micro=2, **settings)
        adapter = [weight.detach().flatten() for weight in model.parameters() if weight.requires_grad]
        results.append((losses, torch.cat(adapter), None))
    trainer, losses = train(folder, tiny_model(), uneven_rows(45), micro=2, **split, kind=ForgetsProcesses)
    results.append((losses, trained_weights(trainer), None))
    if trainer.args.process_index == 0:
        torch.save(results, folder / f"{world}.pt")


def trained_weights(trainer):
    return weights_of(trainer.accelerator.unwrap_model(trainer.model))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(tmp_path, processes):
    for world in (1, processes):
        launch_processes(train_cases, tmp_path, processes=world)
    one, several = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / f"{processes}.pt")
    (_, weights, _), (_, other_weights, _) = one.pop(), several.pop()
    assert ((weights - other_weights).norm() / weights.norm()).item() > 1e-4, "a wrong scale must be seen"
    results = zip(CASES + TOKEN_CASES + ADAPTER_CASES, one, several, strict=True)
    for (dtype, *_), (losses, weights, eval_loss), (other_losses, other_weights, other_eval_loss) in results:
        bound = {"float32": 1e-6, "float64": 1e-12}[dtype]
        assert len(losses) == 10
        np.testing.assert_allclose(losses, other_losses, rtol=bound)
        assert ((weights - other_weights).norm() / weights.norm()).item() <= bound
        assert (eval_loss, other_eval_loss) == (None, None) or eval_loss == pytest.approx(other_eval_loss, rel=1e-6)
