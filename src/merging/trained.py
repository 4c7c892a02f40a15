"""The base as the adapter's training saw it, with the adapter beside it and with the adapter merged into it.

    trained = open_trained(adapter)
    trained.base["model.layers.0.mlp.up_proj.weight"].load()     # dequantized, where training saw it quantized
    trained.merged["model.layers.0.mlp.up_proj.weight"].load()   # with what was learned, in float32
    trained.logits(rows)

A base of 16 or 32 bit stays in its files, from which each tensor is read when it is needed. A quantized one is loaded
as training loads it, and each tensor is dequantized by bitsandbytes when it is needed.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from src.chat_setup import vocabulary_size
from src.checkpoints import hf
from src.checkpoints.architecture import Architecture, LlamaArchitecture
from src.checkpoints.checkpoint import Checkpoint, Generation, LazyTensor, ReadOptions, rounded
from src.checkpoints.evaluation import evaluate_rows
from src.generation import set_stops
from src.merging.adapter import AdapterFolder
from src.merging.outline import PREFIX, Outline, with_adapter
from src.merging.renamed import module_tensors
from src.model import load_model
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Trained:
    """What came of the training, before anything is merged."""

    checkpoint: Checkpoint
    """The base's, with the tensors of `merged`, the adapter's tokenizer and its stops."""
    base: Mapping[str, LazyTensor]
    """The base as training saw it, by the names of `merged`; without tensors of which it had another number of rows."""
    merged: Mapping[str, LazyTensor]
    """The result in float32 for what the adapter changes, in the base's own number format for all else."""
    changed: tuple[str, ...]
    """Names of `merged` that the adapter may change."""
    renamed: bool
    """Whether the base's checkpoint stores tensors under other names than those of the model, which `merged` has."""
    unties: bool
    """Whether the base's head is its embedding, and the result's is not."""
    logits: Callable[..., list[torch.Tensor]]
    """Rows of token ids -> for each float32 logits (tokens, vocabulary) of the base with the adapter, by PEFT, with the
    weights that training saw and all sums in float32; `adapter=False`: of the base alone."""
    quantized_logits: Callable[..., list[torch.Tensor]] | None
    """As `logits`, by bitsandbytes' products of a quantized base, which round activations too. None: it is not."""


def open_trained(adapter: AdapterFolder) -> Trained:
    """Open the base as the adapter's training saw it.

    Raises:
        UserError: the base is not the adapter's, or a file is missing or damaged.
    """
    folders = [folder for folder in (adapter.base, adapter.path) if (folder / "tokenizer.json").is_file()]
    checkpoint = hf.read(adapter.base, ReadOptions(tokenizer=folders[0] if folders else None))
    tokenizer_folder = folders[-1]
    settings = _settings(adapter)
    outline = Outline(settings, adapter)
    stored, renamed = _by_module(checkpoint, outline, adapter)
    quantized = None if adapter.quantization == "none" else _Quantized(adapter, outline, settings)
    source = stored | quantized.tensors() if quantized else stored
    merged, changed, unties = _merged_tensors(outline, source)
    architecture = _architecture(checkpoint.architecture, settings, unties)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    _check_vocabulary(adapter, settings, tokenizer)
    files = hf.tokenizer_files(tokenizer_folder)
    return Trained(
        checkpoint=replace(
            checkpoint,
            inputs=tuple(dict.fromkeys((*checkpoint.inputs, *adapter.files, *files.paths))),
            architecture=architecture,
            tensors=merged,
            tokenizer=files,
            encode=hf.tokenization(tokenizer_folder),
            generation=_generation(checkpoint, outline, tokenizer, adapter),
        ),
        base={
            name: source[own]
            for name in merged
            if (own := outline.source_of(name) if name in outline.names else name) in source
            and source[own].shape == merged[name].shape
        },
        merged=merged,
        changed=changed,
        renamed=renamed,
        unties=unties,
        logits=_Streamed(outline, source).logits,
        quantized_logits=quantized.logits if quantized else None,
    )


def _settings(adapter: AdapterFolder) -> PreTrainedConfig:
    """The base's config, with the vocabulary that the adapter was saved with: its file holds grown embeddings whole."""
    settings = AutoConfig.from_pretrained(adapter.base, local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings)
    embedding = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
    found = adapter.shapes()
    for wrapped in ("", ".base_layer", ".token_adapter.base_layer"):
        if shape := found.get(f"{PREFIX}{embedding}{wrapped}.weight"):
            settings.get_text_config().vocab_size = shape[0]
    text = settings.get_text_config()
    text.vocab_size = max([text.vocab_size, *(row + 1 for row in _token_rows(adapter))])
    return settings


