"""The notebooks run from top to bottom in a short form, and are stored without outputs."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import finish, start

BADGE = "colab.research.google.com/github/{}/notebooks/{}.ipynb)"
MADE = {"quickstart": {"clip.mp4", "longer.mp4", "report"}, "tpu_training": {"run"}}
FOLDER = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("nbmake")
    made = {"VDM_JAX_SMALL": "1", "VDM_JAX_OUT": str(tmp_path)}
    process = start(
        "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "--nbmake", "--nbmake-timeout=900", str(path), **made
    )
    code, out, _ = finish(process)
    assert code == 0, out
    assert MADE[path.stem] <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


def test_badges_open_the_notebooks_in_colab(tmp_path):
    for name in ("README.md", "launch/colab.py", *(f"notebooks/{name}.ipynb" for name in MADE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER.parent / name, tmp_path / name)

    def run(*address):
        code, _, err = finish(start(str(tmp_path / "launch" / "colab.py"), *address), 60)
        return code, err, {path: path.read_text() for path in tmp_path.rglob("*.[mi]*")}

    before = {path: path.read_text() for path in tmp_path.rglob("*.[mi]*")}
    code, err, after = run("https://example.org/owner/code")
    assert code == 1 and err[-1].startswith("usage: ") and after == before
    run("https://github.com/first/place", "dev")
    code, _, after = run("https://github.com/owner/code.git")
    assert code == 0 and after == run("https://github.com/owner/code/")[2]
    for name in MADE:
        badge = BADGE.format("owner/code/blob/main", name)
        cells = json.loads(after[tmp_path / "notebooks" / f"{name}.ipynb"])["cells"]
        assert badge in cells[0]["source"][0] and 'REPOSITORY = "https://github.com/owner/code"\n' in cells[1]["source"]
        assert after[tmp_path / "README.md"].count(badge) == 1
    assert not any("first/place" in text for text in after.values())
