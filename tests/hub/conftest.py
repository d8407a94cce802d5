"""A Hub on loopback, and processes that meet it through the real clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server.server import HubServer, hub_environment

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_" + "a1B2c3D4e5" * 3 + "xyzw"
_CLI = "import sys; sys.argv[0] = 'hf-mel'; from hf_mel.cli import main; main()"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_user("alice", TOKEN, orgs=["org"])
        yield server


class Client:
    """Fresh processes of one user, with a cache of their own."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = TOKEN):
        self.hub, self.home = hub, home
        self.environment = hub_environment(hub, home, token)

    def python(self, code: str, *, check: bool = True, flags: tuple[str, ...] = (), **environment: str):
        """Runs code; its output as text. With `check`, a failure is one of the test."""
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            env=self.environment | {"PYTHONPATH": str(ROOT)} | environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert TOKEN not in done.stdout + done.stderr
        return done

    def cli(self, *arguments: object, check: bool = True, **environment: str):
        """`hf-mel ARGUMENTS`."""
        words = [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments]
        code = f"import sys; sys.argv[1:] = {words!r}; " + _CLI
        return self.python(code, check=check, **environment)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.fixture
def new_client(hub: HubServer, tmp_path: Path) -> Callable[..., Client]:
    """Another user or another machine: `new_client("bob", token)`."""
    return lambda name, token=TOKEN: Client(hub, tmp_path / name, token)
