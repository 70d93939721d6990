"""Whether the weights of a model are in the cache of its library, and how to fetch them; no connection is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch

from rsm_probe.errors import ModelError, did_you_mean
from rsm_probe.runs.missing.requirement import Requirement
from rsm_probe.sources.models.formats.packaged import PACKAGED

# Names of the files of weights on the Hugging Face hub, of which a model has one.
_HUB_FILES = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
# Lists the files of weights that are split.
_SHARDS = "model.safetensors.index.json"


def required_weights(source: str) -> Requirement | None:
    """What the published weights of a source need; None for sources that are files or code of the user.

    Raises:
        ModelError: the library has no such model.
    """
    library, _, title = source.partition(":")
    look_up = _LIBRARIES.get(library)
    return None if look_up is None else look_up(title)


def hub_file(repository: str, *names: str) -> Path | None:
    """The first of some files of a model that the cache of the Hugging Face hub has."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _from_hub(what: str, repository: str, *others: str, names: tuple[str, ...] = _HUB_FILES) -> Requirement:
    """Weights of a repository of the hub, and other files without which they cannot be used."""
    weights = hub_file(repository, *names) is not None or _shards_are_there(repository)
    there = weights and all(hub_file(repository, name) is not None for name in others)
    return Requirement(what, there, f"hf download {repository}", of_library=True)


def _shards_are_there(repository: str) -> bool:
    if (index := hub_file(repository, _SHARDS)) is None:
        return False
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(hub_file(repository, name) is not None for name in files)


def _of_address(what: str, url: str, folder: Path, size: float | None) -> Requirement:
    """Weights that a library downloads into a folder of its own."""
    file = folder / Path(urlsplit(url).path).name
    return Requirement(what, file.is_file(), f"curl -L --create-dirs -o {file} {url}", size=size, of_library=True)


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _torchvision(title: str) -> Requirement:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(title).DEFAULT
    except ValueError:
        raise ModelError(
            f"torchvision has no model {title!r}{did_you_mean(title, torchvision.models.list_models())}"
        ) from None
    megabytes = weights.meta.get("_file_size")
    size = None if megabytes is None else float(megabytes) * 2**20
    return _of_address(f"weights of torchvision:{title}", weights.url, _checkpoints(), size)


def _timm(title: str) -> Requirement:
    import timm

    if not timm.is_model(title):
        raise ModelError(f"timm has no model {title!r}{did_you_mean(title, timm.list_models())}")
    known, what = timm.get_pretrained_cfg(title), f"weights of timm:{title}"
    if known is None or not (known.hf_hub_id or known.url or known.file):
        return Requirement(what, False, "timm publishes none; give weights: a file, or null for random weights")
    if known.file:
        return Requirement(what, Path(known.file).is_file(), f"the file {known.file}")
    by_address = _of_address(what, known.url, _checkpoints(), None) if known.url else None
    if by_address is not None and (by_address.there or not known.hf_hub_id):
        return by_address
    names = (known.hf_hub_filename,) if known.hf_hub_filename else _HUB_FILES
    return _from_hub(what, known.hf_hub_id, names=names)


def _transformers(library: str, title: str) -> Requirement:
    what, folder = f"weights of {library}:{title}", Path(title).expanduser()
    if folder.is_dir() or title.startswith((".", "/", "~")) or title.count("/") > 1:
        return Requirement(what, folder.is_dir(), f"the folder {title}, as save_pretrained writes it")
    # Only files of tensors are read, which cannot hold code.
    return _from_hub(what, title, "config.json", "preprocessor_config.json", names=("model.safetensors",))


def _open_clip(title: str) -> Requirement:
    what = f"weights of open_clip:{title}"
    if title.startswith("local-dir:"):
        folder = Path(title.removeprefix("local-dir:")).expanduser()
        return Requirement(what, folder.is_dir(), f"the folder {folder}")
    if find_spec("open_clip") is None:
        return Requirement(what, False, "pip install open_clip_torch, then run this again for the weights")
    if title.startswith("hf-hub:"):
        return _from_hub(what, title.removeprefix("hf-hub:"))
    import open_clip

    name, _, tag = title.partition("/")
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ModelError(f"OpenCLIP has no weights {tag!r} of {name!r}{did_you_mean(tag, tags)}")
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    places = []
    if known.get("url"):
        places.append(_of_address(what, known["url"], Path("~/.cache/clip").expanduser(), None))
    if repository:
        places.insert(0, _from_hub(what, repository, names=(file,) if file else _HUB_FILES))
    return next((place for place in places if place.there), places[0])


def _torch_hub(title: str) -> Requirement:
    repository = title.rpartition(":")[0]
    what = f"code of torch.hub:{repository}, which fetches its own weights"
    if Path(repository).is_dir() or repository.startswith((".", "/", "~")):
        return Requirement(what, Path(repository).is_dir(), f"the folder {repository}, with a hubconf.py")
    name, _, branch = repository.partition(":")
    pattern = f"{name.replace('/', '_')}_{branch or '*'}"
    there = any(Path(torch.hub.get_dir()).glob(pattern))
    return Requirement(what, there, f"https://github.com/{name}", f"unpack as {Path(torch.hub.get_dir()) / pattern}")


def _packaged(title: str) -> Requirement | None:
    weights = PACKAGED.get(title)
    if weights is None:
        return None
    what = f"weights of pretrained:{title}"
    return Requirement(what, find_spec(weights.package) is not None, weights.install)


_LIBRARIES: dict[str, Callable[[str], Requirement | None]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": lambda title: _transformers("hf", title),
    "hf-classifier": lambda title: _transformers("hf-classifier", title),
    "open_clip": _open_clip,
    "torch.hub": _torch_hub,
    "pretrained": _packaged,
}
