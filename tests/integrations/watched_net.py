"""A small network with all that a recording could disturb, and images."""

import torch
from torch import nn


class WatchedNet(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, stride=2), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(channels, 3)
        # Counts calls in evaluation mode, too.
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, pixel_values, labels=None):
        self.calls += 1
        features = self.layer1(torch.relu(self.norm(self.stem(pixel_values))))
        logits = self.head(self.drop(features.mean((2, 3))))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


LAYERS = ["stem", "layer1"]


def watched_net(seed: int = 0) -> WatchedNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WatchedNet()


def images(count: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def examples(count: int = 24) -> list[dict[str, torch.Tensor]]:
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(2))
    return [{"pixel_values": x, "labels": y} for x, y in zip(images(count, 3), labels, strict=True)]
