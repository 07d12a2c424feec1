"""SIGTERM and SIGINT as a wish that is noted, not an end."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - no error
    """A signal came in the midst of something that goes on, or starts again, when the run does."""


class SignalListener:
    """Notes SIGTERM and SIGINT instead of dying of them."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted; a second SIGINT is a KeyboardInterrupt. In the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        name = signal.Signals(number).name
        logger.warning("%s: a checkpoint will be saved after this step, then training stops; Ctrl-C stops now", name)


def heed_parent_alone(worker_id: int, *, then: Callable[[int], object] | None) -> None:
    """Start a loader's worker that takes SIGTERM from its parent alone, and no SIGINT.

    A launcher or a terminal signals all processes at once, but the parent still wants the batches of its step. It is
    also how the parent ends a worker that hangs (torch does so after five seconds); and without parent it ends itself.

    Args:
        worker_id: Number of the worker.
        then: What else is to be done when a worker starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere there is no way to tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
