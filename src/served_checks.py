"""Whether the model will be served as it is trained: where it stops, its BOS, and tokens that nothing was taught of.

    findings = stop_findings(rows, model.generation_config, tokenizer)
    findings = bos_findings(model.generation_config, tokenizer)
    findings = untrained_findings(rows, model, tokenizer, known_rows=128256)

`rows` are some of the token rows that the run trains on, from `rows_of`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.packing import IGNORED
from src.start_checks import StartFinding
from src.steps import Batch

RARE = 0.01
"""Share of the turns below which an end is taken as one that was cut off."""

NAMED = 6
"""Tokens named in a finding."""

EMPTY = 1e-3
"""Share of the usual length of an embedding below which it holds nothing. Rows that no text ever trained are 0 or all
but 0 in published checkpoints (Llama 3's reserved tokens); rows of rare tokens are about as long as others."""


@dataclass(frozen=True)
class IdsOfRow:
    """A row's tokens: `input_ids` and `labels`, (L,) each."""

    input_ids: np.ndarray
    labels: np.ndarray


def rows_of(batches: Iterable[Batch]) -> list[IdsOfRow]:
    """The rows of micro-batches that have something supervised; padding after a row stays with it, unsupervised."""
    rows = []
    for batch in batches:
        ids, labels = (batch[name].cpu().numpy().reshape(-1) for name in ("input_ids", "labels"))
        borders = batch["document_borders"].cpu().numpy()
        parts = zip(np.split(ids, borders[1:-1]), np.split(labels, borders[1:-1]), strict=True)
        rows += [IdsOfRow(*part) for part in parts if (part[1] != IGNORED).any()]
    return rows


def stop_findings(
    rows: Sequence[IdsOfRow], generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[StartFinding]:
    """What training ends turns with, and generation does not stop at.

    A special token that ends turns and is no stop shows an error: a server would go on behind it. Where no turn at all
    ends with a stop, such as in pieces of texts, that may be meant.
    """
    given = generation.eos_token_id
    stops = set() if given is None else {given} if isinstance(given, int) else set(given)
    ends = Counter(int(end) for row in rows for end in _ends(row))
    total = sum(ends.values())
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    missed = [number for number, count in ends.most_common() if number in special - stops and count > RARE * total]
    if missed:
        share = sum(ends[number] for number in missed) / total
        return [
            StartFinding(
                "stop_token",
                stops=True,
                found=f"{share:.0%} of the supervised turns that were looked at end with {_names(missed, tokenizer)}, "
                f"and generation_config stops at {_names(sorted(stops), tokenizer) or 'nothing'}",
                why="a server would go on behind the answer",
                change="name that token in model.special_tokens.eos_token, or end the rows with a token that stops",
            )
        ]
    if total and not stops & ends.keys():
        return [
            StartFinding(
                "stop_token",
                stops=False,
                found="none of the supervised spans that were looked at ends with "
                f"{_names(sorted(stops), tokenizer) or 'a stop'}",
                why="the model learns to go on, not to stop",
                change="name an eos_token in model.special_tokens, unless the text has no end",
            )
        ]
    return []


def _ends(row: IdsOfRow) -> np.ndarray:
    """The last token of each supervised span."""
    supervised = row.labels != IGNORED
    return row.input_ids[supervised & ~np.append(supervised[1:], False)]


def bos_findings(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[StartFinding]:
    """Whether generation_config and the tokenizer name one BOS. That rows begin with it once is the data contract's."""
    given, own = generation.bos_token_id, tokenizer.bos_token_id
    if given is None or own is None or given == own:
        return []
    return [
        StartFinding(
            "bos_token",
            stops=False,
            found=f"generation_config has {_names([given], tokenizer)} as BOS, and the tokenizer, whose BOS rows are "
            f"trained with, has {_names([own], tokenizer)}",
            why="programs that take BOS from the model's settings, as converters to GGUF do, put the wrong one first",
            change="correct bos_token_id in the checkpoint's config.json and generation_config.json, or that of "
            "the tokenizer",
        )
    ]


def untrained_findings(
    rows: Sequence[IdsOfRow], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, known_rows: int
) -> list[StartFinding]:
    """Tokens that the run meets, whose embeddings hold nothing, and which stay so as an adapter does not train them.

    Args:
        known_rows: embeddings that the checkpoint came with; later ones are this run's.
    """
    if not isinstance(model, PeftModel):
        return []
    table = model.get_input_embeddings()
    trained, weight = _trained_rows(table), _base_weight(table)
    if trained is None or weight is None:
        return []
    new = {number for number in tokenizer.get_vocab().values() if number >= known_rows} - {tokenizer.pad_token_id}
    met = np.unique(np.concatenate([row.input_ids for row in rows])).tolist() if rows else []
    lengths = weight[torch.tensor(met, dtype=torch.long, device=weight.device)].float().norm(dim=-1).cpu().tolist()
    usual = float(weight[: min(known_rows, 4096)].float().norm(dim=-1).median())
    empty = {number for number, length in zip(met, lengths, strict=True) if length < EMPTY * usual}
    left = sorted((new | (empty - {tokenizer.pad_token_id})) - trained)
    if not left:
        return []
    return [
        StartFinding(
            "untrained_tokens",
            stops=False,
            found=f"{_names(left, tokenizer)} {'is' if len(left) == 1 else 'are'} new to the checkpoint or "
            f"{'was' if len(left) == 1 else 'were'} never trained in it, and the adapter does not train "
            f"{'its embedding' if len(left) == 1 else 'their embeddings'}",
            why="the model cannot tell such a token from another of its kind",
            change="add adapter.trainable_tokens with them (lora), or adapter.modules_to_save with the embeddings",
        )
    ]


def _trained_rows(table: torch.nn.Module) -> set[int] | None:
    """The rows of an embedding that an adapter trains; None where it trains all of them, or each a little."""
    if isinstance(table, TrainableTokensWrapper):
        adapter = table.token_adapter
        return {index for indices in adapter.token_indices.values() for index in indices}
    if isinstance(table, ModulesToSaveWrapper) or any(weight.requires_grad for weight in table.parameters()):
        return None
    return set()


def _base_weight(table: torch.nn.Module) -> torch.Tensor | None:
    """An embedding's numbers; None where they are packed, as in 4 bits."""
    inner = table.original_module if isinstance(table, TrainableTokensWrapper) else table
    weight = inner.weight.detach()
    return weight if weight.is_floating_point() and weight.ndim == 2 else None


def _names(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(number)} ({number})" for number in ids[:NAMED])
    return shown + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
