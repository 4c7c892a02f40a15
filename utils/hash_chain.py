"""A chain of hashes: one short text that stands for all that came before it, in its order.

chain = START
for step in steps:
    chain = extended(chain, step.rows, step.lengths)
"""

import hashlib

import numpy as np

START = "0" * 16
"""The chain of nothing."""


def extended(chain: str, *parts: np.ndarray) -> str:
    """The chain with one more link, as 16 hexadecimal digits.

    64 bits tell apart what differs by accident: two chains of a million links each agree by chance with a probability
    of 5e-8. Nothing here guards against one who looks for two that agree.

    Args:
        parts: the link's content; arrays of the same bytes, of any type, are the same. Where a part ends is hashed too.
    """
    digest = hashlib.blake2b(chain.encode(), digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()
