"""Fixtures that start a Hub on loopback and client processes that use it through the real libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub_server.server import HubServer, Store, hub_environment

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_" + "a1B2c3D4e5" * 3 + "xyzw"
_CLI = "import sys; sys.argv[0] = 'hf-mel'; from hf_mel.cli import main; main()"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> HubServer:
    """The Hub server without repositories, and with alice as the only user."""
    server.store = Store(tmp_path / "hub")
    server.users.clear()
    server.faults.clear()
    server.log.clear()
    server.add_user("alice", TOKEN, orgs=["org"])
    return server


class Done(NamedTuple):
    """Exit status and output of a command."""

    returncode: int
    output: str


class Runner:
    """Runs commands in processes forked from one that has loaded the libraries (`tests.hub.forks`)."""

    def __init__(self, environment: dict[str, str], folder: Path, preload: str):
        folder.mkdir(parents=True)
        self.folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.forks", preload],
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdin=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: object, token: str | None = None, cache: Path | None = None) -> Path:
        """Starts `hf-mel ARGUMENTS`, or the function of `forks` named by the first argument; [`result`] waits for it."""
        self._count += 1
        output = self.folder / f"{self._count}.json"
        job = {"arguments": [str(a) for a in arguments], "output": str(output), "token": token}
        job["cache"] = str(cache) if cache else None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return output

    def result(self, output: Path, seconds: float = 600) -> Done:
        end = time.monotonic() + seconds
        while not output.exists():
            assert self._process.poll() is None, "the runner died"
            assert time.monotonic() < end, "the command hangs"
            time.sleep(0.01)
        done = json.loads(output.read_text())
        assert TOKEN not in done["output"]
        return Done(done["code"], done["output"])

    def run(self, *arguments: object, **options) -> Done:
        return self.result(self.start(*arguments, **options))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Client:
    """Starts processes of one user, with a separate cache."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = TOKEN):
        self.hub, self.home = hub, home
        self.environment = hub_environment(hub, home, token)

    def python(self, code: str, *, check: bool = True, flags: tuple[str, ...] = (), **environment: str):
        """Runs code and returns the finished process. With `check`, a failure fails the test."""
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            env=self.environment | {"PYTHONPATH": str(ROOT)} | environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert TOKEN not in done.stdout + done.stderr
        return done

    def runner(self, preload: str = "publish") -> Runner:
        self._runners = getattr(self, "_runners", 0) + 1
        return Runner(self.environment, self.home / f"runner{self._runners}", preload)

    def cli(self, *arguments: object, check: bool = True, **environment: str):
        """Runs `hf-mel ARGUMENTS`."""
        words = [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments]
        code = f"import sys; sys.argv[1:] = {words!r}; " + _CLI
        return self.python(code, check=check, **environment)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def runner(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Client(server, tmp_path_factory.mktemp("home")).runner()
    yield runner
    runner.close()


@pytest.fixture
def new_client(hub: HubServer, tmp_path: Path) -> Callable[..., Client]:
    """Creates clients of other users or machines: `new_client("bob", token)`."""
    return lambda name, token=TOKEN: Client(hub, tmp_path / name, token)
