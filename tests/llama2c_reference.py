"""llama2.c read, tokenized and evaluated on its own terms, in numpy and plain Python; nothing of src is used.

Written from run.c and export.py: interleaved rotary pairs, float64 arithmetic, greedy joins by score.
"""

import struct
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES = DATA / "weights" / "stories260K"
FIELDS = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")


def read_legacy(path):
    """Header and float32 weights of a version 0 file, weights stacked over layers as run.c maps them."""
    content = path.read_bytes()
    header = dict(zip(FIELDS, struct.unpack("<7i", content[:28]), strict=True))
    tied, header["vocab"] = header["vocab"] > 0, abs(header["vocab"])
    dim, hidden, layers, vocab = (header[name] for name in ("dim", "hidden", "layers", "vocab"))
    size = dim // header["heads"]
    shapes = {
        "embedding": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, header["kv_heads"] * size, dim),
        "wv": (layers, header["kv_heads"] * size, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "cos": (header["context"], size // 2),
        "sin": (header["context"], size // 2),
    }
    if not tied:
        shapes["head"] = (vocab, dim)
    weights, place = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        weights[name] = np.frombuffer(content, "<f4", count, place).reshape(shape)
        place += 4 * count
    assert place == len(content)
    weights.setdefault("head", weights["embedding"])
    return header, weights


def write_legacy(path, header, weights, tied):
    """Write a version 0 file from `header` and `weights` as `read_legacy` gives them, `cos` and `sin` left out."""
    size = header["dim"] // header["heads"]
    angles = np.outer(np.arange(header["context"]), 10000.0 ** (-np.arange(0, size, 2) / size))
    order = ["embedding", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm"]
    values = [*(weights[name] for name in order), np.cos(angles), np.sin(angles), *([] if tied else [weights["head"]])]
    counts = dict(header, vocab=header["vocab"] if tied else -header["vocab"])
    content = b"".join(np.asarray(value, "<f4").tobytes() for value in values)
    path.write_bytes(struct.pack("<7i", *(counts[name] for name in FIELDS)) + content)


def logits(header, weights, tokens):
    """float64 logits (tokens, vocabulary) of one row."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    length, heads, size = len(tokens), header["heads"], header["dim"] // header["heads"]
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, size, 2) / size))[:, None, :]

    def norm(states, gain):
        return states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-5) * gain

    def turned(rows):
        pairs = rows.reshape(length, -1, size // 2, 2)
        turned_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack((turned_pairs.real, turned_pairs.imag), -1).reshape(length, -1, size)

    hidden_future = np.triu(np.full((length, length), -np.inf), 1)
    states = wide["embedding"][tokens]
    for layer in range(header["layers"]):
        normed = norm(states, wide["attention_norm"][layer])
        query, key = turned(normed @ wide["wq"][layer].T), turned(normed @ wide["wk"][layer].T)
        value = (normed @ wide["wv"][layer].T).reshape(length, -1, size)
        mixed = np.empty_like(query)
        for head in range(heads):
            shared = head // (heads // header["kv_heads"])
            scores = query[:, head] @ key[:, shared].T / np.sqrt(size) + hidden_future
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = shares / shares.sum(-1, keepdims=True) @ value[:, shared]
        states = states + mixed.reshape(length, -1) @ wide["wo"][layer].T
        normed = norm(states, wide["ffn_norm"][layer])
        gate = normed @ wide["w1"][layer].T
        states = states + (gate / (1 + np.exp(-gate)) * (normed @ wide["w3"][layer].T)) @ wide["w2"][layer].T
    return norm(states, wide["norm"]) @ wide["head"].T


def losses(header, weights, tokens):
    """float64 loss of each token but the first."""
    rows = logits(header, weights, tokens)[:-1]
    peak = rows.max(-1)
    return peak + np.log(np.exp(rows - peak[:, None]).sum(-1)) - rows[np.arange(len(tokens) - 1), tokens[1:]]


def read_tokenizer(path):
    """Pieces as bytes with their scores, in the order of their ids."""
    content, place, pieces = path.read_bytes(), 4, []
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        pieces.append((content[place + 8 : place + 8 + length], score))
        place += 8 + length
    return pieces


def write_tokenizer(path, pieces):
    longest = max(len(piece) for piece, _ in pieces)
    path.write_bytes(
        struct.pack("<i", longest) + b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    )


def encode(pieces, text):
    """run.c's encode() with its begin token: a space in front, characters or bytes, then joins by the best score."""
    ids_by_piece = {piece: index for index, (piece, _) in enumerate(pieces)}
    tokens = [1]
    if text:
        tokens.append(ids_by_piece[b" "])
    for character in text:
        found = ids_by_piece.get(character.encode())
        tokens += [found] if found is not None else [byte + 3 for byte in character.encode()]
    while True:
        best_score, best_place, best_token = -1e10, None, None
        for place in range(len(tokens) - 1):
            joined = ids_by_piece.get(pieces[tokens[place]][0] + pieces[tokens[place + 1]][0])
            if joined is not None and pieces[joined][1] > best_score:
                best_score, best_place, best_token = pieces[joined][1], place, joined
        if best_place is None:
            return tokens
        tokens[best_place : best_place + 2] = [best_token]
