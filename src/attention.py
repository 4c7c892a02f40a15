"""Proof that attention keeps the documents of a pack apart.

transformers takes the borders of packed documents from positions that start again at 0. Not every architecture or
attention implementation does, and one that does not trains on documents that see each other, with a healthy loss. So a
model is asked before it trains on packs.

    check_documents_apart(model)
"""

import torch

from utils.errors import UserError


@torch.no_grad()
def check_documents_apart(model: torch.nn.Module, *, lengths: tuple[int, int] = (5, 7)) -> None:
    """Compare the logits of two packed documents with those of each document alone.

    Args:
        model: a causal language model on the device that trains it; its mode and the random state stay as they are.
        lengths: tokens in the two documents.
    Raises:
        UserError: the logits differ by more than rounding in the model's number format explains.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in lengths]
    positions = [torch.arange(length, device=device)[None] for length in lengths]
    training = model.training
    model.eval()

    def logits(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=places, use_cache=False).logits[0].double()

    packed = logits(torch.cat(documents, dim=1), torch.cat(positions, dim=1))
    alone = torch.cat([logits(*pair) for pair in zip(documents, positions, strict=True)])
    model.train(training)
    dtype = model.get_input_embeddings().weight.dtype
    # Sums of a packed row may run in another order: a thousand roundings of the largest logit is far below what a
    # document seen by its neighbour changes, and far above what order changes.
    allowed = 1000 * torch.finfo(dtype).eps * alone.abs().max().clamp(min=1.0)
    coarse = dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device.type)
    if coarse or hasattr(model.config, "quantization_config"):  # 8-bit products depend on what else is in the batch
        allowed = 0.05 * alone.abs().max().clamp(min=1.0)
    difference = (packed - alone).abs().max()
    if not difference <= allowed:
        raise UserError(
            f"documents of a pack see each other in {type(model).__name__} with attention "
            f"'{model.config._attn_implementation}': packed logits differ from those of each document alone by "
            f"{difference:.3g} (allowed {allowed:.3g}); set data.packing=false, or another model.attention"
        )
