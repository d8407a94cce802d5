import datasets
import pytest


@pytest.fixture(autouse=True)
def _temporary_cache(tmp_path, monkeypatch):
    """Keeps the cache of `datasets` in a temporary folder, so that tests leave the developer's cache alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
