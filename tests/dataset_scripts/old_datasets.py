"""Runs every builder as a script of `datasets` 3.x, over the invented releases of the tests: `make test-datasets3`.

Up to version 3, `datasets` loaded a repository's own script. There, each builder must give the same splits as the
published Parquet gives elsewhere, and images with their bytes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets

import hf_mel.dataset_scripts

ROOT = Path(__file__).parent.parent.parent
#: Arguments of `build_dataset` that a builder's configuration does not have.
_OF_THE_PIPELINE = {"allow_count_mismatch", "overwrite", "config_options"}


def filled(value: Any, folder: Path) -> Any:
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def check(name: str, layout: str, write: Any, splits: dict[str, dict[str, int]], options: dict[str, Any]) -> list[str]:
    """A fault in one layout of one data set."""
    module = importlib.import_module(f"hf_mel.dataset_scripts.{name}.{name}")
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "raw"
        raw.mkdir()
        write(raw)
        options = {**options, **options.get("config_options", {})}
        options = {key: filled(value, raw) for key, value in options.items() if key not in _OF_THE_PIPELINE}
        if module.BUILDER_CLASS.NEEDS_RAW:
            options["data_dir"] = str(raw)
        for config, expected in splits.items():
            try:
                loaded = datasets.load_dataset(
                    str(ROOT / "dataset_scripts" / name / f"{name}.py"),
                    config,
                    trust_remote_code=True,
                    cache_dir=f"{temporary}/cache",
                    **options,
                )
            except Exception as error:
                wrong.append(f"{name} {layout} {config}: {type(error).__name__}: {error}")
                continue
            actual = {split: len(rows) for split, rows in loaded.items()}
            # The pipeline leaves out mentions whose gold is not in the knowledge base; a script does not see it.
            if actual.keys() != expected.keys() or any(actual[split] < expected[split] for split in expected):
                wrong.append(f"{name} {layout} {config}: {actual}, expected {expected}")
            for rows in loaded.values():
                for column in ("image", "images"):
                    if column in rows.column_names:
                        cells = rows.data.column(column).to_pylist()
                        images = [image for cell in cells for image in (cell if isinstance(cell, list) else [cell])]
                        if any(image is not None and not image["bytes"] for image in images):
                            wrong.append(f"{name} {layout} {config}: an image without bytes")
    return wrong


def main() -> int:
    datasets.disable_progress_bars()
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(hf_mel.dataset_scripts.__path__)
        if module.ispkg and (ROOT / "dataset_scripts" / module.name / f"{module.name}.py").is_file()
    )
    wrong = []
    for name in names:
        release = importlib.import_module(f"tests.dataset_scripts.{name}_release")
        layouts = {"": (release.write, release.SPLITS), **getattr(release, "LAYOUTS", {})}
        for layout, (write, splits) in layouts.items():
            actual = check(name, layout, write, splits, release.OPTIONS)
            print(f"{name} {layout}: {'failed' if actual else 'ok'}")
            wrong += actual
    print(f"datasets {datasets.__version__}: {len(names)} builders, {len(wrong)} failures", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
