"""A checkpoint, or an architecture, made into a model and a tokenizer that are ready to train.

tokenizer = load_tokenizer(config.model)
settings = load_settings(config.model, tokenizer)
model = load_model(config.model, settings, tokenizer, trains_all=config.adapter.kind == "none")
"""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from config.schema import ModelConfig
from src.attention import DOCUMENTS
from src.attention_choice import use_attention
from src.generation import set_stops
from src.tokenizer_check import check_ids
from utils.distributed import accelerator_name
from utils.errors import UserError
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer could be loaded from {source}: {_in_one_line(error)}") from error
        check_ids(tokenizer, source, revision)
    for role, token in config.special_tokens.items():
        _set_special_token(tokenizer, role, token)
    _choose_pad_token(tokenizer)
    if config.chat_template is not None:
        path = Path(config.chat_template)
        if not path.is_file():
            raise UserError(f"model.chat_template={path} does not exist; give a file with a Jinja chat template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
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
        UserError: the checkpoint is not there, the architecture is unknown, or its vocabulary is smaller than the
            tokenizer's.
    """
    if config.path is None:
        return _settings_from_architecture(config.architecture, tokenizer)
    _check_local(config.path, "model.path", "config.json")
    try:
        settings = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model.path={config.path} could not be read: {_in_one_line(error)}") from error
    rows, own = settings.get_text_config().vocab_size, _own_size(tokenizer, config)
    if rows < own:
        raise UserError(
            f"the checkpoint {config.path} has embeddings for {rows} tokens, but its tokenizer "
            f"{config.tokenizer or config.path} gives ids up to {own - 1}; they do not belong together: set "
            "model.tokenizer to the one that the checkpoint was trained with"
        )
    return settings


def _settings_from_architecture(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    fields = dict(architecture)
    kind = fields.pop("model_type")
    fields.setdefault("vocab_size", vocabulary_size(tokenizer))
    if fields["vocab_size"] < vocabulary_size(tokenizer):
        raise UserError(
            f"model.architecture.vocab_size={fields['vocab_size']} is below the {vocabulary_size(tokenizer)} tokens of "
            "the tokenizer; raise it, or leave it out"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        settings = AutoConfig.for_model(kind, **fields)
        known = AutoConfig.for_model(kind).to_dict()
    except StrictDataclassError as error:
        raise UserError(f"model.architecture does not suit '{kind}': {_in_one_line(error)}") from error
    except ValueError as error:
        if kind in CONFIG_MAPPING:
            raise UserError(f"model.architecture does not suit '{kind}': {_in_one_line(error)}") from error
        near = difflib.get_close_matches(kind, CONFIG_MAPPING, n=3) or ["llama"]
        raise UserError(
            f"model.architecture.model_type={kind} is not one that transformers knows; did you mean "
            f"{' or '.join(near)}?"
        ) from error
    unknown = sorted(set(fields) - set(known))
    if unknown:
        near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
        raise UserError(
            f"model.architecture has settings that '{kind}' does not know: "
            + "; ".join(f"{name}" + (f" (did you mean {match[0]}?)" if match else "") for name, match in near.items())
        )
    return settings


def context_length(settings: PreTrainedConfig) -> int | None:
    """The tokens that a model was made to see at once, or None where its config does not say."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of the tokenizer: its largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def _own_size(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> int:
    """The vocabulary's size before this run added padding or special tokens to it."""
    added = {PAD_TOKEN, *config.special_tokens.values()}
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
        settings: from `load_settings`.
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
            model = _from_checkpoint(config, settings, dtype if dtype == "auto" else getattr(torch, dtype), options)
    except ImportError as error:
        raise UserError(
            f"this machine lacks what model.attention={config.attention} or model.quantization={config.quantization} "
            f"needs: {_in_one_line(error)}. Install it, or use model.attention=auto and model.quantization=none"
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
    needed, rows = vocabulary_size(tokenizer), model.get_input_embeddings().weight.shape[0]
    if needed > rows:
        log.info("embeddings grow from %d to %d rows for tokens that are new to the checkpoint", rows, needed)
        model.resize_token_embeddings(needed)
    model.config.pad_token_id = tokenizer.pad_token_id
    set_stops(model, tokenizer)
    return model


def _from_checkpoint(
    config: ModelConfig, settings: PreTrainedConfig, dtype: torch.dtype | str, options: dict[str, Any]
) -> PreTrainedModel:
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config.quantization)
        options["device_map"] = {"": _device_index()}
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
    except (EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"the weights of {config.path} could not be loaded: {_in_one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    mismatched = sorted(f"{name} of {tuple(given)} for {tuple(own)}" for name, given, own in report["mismatched_keys"])
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:4]) + (" ..." if len(missing + mismatched) > 4 else "")
        raise UserError(
            f"the checkpoint {config.path} is incomplete: {len(missing)} weights are missing and {len(mismatched)} "
            f"have another shape ({names}); fetch or convert it again"
        )
    _keep_differentiable(model)
    return model


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Forbid a layout of 4-bit weights through which no gradient flows.

    On CPUs with AVX512-BF16, bitsandbytes lays weights out anew at the first evaluation, for a faster product without a
    backward, and keeps to it: a run that is evaluated before it trains would learn from wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _device_index() -> int | str:
    """The device that quantized weights are made on, which is the one that trains them."""
    return torch.accelerator.current_device_index() if accelerator_name() != "cpu" else "cpu"


def _quantization(kind: str) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    half = torch.bfloat16 if accelerator_name() != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )


def _check_local(source: str, field: str, needed: str) -> None:
    """Say plainly what is wrong with a path that is meant to be a folder; leave Hub ids to the Hub."""
    folder = Path(source)
    if not folder.is_dir():
        slashes = source.count("/")
        if source.startswith((".", "/", "~")) or slashes > 1 or (slashes == 1 and folder.parent.is_dir()):
            raise UserError(f"{field}={source} does not exist; give a folder with a checkpoint, or a Hub id")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
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


def _check_json(path: Path, field: str) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{field}={path.parent}: {path.name} is not JSON ({error}); fetch it again") from error


def _check_weights(folder: Path) -> None:
    """Make sure that the weight files of a checkpoint are all there and whole, before anything else takes time."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise UserError(
                f"model.path={folder} is incomplete: {len(absent)} of {len(shards)} weight files that its index names "
                f"are missing ({', '.join(absent[:3])}); fetch it again"
            )
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"model.path={folder} is incomplete: {path.name} is damaged or cut short ({error}); fetch it again"
            ) from error


def _in_one_line(error: Exception) -> str:
    """What another library says, short enough to be read."""
    return " ".join(str(error).split())[:500]
