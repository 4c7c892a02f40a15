"""What the checks of an installation work on: a tiny random model, a byte tokenizer, uneven rows, and a reference.

    model, rows = tiny_model("sdpa"), uneven_rows(8)
    loss, gradient = reference(model, rows)          # one document at a time, in float64
    trainer = trainer_of(folder, model, rows, optim, training)

Shapes: T supervised tokens of a row, V tokens in the vocabulary, P numbers that train.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from config.schema import EvaluationConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.attention import DOCUMENTS, register_documents
from src.attention_choice import takes_borders
from src.chat_setup import set_chat_template
from src.loss import SupervisedLoss
from src.packing import IGNORED, PackCollator, PackedRows
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from utils.distributed import accelerator_name

VOCABULARY = 264
"""256 bytes, the special tokens, and rows to spare, as checkpoints have them."""

PACK_TOKENS = 48


def tiny_model(
    attention: str = DOCUMENTS, *, seed: int = 0, tied: bool = False, attention_dropout: float = 0.0
) -> LlamaForCausalLM:
    """A Llama of 2 layers in float32 on the device that trains, with weights so large that attention matters."""
    register_documents()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # which every attention kernel takes
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attention_dropout=attention_dropout,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model.to(accelerator_name())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, chatml's special tokens, and the end of a turn as padding too: what masks get wrong."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    set_chat_template(tokenizer, "chatml", keeps_eos=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def uneven_rows(count: int) -> Dataset:
    """Rows of 3 to 20 random tokens, of which from one to all but the first are supervised: a mean of means is wrong.

    Two of the first four differ most: one token, and 19.
    """
    random = np.random.default_rng(0)
    ids = [random.integers(0, 256, size=int(random.integers(3, 21))).tolist() for _ in range(count)]
    ids[:2] = [ids[0][:3], random.integers(0, 256, size=20).tolist()]
    firsts = [2, 1, *(int(random.integers(1, len(row))) for row in ids[2:])]
    labels = [[IGNORED] * first + row[first:] for row, first in zip(ids, firsts, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def batch_of(model: PreTrainedModel, packs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor | int]:
    """Packs as the trainer gives them to the model, on its device."""
    told = takes_borders(model)
    batch = PackCollator(0, flat=told, tells_longest=told)(packs)
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    """All gradients end to end, (P,), in float64 on the host; they are cleared."""
    parts = [weight.grad.cpu().double().flatten() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def scored(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], score: SupervisedLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's sum over batches, (1,), and its gradient, (P,), both in float64 on the host."""
    total = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        loss = score(model, batch).total
        loss.backward()
        total += loss.detach().cpu().double()
    return total, gradient_of(model)


def reference(
    model: PreTrainedModel, rows: Dataset, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's sum over supervised tokens, (1,), and its gradient, (P,), by their definitions.

    Each row goes alone through eager attention in float64 on the CPU, on a config of its own.
    """
    exact = type(model)(copy.deepcopy(model.config)).double()
    exact.set_attn_implementation("eager")
    exact.load_state_dict(model.state_dict())
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits_LV = exact(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        for place, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                logits_V = logits_LV[place]
                log_z = logits_V.exp().sum().log()
                log_p_V = logits_V - log_z
                chosen = (1 - label_smoothing) * log_p_V[label] + label_smoothing * log_p_V.mean()
                total = total - chosen + z_loss * log_z**2
    total.backward()
    return total.detach()[None], gradient_of(exact)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """All weights end to end, (P,), in float64 on the host."""
    return torch.cat([weight.detach().cpu().double().flatten() for weight in model.parameters()])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a share of what is expected; infinite where that is 0, or either is no number."""
    size = expected.norm().item()
    share = (found - expected).norm().item() / size if size else math.inf
    return share if math.isfinite(share) else math.inf  # not a number would be passed over by max()


def trainer_of(
    folder: Path,
    model: torch.nn.Module,
    rows: Dataset,
    optim: OptimConfig,
    training: TrainingConfig,
    *,
    score: SupervisedLoss | None = None,
    packing: bool = False,
) -> SFTTrainer:
    """The project's trainer, whose run directory is `folder`."""
    return SFTTrainer(
        model=model,
        args=training_arguments(folder, optim, training, EvaluationConfig(), TrackingConfig()),
        tokenizer=byte_tokenizer(),
        train_packs=PackedRows(rows, max_length=PACK_TOKENS, packing=packing),
        score=score,
        keep_checkpoints=training.keep_checkpoints,
        optim=optim,
    )
