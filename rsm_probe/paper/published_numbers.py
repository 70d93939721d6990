"""The numbers in the paper's tables, to compare with measurements on the same models and data.

Wald et al., "Decoupling Semantic Similarity from Spatial Alignment for Neural Networks", NeurIPS 2024. Models are
looked up by their source; values are (without, with) permutation invariance for each kernel.
"""

from __future__ import annotations

KERNELS = ("cosine", "linear", "rbf")
Numbers = dict[str, tuple[float, ...]]

_RETRIEVAL_MODELS = {
    "hf:CIDAS/clipseg-rd64-refined": "CLIPSeg",
    "hf:facebook/dinov2-giant": "DinoV2-Giant",
    "hf:google/bit-50": "BiT-50",
    "hf:openai/clip-vit-base-patch32": "CLIP",
    "hf:facebook/sam-vit-base": "SAM ViT/B32",
}
# Table 2 (EgoObjects, F1@1): database size -> model -> cosine, inner product and RBF, each without and with.
TABLE2: dict[int, Numbers] = {
    2500: {
        "CLIPSeg": (0.240, 0.781, 0.233, 0.548, 0.205, 0.781),
        "DinoV2-Giant": (0.765, 0.840, 0.767, 0.839, 0.735, 0.834),
        "BiT-50": (0.670, 0.799, 0.659, 0.780, 0.582, 0.789),
        "CLIP": (0.704, 0.803, 0.703, 0.792, 0.584, 0.779),
        "SAM ViT/B32": (0.509, 0.735, 0.511, 0.695, 0.371, 0.703),
    },
    5000: {
        "CLIPSeg": (0.280, 0.835, 0.281, 0.624, 0.247, 0.836),
        "DinoV2-Giant": (0.827, 0.876, 0.829, 0.876, 0.810, 0.876),
        "BiT-50": (0.750, 0.846, 0.730, 0.823, 0.668, 0.835),
        "CLIP": (0.784, 0.858, 0.780, 0.848, 0.679, 0.835),
        "SAM ViT/B32": (0.614, 0.804, 0.616, 0.774, 0.474, 0.784),
    },
    10000: {
        "CLIPSeg": (0.344, 0.859, 0.328, 0.569, 0.293, 0.854),
        "DinoV2-Giant": (0.857, 0.889, 0.856, 0.890, 0.843, 0.888),
        "BiT-50": (0.800, 0.868, 0.782, 0.852, 0.741, 0.859),
        "CLIP": (0.827, 0.876, 0.823, 0.867, 0.749, 0.863),
        "SAM ViT/B32": (0.688, 0.838, 0.688, 0.815, 0.556, 0.823),
    },
}
# Table 3 (Cityscapes, IoU of classes, 500 queries and a database of 2 975).
TABLE3: Numbers = {
    "CLIPSeg": (0.662, 0.694, 0.664, 0.654, 0.664, 0.696),
    "DinoV2-Giant": (0.689, 0.700, 0.686, 0.696, 0.686, 0.690),
    "BiT-50": (0.679, 0.687, 0.677, 0.677, 0.684, 0.687),
    "CLIP": (0.691, 0.701, 0.693, 0.701, 0.678, 0.687),
    "SAM ViT/B32": (0.690, 0.702, 0.687, 0.677, 0.679, 0.687),
}
_CLASSIFIERS = {
    "hf-classifier:microsoft/resnet-18": "ResNet18",
    "hf-classifier:microsoft/resnet-50": "ResNet50",
    "hf-classifier:microsoft/resnet-101": "ResNet101",
    "hf-classifier:facebook/convnextv2-base-1k-224": "ConvNextV2-Base",
    "hf-classifier:google/vit-base-patch16-224": "ViT-B/16",
    "hf-classifier:google/vit-large-patch32-384": "ViT-L/32",
    "hf-classifier:facebook/dinov2-giant-imagenet1k-1-layer": "DinoV2-Giant",
}
# Table 1 (Pearson, 2 000 images), as printed. The RBF value of ResNet18 without permutation invariance seems to lack a
# minus sign: Table 4 gives -0.174.
TABLE1: Numbers = {
    "ResNet18": (-0.276, -0.326, -0.259, -0.270, 0.176, -0.199),
    "ResNet50": (-0.248, -0.320, -0.243, -0.270, 0.040, 0.029),
    "ResNet101": (-0.192, -0.276, -0.174, -0.240, 0.091, 0.084),
    "ConvNextV2-Base": (-0.134, -0.098, -0.132, -0.171, 0.117, 0.090),
    "ViT-B/16": (-0.046, -0.100, -0.045, -0.026, -0.077, -0.122),
    "ViT-L/32": (-0.138, -0.188, -0.138, -0.144, -0.134, -0.166),
    "DinoV2-Giant": (-0.012, -0.044, -0.013, -0.031, -0.008, -0.048),
}
# Table 4, right half (Spearman, 20 000 images).
TABLE4_SPEARMAN: Numbers = {
    "ResNet18": (-0.231, -0.337, -0.239, -0.225, -0.435, -0.476),
    "ResNet50": (-0.032, 0.007, -0.046, -0.040, 0.128, 0.132),
    "ResNet101": (-0.007, -0.053, -0.007, -0.077, 0.071, 0.068),
    "ConvNextV2-Base": (-0.017, 0.026, -0.013, -0.045, 0.143, 0.128),
    "ViT-B/16": (-0.013, -0.230, -0.021, 0.029, -0.220, -0.313),
    "ViT-L/32": (-0.034, -0.276, -0.029, -0.014, -0.335, -0.392),
    "DinoV2-Giant": (-0.014, -0.037, -0.015, -0.022, -0.015, -0.042),
}
# Table 4, left half (Pearson, 20 000 images).
TABLE4_PEARSON: Numbers = {
    "ResNet18": (-0.279, -0.328, -0.264, -0.272, -0.174, -0.197),
    "ResNet50": (-0.256, -0.305, -0.249, -0.269, 0.028, 0.015),
    "ResNet101": (-0.235, -0.330, -0.211, -0.274, 0.076, 0.067),
    "ConvNextV2-Base": (-0.162, -0.126, -0.160, -0.184, 0.077, 0.050),
    "ViT-B/16": (-0.058, -0.098, -0.056, -0.031, -0.079, -0.120),
    "ViT-L/32": (-0.142, -0.189, -0.143, -0.152, -0.131, -0.164),
    "DinoV2-Giant": (-0.016, -0.046, -0.016, -0.030, -0.013, -0.052),
}
# Table 5 (ResNet-101 on Tiny-ImageNet): method -> locations -> share of the optimum in percent, milliseconds per pair.
TABLE5: dict[str, dict[int, tuple[float, float]]] = {
    "ortools": {256: (100, 4.26), 1024: (100, 69.6), 4096: (100, 1520)},
    "scipy": {256: (100, 5.10), 1024: (100, 148), 4096: (100, 8750)},
    "lapjv": {256: (100, 5.73), 1024: (100, 97.5), 4096: (100, 6120)},
    "identity": {256: (68.9, 1.40e-3), 1024: (67.0, 2.49e-3), 4096: (57.9, 4.36e-3)},
    "batch-optimal-128": {256: (97.6, 2.41), 1024: (94.5, 9.08), 4096: (92.8, 43.4)},
    "batch-optimal-256": {256: (100, 4.56), 1024: (96.8, 16.9), 4096: (95.0, 95.9)},
    "batch-optimal-512": {256: (100, 4.57), 1024: (98.6, 37.1), 4096: (96.8, 171)},
    "batch-optimal-1024": {256: (100, 4.57), 1024: (100, 79.5), 4096: (98.2, 391)},
}


def retrieval_number(data: str, source: str | None, database: int, kernel: str, matching: str) -> float:
    """The value in Table 2 or 3 for a model on a data set; NaN if there is none."""
    tables: dict[str, Numbers] = {"egoobjects": TABLE2.get(database, {})}
    if data == "cityscapes" and database == 2975:
        tables["cityscapes"] = TABLE3
    return _number(tables.get(data, {}), _RETRIEVAL_MODELS.get(source or "", ""), kernel, matching)


def correlation_number(table: Numbers, source: str | None, kernel: str, matching: str) -> float:
    """The value in Table 1 or 4 for a classifier; NaN if there is none."""
    return _number(table, _CLASSIFIERS.get(source or "", ""), kernel, matching)


def _number(table: Numbers, model: str, kernel: str, matching: str) -> float:
    # The paper's semantic RSMs use Batch-Optimal with b = 512, which is exact up to 512 locations.
    side = {"identity": 0, "batch-optimal": 1, "optimal": 1}.get(matching)
    if model not in table or kernel not in KERNELS or side is None:
        return float("nan")
    return table[model][2 * KERNELS.index(kernel) + side]
