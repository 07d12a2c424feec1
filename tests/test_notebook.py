"""The notebook runs from top to bottom, with tiny towers and pairs in the places of the demo's."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, run_config: Path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("configs/demo.yaml", str(run_config))
        cell.source = cell.source.replace("outputs/notebook", str(run_config.parent / "run"))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    (difference,) = re.findall(r"norm 1.000000, largest difference (\S+)", last.outputs[0].text)
    assert float(difference) < 1e-5
    assert {"training_curves.png", "metrics.csv", "report.html"} <= {file.name for file in (run_config.parent / "run").iterdir()}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran_and_defines_nothing_long(path: Path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    for cell in cells:
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 5, node.name
