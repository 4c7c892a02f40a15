"""One hash for a model's weights, however they are spread over files.

weights_sha256(Path("outputs/smol/model"))     # "9f86d081884c7d65..."
"""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open


def weights_sha256(folder: Path) -> str | None:
    """The SHA-256 of all tensors in a folder's safetensors files, by name: of each its name, dtype, shape and bytes.

    Files' metadata and their split into shards do not count. One tensor is held at a time.

    Returns:
        64 hexadecimal digits; None where the folder has no such file.
    """
    place_of: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            place_of |= dict.fromkeys(content.keys(), file)
    if not place_of:
        return None
    digest, opened, content = hashlib.sha256(), None, None
    for name, file in sorted(place_of.items()):
        if file != opened:
            opened, content = file, safe_open(file, "pt")
        tensor = content.get_tensor(name)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
