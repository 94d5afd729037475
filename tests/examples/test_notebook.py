"""examples/lab.ipynb runs from its first cell to its last, and is kept without outputs, which
would be figures of one machine that every run changes."""

from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
NOTEBOOK = ROOT / "examples" / "lab.ipynb"
SMALL = """
STEPS = 10
OPTIONS = [
    "model.path={model}", "task.train=48", "task.test=8", "rollout.prompts_per_step=4",
    "rollout.max_new_tokens=16", "eval.samples=2", "eval.every=5", "optimizer.lr=2e-3",
]
"""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_kept_without_outputs() -> None:
    book = read()
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.source.splitlines()[0] == "STEPS = 40"


@pytest.mark.exhaustive
def test_it_runs(tiny_model: Path, tmp_path: Path) -> None:
    """With the cell that is tagged `parameters` replaced, as papermill does it."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
    book = read()
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = SMALL.format(model=tiny_model)
    client = nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    figures = [
        output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 2
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all((run / "summary.json").is_file() for run in runs)
    assert "answers," in "".join(o.get("text", "") for o in cells[2].outputs)
    final, copies = eval(cells[1].outputs[-1]["data"]["text/plain"])
    assert 0 <= final <= 1 and copies == []
