"""A tokenizer of another format's kind, made into Hugging Face's own files.

made_tokenizer(checkpoint).texts["tokenizer.json"]
"""

import json
from typing import Any

from src.checkpoints.characters import Characters
from src.checkpoints.checkpoint import Checkpoint, MadeTokenizer, TokenizerFiles
from src.checkpoints.pieces import ScoredPieces


def made_tokenizer(checkpoint: Checkpoint) -> MadeTokenizer:
    """The tokenizer of a checkpoint that has it in no files of Hugging Face's.

    The class is PreTrainedTokenizerFast, which takes tokenizer.json as it stands, its begin token in front included;
    LlamaTokenizer would replace its normalizer by one that drops the added space of a text that begins with a space.
    """
    tokenizer, generation = checkpoint.tokenizer, checkpoint.generation
    assert not isinstance(tokenizer, TokenizerFiles), "files need only be copied"
    if isinstance(tokenizer, MadeTokenizer):
        return tokenizer
    backend = tokenizer.to_tokenizer()
    ids: dict[str, int | None] = {}
    if not isinstance(tokenizer, Characters):  # which have no special tokens
        ids = {"bos": generation.bos_token_id, "eos": next(iter(generation.stop_token_ids), None)}
        ids |= {"unk": tokenizer.unk_id} if isinstance(tokenizer, ScoredPieces) else {}
        ids |= {"pad": generation.pad_token_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": backend.id_to_token(index) for name, index in ids.items() if index is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.architecture.max_position_embeddings,
    }
    texts = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": _json(settings)}
    if checkpoint.chat_template is not None:
        texts["chat_template.jinja"] = checkpoint.chat_template
    return MadeTokenizer(texts)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
