"""Tests of `hf-mel space`: the environment that it passes to the app."""

import json
import os
import runpy
import sys

import pytest
from typer.testing import CliRunner

from hf_mel.cli import app
from hf_mel.errors import KnowledgeBaseError


@pytest.fixture
def started(monkeypatch):
    """The environment in which the app would start, recorded instead of starting it."""
    seen: dict[str, str] = {}
    for name in ("MEL_MODELS", "MEL_KBS", "GRADIO_SERVER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(
        runpy, "run_path", lambda path, run_name: seen.update(os.environ, path=path, run_name=run_name)
    )
    return seen


def test_models_rerankers_and_knowledge_bases_are_passed_to_the_app(started):
    arguments = [
        "space",
        "runs/one",
        "kb/first/",
        "--also-model",
        "org/two",
        "--reranker",
        "runs/r",
        "--also-kb",
        "kb/second",
    ]
    result = CliRunner().invoke(app, [*arguments, "--port", "7999"])
    assert result.exit_code == 0, result.output
    assert json.loads(started["MEL_MODELS"]) == {
        "one + r": {"model": "runs/one", "reranker": "runs/r"},
        "one": "runs/one",
        "two": "org/two",
    }
    assert json.loads(started["MEL_KBS"]) == {"first": "kb/first/", "second": "kb/second"}
    assert started["GRADIO_SERVER_PORT"] == "7999"
    assert os.path.isfile(started["path"])
    assert started["run_name"] == "__main__"


def test_the_error_without_a_model_suggests_the_demo(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["space"])
    assert isinstance(result.exception, KnowledgeBaseError)
    assert "hf-mel demo" in str(result.exception)
    assert not started
