"""Loads the data beside the task files, from any working directory."""

from pathlib import Path

import datasets


def load(file: str, **_: object) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_json(str(Path(__file__).with_name(file)))}
