"""Benchmarks of systems: grids of runs, their tables, and tests of differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.bench.grid import run_suite as run_suite
    from hf_mel.bench.significance import corrected as corrected
    from hf_mel.bench.significance import paired_difference as paired_difference
    from hf_mel.bench.suite import Suite as Suite
    from hf_mel.bench.suite_results import suite_results as suite_results
    from hf_mel.bench.suite_tables import write_suite as write_suite

#: Public name → its module, imported on first use of the name, because some modules import torch.
_EXPORTS = {
    "Suite": "hf_mel.bench.suite",
    "corrected": "hf_mel.bench.significance",
    "paired_difference": "hf_mel.bench.significance",
    "run_suite": "hf_mel.bench.grid",
    "suite_results": "hf_mel.bench.suite_results",
    "write_suite": "hf_mel.bench.suite_tables",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
