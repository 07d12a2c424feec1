"""SIGTERM and SIGINT as a wish that is noted, not an end."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


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
