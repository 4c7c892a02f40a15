"""Meta's own layout of Llama 1, 2, 3, 3.1 and 3.2: `consolidated.NN.pth`, `params.json` and `tokenizer.model`.

    checkpoint = read(Path("Llama3.1-8B"), ReadOptions(meta_version="3.1", instruct=False))

The files hold neither the context length nor the stop tokens, nor which of 3.1's and 3.2's rotary scalings is meant:
`--meta-version` and `--instruct` or `--base` say so. Folders that `write` made hold a `reading.json` with the two.

Source: https://github.com/meta-llama/llama-models/tree/main/models/llama3
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from src.checkpoints.architecture import LlamaArchitecture, as_llama, check_layers
from src.checkpoints.characters import Characters
from src.checkpoints.checkpoint import (
    AnyTokenizer,
    Checkpoint,
    Generation,
    MadeTokenizer,
    ReadOptions,
    Rounding,
    TokenizerFiles,
    WriteOptions,
)
from src.checkpoints.interleaved import (
    from_hugging_face,
    interleaved_logits,
    shapes_by_meta_name,
    to_hugging_face,
)
from src.checkpoints.json_files import read_json_object
from src.checkpoints.meta_params import Params, feed_forward_size, params_of, read_params
from src.checkpoints.meta_releases import PAD, READING, RELEASES, Release, release_of
from src.checkpoints.meta_shards import (
    EMBEDDING,
    HEAD,
    Shard,
    check_split,
    embedding_axis,
    has_tied_head,
    joined,
    open_shards,
    shard_files,
    tensor_of,
    write_shards,
)
from src.checkpoints.pieces import ScoredPieces, pieces_of_content
from src.checkpoints.sentencepiece_model import read_model, write_model
from src.checkpoints.tiktoken_ranks import TiktokenRanks, is_ranks, ranks_of_content, read_ranks, write_ranks
from utils.errors import UserError
from utils.files import write_json
from utils.logging import get_logger

log = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = frozenset({"tokenizer", "meta_version", "instruct", "chat_template"})


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with shards, or a params.json that gives a model's `dim`."""
    if not path.is_dir():
        return False
    return bool(shard_files(path)) or (
        (path / "params.json").is_file() and "dim" in read_json_object(path / "params.json")
    )


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Read a folder; the tokenizer may also stand in the folder above, as Llama 1 and 2 were handed out.

    A head that equals the embedding value for value is read as tied to it, as Llama 3.2 has it.

    Raises:
        UserError: a file is missing or damaged, the files contradict each other, or they do not tell which release
            they are of and no option does.
    """
    params = read_params(path / "params.json")
    places = [options.tokenizer] if options.tokenizer else [path / "tokenizer.model", path.parent / "tokenizer.model"]
    tokenizer_file = next((place for place in places if place.is_file()), None)
    if tokenizer_file is None:
        raise UserError(f"{places[0]} does not exist; name Meta's tokenizer.model with --tokenizer FILE")
    has_ranks = is_ranks(tokenizer_file)
    release, instruct = release_of(path, params.use_scaled_rope, has_ranks, options)
    if options.instruct and options.chat_template is None:
        log.warning("%s holds no chat template, so none is written; give one with --chat-template FILE", path)
    shards = open_shards(path)
    architecture = _architecture(path, params, release, shards)
    tensors = joined(shards, architecture)
    tokenizer: ScoredPieces | TiktokenRanks
    if has_ranks:
        tokenizer = read_ranks(tokenizer_file, release.special_tokens)
        encode, size = tokenizer.encode, tokenizer.vocab_size
    else:
        tokenizer, encode = read_model(tokenizer_file)
        size = len(tokenizer.pieces)
    if size != architecture.vocab_size:
        raise UserError(
            f"{tokenizer_file} has {size} tokens, but {EMBEDDING} has {architecture.vocab_size} rows; give the "
            "tokenizer that the model was trained with"
        )
    descriptions = [file for file in (path / "params.json", path / READING) if file.is_file()]
    checkpoint = Checkpoint(
        inputs=(*descriptions, *(shard.path for shard in shards), tokenizer_file),
        architecture=architecture,
        tensors=to_hugging_face(architecture, tensors),
        tokenizer=tokenizer,
        generation=_generation(tokenizer, release, instruct),
        logits=functools.partial(interleaved_logits, architecture, tensors),
        encode=encode,
        chat_template=_chat_template(options.chat_template),
    )
    checkpoint.check_tensors()
    return checkpoint


def _architecture(path: Path, params: Params, release: Release, shards: Sequence[Shard]) -> LlamaArchitecture:
    """The model that params.json and the shapes of the tensors describe together."""
    check_layers(f"{path / 'params.json'}: n_layers", params.n_layers, len(shards[0].tensors))
    of_embedding = embedding_axis(shards, params.dim)
    rows = tensor_of(shards[0], EMBEDDING).shape[0] * (1 if of_embedding else len(shards))
    if params.vocab_size > 0 and rows != params.vocab_size:
        raise UserError(
            f"{shards[0].path}: {EMBEDDING} has {rows} rows in all, but {path / 'params.json'} says "
            f"vocab_size={params.vocab_size}; a shard is missing, or params.json is of another model"
        )
    wide = tensor_of(shards[0], "layers.0.feed_forward.w1.weight").shape[0] * len(shards)
    described = feed_forward_size(params.dim, params.multiple_of, params.ffn_dim_multiplier)
    if wide != described:
        raise UserError(
            f"{shards[0].path}: layers.0.feed_forward.w1.weight has {wide} rows in {len(shards)} shards, but "
            f"multiple_of={params.multiple_of} and ffn_dim_multiplier={params.ffn_dim_multiplier} in params.json ask "
            f"for {described}; a shard is missing, or params.json is of another model"
        )
    default_theta = 500000.0 if release.special_tokens else 10000.0
    return LlamaArchitecture(
        vocab_size=rows,
        hidden_size=params.dim,
        intermediate_size=wide,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        max_position_embeddings=release.context,
        rms_norm_eps=params.norm_eps,
        tie_word_embeddings=has_tied_head(shards, of_embedding),
        rope_parameters=release.rope_parameters(float(params.rope_theta or default_theta)),
    )


def _generation(tokenizer: ScoredPieces | TiktokenRanks, release: Release, instruct: bool) -> Generation:
    """`<unk>` pads for pieces, whose bytes spell every character; ranks have a token for it from 3.1 on."""
    if isinstance(tokenizer, ScoredPieces):
        return Generation(tokenizer.bos_id, (tokenizer.eos_id,), tokenizer.unk_id)
    stops = tuple(tokenizer.id_of(name) for name in release.stops(instruct))
    return Generation(tokenizer.bos_id, stops, tokenizer.id_of(PAD) if PAD in release.special_tokens else None)


def _chat_template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no readable chat template ({error}); name a file of Jinja in UTF-8") from error


def write(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Rounding | None:
    """Write a checkpoint as `options.shards` files, with params.json and tokenizer.model.

    Context length and stop tokens follow from the release that `reading.json` names; params.json has no room for them.

    Returns:
        How weights were rounded; None if they were not.
    Raises:
        UserError: a field or the tokenizer is beyond the format; the field is named.
    """
    sizes = as_llama(checkpoint.architecture, "meta")
    _refuse_what_cannot_be_held(checkpoint, sizes)
    tokenizer = _tokenizer_to_write(checkpoint.tokenizer)
    release, instruct = _release_to_write(checkpoint, sizes, tokenizer)
    of_embedding = 1 if isinstance(tokenizer, ScoredPieces) else 0
    check_split(sizes, options.shards, of_embedding)
    if isinstance(tokenizer, ScoredPieces):
        write_model(tokenizer, folder / "tokenizer.model")
    else:
        write_ranks(tokenizer, folder / "tokenizer.model")
    write_json(folder / "params.json", params_of(sizes, release))
    write_json(folder / READING, {"meta_version": release.version, "instruct": instruct})
    dtype = DTYPES[options.dtype] if options.dtype else None

    def loader(name: str) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            tensor = from_hugging_face(sizes, name, checkpoint.tensors)
            return tensor if dtype is None else tensor.to(dtype)

        return load

    loaders = {name: loader(name) for name in shapes_by_meta_name(sizes)}
    if sizes.tie_word_embeddings:
        loaders[HEAD] = loaders[EMBEDDING]
    write_shards(folder, loaders, options.shards, of_embedding)
    return None if dtype is None else lambda name, tensor: tensor.to(dtype)


def _refuse_what_cannot_be_held(checkpoint: Checkpoint, sizes: LlamaArchitecture) -> None:
    allowed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
    }
    for name, value in allowed.items():
        if (given := getattr(sizes, name)) != value:
            raise UserError(f"{name}={given} cannot be held by meta, which fixes it at {value}; choose another --to")
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{name} is {tensor.dtype}; meta holds {', '.join(DTYPES)}: choose one with --dtype")
    files = checkpoint.tokenizer.paths if isinstance(checkpoint.tokenizer, TokenizerFiles) else ()
    templates = [
        path
        for path in files
        if path.name == "chat_template.jinja"
        or (path.name == "tokenizer_config.json" and "chat_template" in read_json_object(path))
    ]
    if templates or checkpoint.chat_template is not None:
        log.warning("meta holds no chat template; keep it, and give it with --chat-template on reading back")
    if checkpoint.generation.sampling:
        log.warning("meta holds no sampling settings: %s are left out", dict(checkpoint.generation.sampling))


def _tokenizer_to_write(tokenizer: AnyTokenizer) -> ScoredPieces | TiktokenRanks:
    if isinstance(tokenizer, Characters):
        raise UserError("the tokenizer cuts texts into characters, which no model of Meta's does; choose another --to")
    if isinstance(tokenizer, ScoredPieces | TiktokenRanks):
        return tokenizer
    made = isinstance(tokenizer, MadeTokenizer)
    name = "the tokenizer" if made else str(tokenizer.tokenizer_json)
    content = tokenizer.tokenizer_json if made else read_json_object(tokenizer.tokenizer_json)
    if not content["model"].get("byte_fallback"):
        return ranks_of_content(name, content)
    pieces = pieces_of_content(name, content)
    controls = {pieces.pieces[index] for index in (pieces.unk_id, pieces.bos_id, pieces.eos_id)}
    if more := sorted({token["content"] for token in content.get("added_tokens", ())} - controls):
        raise UserError(f"{name}: added_tokens {more} cannot be held by SentencePiece's pieces; choose another --to")
    return pieces


def _release_to_write(
    checkpoint: Checkpoint, sizes: LlamaArchitecture, tokenizer: ScoredPieces | TiktokenRanks
) -> tuple[Release, bool]:
    """The release whose rotary embedding, tokenizer and stop tokens the checkpoint has."""
    size = len(tokenizer.pieces) if isinstance(tokenizer, ScoredPieces) else tokenizer.vocab_size
    if size != sizes.vocab_size:
        raise UserError(
            f"vocab_size={sizes.vocab_size} cannot be held by meta with a tokenizer of {size} tokens, which it keeps "
            "equal; choose another --to"
        )
    rope = dict(sizes.rope_parameters)
    special = () if isinstance(tokenizer, ScoredPieces) else tokenizer.special_tokens
    of_rope = [each for each in RELEASES.values() if each.rope_parameters(rope["rope_theta"]) == rope]
    if not of_rope:
        raise UserError(
            f"rope_parameters={rope} cannot be held by meta, which has default and Llama 3.1's and 3.2's scaling; "
            "choose another --to"
        )
    fitting = [each for each in of_rope if each.special_tokens == special]
    if not fitting:
        raise UserError(
            f"tokenizer.special_tokens={special[:12]}... with rope_parameters={rope} cannot be held by meta: Llama "
            f"{' or '.join(each.version for each in of_rope)} has {of_rope[-1].special_tokens[:12] or 'pieces'}...; "
            "choose another --to"
        )
    release = next((each for each in fitting if sizes.max_position_embeddings <= each.context), fitting[-1])
    given = checkpoint.generation
    known = {instruct: _generation(tokenizer, release, instruct) for instruct in (False, True)}
    for instruct, generation in known.items():
        if set(generation.stop_token_ids) != set(given.stop_token_ids):
            continue
        if generation.bos_token_id != given.bos_token_id:
            break
        _warn_of_what_changes(sizes, given, release, generation)
        return release, instruct
    raise UserError(
        f"generation.bos_token_id={given.bos_token_id} with stop_token_ids={given.stop_token_ids} cannot be held by "
        f"meta: Llama {release.version} begins with {known[True].bos_token_id} and ends with "
        f"{known[False].stop_token_ids} or {known[True].stop_token_ids}; choose another --to"
    )


def _warn_of_what_changes(sizes: LlamaArchitecture, given: Generation, release: Release, read: Generation) -> None:
    """Say which fields will be the release's own on reading, since no file of Meta's holds them."""
    changed = {
        "max_position_embeddings": (sizes.max_position_embeddings, release.context),
        "generation.pad_token_id": (given.pad_token_id, read.pad_token_id),
    }
    for name, (before, after) in changed.items():
        if before != after:
            log.warning(
                "meta does not hold %s=%s: on reading, Llama %s's %s takes its place",
                name,
                before,
                release.version,
                after,
            )


def read_back(folder: Path) -> Checkpoint:
    """Read what `write` wrote, evaluated from its shards."""
    return read(folder, ReadOptions())
