"""The folder of a run: one JSON about it, and one JSONL with a record for each example, written as they come.

All ranks append to the JSONL, a line at a time. An interruption loses no written record, and a half-written
line is not read as a record.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from arguments import read_run
from runs.description import Record, now
from runs.failures import Failed

# Arguments that may differ when a run is resumed; `train.py` compares the samples of a step itself.
_MAY_DIFFER = {
    "resume", "output_dir", "threads", "batch_size", "answer_file", "text_quality",
    "gradient_accumulation", "gradient_checkpointing",
}  # fmt: skip


@dataclass
class Run:
    """A folder with `run.json` and `records.jsonl`."""

    folder: Path
    description: Record

    @classmethod
    def open(cls, output_dir: str, resume: str | None, description: Record) -> Run:
        """A new folder `script_<time>` in `output_dir`, or the folder of the interrupted run to resume.

        Raises:
            Failed: it cannot be written, or the run to resume is another one.
        """
        if resume is None:
            began = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # other runs may begin in the same second
            run = cls(Path(output_dir).expanduser() / f"{description['script']}_{began}", description)
        else:
            earlier = check_same_run(resume, description)
            run = cls(Path(resume).expanduser(), description | {"began": earlier.get("began")})
            if (path := run.folder / "records.jsonl").exists():  # a training has none
                write_atomically(path, _lines(run.records().values()))  # without a line that was cut
        run.write_status("running")
        return run

    def records(self) -> dict[int, Record]:
        """Every complete record by index."""
        found = dict[int, Record]()
        path = self.folder / "records.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError):  # it was cut
                record = json.loads(line)
                found[record["index"]] = record
        return found

    def append(self, record: Record) -> None:
        """Write a record; it is on the disk before this returns."""
        path = self.folder / "records.jsonl"
        try:
            _write(path, "a", _lines([record]))
        except OSError as error:
            raise Failed(f"cannot write {path}: {error.strerror}") from error

    def finish(self, records: list[Record], metrics: Record) -> None:
        """Write all records in order into one file, and the metrics into run.json."""
        write_atomically(self.folder / "records.jsonl", _lines(records))
        self.write_status("finished", metrics=metrics)

    def write_status(self, status: str, **more: object) -> None:
        """Write description and status into run.json."""
        ended = {} if status == "running" else {"ended": now()}
        content = {**self.description, "status": status, **ended, **more}
        text = json.dumps(content, indent=2, allow_nan=False)
        write_atomically(self.folder / "run.json", f"{text}\n")

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        python = Path(sys.executable)
        if python.is_relative_to(here := Path.cwd()):
            python = python.relative_to(here)
        program = [str(python)]
        if (ranks := self.description["num_ranks"]) > 1:
            program = [str(python.with_name("torchrun")), "--nproc_per_node", str(ranks)]
        return shlex.join([*program, sys.argv[0], "--resume", str(self.folder)])

    def listing(self) -> str:
        """The folder and the files in it, in one line."""
        return f"{self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}"


def write_atomically(path: Path, text: str) -> None:
    """Write a file and the folders above it; at any time the file has the old text or the new one.

    Raises:
        Failed: the file cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, "w", text)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Failed(f"cannot write {path}: {error.strerror}") from error


def check_same_run(resume: str, description: Record) -> Record:
    """Return the `run.json` of the run to resume. Raises Failed, which names the difference, if the script,
    an argument, the device or the dtype differs from the description of this run.
    """
    earlier = read_run(resume)
    if (script := earlier.get("script")) != description["script"]:
        raise Failed(f"--resume {resume}: is of {script}.py, go on with that")
    asked = description["arguments"]
    was_asked = earlier["arguments"]
    # The records of a measured sweep are times of batches.
    compared = asked.keys() - (_MAY_DIFFER if script != "sweep" else _MAY_DIFFER - {"batch_size"})
    pairs = [(f"--{name}", was_asked.get(name, asked[name]), asked[name]) for name in sorted(compared)]
    pairs += [(key, earlier.get(key), description[key]) for key in ("device", "dtype") if key in description]
    for name, was, asks in pairs:
        # The steps of the earlier training are the first ones of a longer one.
        if was != asks and not (name == "--num_steps" and asks > was):
            raise Failed(f"--resume {resume}: that run had {name} {was!r}, this one has {asks!r}")
    return earlier


def _write(path: Path, mode: str, text: str) -> None:
    with open(path, f"{mode}b") as file:
        file.write(text.encode())  # a line is one write, between writes of other ranks
        file.flush()
        os.fsync(file.fileno())


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
