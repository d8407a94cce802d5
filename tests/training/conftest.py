"""Training tests compute in float32 on every machine, because they compare digits."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr("hf_mel.training.arguments.native_bf16", lambda device_type: (False, "this is a test"))
