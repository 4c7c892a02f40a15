"""Checks of what a run writes and reads: merged adapters, saved models, checkpoints that training goes on from.

verdict = resume(folder)      # or SelftestError
"""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from config.schema import AdapterConfig, OptimConfig, TrainingConfig
from src.adapter_export import save_adapter
from src.adapters import add_adapter
from src.run import Run
from src.selftest.subjects import relative, tiny_model, trainer_of, uneven_rows, weights_of
from src.selftest.verdict import FLOAT32, SelftestError, Verdict, judge

STEPS, STOP = 6, 3
"""Steps of the straight run, and the one whose checkpoint the other goes on from: three follow, as a schedule that is
off by a step shows only from the second."""


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of 24 fixed tokens without dropout, in float64 on the host."""
    ids = torch.arange(24, device=model.device)[None]
    return model.eval()(input_ids=ids, use_cache=False).logits[0].cpu().double()


def merge(folder: Path) -> Verdict:
    """An adapter gives the same logits where it trains, loaded from its folder, and merged into its base."""
    base = tiny_model()
    plain = _logits(base)
    adapted = add_adapter(copy.deepcopy(base), AdapterConfig(kind="lora", rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, so that nothing would be merged
            weight.data = (0.1 * torch.randn(weight.shape, generator=generator)).to(weight)
    expected = _logits(adapted)
    if relative(plain, expected) < 0.01:
        raise SelftestError("the adapter has no effect on its base's logits; install peft as requirements/base.txt has")
    save_adapter(adapted, folder / "adapter", AdapterConfig(kind="lora", rank=4))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    found = [_logits(loaded), _logits(loaded.merge_and_unload()), _logits(adapted.merge_and_unload())]
    return judge(
        "merge",
        max(relative(logits, expected) for logits in found),
        bound=FLOAT32,
        detail="logits of LoRA as it trains, as it is loaded, and as it is merged",
        meaning="What is served is not what was trained; keep the adapter unmerged, and install peft as "
        "requirements/base.txt has it",
    )


def save(folder: Path) -> Verdict:
    """A model that was exported is loaded with the same weights and logits, also where head and embeddings are one."""
    weights = logits = 0.0
    training = TrainingConfig(max_steps=1, save_every_steps=None, precision="float32")
    for tied in (False, True):
        run = Run(folder / f"tied-{tied}", None)
        model = tiny_model(tied=tied)
        trainer = trainer_of(run.path, model, uneven_rows(4), OptimConfig(learning_rate=0.01), training)
        trainer.train()
        run.export(trainer)
        loaded = AutoModelForCausalLM.from_pretrained(run.path / "model", dtype=torch.float32).to(model.device)
        loaded.set_attn_implementation(model.config._attn_implementation)
        weights = max(weights, relative(_tensors(loaded), _tensors(model)))
        logits = max(logits, relative(_logits(loaded), _logits(model)))
    meaning = (
        "A saved model is not the one that was trained: weights are lost or made anew; install transformers and "
        "safetensors as requirements/base.txt has them before you train"
    )
    detail = "of a trained model and of its saved copy, tied head or not"
    judge("save", weights, bound=0.0, detail=f"weights {detail}", meaning=meaning)
    # Where the weights lie in memory may change the order of a product's sums, but no more.
    return judge("save", logits, bound=FLOAT32, detail=f"logits {detail}", meaning=meaning)


def _tensors(model: torch.nn.Module) -> torch.Tensor:
    """All that is saved, and a tied head too, end to end in float64 on the host."""
    return torch.cat([tensor.cpu().double().flatten() for _, tensor in sorted(model.state_dict().items())])


def resume(folder: Path) -> Verdict:
    """A run that goes on from a checkpoint ends with the weights of the run that was never stopped."""
    optim = OptimConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2)
    training = TrainingConfig(
        max_steps=STEPS,
        accumulation_steps=2,
        save_every_steps=STOP,
        log_every_steps=1,
        keep_checkpoints=STEPS,
        precision="float32",
    )
    models, rates = [], []
    for name, seed, checkpoint in (("straight", 0, None), ("resumed", 1, folder / "straight" / f"checkpoint-{STOP}")):
        model = tiny_model(seed=seed, attention_dropout=0.1)  # dropout shows whether the random state is restored
        trainer = trainer_of(folder / name, model, uneven_rows(16), optim, training)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        models.append(weights_of(model))
        rates.append([f"{line['learning_rate']:.3g}" for line in trainer.state.log_history if "loss" in line])
    straight, resumed = models
    before, after = (", ".join(each[STOP:]) for each in rates)
    told = "" if before == after else f" (learning rates {before} became {after})"
    exact = not torch.accelerator.is_available()
    return judge(
        "resume",
        relative(resumed, straight),
        bound=0.0 if exact else 1e-4,  # a GPU may add up gradients in another order each time
        detail=f"weights after {STEPS} steps, straight and resumed at {STOP}{told}",
        meaning="A run that is resumed is not the run that was stopped; do not use --resume until transformers and "
        "torch are of versions that pass this check",
    )
