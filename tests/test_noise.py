"""Noise on the embeddings of training rows."""

import pytest
import torch

from src.noise import noisy_embeddings
from tests.tiny_run import metrics_of, run_train, write_recipe

WIDTH = 16


class Words(torch.nn.Module):
    """A model that is its embeddings, all zero."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, WIDTH)
        torch.nn.init.zeros_(self.words.weight)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.words(ids)


def batch_of(*lengths):
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {"input_ids": torch.zeros((1, sum(lengths)), dtype=torch.int64), "document_borders": borders}


def noise_of(model, batch, alpha):
    with noisy_embeddings(model, batch, alpha):
        return model(batch["input_ids"])[0].detach()


def test_each_document_has_the_noise_that_it_would_have_alone():
    torch.manual_seed(0)
    lengths, alpha = (400, 25), 5.0
    noise = noise_of(Words(), batch_of(*lengths), alpha)
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        most = alpha / (length * WIDTH) ** 0.5
        assert 0.95 * most < part.abs().max() <= most
        assert part.square().mean() == pytest.approx(most**2 / 3, rel=0.15)  # the variance of a uniform distribution
        assert abs(part.mean()) < 0.15 * most


def test_there_is_none_in_evaluation_and_none_after_the_context_or_unasked():
    model = Words()
    assert noise_of(model, batch_of(8), None).abs().max() == 0
    assert noise_of(model.eval(), batch_of(8), 5.0).abs().max() == 0
    noise_of(model.train(), batch_of(8), 5.0)
    assert model(batch_of(8)["input_ids"]).abs().max() == 0


def test_a_run_with_noise_trains_otherwise_and_is_evaluated_without_it(tmp_path):
    first = {}
    for alpha in (None, 5.0):
        recipe = write_recipe(tmp_path, training={"neftune_alpha": alpha})
        done = run_train("--config", recipe, "--output.name", f"alpha-{alpha}")
        assert done.code == 0, done.stderr
        lines = metrics_of(tmp_path / "outputs" / f"alpha-{alpha}")
        first[alpha] = [next(line[name] for line in lines if name in line) for name in ("eval_loss", "loss")]
    assert first[None][0] == first[5.0][0]  # before the first step
    assert first[None][1] != first[5.0][1]
