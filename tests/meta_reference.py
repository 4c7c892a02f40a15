"""Meta's Llama made, cut into shards and evaluated on its own terms, in plain PyTorch; nothing of src is used.

Written from Meta's public model.py: complex rotary embedding of neighbouring pairs, and layers whose parts are computed
by each shard alone and summed or set side by side, as its processes do. float64 throughout.
"""

import base64
import io
import json
import math

import sentencepiece
import torch
from torch.nn.functional import silu

TEXT = "the cat sat on the mat, and then that other cat sat there with a hat " * 4
SPECIAL = 256
JOINS = (
    b"th",
    b"at",
    b" t",
    b" th",
    b"the",
    b" the",
    b"cat",
    b" c",
    b" cat",
    b"sat",
    b" s",
    b"an",
    b"and",
    b" a",
    b"re",
    b"he",
)


def params(release, kv_heads=2, layers=2):
    """A small params.json in the words of a release."""
    content = {"dim": 32, "n_layers": layers, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}
    if kv_heads != 4:
        content["n_kv_heads"] = kv_heads
    if release[0] == "3":
        content |= {"vocab_size": 256 + len(JOINS) + SPECIAL, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0}
        content["use_scaled_rope"] = release != "3"
    return content


def wide(content):
    """112 for the params of Llama 3 above, 96 for the others: int(8 * 32 / 3) = 85, times 1.3 or not, in sixteens."""
    return 112 if "ffn_dim_multiplier" in content else 96


def sentencepiece_model(vocab_size=320):
    """The bytes of a model that SentencePiece's own trainer made, with Llama's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "Zürich, naïve café; 17 + 4 = 21"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def ranks():
    """The bytes of a file of ranks: every byte, then `JOINS`."""
    tokens = [*(bytes([byte]) for byte in range(256)), *JOINS]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def weights(content, vocab, tied=False, seed=0, dtype=torch.float32):
    """Random whole tensors by Meta's names."""
    generator = torch.Generator().manual_seed(seed)
    dim, size = content["dim"], content["dim"] // content["n_heads"]
    keys, inner = content.get("n_kv_heads", content["n_heads"]) * size, wide(content)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator).mul(0.3).to(dtype)

    def norm():
        return torch.randn(dim, generator=generator).mul(0.1).add(1).to(dtype)

    found = {"tok_embeddings.weight": matrix(vocab, dim), "norm.weight": norm()}
    for layer in range(content["n_layers"]):
        shapes = {"attention.wq": (dim, dim), "attention.wk": (keys, dim), "attention.wv": (keys, dim)}
        shapes |= {"attention.wo": (dim, dim), "feed_forward.w1": (inner, dim), "feed_forward.w2": (dim, inner)}
        for name, shape in (shapes | {"feed_forward.w3": (inner, dim)}).items():
            found[f"layers.{layer}.{name}.weight"] = matrix(*shape)
        found |= {f"layers.{layer}.{name}_norm.weight": norm() for name in ("attention", "ffn")}
    found["output.weight"] = found["tok_embeddings.weight"].clone() if tied else matrix(vocab, dim)
    return found


def write(folder, release, shards=1, kv_heads=2, tied=False, dtype=torch.float32):
    """Write a random model as Meta's files of `shards` processes; key heads are repeated where they are fewer."""
    content = params(release, kv_heads)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(ranks() if release[0] == "3" else sentencepiece_model())
    whole = weights(content, content["vocab_size"] if release[0] == "3" else 320, tied, dtype=dtype)
    for shard in range(shards):
        part = {name: cut(name, tensor, shard, shards, release, kv_heads) for name, tensor in whole.items()}
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    return whole


def cut(name, tensor, shard, shards, release, kv_heads):
    """The slice of a tensor that one of the processes holds."""
    if "norm" in name:
        return tensor.clone()
    if "wk" in name or "wv" in name:
        parts = min(shards, kv_heads)
        return tensor.chunk(parts)[shard * parts // shards].clone()
    by_columns = "wo" in name or "w2" in name or ("tok_embeddings" in name and release[0] != "3")
    return tensor.chunk(shards, dim=1 if by_columns else 0)[shard].clone()


def frequencies(content, size, factor):
    """Radians a position of each pair, with Meta's `apply_scaling` where the params ask for it."""
    plain = [content.get("rope_theta", 10000.0) ** (-pair / size) for pair in range(0, size, 2)]
    if not content.get("use_scaled_rope"):
        return plain
    low_wavelength, high_wavelength = 8192 / 1.0, 8192 / 4.0
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < high_wavelength:
            scaled.append(frequency)
        elif wavelength > low_wavelength:
            scaled.append(frequency / factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def logits(folder, tokens, factor=8.0):
    """float64 logits (tokens, vocabulary) from the files of all shards."""
    content = json.loads((folder / "params.json").read_text("utf-8"))
    files = sorted(folder.glob("consolidated.*.pth"))
    parts = [{name: tensor.double() for name, tensor in torch.load(file).items()} for file in files]
    size, heads = content["dim"] // content["n_heads"], content["n_heads"] // len(parts)
    angles = torch.outer(torch.arange(len(tokens)).double(), torch.tensor(frequencies(content, size, factor)).double())
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(states, name):
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + content["norm_eps"]) * parts[0][name]

    def rotated(states):
        pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    def attended(states, part, layer):
        query, key, value = (
            (states @ part[f"layers.{layer}.attention.w{name}.weight"].T).unflatten(1, (-1, size)) for name in "qkv"
        )
        query, key = rotated(query), rotated(key)
        key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size)
        scores = scores + torch.full(scores.shape[1:], -math.inf).double().triu(1)
        found = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        return found @ part[f"layers.{layer}.attention.wo.weight"].T

    def fed(states, part, layer):
        gate, down, up = (part[f"layers.{layer}.feed_forward.w{number}.weight"] for number in "123")
        return (silu(states @ gate.T) * (states @ up.T)) @ down.T

    tables = [part["tok_embeddings.weight"] for part in parts]
    states = torch.cat(tables, dim=0 if tables[0].shape[1] == content["dim"] else 1)[torch.tensor(tokens)]
    for layer in range(content["n_layers"]):
        normed = norm(states, f"layers.{layer}.attention_norm.weight")
        states = states + sum(attended(normed, part, layer) for part in parts)
        normed = norm(states, f"layers.{layer}.ffn_norm.weight")
        states = states + sum(fed(normed, part, layer) for part in parts)
    states = norm(states, "norm.weight")
    return torch.cat([states @ part["output.weight"].T for part in parts], dim=1)