def _token_rows(adapter: AdapterFolder) -> set[int]:
    """Rows of the embeddings that the adapter holds, each whole."""
    rows = getattr(adapter.config, "trainable_token_indices", None) or []
    return {row for each in (rows.values() if isinstance(rows, dict) else [rows]) for row in each}


def _grown(tensors: dict[str, LazyTensor], outline: Outline, adapter: AdapterFolder) -> dict[str, LazyTensor]:
    """The base's tensors, of which embeddings and head have the rows that the adapter's own tokens stand in."""
    held = _token_rows(adapter)

    def longer(name: str, tensor: LazyTensor) -> LazyTensor:
        rows = outline.shape_of(name)[0]

        def load() -> torch.Tensor:
            weight = tensor.load()
            # The adapter holds these rows whole, so it does not matter what stands there.
            return torch.cat([weight, weight.new_zeros(rows - len(weight), *weight.shape[1:])])

        return replace(tensor, shape=(rows, *tensor.shape[1:]), load=load)

    own = {
        name
        for name in tensors.keys() & outline.names.keys()
        if tensors[name].shape
        if (missing := set(range(*(shape[0] for shape in (tensors[name].shape, outline.shape_of(name))))))
        and missing <= held
    }
    return {name: longer(name, tensor) if name in own else tensor for name, tensor in tensors.items()}


def _by_module(checkpoint: Checkpoint, outline: Outline, adapter: AdapterFolder) -> tuple[dict[str, LazyTensor], bool]:
    """The base's tensors by their names in the model, and whether the checkpoint stores them under others.

    They are as training loaded them, without a second one of two that are tied, and with those that the adapter's file
    holds whole.
    """
    stored, needed = dict(checkpoint.tensors), set(outline.sources.values()) - outline.whole.keys()
    if renamed := not needed <= stored.keys():
        log.warning("%s is loaded whole, as it stores tensors under other names than its modules have", adapter.base)
        stored = module_tensors(adapter.base)
    aliases = {name for name in outline.names if outline.source_of(name) != name}
    stored = {name: tensor for name, tensor in stored.items() if name not in aliases}
    if adapter.model.dtype != "auto":
        dtype = getattr(torch, adapter.model.dtype)
        cast = rounded(stored, lambda _, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        stored = {
            name: replace(tensor, dtype=dtype) if tensor.dtype.is_floating_point else tensor
            for name, tensor in cast.items()
        }
    for name, tensor in outline.whole.items():
        stored[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
    stored = _grown(stored, outline, adapter)
    for name in outline.sources.values():
        if name not in stored or stored[name].shape != outline.shape_of(name):
            found = f"has shape {stored[name].shape}" if name in stored else "is missing"
            raise UserError(
                f"{adapter.base}: {name} {found}, while its config.json asks for {outline.shape_of(name)}; give a "
                "complete base with --base-model"
            )
    return stored, renamed


class _Streamed:
    """The evaluation of an outline, whose weights come from elsewhere when they are needed."""

    def __init__(self, outline: Outline, tensors: Mapping[str, LazyTensor]) -> None:
        self._outline, self._tensors = outline, tensors

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True) -> list[torch.Tensor]:
        """As `Trained.logits`."""
        model = self._outline.model
        with self._outline.streamed(self._tensors), contextlib.nullcontext() if adapter else model.disable_adapter():
            return evaluate_rows(model, rows)


class _Quantized:
    """A base as bitsandbytes holds and multiplies it, all else of it in float32, and the adapter beside it."""

    def __init__(self, adapter: AdapterFolder, outline: Outline, settings: PreTrainedConfig) -> None:
        own = adapter.base if (adapter.base / "tokenizer.json").is_file() else adapter.path
        tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
        config = replace(adapter.model, attention="eager")  # which every family has
        stored_settings = AutoConfig.from_pretrained(adapter.base, local_files_only=True)
        base = load_model(config, stored_settings, tokenizer, trains_all=False, autocasts=False)
        if base.get_input_embeddings().weight.shape[0] != settings.get_text_config().vocab_size:
            base.resize_token_embeddings(settings.get_text_config().vocab_size, mean_resizing=False)
        names = {id(weight): name for name, weight in base.named_parameters()}
        self._parts = {
            name: (base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names.values()
        }
        self._outline = outline
        for name, weight in base.named_parameters():
            if name in outline.whole:
                weight.data = outline.whole[name].to(weight.device)
            if weight.is_floating_point():
                weight.data = weight.data.float()
        self._model, _ = with_adapter(base, adapter, lambda weight: names.get(id(weight)))

    def tensors(self) -> dict[str, LazyTensor]:
        """The base's weights as products use them, by name."""
        return {
            name: LazyTensor(self._outline.shape_of(name), torch.float32, functools.partial(self._dequantized, name))
            for name in self._parts
        }

    def _dequantized(self, name: str) -> torch.Tensor:
        module, own = self._parts[name]
        weight = getattr(module, own)
        kind = type(weight).__name__
        if kind not in ("Params4bit", "Int8Params"):
            return weight.detach().cpu()
        from bitsandbytes import functional as formats  # an extra package, which loaded the model

        if kind == "Params4bit":
            # Products dequantize to the number format that they are computed in.
            values = formats.dequantize_4bit(weight.data, weight.quant_state).to(module.compute_dtype)
        else:
            scales = module.state.SCB if module.state.SCB is not None else weight.SCB
            values = formats.int8_vectorwise_dequant(weight.data, scales)
        values = values.float().cpu()
        return values.T if name in self._outline.transposed else values

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True) -> list[torch.Tensor]:
        """As `Trained.logits`."""
        with contextlib.nullcontext() if adapter else self._model.disable_adapter():
            return evaluate_rows(self._model, rows, self._model.device)


def _merged_tensors(
    outline: Outline, source: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], tuple[str, ...], bool]:
    """The result's tensors, which of them the adapter may change, and whether tied ones come apart."""
    merged, changed = dict(source), []
    for unit in outline.units:
        for name in outline.names_in(unit):

            def load(unit: str = unit, name: str = name) -> torch.Tensor:
                return outline.merged_unit(unit, source)[name]

            merged[name] = LazyTensor(outline.shape_of(name), torch.float32, load)
            changed.append(name)
    unties = False
    for name in outline.names:
        first = outline.source_of(name)
        if name == first or not {name, first} & set(changed):
            continue
        second = merged.get(name, source[first])
        if torch.equal(second.load().float(), merged[first].load().float()):
            merged.pop(name, None)
        else:
            merged[name], unties = second, True
    return merged, tuple(name for name in changed if name in merged), unties


