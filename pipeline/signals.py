"""A graceful stop on SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StoppedEarly", "leave_on_signals", "stop_on_signals"]


class StoppedEarly(BaseException):
    """A signal came before there was anything to stop. No Exception: an import in progress must not take it for one."""


@contextmanager
def leave_on_signals() -> Iterator[Callable[[], None]]:
    """While inside, SIGTERM or SIGINT raises StoppedEarly at once, until what is yielded is called: then it is ignored.

    For a start that takes seconds of imports. The handlers of before come back on leaving.
    """
    begun: list[bool] = []

    def begin() -> None:
        begun.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield begin
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not begun:
            raise StoppedEarly

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield begin
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """While inside, the first SIGTERM or SIGINT sets the event, and a second SIGINT raises KeyboardInterrupt.

    The handlers of before come back on leaving. Outside the main thread signals cannot be handled: the event is
    then just an event. The main thread may ask `is_set()` but must not `wait()` on the event: a handler that runs
    inside `wait` would block on the event's own lock.
    """
    event = threading.Event() if stop is None else stop
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    # Not the event itself: a second signal may arrive inside `event.set`, which must not be entered twice.
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        seen.append(number)
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
