"""Adapters beside quantized weights on a GPU.

pytest -m gpu tests/test_gpu_adapters.py
"""

import pytest
import torch

from config.schema import AdapterConfig, ModelConfig
from src.adapter_probe import probe_adapter
from src.adapters import add_adapter
from tests.gpu_runs import DEVICE, HAS_GPU, ON_GPU, nf4_model, small_model
from tests.toy_tokenizer import toy_tokenizer

pytestmark = ON_GPU


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "oft", "vera", "ia3"])
def test_an_adapter_beside_quantized_weights_gets_the_gradients_of_their_values(kind, quantization):
    pytest.importorskip("bitsandbytes")
    probe_adapter(AdapterConfig(kind=kind), ModelConfig(path="nowhere", quantization=quantization), toy_tokenizer())


@pytest.mark.skipif(not HAS_GPU, reason="PEFT's LoftQ computes on a GPU alone")
def test_loftq_starts_nearer_to_the_weights_before_they_were_quantized(tmp_path):
    ids = torch.arange(3, 40, device=DEVICE)[None]
    plain = small_model().to(torch.bfloat16).to(DEVICE).eval()
    errors = {}
    with torch.no_grad():
        expected = plain(ids).logits.float()
        for init in ("default", "loftq"):
            model = nf4_model(tmp_path / init, pytest.importorskip("bitsandbytes"))
            adapted = add_adapter(model, AdapterConfig(kind="lora", rank=16, init=init)).eval()
            errors[init] = float((adapted(ids).logits.float() - expected).norm())
    assert errors["loftq"] < errors["default"]
