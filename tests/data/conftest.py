"""Fixtures for tests of loading data."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _isolated_datasets_cache(tmp_path, monkeypatch):
    """Keeps the data sets that tests load out of the developer's `datasets` cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
