"""nanoGPT's forward pass in float64 numpy, from arrays by nanoGPT's names; nothing of src is used.

Written from nanoGPT's model.py: weights are (outputs, inputs), queries, keys and values lie side by side in c_attn.
"""

import math

import numpy as np

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 64}
_erf = np.vectorize(math.erf)


def arrays(rows, bias, seed=3, sizes=SIZES):
    """Random float32 arrays of a model with `rows` embedding rows."""
    rng = np.random.default_rng(seed)
    width = sizes["n_embd"]
    made = {"transformer.wte.weight": (rows, width), "transformer.wpe.weight": (sizes["block_size"], width)}
    for layer in range(sizes["n_layer"]):
        matrices = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, shape in (matrices | {"ln_1": (width,), "ln_2": (width,)}).items():
            made[f"transformer.h.{layer}.{name}.weight"] = shape
            if bias:
                made[f"transformer.h.{layer}.{name}.bias"] = shape[:1]
    made["transformer.ln_f.weight"] = (width,)
    if bias:
        made["transformer.ln_f.bias"] = (width,)
    found = {name: rng.normal(0, 0.4, shape).astype("<f4") for name, shape in made.items()}
    for name in found:
        if ".ln_" in name and name.endswith("weight"):
            found[name] += 1
    return found


def logits(weights, tokens, exact=True, sizes=SIZES):
    """float64 logits (tokens, rows) of one row."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    length, heads, size = len(tokens), sizes["n_head"], sizes["n_embd"] // sizes["n_head"]

    def norm(states, name):
        centred = states - states.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * wide[f"{name}.weight"] + wide.get(f"{name}.bias", 0.0)

    def linear(states, name):
        return states @ wide[f"{name}.weight"].T + wide.get(f"{name}.bias", 0.0)

    def gelu(x):
        if exact:
            return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    hidden_future = np.triu(np.full((length, length), -np.inf), 1)
    states = wide["transformer.wte.weight"][tokens] + wide["transformer.wpe.weight"][:length]
    for layer in range(sizes["n_layer"]):
        prefix = f"transformer.h.{layer}"
        together = linear(norm(states, f"{prefix}.ln_1"), f"{prefix}.attn.c_attn")
        query, key, value = np.split(together, 3, axis=1)
        mixed = np.empty_like(states)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = query[:, own] @ key[:, own].T / math.sqrt(size) + hidden_future
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, own] = shares / shares.sum(-1, keepdims=True) @ value[:, own]
        states = states + linear(mixed, f"{prefix}.attn.c_proj")
        inner = gelu(linear(norm(states, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc"))
        states = states + linear(inner, f"{prefix}.mlp.c_proj")
    return norm(states, "transformer.ln_f") @ wide.get("lm_head.weight", wide["transformer.wte.weight"]).T
