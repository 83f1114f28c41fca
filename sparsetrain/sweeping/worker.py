"""A process that imports torch once and forks for every job: each has a process of its own, at once.

Jobs come as lines of JSON on standard input, answers go to standard output. A job's own output goes to the log in its
point's folder. When whoever gave the jobs is gone, standard input ends, and the job that is under way stops: training
with a checkpoint.
"""

import fcntl
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparsetrain.files import WriteError
from sparsetrain.sweeping.records import LOG, Job

PATIENCE = 60  # seconds: to end after a signal, or to wait for a process that works on the same point
ATTEMPTS = 2  # a job whose process was killed goes on from its last checkpoint once: then its memory may not suffice
LOCK = ".lock"
# Imported before the first job, so that no job does it again; torch's optimisers take the last of them, two seconds.
NEEDED = ("sparsetrain.sweeping.stages", "torch.utils.tensorboard", "torch._dynamo")


class Worker:
    """The handle of such a process, as a context; started with its first job, and anew where it died.

    Args:
        hide_gpus: leave its jobs no GPU.
    """

    def __init__(self, hide_gpus: bool = False) -> None:
        self.changes = {"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def run(self, job: Job, tick: Callable[[], None] = lambda: None) -> str | None:
        """Do a job; its result is in its record afterwards.

        Args:
            job: what to do.
            tick: called about once a second.

        Returns:
            None, or why it failed.
        """
        for _ in range(ATTEMPTS):  # if the process dies that forks
            if answer := self._ask(job, tick):
                return json.loads(answer)["error"]
            assert self.process
            status = self.process.wait()
            self.stop()
        return f"the process of the jobs ended with status {status}"

    def _ask(self, job: Job, tick: Callable[[], None]) -> bytes:
        """The answer to a job as it came; empty where the process died."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "sparsetrain.sweeping.worker"]
            # A session of its own: Ctrl-C reaches whoever gave the jobs, who then ends this in good order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                env=os.environ | self.changes,
            )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(job.message().encode() + b"\n")
            self.process.stdin.flush()
            while not select.select([self.process.stdout], [], [], 1)[0]:
                tick()
            return self.process.stdout.readline()
        except BrokenPipeError:
            return b""

    def stop(self) -> None:
        """End the process, and the job that is under way; training saves a checkpoint first."""
        if self.process is None:
            return
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process = None


def main() -> None:
    """Take jobs until standard input ends."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to all: whoever gave the jobs answers it
    for name in NEEDED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what anyone prints is no answer
    for line in sys.stdin.buffer:
        answer = _done(Job.from_message(line.decode()))
        with suppress(BrokenPipeError):  # whoever gave the job was killed; it is recorded
            answers.write(json.dumps({"error": answer}).encode() + b"\n")


def _done(job: Job) -> str | None:
    """Do a job, again if its process was killed; returns why it failed."""
    for _ in range(ATTEMPTS):
        error, killed = _forked(job)
        if not killed:
            return error
    _note(job, error)
    return error


def _forked(job: Job) -> tuple[str | None, bool]:
    """Do a job in a process of its own; returns why it failed, and whether it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(job, writing))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status >= 0:
        return told or (f"ended with status {status}" if status else None), False
    name = signal.Signals(-status).name
    error = f"killed by {name}" + ("; memory may have run out" if name == "SIGKILL" else "")
    return error, name != "SIGTERM"  # that is how a job is asked to stop


def _child(job: Job, writing: int) -> int:
    """Do a job in this process, which does nothing else; returns the exit status."""
    error = ""
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = _log_and_lock(job.folder)
        if not _locked(lock):
            error = f"another process works on {job.folder}; wait for it, or end it"
        else:
            _do(job)
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        with suppress(OSError):  # of a full disk; the message still gets through the pipe
            traceback.print_exc()
        if type(problem).__name__ != "Interrupted":  # which is to go on, not to be reported
            _note(job, error)
    os.write(writing, error.encode())
    return 1 if error else 0


def _note(job: Job, error: str) -> None:
    """Record a failure; where the disk is full it is told at least."""
    with suppress(WriteError, OSError):
        job.write(error=error)


def _log_and_lock(folder: Path) -> int:
    """Send what this process prints to the point's log; returns the point's open lock file."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)


def _do(job: Job) -> None:
    from sparsetrain.sweeping.stages import run_stage

    if "result" not in job.record():  # another process may have been faster
        logging.info("%s", job.name)
        began = time.perf_counter()
        result = run_stage(job)
        job.write(result=result, seconds=round(time.perf_counter() - began, 3))


def _locked(file: int) -> bool:
    """Whether the point is ours now; a process whose parent was killed may need a moment to end."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)


def _end_with_parent() -> None:
    """Wait until standard input ends, then stop: in good order, or else after a while."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is left to do, and torch takes seconds to leave
