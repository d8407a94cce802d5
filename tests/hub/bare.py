"""Environments that contain only the given packages and their requirements."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement


def bare_environment(folder: Path, *packages: str) -> Path:
    """Links packages and their requirements into `folder`, which is returned for use as PYTHONPATH of `python -S`."""
    folder.mkdir()
    missing, seen = list(packages), set()
    while missing:
        name = missing.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        if distribution.metadata["Name"] in seen:
            continue
        seen.add(distribution.metadata["Name"])
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(top)))
            if source.suffix != ".pth" and not (folder / top).exists():
                (folder / top).symlink_to(source)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing.append(requirement.name)
    return folder
