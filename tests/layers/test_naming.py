import pytest
import torch
from torch import nn

import batchnorm as bn


def test_an_error_names_the_layer_in_its_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Identity(), nn.Sequential(bn.BatchNorm1d(7)))

        def forward(self, x):
            return self.blocks(x)

    with pytest.raises(ValueError, match=r"\[in 'blocks\.1\.0' of Net: BatchNorm1d\(7, "):
        Net()(torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"\[in BatchNorm1d\(7, "):
        bn.BatchNorm1d(7)(torch.zeros(1, 7))
