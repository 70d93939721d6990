"""The subjects of a study of brains: RDMs from files, joined to the images by name, or simulated."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from rsm_probe.brains import read_rsms, simulated_subjects, unrelated_subjects
from rsm_probe.checks import brief, listed
from rsm_probe.config import Config, config_path
from rsm_probe.errors import ComparisonError, repeated
from rsm_probe.runs.fields import AtLeastTwo, Seed
from rsm_probe.similarity.rsm import RSM
from rsm_probe.similarity.rsms import RSMs
from rsm_probe.sources.images.image_set import ImageSet
from rsm_probe.studies.brain.words import layer_words

# Keys that say how files are read.
_OF_FILES = ("key", "ids", "names", "descriptor", "dissimilarity", "intersection", "allow_missing")
# Arguments that messages about files advise -> the keys that say the same.
_KEY_OF = {
    "on='intersection'": "subjects.intersection: true",
    "allow_missing=True": "subjects.allow_missing: true",
    "kind='similarity'": "subjects.kind: similarity",
}
# With fewer images, no bootstrap sample and no permutation says anything.
FEWEST_IMAGES = 4


def _files(written: str, info: ValidationInfo) -> str:
    """A path as `ConfigPath`; a glob is looked up in the folder of the configuration first, too."""
    if not glob.has_magic(written):
        return config_path(written, info)
    folder = getattr(info.context, "folder", None)
    beside = written if folder is None or os.path.isabs(written) else os.path.join(folder, written)
    return beside if glob.glob(beside, recursive=True) else written


def _names_file(written: str, info: ValidationInfo) -> str:
    """A file of names as `ConfigPath`, or a table and its column, as events.tsv:stimulus."""
    file, colon, column = written.rpartition(":")
    return f"{config_path(file, info)}:{column}" if colon and file else config_path(written, info)


_Files = Annotated[str, AfterValidator(_files)]
_Ids = Annotated[str, AfterValidator(_names_file)]


class SimulatedSubjects(Config):
    """Subjects whose truth is known: the RSM of one layer, or nothing, plus noise."""

    unrelated: bool = Field(default=False, description="simulate subjects from nothing: no layer explains them")
    model: str | None = Field(default=None, description="name of the model whose layer all subjects share")
    layer: str | None = Field(default=None, description="the layer that all subjects share")
    matching: str = Field(default="optimal", description="matching of the shared RSM, one of matchings:")
    kernel: str = Field(default="linear", description="kernel of the shared RSM")
    subjects: AtLeastTwo = Field(default=8, description="number of subjects")
    noise: float = Field(
        default=1.0, ge=0, description="standard deviation of a subject's noise, in those of the shared distances"
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_truth(self) -> SimulatedSubjects:
        if self.unrelated and (self.model is not None or self.layer is not None):
            raise ValueError("unrelated subjects share no layer; leave out model: and layer:")
        if not self.unrelated and (self.model is None or self.layer is None):
            raise ValueError("name the model: and layer: that the subjects share, or write simulate: unrelated")
        return self

    def made(self, truth: RSM | None, ids: Sequence[str]) -> RSMs:
        """The subjects, over the images of the shared RSM, or over these ids where there is none."""
        if truth is None:
            return unrelated_subjects(ids, self.subjects, self.seed)
        return simulated_subjects(truth, self.subjects, self.noise, self.seed)

    def __str__(self) -> str:
        if self.unrelated:
            return f"{self.subjects} subjects simulated from nothing (seed {self.seed})"
        assert self.layer is not None
        return (
            f"{self.subjects} subjects simulated as the RSM of {layer_words(self.layer)} of {self.model} (matching "
            f"{self.matching}, kernel {self.kernel}) plus noise of {self.noise:g} standard deviations (seed "
            f"{self.seed})"
        )


class SubjectsConfig(Config):
    """RDMs of subjects: files, or a simulation."""

    path: _Files | tuple[_Files, ...] | dict[str, _Files] | None = Field(
        default=None,
        description="file, folder or glob of RDMs (.h5 of rsatoolbox, .npy, .npz, .mat, .csv, .tsv), a list of files, "
        "or name of a subject -> file",
    )
    key: str | None = Field(default=None, description="variable or column that holds the RDMs, if there are several")
    ids: _Ids | tuple[str, ...] | None = Field(
        default=None,
        description="names of the images in the order of the RDMs: a list, a file with one per line, or a column as "
        "events.tsv:stimulus; by default those in the files",
    )
    names: str | tuple[str, ...] | None = Field(
        default=None, description="names of the subjects, or the descriptor, variable or column that holds them"
    )
    descriptor: str | None = Field(default=None, description="what names the images in the files, such as image")
    dimension: str = Field(default="subject", description="what the RDMs are of: subject, session, region, ...")
    kind: Literal["distance", "similarity"] = Field(
        default="distance", description="similarity if larger values mean more alike"
    )
    dissimilarity: str | None = Field(
        default=None, description="kind of distance, such as correlation or squared euclidean"
    )
    intersection: bool = Field(default=False, description="cut RDMs of different images to those that all of them hold")
    allow_missing: bool = Field(default=False, description="skip pairs of images that an RDM misses (NaN)")
    simulate: SimulatedSubjects | None = Field(
        default=None, description="in place of path: subjects with known truth, or unrelated"
    )

    @field_validator("simulate", mode="before")
    @classmethod
    def _from_nothing(cls, simulate: Any) -> Any:
        return {"unrelated": True} if simulate == "unrelated" else simulate

    @model_validator(mode="after")
    def _one_source(self) -> SubjectsConfig:
        if (self.path is None) == (self.simulate is None):
            raise ValueError("give path: of the RDMs, or simulate:, one of the two")
        said = [key for key in _OF_FILES if getattr(self, key)]
        if self.simulate is not None and said:
            raise ValueError(f"{', '.join(said)}: {'apply' if len(said) > 1 else 'applies'} to path: only")
        return self

    def read(self) -> RSMs:
        """Read the RDMs.

        Raises:
            ComparisonError: they are not distances or similarities of the same images.
            StorageError: a file cannot be read.
        """
        assert self.path is not None
        several = self.path.values() if isinstance(self.path, dict) else self.path
        try:
            with self.naming_paths(*([self.path] if isinstance(self.path, str) else several)):
                return read_rsms(
                    self.path, ids=self.ids, names=self.names, key=self.key, descriptor=self.descriptor, kind=self.kind,
                    dissimilarity=self.dissimilarity, allow_missing=self.allow_missing, dimension=self.dimension,
                    on="intersection" if self.intersection else None,
                )  # fmt: skip
        except ComparisonError as error:
            keys = ", ".join(key for argument, key in _KEY_OF.items() if argument in str(error))
            raise ComparisonError(f"{error} (in a configuration: {keys})" if keys else str(error)) from error


@dataclass(frozen=True)
class JoinedImages:
    """Which images of the study are those of the RDMs.

    Attributes:
        indices: index of each image that both have among those of the study, in the order of the study.
        ids: its name in the RDMs.
        of_study: number of images of the study.
        of_subjects: number of images of the RDMs.
        by_stem: whether names were joined without folders and endings.
    """

    indices: list[int]
    ids: list[str]
    of_study: int
    of_subjects: int
    by_stem: bool = False

    def __str__(self) -> str:
        if len(self.indices) == self.of_study == self.of_subjects:
            return f"all {self.of_study:,} images are used"
        by = ", joined by file names without folders and endings" if self.by_stem else ""
        return (
            f"{len(self.indices):,} images are used: of {self.of_study:,} images of the study and {self.of_subjects:,} "
            f"of the RDMs{by}"
        )


def joined(images: Sequence[str], rdms: Sequence[str]) -> JoinedImages:
    """Join the names of images to those of RDMs: equal ones or, if none is equal, those with the same stem.

    Args:
        images: ids of the images of a study, such as paths within a folder.
        rdms: ids of the images of RDMs.

    Raises:
        ComparisonError: too few names are in both, images of the RDMs are called by their positions, or a name without
            folder and ending stands for several images.
    """
    if list(rdms) == [str(k) for k in range(len(rdms))] and list(images) != list(rdms):
        raise ComparisonError(
            f"the RDMs call their {len(rdms)} images by positions (0 to {len(rdms) - 1}), which do not say which "
            f"images they are; give their names in that order as subjects.ids, such as {listed(images, 2)}"
        )
    pairs, by_stem = _matched({name: name for name in images}, {name: name for name in rdms}), False
    if not pairs:
        pairs, by_stem = _matched(_by_stem(images, "images"), _by_stem(rdms, "images of the RDMs")), True
    if len(pairs) < FEWEST_IMAGES:
        raise ComparisonError(
            f"{len(pairs) or 'no'} image{'s are' if len(pairs) != 1 else ' is'} both among the images and in the RDMs, "
            f"and at least {FEWEST_IMAGES} are needed (images: {listed(images, 3)}; RDMs: {listed(rdms, 3)}); names "
            "must be equal, or equal without folders and endings; subjects.ids gives those of the RDMs"
        )
    number = {name: k for k, name in enumerate(images)}
    taken = sorted((number[image], name) for image, name in pairs)
    return JoinedImages([k for k, _ in taken], [name for _, name in taken], len(images), len(rdms), by_stem)


def _matched(images: Mapping[str, str], rdms: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(image, rdms[key]) for key, image in images.items() if key in rdms]


def _by_stem(names: Sequence[str], what: str) -> dict[str, str]:
    stems = [PurePosixPath(name.replace("\\", "/")).stem for name in names]
    if (twice := repeated(stems)) is not None:
        both = [name for name, stem in zip(names, stems, strict=True) if stem == twice]
        raise ComparisonError(
            f"no image is called the same in the RDMs, and without folders and endings {brief(twice)} stands for "
            f"several {what}: {listed(both, 3)}; give the names of the RDMs' images as subjects.ids"
        )
    return dict(zip(stems, names, strict=True))


def of_images(subjects: RSMs, images: ImageSet, join: JoinedImages) -> RSMs:
    """The RSMs of subjects over joined images, in the order and by the names of the study.

    Args:
        subjects: RSMs of all their images.
        images: the joined images of the study.
        join: how they were joined.
    """
    dataset = subjects.subset(ids=join.ids).dataset
    return RSMs(dataset.assign_coords(image_a=list(images.ids), image_b=list(images.ids)))
