"""Which attention a model gets, and the proof that it keeps the documents of a pack apart.

Not every architecture does, whatever its attention: short convolutions and state spaces carry one document into the
next, with a healthy loss. So a model is asked before it trains on packs.

    use_attention(model, config.model.attention)
    packing = prove_attention(model, config.model.attention, packing=True, device=args.device, autocast=None)
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedModel, utils
from transformers.integrations import is_deepspeed_zero3_enabled

from src.attention import DOCUMENTS, border_arguments, register_documents
from src.bad_modules import bad_weights
from src.kernels import VARLEN_OPTIONS
from utils.distributed import accelerator_name, asks_for_fsdp
from utils.errors import UserError, some
from utils.logging import get_logger

log = get_logger(__name__)

LONGEST_PROBED_WINDOW = 1024
"""Sliding windows up to this many tokens are probed with a document that is longer."""

COMPARED_LOGITS = 4096
"""Logits of a position that are compared, in twice the precision: those of all tokens would take gigabytes."""

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as configs name them, through which a document reaches another by attention alone."""


def use_attention(model: PreTrainedModel, requested: str, *, autocasts: bool = True) -> None:
    """Give a model the attention `documents`, or where that cannot serve, what `auto` means instead; told once.

    Args:
        requested: `model.attention`; every name but `auto` and `documents` is in the model already.
        autocasts: whether float32 weights train under autocast, which flash-attention needs of them.
    Raises:
        UserError: `documents` is asked for, and the model's code does not take its attention from transformers.
    """
    register_documents()
    if requested not in ("auto", DOCUMENTS):
        log.info("attention: %s, as model.attention says", model.config._attn_implementation)
        return
    takes = model.is_backend_compatible()
    if requested == DOCUMENTS and not takes:
        raise UserError(
            f"model.attention={DOCUMENTS} cannot be had in {type(model).__name__}, whose code brings its own; use auto"
        )
    half = autocasts or model.dtype in (torch.float16, torch.bfloat16)
    name, reason = (DOCUMENTS, "") if requested == DOCUMENTS else _choice(model, accelerator_name(), half=half)
    if name is not None:
        model.set_attn_implementation(name)
    log.info("attention: %s%s", model.config._attn_implementation, f", as {reason}" if reason else "")


def takes_borders(model: torch.nn.Module) -> bool:
    """Whether the model's attention is told the borders of documents, and so takes packs without padding."""
    name = model.config._attn_implementation
    return name == DOCUMENTS or name.startswith("flash")


def _choice(model: PreTrainedModel, device: str, *, half: bool) -> tuple[str | None, str]:
    """The name of the best attention, None for the one that transformers has chosen; and why it is not `documents`."""
    if not model.is_backend_compatible():
        return None, "the model's code brings its own attention"
    if device in ("cpu", "mps"):
        return DOCUMENTS, ""
    if device != "cuda":
        return None, f"{DOCUMENTS} is not known to serve {device}"
    config = model.config.get_text_config()
    soft = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    obstacles = {
        "this torch has no variable-length kernel": not VARLEN_OPTIONS,
        f"{type(model).__name__} is not made for variable-length attention": not model._supports_flash_attn,
        "its scores are soft-capped": soft,
        "it has attention sinks": sinks,
        "it attends in chunks": getattr(config, "attention_chunk_size", None) is not None,
    }
    reason = next((name for name, stands in obstacles.items() if stands), "")
    if not reason:
        return DOCUMENTS, ""
    known = getattr(model, "_compatible_flash_implementations", None)
    for version in (4, 3, 2):
        name = f"flash_attention_{version}"
        installed = getattr(utils, f"is_flash_attn_{version}_available", bool)()
        able = model._supports_flash_attn and not (soft and version != 2) and not (sinks and version == 2)
        if installed and half and able and (known is None or name in known):
            return name, reason
    return ("flex_attention" if model._supports_flex_attn else None), reason


def prove_attention(
    model: PreTrainedModel, requested: str, *, packing: bool, device: torch.device, autocast: torch.dtype | None
) -> bool:
    """Move a model to the device that trains it, and compare what it computes there for a pack with what it computes
    for each document alone. A model that will be sharded stays where it is, and is judged by its kinds of layers.

    Args:
        requested: `model.attention`.
        packing: whether rows are to share packs.
        autocast: number format of matrix products, or None: that of the weights.
    Returns:
        Whether rows share packs: false too where `auto` found an architecture that carries documents into each other.
    Raises:
        UserError: the attention that was asked for by name does not compute what the model means, or does not keep
            documents apart.
    """
    if asks_for_fsdp() or is_deepspeed_zero3_enabled():
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
        if packing and kinds:
            _tell_unpacked(model, UserError(f"it has layers of the kind {', '.join(sorted(kinds))}"))
        return packing and not kinds
    if model.device != device:
        model.to(device)
    own = model.config._attn_implementation
    names = [own]
    if requested == "auto" and model.is_backend_compatible():
        names += [DOCUMENTS, "sdpa" if model._supports_sdpa else "eager"]
    lengths, faults = _probe_lengths(model), {}
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for shared in (True, False) if packing else (False,):
            for name in dict.fromkeys(names):
                model.set_attn_implementation(name)
                fault = _fault(model, lengths, shared=shared)
                if fault is None:
                    if packing and not shared:
                        _tell_unpacked(model, faults[name])
                    elif name != own:
                        log.warning("attention: %s instead of %s: %s", name, own, _in_short(faults[own]))
                    return shared
                if requested != "auto":
                    raise fault
                faults.setdefault(name, fault)
    raise faults[own]


