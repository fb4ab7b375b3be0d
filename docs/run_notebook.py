"""Run the cells of a notebook in the notebook's folder, and write their outputs, text and pictures, into it.

    python docs/run_notebook.py docs/tour.ipynb

Needs no Jupyter. Cells are plain Python: text is what they print, pictures are what pyplot has drawn.
"""

import base64
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def outputs(source: str, names: dict[str, Any]) -> list[dict]:
    """Run one cell in the namespace `names`; return text, then pictures, as notebooks have them."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(source, names)
    text = printed.getvalue().splitlines(keepends=True)
    shown: list[dict] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, dpi=80, bbox_inches="tight", metadata={"Software": None})
        png = base64.b64encode(picture.getvalue()).decode()
        shown.append({"data": {"image/png": png}, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return shown


def main(path: Path) -> None:
    notebook = json.loads(path.read_text())
    names: dict[str, Any] = {}
    home = Path.cwd()
    os.chdir(path.parent)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        cell["outputs"] = outputs("".join(cell["source"]), names)
    os.chdir(home)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
