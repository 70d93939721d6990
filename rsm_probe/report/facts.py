"""What the page of every study says about how its numbers were made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsm_probe.execution.amounts import format_seconds
from rsm_probe.storage.files import load_json


def command_of(folder: Path) -> str:
    """The command that makes a run folder, with the settings that it stores."""
    return shlex.join(["rsm-probe", "run", (folder / "config.yaml").as_posix(), "--out", folder.as_posix()])


def facts_of(folder: Path) -> dict[str, str]:
    """The provenance of a run by name: when it finished, accuracies, seeds, machine and versions; {} without any.

    Raises:
        StorageError: `provenance.json` is damaged.
    """
    file = folder / "provenance.json"
    if not file.is_file():
        return {}
    stored = load_json(file)
    machine = [stored.get("machine"), stored.get("gpu"), f"Python {stored['python']}" if "python" in stored else None]
    of_packages = stored.get("versions", {})
    facts = {
        "Finished": _moment(stored.get("finished")),
        "Time": _time_of(stored),
        "Accuracy on held-out images": _listed(stored.get("accuracy")),
        "Random seeds": _seeds(stored.get("seeds")),
        "Images left out": _listed(stored.get("skipped")),
        "Machine": ", ".join(str(part) for part in machine if part),
        "Versions": _listed({k: v for k, v in of_packages.items() if v != "not installed"} if of_packages else None),
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _time_of(stored: Mapping[str, Any]) -> str:
    """How long the run took; "" for runs of earlier versions."""
    if "seconds" not in stored:
        return ""
    training = ", including the training of its networks" if stored.get("accuracy") else ""
    said = f"about {format_seconds(stored['seconds'])}{training}"
    return f"{said}; only the part since an interruption is counted" if stored.get("continued") else said


def _moment(finished: Any) -> str:
    """A time as people write it, such as 2026-01-31 12:00 UTC."""
    try:
        return f"{datetime.fromisoformat(str(finished)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return _listed(finished)


def _seeds(seeds: Any) -> str:
    """Each seed after what it belongs to."""
    if not isinstance(seeds, Mapping):
        return _listed(seeds)
    belongs = dict(seeds)
    if isinstance(models := seeds.get("models"), Mapping):
        belongs.pop("models")
        belongs |= {f"model {name}": one for name, one in models.items()}
    return "; ".join(f"{name}: {_listed(one)}" for name, one in belongs.items())


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_listed(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_listed, value))
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
