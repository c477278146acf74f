"""Processes of this machine that call functions for this one: fresh interpreters, each independent of the others."""

import contextlib
import functools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import Executor, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe

from replication.engine.machine import tune_malloc

GRACE_SECONDS = 300  # for an interrupted worker to finish its iteration and write a checkpoint
# The caller's path first, so that the worker imports the same modules. Its script is not imported: it needs no guard,
# and may be a REPL, a notebook or standard input.
START = """
import sys
from multiprocessing.connection import Connection
try:
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = connection.recv()
    from replication.engine.workers import serve
    serve(connection)
except KeyboardInterrupt:
    pass
"""
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


class WorkerError(RuntimeError):
    """A function raised an exception in a worker: its type and message."""


class WorkerDiedError(RuntimeError):
    """A worker ended before its function returned."""


def says_all(error):
    """Whether the message of an error says all there is to say: one that this package raises, or the system for it.

    Any other is a bug, here or in the caller's code, and needs its traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame.filename.startswith(PACKAGE) for frame in frames]
    if isinstance(error, ValueError | TypeError | RuntimeError):
        return any(ours) and ours[-1] and frames[-1].line.startswith("raise ")
    return any(ours) and isinstance(error, OSError | MemoryError)


class Worker:
    """A process that calls one function at a time; an interrupt of the terminal does not reach it."""

    def __init__(self):
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno())]
        # glibc reads this before anything else runs: huge pages where Linux has them.
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, process_group=0
        )
        theirs.close()
        self.connection.send(sys.path)

    def call(self, function):
        """The value of ``function()``, which the worker can import or is a ``functools.partial`` of one that it can.

        Raises WorkerError for an exception of the function, and WorkerDiedError.
        """
        try:
            self.connection.send(function)
            success, outcome = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerDiedError(self._ending()) from None
        if success:
            return outcome
        raise WorkerError(outcome)

    def interrupt(self):
        """Have it leave a checkpoint and end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def close(self):
        """Wait until it has ended."""
        self.connection.close()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ending(self):
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed (is there enough memory?)"
        return f"its process ended with exit code {code}"


class Workers(Executor):
    """An executor of so many workers: one that dies is replaced, and what it was called for is tried once more.

    As a context manager: an exception interrupts the workers, and at the end all are gone.
    """

    def __init__(self, count):
        self._threads = ThreadPoolExecutor(count)  # each of which waits for a worker of its own
        self._own, self._all, self._interrupted = threading.local(), [], False

    def submit(self, function, /, *arguments, **options):
        return self._threads.submit(self._call, functools.partial(function, *arguments, **options))

    def _call(self, function):
        try:
            return self._worker().call(function)
        except WorkerDiedError:
            self._own.worker = None
            if self._interrupted:
                raise
            return self._worker().call(function)

    def _worker(self):
        if getattr(self._own, "worker", None) is None:
            self._own.worker = Worker()
            self._all.append(self._own.worker)
        if self._interrupted:  # perhaps while this worker was started, too early for the interrupt to reach it
            raise WorkerDiedError("it was interrupted before it began")
        return self._own.worker

    def shutdown(self, wait=True, *, cancel_futures=False):
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        for worker in self._all:
            worker.close()

    def __exit__(self, kind, *_):
        if kind is not None:
            self._interrupted = True
            for worker in self._all:
                worker.interrupt()
        self.shutdown(cancel_futures=True)


def serve(connection: Connection):
    """Be a worker: call what comes through the connection, until its other end is closed."""
    calls, busy = queue.SimpleQueue(), threading.Event()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the caller's shell had it do
    tune_malloc()
    threading.Thread(target=_receive, args=(connection, calls, busy), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        while (call := calls.get()) is not None:
            busy.set()
            outcome = _outcome(call)
            busy.clear()  # first: the caller may go as soon as it has the outcome
            connection.send(outcome)


def _outcome(call):
    """Whether a call succeeded, and its value or what was raised, in words."""
    try:
        return True, pickle.loads(call)()
    except Exception as error:
        if not says_all(error):
            traceback.print_exc()
        return False, f"{type(error).__name__}: {error}"


def _receive(connection, calls, busy):
    """Put what comes into the queue; when the caller is gone, have this process leave a checkpoint and end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls.put(connection.recv_bytes())
    calls.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
