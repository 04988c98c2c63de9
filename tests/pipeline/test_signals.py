from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from stepstream.pipeline.signals import StoppedEarly, leave_on_signals, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_event_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts() -> None:
    mine = threading.Event()
    with stop_on_signals(mine) as stop:
        assert stop is mine
        os.kill(os.getpid(), signal.SIGINT)
        assert mine.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_it_is_just_an_event() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.extend([stop.is_set(), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]


def test_before_it_began_a_signal_leaves_at_once_and_then_none_does() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def interrupted_import(number: signal.Signals) -> None:
        with suppress(Exception), leave_on_signals():  # what importers do
            os.kill(os.getpid(), number)
            time.sleep(5)

    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(StoppedEarly):
            interrupted_import(number)
    with leave_on_signals() as begin:
        begin()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGTERM) is before
