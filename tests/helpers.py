"""What tests of several scripts share: small data, the folder that a run left, and its records."""

from __future__ import annotations

import json

import forks
import pandas
import torch.distributed.run

import benchmark
from self_speculation.drafts.costs import Costs

TORCHRUN = torch.distributed.run.__file__
# What a record says of the clock, and of who else was there when it was taken.
TIMES = [
    f"{side}{time}_time"
    for side in ("", "autoregressive_")
    for time in ("prefill", "decode", "wall", "processor")
]
TIMES += ["batch_size", "window", "rank"]


def custom_data(folder):
    """A file for `--dataset custom_jsonl`: 12 rows."""
    path = folder / "data.jsonl"
    rows = [{"prompt": f"add{i}(a, b):", "response": f"    return a + b + {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only_run(tmp_path):
    """The one folder that was written below `--output_dir tmp_path/logs`."""
    (folder,) = (tmp_path / "logs").iterdir()
    return folder


def untimed(folder):
    """The records of a run without what a clock said."""
    frame = pandas.read_json(folder / "records.jsonl", lines=True)
    return frame.drop(columns=[name for name in TIMES if name in frame]).to_dict("records")


def torchrun(ranks, script, *args):
    """By the launcher itself, which starts a new process for each rank. Cheaper: forks.run_ranks."""
    return forks.run(TORCHRUN, "--nproc_per_node", ranks, script, *args)


def no_calibration(monkeypatch):
    """For a test that is not about times: sweep.py is told what passes cost. The one place that knows how."""
    monkeypatch.setattr(
        "measures.sweeping.calibrate",
        lambda model, config, exit_layers, *_: [
            Costs(
                plain_step=1.0,
                draft_step={layer: layer / 8 for layer in exit_layers},
                verifications=dict.fromkeys(exit_layers, (1.0, 1.5)),
                lengths=(0, 20),
            )
        ],
    )


def no_pictures(monkeypatch):
    """For a test that is not about what sweep.py draws."""
    monkeypatch.setattr("measures.sweeping.heat_maps", lambda *_: None)


def outcome(args, capsys):
    """Exit status of benchmark.py and the last line on standard error."""
    try:
        status = benchmark.main(args)
    except SystemExit as end:
        status = end.code
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return status, errors.strip().rpartition("\n")[2].rpartition("\r")[2]
