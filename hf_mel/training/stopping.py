"""Ends of a training before its time: on SIGTERM, as schedulers send it, and on a loss that is no number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StopsOnSigterm(TrainerCallback):
    """Saves a checkpoint after the current step and ends training, once the process has got SIGTERM.

    Of several processes, all end after the same step, as soon as one of them has got it.

    Attributes:
        stopped_at (`int`, *optional*): The step after which training ended. `None`: it was not asked to.
    """

    def __init__(self) -> None:
        self._asked = False
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the block runs. Only the main thread of a process can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _remember(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the Trainer to save and to stop."""
        if args.world_size > 1:
            asked = torch.tensor(int(self._asked), device=args.device)
            dist.all_reduce(asked)
            self._asked = bool(asked)
        if self._asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
