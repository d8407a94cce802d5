"""Output of the command line that several verbs share."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


class _LinePrinter(logging.Handler):
    """Prints each log record as one line on standard error, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def show_logs() -> Iterator[None]:
    """Prints the log lines of hf_mel while the block runs. Of several processes, only the first prints."""
    logger = logging.getLogger("hf_mel")
    first = int(os.environ.get("RANK", "0")) == 0
    handler, level = (_LinePrinter() if first else logging.NullHandler()), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
