"""SIGTERM, which a cluster sends before it takes a machine away, and Ctrl-C: a run is stopped where it can be gone on with."""

import signal
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, Optional

from utils.processes import known_to_all, largest

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """One of the `STOPPING` signals came; `status` is the exit status that shells give to a program it ends.

    `kept` is a sentence that says how to go on, where there is something to go on from.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.name, self.status, self.kept = signal.Signals(number).name, 128 + number, ""


class Interruption:
    """Raises Interrupted where a signal comes or, while `deferred`, not before `stop_if_asked` is called.

    >>> with Interruption.watched() as interruption, interruption.deferred():
    ...     for step in steps:
    ...         step()
    ...         interruption.stop_if_asked()

    A second signal ends the program at once. In a job of several processes all stop at the same call, whichever the signal came to.
    """

    def __init__(self):
        self.asked: Optional[int] = None
        self.waits = False

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator["Interruption"]:
        """An object that receives the signals inside the with block."""
        interruption = cls()
        before = {number: signal.signal(number, interruption._receive) for number in STOPPING}
        try:
            yield interruption
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def stop_if_asked(self) -> None:
        asked = largest(self.asked or 0)
        if asked:
            raise known_to_all(Interrupted(asked))

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.asked = number
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        if not self.waits:
            raise Interrupted(number)