def _architecture(architecture: Architecture, settings: PreTrainedConfig, unties: bool) -> Architecture:
    """The base's architecture with the result's vocabulary, and with a head of its own where it has one."""
    rows = settings.get_text_config().vocab_size
    tied = architecture.tie_word_embeddings and not unties
    fields = {"vocab_size": rows, "tie_word_embeddings": tied}
    if rows == architecture.vocab_size and not unties:
        return architecture
    if isinstance(architecture, LlamaArchitecture):
        return replace(architecture, **fields)
    described = dict(architecture.settings)
    if "text_config" in described:
        described["text_config"] = described["text_config"] | fields
        return replace(architecture, settings=described | {"tie_word_embeddings": tied}, **fields)
    return replace(architecture, settings=described | fields, **fields)


def _generation(
    checkpoint: Checkpoint, outline: Outline, tokenizer: PreTrainedTokenizerBase, adapter: AdapterFolder
) -> Generation:
    """The adapter's generation settings, else the base's, with the stops of the chat template that it trained with."""
    own = (adapter.path / "generation_config.json").is_file()
    generation = hf.read_generation(adapter.path) if own else checkpoint.generation
    model = outline.model.get_base_model()
    model.generation_config = GenerationConfig(eos_token_id=list(generation.stop_token_ids) or None)
    set_stops(model, tokenizer)
    ends = model.generation_config.eos_token_id
    return replace(
        generation,
        stop_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else generation.pad_token_id,
    )


def _check_vocabulary(adapter: AdapterFolder, settings: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows, needed = settings.get_text_config().vocab_size, vocabulary_size(tokenizer)
    if needed > rows:
        raise UserError(
            f"the tokenizer of {adapter.path} gives ids up to {needed - 1}, but the base {adapter.base} has embeddings "
            f"for {rows} tokens and {adapter.weights} holds none for the others; save the adapter again with its "
            "embeddings, or give its own base with --base-model"
        )
