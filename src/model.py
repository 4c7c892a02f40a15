"""A checkpoint, or an architecture, made into a model and a tokenizer that are ready to train.

tokenizer = load_tokenizer(config.model)
settings = load_settings(config.model, tokenizer)
model = load_model(config.model, settings, tokenizer, trains_all=config.adapter.kind == "none")
"""

import contextlib
import difflib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from config.schema import ModelConfig
from src.architectures import settings_from
from src.attention import DOCUMENTS
from src.attention_choice import use_attention
from src.chat_setup import grow_embeddings, set_chat_template, template_tokens
from src.checkpoints.architecture import check_config_layers
from src.checkpoints.json_files import read_json_object
from src.context import scale_context
from src.families import check_code, check_family, refuse_own_code
from src.generation import set_stops
from src.quantization import finish_base, hold_dequantized, loading_options
from src.tokenizer_check import check_ids, check_saved
from utils.distributed import accelerator_name
from utils.errors import UserError, in_one_line, some
from utils.json_text import parse_json
from utils.logging import get_logger

log = get_logger(__name__)

PAD_TOKEN = "<|pad|>"
"""The padding token that is added to a tokenizer that has none fit for it."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with a padding token that is not the end-of-sequence token.

    Raises:
        UserError: there is no such tokenizer, a file or special token of the config is not to be found, or its class
            gives other ids than its tokenizer.json.
    """
    source = config.tokenizer or config.path
    if source.endswith(".json"):
        if not Path(source).is_file():
            raise UserError(f"model.tokenizer={source} does not exist; give a tokenizer.json, a folder or a Hub id")
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"model.tokenizer={source} is no tokenizer.json that can be read: {error}") from error
    else:
        _check_local(source, "model.tokenizer" if config.tokenizer else "model.path", "tokenizer_config.json")
        revision = config.revision if source == config.path else None
        # `model.revision` tells which code the checkpoint brings, and nothing of that of another repository.
        trusted = config.trust_remote_code and (source == config.path or Path(source).is_dir())
        if trusted:
            check_code(source, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trusted)
            tokenizer("a")  # what the files say is put to use
        except Exception as error:  # transformers and tokenizers check few of the values that they compute with
            raise UserError(f"no tokenizer could be loaded from {source}: {in_one_line(error)}") from error
        check_ids(tokenizer, source, revision)
    for role, token in config.special_tokens.items():
        _set_special_token(tokenizer, role, token)
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template, keeps_eos="eos_token" in config.special_tokens)
    _choose_pad_token(tokenizer)
    return tokenizer


def _set_special_token(tokenizer: PreTrainedTokenizerBase, role: str, token: str) -> None:
    roles = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name != "additional_special_tokens"]
    if role not in roles:
        near = difflib.get_close_matches(role, roles, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"model.special_tokens has no role '{role}'{hint} Roles: {', '.join(roles)}")
    if token not in tokenizer.get_vocab():
        log.warning("%s %s is new to the tokenizer: its embedding starts untrained", role, token)
    tokenizer.add_special_tokens({role: token})


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the pad token if it is not the eos token, else take one made for padding, else <unk>, else one that is
    reserved for uses like this, else add one."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    candidates = [token for token in special if "pad" in token.lower()]
    candidates += [tokenizer.unk_token] if tokenizer.unk_token is not None else []
    candidates += [token for token in special if "reserved" in token.lower() or "unused" in token.lower()]
    chosen = next((token for token in candidates if token != tokenizer.eos_token), PAD_TOKEN)
    reason = "had no padding token" if tokenizer.pad_token is None else "padded with its eos token"
    added = tokenizer.add_special_tokens({"pad_token": chosen})
    log.info("the tokenizer %s; %s is %s for it", reason, chosen, "added" if added else "taken")


