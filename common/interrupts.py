"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) end a program in one line, with status 130, 143 or 129.

    if __name__ == "__main__":
        from common import interrupts

        interrupts.watch("sample.py")           first of all: the imports that follow take seconds

    with report_errors(parser, memory, kept)    of common/cli.py, which says what is kept
    with finish_steps(): ... if came(): ...     as in train.fit, which saves its state first
"""

import contextlib
import os
import signal
import threading
from multiprocessing import parent_process

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
raised = 0  # the signal that has interrupted: some of PyTorch's functions turn its KeyboardInterrupt into a ValueError
waiting = None  # while `finish_steps` has them wait: the signals that have come


def listen(handle):
    """From now on handle(number, frame) is called for each signal, but those that this process ignores, as nohup makes
    it do. In a notebook's thread nothing changes. -> {number: what was called before}"""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heard}


@contextlib.contextmanager
def interruptible():
    """A signal comes out of here as KeyboardInterrupt(number)."""
    global raised
    raised = 0
    before = listen(interrupt)
    try:
        yield
    except Exception:
        if raised:
            raise KeyboardInterrupt(raised) from None
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def watch(program):
    """Until `report_errors`, and after it: an exception would come out of a module's import as another one."""

    def end(number, frame):
        os.write(2, f"{program}: interrupted before it began, or after it was done\n".encode())
        os._exit(128 + number)

    listen(end)


def interrupt(number, frame):
    """KeyboardInterrupt(number), for `report_errors`; or the number is noted, and the step that is running goes on."""
    global raised
    if parent_process():  # a worker that was forked: the program ends it
        if number == signal.SIGTERM:
            os._exit(128 + number)
    elif waiting == []:
        waiting.append(number)
    else:
        raised = number
        raise KeyboardInterrupt(number)


@contextlib.contextmanager
def finish_steps():
    """The first signal does not interrupt what is in here, which asks `came` after each step; the second does."""
    global waiting
    waiting = []
    try:
        yield
        late = came()
    finally:
        waiting = None
    if late:
        raise KeyboardInterrupt(late)


def came():
    """-> the signal that came within `finish_steps`, or 0"""
    return waiting[0] if waiting else 0


@contextlib.contextmanager
def kept_from_children():
    """Processes that start in here never see Ctrl-C or a closed terminal, which reach all: the parent ends them.

    It hears them itself afterwards. The mask is this thread's alone: where another takes the signal, an exception
    would leave a process half started, which then complains."""
    mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
    if mask:
        before = mask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        with finish_steps():
            yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
