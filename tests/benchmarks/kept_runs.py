"""Finished runs of a long benchmark, one JSON file each: a second start makes only what is missing."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"


class OtherSettings(ValueError):
    """The folder holds runs that were made otherwise; mixing them would compare unlike things."""


@dataclass(frozen=True)
class KeptRuns:
    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> "KeptRuns":
        """The folder's runs, made with exactly these settings. Raises OtherSettings."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        if not path.exists():
            _write(path, settings)
        elif (found := json.loads(path.read_text(encoding="utf-8"))) != settings:
            differing = ", ".join(sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k)))
            raise OtherSettings(f"{folder} holds runs with other settings ({differing}); give another --out")
        return cls(folder)

    def get_or_make(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under the name, or what `make` gives, kept once it is complete."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            _write(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)
