"""What studies have in common: a folder that is theirs, and the models that their configuration names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rsm_probe.config import Config, read_yaml
from rsm_probe.errors import ConfigError, StorageError
from rsm_probe.probe.layers import Layers
from rsm_probe.sources.models import LoadedModel
from rsm_probe.storage.files import save_text
from rsm_probe.studies.entries import ModelConfig


def require_study(file: Path, study: str) -> None:
    """Makes sure that a run folder's configuration, where there is one, is of a study.

    Raises:
        StorageError: it is of another.
    """
    if file.exists() and (found := read_yaml(file).get("study")) != study:
        raise StorageError(f"{file.parent} holds a run of study {found!r}; choose another --out")


def claim(config: Config, out: Path, begun: Path, execution: Collection[str]) -> None:
    """Makes a folder a study's, or makes sure that it is, and writes its `config.yaml`.

    Args:
        config: of the study, with its name as `study`.
        out: the folder.
        begun: what is there once something was computed. Until then the folder is free to change its settings.
        execution: keys that may differ when a run is continued, because they decide how, not what.

    Raises:
        StorageError: the folder holds something else, or a run with other settings.
    """
    file = out / "config.yaml"
    require_study(file, config.model_dump()["study"])
    if out.is_file():
        raise StorageError(f"{out} is a file; choose another --out")
    if begun.exists() and file.exists():
        left_out = set(execution)
        stored = config.parse(read_yaml(file), str(file)).model_dump(mode="json", exclude=left_out)
        mine = config.model_dump(mode="json", exclude=left_out)
        differing = [key for key in mine if mine[key] != stored[key]]
        if differing:
            raise StorageError(
                f"{out} holds a run with other {', '.join(differing)}; choose another --out or remove it"
            )
    elif not file.exists() and out.is_dir() and any(not f.name.startswith(".") for f in out.iterdir()):
        raise StorageError(f"{out} is not empty and holds no run (there is no config.yaml); choose another --out")
    save_text(file, config.to_yaml())


def load_models(
    entries: Sequence[ModelConfig], layers: str | Sequence[str], networks: Path, device: str | None, progress: bool
) -> tuple[dict[str, LoadedModel], dict[str, Layers], dict[str, float]]:
    """The models of a configuration by title, the layers of each, and the accuracies of those trained here.

    Args:
        entries: what the configuration says of them.
        layers: of models that name none of their own.
        networks: the folder of trained networks.
        device: where to train.
        progress: show bars.

    Raises:
        ConfigError: two models of one title.
        RsmProbeError: whatever loading and training raise.
    """
    models: dict[str, LoadedModel] = {}
    chosen: dict[str, Layers] = {}
    accuracies: dict[str, float] = {}
    for entry in entries:
        for title, loaded, accuracy in entry.load(networks, device, progress):
            if title in models:
                raise ConfigError(f"two models are called {title!r}; give each a name: of its own")
            models[title] = loaded
            if accuracy is not None:
                accuracies[title] = accuracy
            own = layers if entry.layers is None else entry.layers
            chosen[title] = own if isinstance(own, str) else list(own)
    return models, chosen, accuracies
