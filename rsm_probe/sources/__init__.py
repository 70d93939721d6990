"""Inputs: models, images, and training recipes for networks that differ only in their seed.

Begin with `loading.py`, which turns names into models. `images` needs no model library, `models` builds on `images`,
and `training` uses both.
"""

from typing import TYPE_CHECKING

from rsm_probe.faces import lazy_face

if TYPE_CHECKING:
    from rsm_probe.sources.addresses import ImagesAddress, ModelAddress, images_address, model_address
    from rsm_probe.sources.checkpoint_sequences import load_checkpoints
    from rsm_probe.sources.images.any_images import as_images, from_dataset, from_tensor
    from rsm_probe.sources.images.crops import crop_pairs
    from rsm_probe.sources.images.embedded.photos import photos
    from rsm_probe.sources.images.embedded.scenes import cluttered, digits, scenes
    from rsm_probe.sources.images.folders import folder
    from rsm_probe.sources.images.image_set import ImageSet, Targets
    from rsm_probe.sources.images.loaders import ImageLoader
    from rsm_probe.sources.images.objects.annotated import cityscapes, egoobjects
    from rsm_probe.sources.images.objects.coco import coco
    from rsm_probe.sources.images.objects.coco_writer import write_coco
    from rsm_probe.sources.images.objects.composed import composed
    from rsm_probe.sources.images.objects.detections import from_detections
    from rsm_probe.sources.images.published import cifar100, class_folders
    from rsm_probe.sources.images.registry import EMBEDDED, IMAGE_SETS, NamedImageSet
    from rsm_probe.sources.images_of_functions import images_in
    from rsm_probe.sources.loading import load_model
    from rsm_probe.sources.models.formats.packaged import PACKAGED, PackagedWeights
    from rsm_probe.sources.models.libraries import LIBRARIES, Library
    from rsm_probe.sources.models.loaded_model import LoadedModel
    from rsm_probe.sources.training.networks import NetworkConfig, build_network
    from rsm_probe.sources.training.recipe import TrainingConfig
    from rsm_probe.sources.training.train import train, train_or_load
    from rsm_probe.sources.training.trained_network import Trained, normalise
else:
    __getattr__, __dir__ = lazy_face(__name__)

__all__ = [
    "EMBEDDED",
    "IMAGE_SETS",
    "LIBRARIES",
    "PACKAGED",
    "ImageLoader",
    "ImageSet",
    "ImagesAddress",
    "Library",
    "LoadedModel",
    "ModelAddress",
    "NamedImageSet",
    "NetworkConfig",
    "PackagedWeights",
    "Targets",
    "Trained",
    "TrainingConfig",
    "as_images",
    "build_network",
    "cifar100",
    "cityscapes",
    "class_folders",
    "cluttered",
    "coco",
    "composed",
    "crop_pairs",
    "digits",
    "egoobjects",
    "folder",
    "from_dataset",
    "from_detections",
    "from_tensor",
    "images_address",
    "images_in",
    "load_checkpoints",
    "load_model",
    "model_address",
    "normalise",
    "photos",
    "scenes",
    "train",
    "train_or_load",
    "write_coco",
]
