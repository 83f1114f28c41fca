"""A stand-in for a Slurm cluster of one machine: sbatch, srun, sacct and scontrol, by the name that it is called by.

It really runs the scripts it is given, in the background. A job's state, and the process that runs it, are files in the
folder $FAKE_SLURM. There a file `disk` limits the bytes of a job's files, and `end` makes each job end at once with the
state that it names.
"""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path(os.environ["FAKE_SLURM"])


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    (PLACE / "submitted").open("a").write(text)
    id = str(1000 + len(list(PLACE.glob("script-*"))))
    (PLACE / f"script-{id}").write_text(text)
    array = re.search(r"--array=0-(\d+)%(\d+)", text)
    tasks = [f"{id}_{i}" for i in range(int(array[1]) + 1)] if array else [id]
    for task in tasks:
        (PLACE / f"state-{task}").write_text("PENDING")
    command = [sys.executable, __file__, "cluster", array[2] if array else "1", *tasks]
    subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {id}")


def cluster(at_once: str, *waiting: str) -> None:
    """Run the tasks of an array, as many at once as it says."""
    queue, running = list(waiting), dict[str, subprocess.Popen]()
    while queue or running:
        while queue and len(running) < int(at_once):
            task = queue.pop(0)
            running[task] = started(task)
        for task in [task for task, process in running.items() if process.poll() is not None]:
            requeued = PLACE / f"requeue-{task}"
            state = "PENDING" if requeued.exists() else "COMPLETED" if not running[task].returncode else "FAILED"
            if (PLACE / "end").exists():
                state = (PLACE / "end").read_text()
            queue += [task] if state == "PENDING" else []
            requeued.unlink(missing_ok=True)
            (PLACE / f"state-{task}").write_text(state)
            del running[task]
        time.sleep(0.05)


def started(task: str) -> subprocess.Popen:
    id, _, index = task.partition("_")
    array = {"SLURM_ARRAY_JOB_ID": id, "SLURM_ARRAY_TASK_ID": index} if index else {}
    environment = {**os.environ, "SLURM_JOB_ID": id, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", **array}
    script = ["bash", str(PLACE / f"script-{id}")] if not (PLACE / "end").exists() else ["true"]
    process = subprocess.Popen(script, start_new_session=True, env=environment)
    (PLACE / f"state-{task}").write_text("RUNNING")
    (PLACE / f"pid-{task}").write_text(str(process.pid))
    return process


def srun(*arguments: str) -> None:
    out, command = arguments[2], list(arguments[3:])  # after --unbuffered --output
    for name, value in (("%A", "SLURM_ARRAY_JOB_ID"), ("%a", "SLURM_ARRAY_TASK_ID"), ("%j", "SLURM_JOB_ID")):
        out = out.replace(name, os.environ.get(value, ""))
    file = os.open(out.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if (PLACE / "disk").exists():
        limit = int((PLACE / "disk").read_text())
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.execvp(command[0], command)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for at in (i for i, argument in enumerate(arguments) if argument == "-j"):
        for file in PLACE.glob(f"state-{arguments[at + 1]}*"):
            print(f"{file.name.removeprefix('state-')}|{file.read_text()}|here")


def scontrol(_: str, task: str) -> None:
    (PLACE / f"requeue-{task}").touch()


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        cluster(*sys.argv[2:])
    else:
        {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scontrol": scontrol}[Path(sys.argv[0]).name](*sys.argv[1:])
