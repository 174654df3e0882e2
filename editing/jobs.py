"""Edits behind app.py, one at a time: the queue, what it tells of them, and the results on disk.

A job has a folder of its own, with what goes in and what comes out. job.json, the last file, says that it is whole.
"""

import re
import shlex
import shutil
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field

from common.cli import explain, tell
from common.files import read_json, write_json
from common.pictures import tensor_to_picture
from editing import options, uploads

RESULT = r"\d{8}-\d{6}-[0-9a-f]{8}"  # a job's id, and the name of its folder
FILE = r"(picture|map|coarse|out(-\d+)?)\.png|edits\.json"  # in it
WAITING = 20  # in line

usual_warning = warnings.showwarning
edit = threading.local()  # .notes: the warnings of the edit that a thread makes


def take_warning(message, *more):
    """A warning is a note of the edit in whose thread it is given: a page's upload may warn meanwhile."""
    if hasattr(edit, "notes"):
        edit.notes.append(str(message))
    else:
        usual_warning(message, *more)


class Cancelled(Exception):
    pass


@dataclass
class Job:
    id: str
    kind: str  # of uploads.FIELDS
    parameters: dict  # what the page's form said
    argv: list  # the same for sample.py
    state: str = "waiting"  # then running; then done, failed or cancelled
    step: int = 0
    steps: int = 0
    pictures: list = field(default_factory=list)  # names of files; while it runs, data URLs
    notes: list = field(default_factory=list)  # warnings, or the error
    version: int = 0

    def describe(self):
        return vars(self) | {"command": shlex.join(["python", "sample.py", *self.argv])}


class Jobs:
    """All jobs by their id. They change under the lock `changes`, which wakes those who wait for it.

    run(job, watch) makes the pictures; watch(step, steps, x) is to be called after each step, where x() gives the
    pictures so far, tensors (3, H, W) in [0, 1]
    """

    def __init__(self, folder, run):
        self.folder = folder
        self.run = run
        self.all = {}
        self.version = 0  # grows with each change
        self.changes = threading.Condition()
        self.idle = threading.Event()  # no job runs
        self.idle.set()
        for path in sorted(folder.iterdir()):
            if re.fullmatch(RESULT, path.name):
                self.read_result(path)
        threading.Thread(target=self.work, daemon=True).start()

    def read_result(self, path):
        """A result of an earlier time. What is left of an edit that was interrupted is deleted."""
        if not (path / "job.json").exists():
            shutil.rmtree(path, ignore_errors=True)  # it may be a file of somebody's
            return
        try:
            job = Job(path.name, state="done", **read_json(path / "job.json"))
            names = [str(name) for name in job.pictures]
            if job.kind not in uploads.FIELDS or not all(re.fullmatch(FILE, name) for name in names):
                raise ValueError("it is not of this program")
            uploads.check_parameters(job.kind, job.parameters)
            job.describe()  # raises for a command of anything but words
            self.change(job)
        except (ValueError, TypeError) as e:
            tell(f"{path} is left out: {e}")

    def path_of(self, name, file):
        """A file of a result. ValueError for any other."""
        if re.fullmatch(RESULT, name) and re.fullmatch(FILE, file):
            path = self.folder / name / file
            if path.is_file():
                return path
        raise ValueError("there is no such result")

    def change(self, job, **values):
        with self.changes:
            self.version += 1
            vars(job).update(values, version=self.version)
            self.all[job.id] = job
            self.changes.notify_all()

    def news(self, seen, patience):
        """-> the version now, and the jobs that have changed since `seen`; after so many seconds none"""
        with self.changes:
            self.changes.wait_for(lambda: self.version > seen, patience)
            return self.version, [job.describe() for job in self.all.values() if job.version > seen]

    def add(self, job):
        with self.changes:
            if sum(other.state == "waiting" for other in self.all.values()) >= WAITING:
                raise ValueError(f"{WAITING} edits are waiting: let them finish, or cancel one")
            self.change(job)

    def cancel(self, name):
        with self.changes:
            job = self.all.get(name) if isinstance(name, str) else None
            if job and job.state == "waiting":
                shutil.rmtree(self.folder / job.id, ignore_errors=True)
            if job and job.state in ("waiting", "running"):
                self.change(job, state="cancelled", pictures=[])

    def next_job(self):
        return next((job for job in self.all.values() if job.state == "waiting"), None)

    def work(self):
        """A thread's: one job after another, for ever."""
        while True:
            with self.changes:
                job = self.changes.wait_for(self.next_job)
                self.idle.clear()
                self.change(job, state="running")
            try:
                self.finish(job)
            except Cancelled:
                shutil.rmtree(self.folder / job.id, ignore_errors=True)
            except Exception as e:
                why = explain(e, "fewer samples may fit")
                if why is None:
                    traceback.print_exc()
                    why = f"it failed, the terminal of app.py says why: {e!r}"
                shutil.rmtree(self.folder / job.id, ignore_errors=True)
                self.change(job, state="failed", pictures=[], notes=[why])
            self.idle.set()

    def stop(self):
        """Before the program ends: PyTorch aborts where it is interrupted. So the step that runs is waited for."""
        for name in list(self.all):
            self.cancel(name)
        self.idle.wait(60)

    def finish(self, job):
        edit.notes, warnings.showwarning = [], take_warning
        warnings.simplefilter("always", UserWarning)
        self.run(job, self.watcher(job))
        names = [path.name for path in options.result_paths(options.parse(job.argv, "")[1])]
        said = {"kind": job.kind, "parameters": job.parameters, "argv": job.argv, "pictures": names,
                "notes": edit.notes}
        with self.changes:
            if job.state == "cancelled":
                raise Cancelled
            write_json(self.folder / job.id / "job.json", said)
            self.change(job, state="done", **said)

    def watcher(self, job):
        """-> the `watch` of `run`: a cancelled job ends there; to look at pictures takes at most a fifth of the time"""
        due = 0

        def watch(step, steps, x):
            nonlocal due
            pictures, start = job.pictures, time.monotonic()
            if start >= due:
                pictures = [uploads.to_data_url(tensor_to_picture(one)) for one in x()]
                due = time.monotonic() + 4 * (time.monotonic() - start)
            with self.changes:
                if job.state == "cancelled":
                    raise Cancelled
                self.change(job, step=step, steps=steps, pictures=pictures)

        return watch
