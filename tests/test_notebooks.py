"""The notebooks run from top to bottom, at a small setting, and are stored without outputs."""

import json
from pathlib import Path

import pytest

from tests.helpers import finish, start

MADE = {"quickstart": {"clips.mp4", "longer.mp4", "report"}, "tpu_training": {"run"}}
FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("nbmake")
    made = {"VDM_JAX_SMALL": "1", "VDM_JAX_OUT": str(tmp_path)}
    process = start(
        "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "--nbmake", "--nbmake-timeout=900", str(path), **made
    )
    code, out, _ = finish(process, 1200)
    assert code == 0, out
    assert MADE[path.stem] <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
