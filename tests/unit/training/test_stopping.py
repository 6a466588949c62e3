"""SIGINT and SIGTERM ask a run to stop, once; what was there before is there afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from veneer.training.stopping import stop_on_signals


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_the_first_asks_and_the_second_leaves(kind: signal.Signals) -> None:
    before, said = signal.getsignal(kind), []
    with pytest.raises(KeyboardInterrupt), stop_on_signals(said.append) as stop:
        assert not stop.asked
        os.kill(os.getpid(), kind)
        assert stop.asked
        os.kill(os.getpid(), kind)
    assert len(said) == 1
    assert signal.getsignal(kind) is before


def test_only_the_signals_that_are_named_are_caught() -> None:
    with stop_on_signals(kinds=[signal.SIGINT]) as stop:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_one_of_each_kind_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with stop_on_signals(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
    assert len(said) == 1


def test_a_launcher_passes_on_what_the_terminal_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with stop_on_signals(lambda line: None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_another_thread_changes_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with stop_on_signals(print) as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
