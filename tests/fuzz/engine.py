"""Targets of fuzzing, their runs, and the corpus of inputs that once failed."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from hf_mel.errors import MelError

#: One file for each input that once failed: the `repr` of the input. `make test` replays all of them.
CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A parser or public entry that any input must leave with a result or a typed error.

    Args:
        name (`str`): Its name, which is also that of its folder in the corpus.
        inputs (`SearchStrategy`): Inputs whose `repr` is a Python literal.
        attempt (`Callable`): Takes an input and an empty folder. Raises a [`~hf_mel.errors.MelError`] for input that is
            refused, and any other error, an `AssertionError` among them, for a failure.
        share (`int`): How often torture runs it, in relation to other targets.
    """

    name: str
    inputs: SearchStrategy[Any]
    attempt: Callable[[Any, Path], None]
    share: int = 10

    def run(self, value: Any) -> bool:
        """Tries one input. Returns whether it was accepted, and raises for a failure."""
        with empty_folder() as folder:
            try:
                self.attempt(value, folder)
            except MelError as error:
                refusal = error
            else:
                return True
        str(refusal).encode("utf-8", "backslashreplace")
        assert refusal.message.strip(), "the error says nothing"
        return False


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder that is deleted afterwards, in memory where the system has a place for that."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="hf_mel-fuzz-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Outcome:
    """The outcome of a run of a target: numbers of inputs, and the smallest input that failed with its error."""

    tried: int = 0
    accepted: int = 0
    failing: Any = None
    error: Exception | None = None


def fuzz(target: Target, count: int, number: int | None = None) -> Outcome:
    """Tries inputs of a target.

    Args:
        target ([`Target`]): The target.
        count (`int`): Number of inputs. After a failure, further ones are tried to make it smaller.
        number (`int`, *optional*): Seed of the inputs. Default: the same inputs at all times.
    """
    outcome = Outcome()

    def attempt(value: Any) -> None:
        outcome.tried += 1
        try:
            outcome.accepted += target.run(value)
        except Exception as error:
            outcome.failing, outcome.error = value, error
            raise

    run = given(target.inputs)(attempt)
    if number is not None:
        run = seed(number)(run)
    options = {"derandomize": number is None, "database": None, "deadline": None, "report_multiple_bugs": False}
    phases = [Phase.generate, Phase.shrink]
    run = settings(max_examples=count, suppress_health_check=list(HealthCheck), phases=phases, **options)(run)
    try:
        run()
    except Exception as error:
        if outcome.error is None:
            raise error
    return outcome


def save_failing(target: Target, value: Any) -> Path:
    """Writes an input to the corpus, and returns its file."""
    text = repr(value)
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}.txt"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_failing(path: Path) -> Any:
    """Reads an input of the corpus."""
    # literal_eval does not read nan and infinities; these files are the project's own.
    return eval(path.read_text(encoding="utf-8"), {"__builtins__": {}}, {"nan": math.nan, "inf": math.inf})