def load_settings(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The transformers config of a run's model, read without its weights.

    Raises:
        UserError: the checkpoint is not there or no causal language model, needs code that is not trusted, the
            architecture is unknown, its vocabulary is smaller than the tokenizer's, or its positions contradict
            `model.rope_scaling`.
    """
    if config.path is None:
        settings = settings_from(config.architecture, tokenizer)
        check_family(settings, f"model.architecture.model_type={settings.model_type}")
        check_saved(tokenizer, settings)
        scale_context(settings, config.rope_scaling)
        return settings
    _check_local(config.path, "model.path", "config.json")
    if config.trust_remote_code:
        check_code(config.path, config.revision)
    try:
        settings = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # each family computes with its settings in its own way, and checks few of them
        if not config.trust_remote_code:
            refuse_own_code(config.path, config.revision)
        raise UserError(f"model.path={config.path} could not be read: {in_one_line(error)}") from error
    check_family(settings, f"model.path={config.path}")
    if config.tokenizer is not None and not getattr(settings, "auto_map", None):
        check_saved(tokenizer, settings)
    rows, own = settings.get_text_config().vocab_size, _own_size(tokenizer, config)
    if rows < own:
        raise UserError(
            f"the checkpoint {config.path} has embeddings for {rows} tokens, but its tokenizer "
            f"{config.tokenizer or config.path} gives ids up to {own - 1}; they do not belong together: set "
            "model.tokenizer to the one that the checkpoint was trained with"
        )
    scale_context(settings, config.rope_scaling)
    return settings


def _own_size(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> int:
    """The vocabulary's size before this run added padding or special tokens to it."""
    added = {PAD_TOKEN, *config.special_tokens.values(), *template_tokens(config.chat_template)}
    return max(index for token, index in tokenizer.get_vocab().items() if token not in added) + 1


def load_model(
    config: ModelConfig,
    settings: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trains_all: bool,
    autocasts: bool = True,
) -> PreTrainedModel:
    """The model of a run, on the CPU unless it is quantized, with embeddings for every token of the tokenizer.

    Args:
        settings: from `load_settings`; `src.quantization.check_base` says whether a run can train on what they name.
        trains_all: whether every weight trains, for which `auto` means float32.
        autocasts: whether float32 weights train under autocast, which flash-attention needs of them.
    Raises:
        UserError: files or weights are missing, or the attention or quantization is not to be had here.
    """
    if config.attention == "flex_attention" and accelerator_name() == "cpu":
        raise UserError("model.attention=flex_attention has no backward pass on a CPU; use auto or sdpa")
    dtype = config.dtype if config.dtype != "auto" or not trains_all else "float32"
    later = config.attention in ("auto", DOCUMENTS)  # once the model is there to be asked what it needs
    options: dict[str, Any] = {} if later else {"attn_implementation": config.attention}
    try:
        if config.path is None:
            dtype = getattr(torch, "float32" if dtype == "auto" else dtype)
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype, **options)
        else:
            dtype = dtype if dtype == "auto" else getattr(torch, dtype)
            options |= loading_options(config, settings, trains_all=trains_all, dtype=dtype)
            model = _from_checkpoint(config, settings, dtype, options)
    except ImportError as error:
        raise UserError(
            f"this machine lacks what model.attention={config.attention} or model.quantization={config.quantization} "
            f"needs: {in_one_line(error)}. Install it, or use model.attention=auto and model.quantization=none"
        ) from error
    except KeyError as error:
        raise UserError(f"the model's config names {error}, which transformers does not have; correct it") from error
    use_attention(model, config.attention, autocasts=autocasts)
    if autocasts and not trains_all and config.dtype == "auto" and model.dtype == torch.float32:
        log.warning(
            "the frozen weights are held in float32, as the checkpoint has them, and autocast casts all of them in "
            "every micro-batch; model.dtype=bfloat16 takes half their memory and no cast, but rounds what runs between "
            "products and what adapter.modules_to_save trains to 8 bits too"
        )
    grow_embeddings(model, tokenizer, trains_all=trains_all, becomes_chat=config.chat_template is not None)
    finish_base(model, config)
    model.config.pad_token_id = tokenizer.pad_token_id
    set_stops(model, tokenizer)
    return model


def _from_checkpoint(
    config: ModelConfig, settings: PreTrainedConfig, dtype: torch.dtype | str, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=settings,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    except (ImportError, KeyError):
        raise  # a package that is absent, or a name that transformers has not: the caller tells
    except Exception as error:  # damaged files, and settings that no model can be made of
        raise UserError(f"the weights of {config.path} could not be loaded: {in_one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    mismatched = sorted(f"{name} of {tuple(given)} for {tuple(own)}" for name, given, own in report["mismatched_keys"])
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:4]) + (" ..." if len(missing + mismatched) > 4 else "")
        raise UserError(
            f"the checkpoint {config.path} is incomplete: {len(missing)} weights are missing and {len(mismatched)} "
            f"have another shape ({names}); fetch or convert it again"
        )
    hold_dequantized(model, options, dtype)
    return model


def _check_local(source: str, field: str, needed: str) -> None:
    """Say plainly what is wrong with a path that is meant to be a folder; leave Hub ids to the Hub."""
    folder = Path(source)
    if not folder.is_dir():
        slashes = source.count("/")
        if source.startswith((".", "/", "~")) or slashes > 1 or (slashes == 1 and folder.parent.is_dir()):
            raise UserError(f"{field}={source} does not exist; give a folder with a checkpoint, or a Hub id")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{field}={source} holds an adapter, not a model; train from its base {base}, or merge the two first"
        )
    if not (folder / needed).is_file():
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{field}={source} has no {needed} (it holds {present}); it is not a complete checkpoint")
    for name in (needed, "tokenizer.json"):
        if (folder / name).is_file():
            _check_json(folder / name, field)
    if needed == "config.json":
        _check_weights(folder)
    _check_layers(folder, field)


def _check_json(path: Path, field: str) -> None:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{field}={path.parent}: {path.name} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{field}={path.parent}: {path.name} holds no object; fetch it again")


def _check_weights(folder: Path) -> None:
    """Make sure that the weight files of a checkpoint are all there and whole, before anything else takes time."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"model.path={folder}: {index.name} has no weight_map of file names; fetch it again")
        shards = set(places.values())
        if outside := sorted(name for name in shards if name != Path(name).name):
            raise UserError(
                f"model.path={folder}: {index.name} names weight files that are not beside it "
                f"({', '.join(outside[:3])}), where a checkpoint's stand; fetch it again from where you trust it"
            )
        absent = sorted(name for name in shards if not os.path.isfile(folder / name))  # is_file() raises at a long name
        if absent:
            raise UserError(
                f"model.path={folder} is incomplete: {len(absent)} of {len(shards)} weight files that its index names "
                f"are missing ({some(absent, 3)}); fetch it again"
            )
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"model.path={folder} is incomplete: {path.name} is damaged or cut short ({error}); fetch it again"
            ) from error


def _check_layers(folder: Path, field: str) -> None:
    """Make sure that config.json claims no more layers than there are tensors, by the index or the file of weights, if
    there is one: transformers reads it for the tokenizer too, and some families make a list of the layers then."""
    tensors, index, whole = 0, folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        places = read_json_object(index).get("weight_map")
        tensors = len(places) if isinstance(places, dict) else 0
    elif whole.is_file():
        with contextlib.suppress(SafetensorError), safe_open(whole, framework="pt") as content:
            tensors = len(content.keys())
    if tensors and (folder / "config.json").is_file():
        check_config_layers(f"{field}={folder}: config.json", read_json_object(folder / "config.json"), tensors)
