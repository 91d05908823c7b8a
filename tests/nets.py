"""Small random nets that are no vision-language models."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNet(nn.Module):
    """Two convolutions, one of them strided, one depthwise, a norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.second = nn.Conv2d(16, 32, (1, 3), padding=(0, 1), dilation=(1, 1))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.second(self.depthwise(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def conv_net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()
