"""Training recipes: which network to train, on which images, and for how long."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from rsm_probe.checks import brief
from rsm_probe.config import Config, ConfigPath, config_path
from rsm_probe.errors import ImageError
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.sources.images.limits import in_bytes, require_drawn, require_edge
from rsm_probe.sources.images.registry import FOLDER, IMAGE_SETS, named_images
from rsm_probe.sources.training.networks import NetworkConfig

# A step takes a millisecond at least.
_MOST_STEPS = 10**8
_MOST_BATCH_BYTES = 10**11
# Default number of scenes or crops to draw.
_DRAWN = 4000
# At most this many of them are drawn for testing.
_HELD_OUT = 500


# YAML reads `yes` as true, which would otherwise be 1.
_Count = Annotated[int, Field(strict=True, ge=2)]
_Step = Annotated[int, Field(strict=True, ge=0)]


class TrainingConfig(Config):
    """A training recipe: network, images and schedule.

    The optimiser is SGD with Nesterov momentum under a one-cycle schedule. The network trains on the training split of
    the images, and its accuracy is measured on their test split.
    """

    images: str = Field(
        default="digits",
        description="digits, scenes, cluttered, photos, cifar100, or the path of a folder that holds train/<class>/ "
        "and, with the same classes, test/, val/ or validation/",
    )
    root: ConfigPath = Field(default="data", description="the folder that holds cifar-100-python")
    size: PositiveInt = Field(default=32, description="edge of the images in pixels; others are resized and cropped")
    count: PositiveInt = Field(
        default=_DRAWN, description="how many scenes or crops to draw; other sets are used whole"
    )
    network: NetworkConfig = NetworkConfig()
    steps: int = Field(
        default=150, ge=0, description="batches to train for, at least 10; 0 leaves the network untrained"
    )
    batch_size: int = Field(default=64, ge=2)
    learning_rate: PositiveFloat = 0.1
    weight_decay: float = Field(default=5e-4, ge=0)
    augment: bool = Field(
        default=False,
        description="pad by an eighth of the edge, crop at random, and mirror half of the images",
    )
    expected_accuracy: float = Field(default=0.0, ge=0, le=1, description="warn if the accuracy is below this")
    checkpoints: _Count | Annotated[tuple[_Step, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="steps after which the network is written as well, such as [0, 10, 30], where 0 is the untrained "
        "network; or how many, spaced logarithmically; the last step is always one of them",
    )

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps of all checkpoints in order, the last step included; empty without `checkpoints`."""
        if self.checkpoints is None:
            return ()
        if isinstance(self.checkpoints, int):
            return logarithmic_steps(self.steps, self.checkpoints)
        return tuple(sorted({*self.checkpoints, self.steps}))

    @property
    def questions(self) -> int:
        """Number of questions that the network answers, each by its own softmax."""
        return named_images(self.images).questions

    @field_validator("images")
    @classmethod
    def _known(cls, images: str, info: ValidationInfo) -> str:
        # A name without a path separator is a typo rather than a path.
        trainable = [name for name, named in IMAGE_SETS.items() if named.trainable]
        if images not in trainable and not {"/", os.sep} & set(images):
            names = ", ".join(repr(name) for name in trainable)
            raise ValueError(f"input should be {names} or the path of a folder, such as './{images}'")
        return images if images in trainable else config_path(images, info)

    @field_validator("steps")
    @classmethod
    def _warm_up_fits(cls, steps: int) -> int:
        if 0 < steps < 10:
            raise ValueError("must be 0 or at least 10, so that the schedule has a warm-up")
        if steps > _MOST_STEPS:
            raise ValueError(f"must be at most {_MOST_STEPS}: even steps of a millisecond would take more than a day")
        return steps

    @field_validator("size", "count")
    @classmethod
    def _fits_memory(cls, number: int, info: ValidationInfo) -> int:
        (require_edge if info.field_name == "size" else require_drawn)(number)
        return number

    @model_validator(mode="after")
    def _keys_suit_each_other(self) -> TrainingConfig:
        if (taken := 12 * self.batch_size * self.size**2) > _MOST_BATCH_BYTES:
            raise ValueError(
                f"batch_size: {brief(self.batch_size)} images of {self.size} x {self.size} take {in_bytes(taken)}, "
                f"above the limit of {in_bytes(_MOST_BATCH_BYTES)}"
            )
        if isinstance(self.checkpoints, int) and self.checkpoints > self.steps + 1:
            raise ValueError(f"checkpoints: {brief(self.checkpoints)} are more than the steps from 0 to {self.steps}")
        if isinstance(self.checkpoints, tuple) and max(self.checkpoints) > self.steps:
            raise ValueError(
                f"checkpoints: step {brief(max(self.checkpoints))} comes after the last step, steps: {self.steps}"
            )
        if named_images(self.images).on_disk and self.count != _DRAWN:
            raise ValueError(f"count: is for scenes and crops; {self.images} is used whole")
        return self


def logarithmic_steps(last: int, count: int) -> tuple[int, ...]:
    """Space distinct steps logarithmically: 0, 1, ..., `last`.

    Args:
        last: the last step, at least count - 1.
        count: number of steps, at least 2.
    """
    steps = [0]
    for left in range(count - 1, 0, -1):
        step = steps[-1]
        # The same ratio for all steps that are left; early ones lie closer than whole numbers.
        steps.append(max(step + 1, round(step * (last / step) ** (1 / left))) if step else (1 if left > 1 else last))
    return tuple(steps)


def splits(config: TrainingConfig) -> tuple[ImageSet, ImageSet]:
    """Load the images to train on and those held out, with targets and in the size of the recipe.

    Raises:
        ImageError: images are missing or do not suit their options, or the two splits have different classes.
    """
    images = named_images(config.images)
    with config.naming_paths(config.images, config.root):
        train, test = (
            # A broken file raises in the first epoch; verifying all files beforehand would take as long.
            images.load(
                path=config.images, root=config.root, split=split, size=config.size,
                count=count if images.drawn else None, seed=seed, verify=False,
            )
            for split, count, seed in (("train", config.count, 0), ("test", min(config.count, _HELD_OUT), 1))
        )  # fmt: skip
    differing = sorted(set(train.labels) ^ set(test.labels)) if images is FOLDER else []
    if differing:
        where = train.name if differing[0] in train.labels else test.name
        raise ImageError(
            f"{train.name} and {test.name} must hold the same classes, but {len(differing)} are in only one of "
            f"them, first {differing[0]!r} in {where}"
        )
    return train, test
