"""Building data sets from raw releases, and checking any data set.

Names load on first use, so that `hf-mel --help` does not import `datasets` and pyarrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.building.build import build_dataset as build_dataset
    from hf_mel.building.builders import find_builder as find_builder
    from hf_mel.building.builders import known_datasets as known_datasets
    from hf_mel.building.checks import check_dataset as check_dataset
    from hf_mel.building.report import BuildReport as BuildReport
    from hf_mel.building.report import CheckReport as CheckReport

_EXPORTS = {
    "BuildReport": "hf_mel.building.report",
    "CheckReport": "hf_mel.building.report",
    "build_dataset": "hf_mel.building.build",
    "check_dataset": "hf_mel.building.checks",
    "find_builder": "hf_mel.building.builders",
    "known_datasets": "hf_mel.building.builders",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
