"""Tests that the Auto classes know the shipped methods, for every order of imports and every program name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECK_REGISTRATION = """
from transformers import CONFIG_MAPPING, MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING, PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

for method in {methods}:
    config = CONFIG_MAPPING[method]
    assert config in MODEL_MAPPING, method
    assert config in PROCESSOR_MAPPING, method
    assert (config in MODEL_FOR_PRETRAINING_MAPPING) == (method in ("imn", "pfmel")), method
assert "multimodal-entity-linking" in PIPELINE_REGISTRY.get_supported_tasks()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import sys, hf_mel; assert not {'torch', 'transformers'} & set(sys.modules)",
        "import sys; sys.argv[0] = 'hf-mel'; import hf_mel",
        "from transformers import AutoProcessor; import hf_mel",
        "from hf_mel.modeling.imn.modeling_imn import ImnModel",
        "from hf_mel.linking import pipeline",
        "import hf_mel; from transformers import Trainer",
        "from hf_mel import MelTrainer",
    ],
)
def test_every_order_of_imports_registers_every_method(first):
    folders = (ROOT / "modeling").iterdir()
    methods = sorted(path.name for path in folders if path.is_dir() and not path.name.startswith("__"))
    run(first + CHECK_REGISTRATION.format(methods=methods))


def test_the_help_of_the_command_line_does_not_import_torch():
    run(
        "import sys\nsys.argv = ['hf-mel', '--help']\nfrom hf_mel.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )


def test_idle_threads_of_the_command_line_do_not_spin():
    code = "import os, hf_mel.cli; assert os.environ['OMP_WAIT_POLICY'] == '{}'"
    run("import os; os.environ.pop('OMP_WAIT_POLICY', None)\n" + code.format("PASSIVE"))
    run("import os; os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'\n" + code.format("ACTIVE"))
