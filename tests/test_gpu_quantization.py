"""Formats of frozen weights on a GPU: an adapter's gradient beside them is that beside the numbers they stand for."""

import pytest
import torch

from config.schema import ModelConfig
from src.model import load_model, load_settings
from src.packing import PackCollator, PackedRows
from src.quantization import check_base
from tests.gpu_runs import DEVICE, LENGTH, ON_GPU, difference, small_model, small_tokenizer, uneven_rows
from tests.test_gpu import adapter_gradient

pytestmark = ON_GPU


def base_of(folder, **fields):
    config = ModelConfig(path=str(folder), dtype="bfloat16", **fields)
    words = small_tokenizer()
    settings = load_settings(config, words)
    check_base(config, settings, trains_all=False)
    return load_model(config, settings, words, trains_all=False).to(DEVICE)


@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_int4", "torchao_float8"])
def test_the_gradient_beside_torchaos_weights_is_that_beside_the_numbers_they_stand_for(tmp_path, kind):
    pytest.importorskip("torchao")
    small_model().to(torch.bfloat16).save_pretrained(tmp_path)
    quantized, plain = base_of(tmp_path, quantization=kind), base_of(tmp_path)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize") and "lm_head" not in name:
                assert module.weight.device.type == DEVICE.type
                plain.get_submodule(name).weight.copy_(module.weight.dequantize())
    packs = PackedRows(uneven_rows(), max_length=LENGTH, packing=True)
    batch = {name: tensor.to(DEVICE) for name, tensor in PackCollator(0)([packs[0], packs[1]]).items()}
    expected = adapter_gradient(plain, batch)
    assert expected.norm() > 0
    assert difference(adapter_gradient(quantized, batch), expected) <= 0.05  # bf16 keeps 8 bits; see gpu_runs.BOUNDS
