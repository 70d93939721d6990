"""Draws docs/figures/matched.png: matched locations of two overlapping crops of a photograph of a cat.

python docs/figures/matched.py    # needs pip install "rsm-probe[pretrained]"
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from skimage import data

import rsm_probe
from rsm_probe import figures

photograph = Image.fromarray(data.chelsea())
crops = [photograph.crop(box).resize((224, 224)) for box in ((60, 20, 300, 260), (150, 60, 390, 300))]
model = rsm_probe.load_model("pretrained:efficientnet_lite0")
with torch.no_grad(), rsm_probe.Probe(model.module, "blocks.4.2") as probe:
    model.module(torch.stack([model.preprocess(crop) for crop in crops]))
layer = probe.representations["blocks.4.2"]
tokens = torch.nn.functional.normalize(layer.tokens - layer.tokens.mean((0, 1)), dim=2)  # affinities are cosines
best = rsm_probe.match(*tokens)
with figures.print_style():
    figure, ax = plt.subplots(figsize=(6, 2.8))
    figures.matched_locations(ax, tuple(crops), (layer.grid, layer.grid), best.permutation, best.affinities, most=40)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, bbox_inches="tight")
