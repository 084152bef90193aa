"""Embedding widths, which are also numbers in a network's attributes, cut in mid-fit."""

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from lit_compress import ChannelPruning, Schedule
from tests.callbacks.nets import Net, trainer


def test_the_average_of_an_attention_network_runs_with_the_width_that_is_left():
    class Attention(Net):
        def __init__(self) -> None:
            super().__init__()
            self.model = VisionTransformer(
                image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32
            )

    images = torch.randn(16, 3, 8, 8)
    data = DataLoader(TensorDataset(images, torch.zeros(16, dtype=torch.int64)), batch_size=4)
    average = EMAWeightAveraging()
    module = Attention()
    pruning = ChannelPruning(0.5, schedule=Schedule("constant", begin=2, end=2, update_every=1))
    callbacks = [average, pruning]
    trainer(max_epochs=1, callbacks=callbacks).fit(module, data)
    assert module.model.hidden_dim == 8
    averaged = average._average_model.module.model
    assert averaged.hidden_dim == 8
    with torch.no_grad():
        assert averaged(images).shape == (16, 1000)