def _fault(model: PreTrainedModel, lengths: tuple[int, int], *, shared: bool) -> UserError | None:
    """What is wrong with a model's attention, if anything is, for rows that share packs or do not."""
    try:
        if model.config._attn_implementation == DOCUMENTS:
            _check_as_eager(model, lengths[0])
        if shared:
            check_documents_apart(model, lengths=lengths)
    except UserError as error:
        return error
    return None


def _in_short(error: UserError) -> str:
    """What was found, without what to change."""
    return str(error).partition(";")[0]


def _tell_unpacked(model: PreTrainedModel, fault: UserError) -> None:
    log.warning(
        "rows do not share packs: %s. Each micro-batch is padded to its longest row, which costs time and memory as "
        "far as rows differ in length",
        _in_short(fault),
    )


def _probe_lengths(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens in two documents, the first longer than a sliding window that is not too long to try."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longer = window + 8 if window <= LONGEST_PROBED_WINDOW else 12
    return min(longer, getattr(config, "max_position_embeddings", None) or longer), 7


@torch.no_grad()
def _check_as_eager(model: PreTrainedModel, length: int) -> None:
    """Compare the logits of one document with those of eager attention, which holds all that the model means.

    Raises:
        UserError: they differ by more than rounding explains, or the model tells its attention what no kernel knows.
    """
    [document] = _documents(model, (length,))
    found = _logits(model, [document])
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    eager = _logits(model, [document])
    model.set_attn_implementation(own)
    difference = ((found - eager).norm() / eager.norm()).item()
    if not difference <= rounding(model):
        raise UserError(
            f"attention '{own}' is not what {type(model).__name__} means: logits differ from those of eager attention "
            f"by {difference:.2g} of their norm; use another model.attention"
        )


def check_documents_apart(model: torch.nn.Module, *, lengths: tuple[int, int] = (5, 7)) -> None:
    """Look for a gradient from the second of two packed documents to the first, and compare the logits of both with
    those of each document alone.

    What is masked gets a gradient of exactly zero, so that the faintest path between documents is found, in weights of
    any size and in any number format. The logits show whether positions start again.

    Args:
        model: a causal language model on the device that trains it; its mode, its gradients and the random state stay
            as they are.
        lengths: tokens in the two documents.
    Raises:
        UserError: there is a gradient, the logits differ by more than rounding explains, or they are not finite.
    """
    documents = _documents(model, lengths)
    packed, reaching = _logits_and_gradient(model, documents)
    with torch.no_grad():
        alone = torch.cat([_logits(model, [document]) for document in documents])
    if not bool(torch.isfinite(alone).all()):
        weights = f", as {some(names)} are not" if (names := bad_weights(model)) else ""
        raise UserError(
            f"logits of {type(model).__name__} for random tokens are not finite{weights}; load a checkpoint that is "
            "whole, or give training.precision=float32, or another model.attention"
        )
    allowed = (rounding(model) * alone.abs().max()).item()
    difference = (packed - alone).abs().max().item()
    found = f"packed logits differ from those of each document alone by {difference:.3g} (allowed {allowed:.3g})"
    if reaching:
        found = "a gradient flows from the second to the first"
    if reaching or not difference <= allowed:
        raise UserError(
            f"documents of a pack see each other in {type(model).__name__} with attention "
            f"'{model.config._attn_implementation}', where {found}; set data.packing=false, or another model.attention"
        )


def _documents(model: torch.nn.Module, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Random tokens, (1, length) each, on the model's device."""
    weight = model.get_input_embeddings().weight
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator).to(weight.device) for length in lengths]


def _logits_and_gradient(model: torch.nn.Module, documents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The logits of a pack, and whether a gradient goes from those of its last document to embeddings before it."""
    embedded = []

    def cut(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    with torch.enable_grad():
        logits = _logits(model, documents)
    hook.remove()
    before = logits.shape[0] - documents[-1].shape[1]
    weights = torch.randn(logits[before:].shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    [gradient] = torch.autograd.grad((logits[before:] * weights).sum(), embedded[-1:])
    return logits.detach(), bool((gradient[:, :before] != 0).any())


def _logits(model: torch.nn.Module, documents: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of a pack of documents, (tokens, V or less), in float64, without dropout."""
    ids = torch.cat(list(documents), dim=1)
    lengths = [document.shape[1] for document in documents]
    places = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
    told = border_arguments(borders, max(lengths)) if takes_borders(model) else {}
    training = model.training
    model.eval()
    logits = model(input_ids=ids, position_ids=places, use_cache=False, **told).logits[0]
    model.train(training)
    return logits[:, :COMPARED_LOGITS].double()


def rounding(model: torch.nn.Module) -> float:
    """The share of the largest logit that rounding may change: a thousand roundings of it.

    Sums of a packed row may run in another order. The share is far below what a document seen by its neighbour changes,
    and far above what order does; 8-bit products depend on what else is in the batch.
    """
    weight = model.get_input_embeddings().weight
    coarse = weight.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(weight.device.type)
    coarse = coarse or hasattr(model.config, "quantization_config")
    return 0.05 if coarse else 1000 * torch.finfo(weight.dtype).eps
