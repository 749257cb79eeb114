"""Who may import whom, read from the source: the arrows that keep each idea in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "sample", "evaluate", "overview", "dry_run", "bench")  # may import everything
SHARED = ("stages", "latents", "generate", "preview", "task_metrics")  # what scripts share: here models and data meet
# Modules that also have a command of their own, and what only that command imports.
COMMANDS = {"vdm_jax.checkpoint": ["vdm_jax.stages"]}
WITHOUT_JAX = [  # what a process that only loads or measures data needs, quick to start
    "vdm_jax.data.captions",
    "vdm_jax.data.files",
    "vdm_jax.data.world",
    "vdm_jax.metrics.figures",
    "vdm_jax.metrics.reconstruction",
    "vdm_jax.metrics.report",
    "vdm_jax.metrics.tracker",
]


def imports(module: str, source: str) -> set[str]:
    """Dotted names of all that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # a package is named a.__init__ here, so one level up is always right
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, packages) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def violations(module: str, source: str) -> list[str]:
    """The imports of a module, by its dotted name, that the layout does not allow."""
    scripts, shared = ([f"vdm_jax.{name}" for name in names] for names in (SCRIPTS, SHARED))
    forbidden, allowed = [*scripts, *shared, "vdm_jax.models"], COMMANDS.get(module, [])
    if is_within(module, shared):
        forbidden = scripts
    elif is_within(module, ["vdm_jax.models"]):
        forbidden = ["vdm_jax"]
        allowed = ["vdm_jax.models", "vdm_jax.errors"]
        allowed += [f"vdm_jax.sharding.{name}" for name in ("constrain", "shard_map_batch", "split")]
    elif module in ("vdm_jax.diffusion", "vdm_jax.samplers"):
        forbidden = [*forbidden, "vdm_jax.data"]
    elif is_within(module, scripts):
        forbidden = []
    if not is_within(module, ["vdm_jax.models"]):
        forbidden = [*forbidden, "flax"]
    names = sorted(imports(module, source))
    return [n for n in names if is_within(n, forbidden) and not is_within(n, allowed)]


def modules() -> dict[str, Path]:
    files = [f for folder in ("vdm_jax", "configs") for f in (ROOT / folder).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in sorted(files)}


@pytest.mark.parametrize("module, path", modules().items(), ids=modules())
def test_arrows(module, path):
    found = violations(module, path.read_text())
    assert not found, f"{module} must not import {', '.join(found)}"


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("vdm_jax.models.unet", "from vdm_jax.sharding import constrain", []),
        ("vdm_jax.models.unet", "import flax.linen as nn\nfrom vdm_jax.models import layers", []),
        ("vdm_jax.models.unet", "from vdm_jax.sharding import make_mesh", ["sharding.make_mesh"]),
        ("vdm_jax.models.unet", "from vdm_jax import sharding", ["sharding"]),
        ("vdm_jax.models.unet", "from vdm_jax import diffusion", ["diffusion"]),
        ("vdm_jax.models.unet", "from .. import text", ["text"]),
        ("vdm_jax.models.__init__", "from ..text import encode", ["text.encode"]),
        ("vdm_jax.diffusion", "def f():\n    import vdm_jax.models.unet", ["models.unet"]),
        ("vdm_jax.samplers", "from vdm_jax.data.world import World", ["data.world.World"]),
        ("vdm_jax.samplers", "from vdm_jax import diffusion", []),
        ("vdm_jax.data.world", "from vdm_jax.models import clip", ["models.clip"]),
        ("vdm_jax.data.world", "from vdm_jax.errors import UserError", []),
        ("vdm_jax.metrics.sync", "from vdm_jax import train", ["train"]),
        ("vdm_jax.train_state", "from vdm_jax import trainers", []),
        ("vdm_jax.stages", "from vdm_jax.models import clip\nfrom vdm_jax import data", []),
        ("vdm_jax.stages", "from vdm_jax.sample import load", ["sample.load"]),
        ("vdm_jax.media", "from vdm_jax import preview, text", ["preview"]),
        ("vdm_jax.evaluate", "from vdm_jax import sample, stages\nimport vdm_jax.models", []),
        ("vdm_jax.checkpoint", "from vdm_jax import stages, sample", ["sample"]),
    ],
)
def test_the_checker_sees(module, source, found):
    assert violations(module, source) == [f"vdm_jax.{name}" for name in found]


@pytest.mark.parametrize("module", ["vdm_jax.train", "vdm_jax.optim", "configs.world"])
@pytest.mark.parametrize("source", ["import flax", "from flax import linen as nn"])
def test_the_checker_sees_flax_outside_models(module, source):
    assert violations(module, source)


def test_data_and_metrics_start_without_jax():
    code = f"import sys, {', '.join(WITHOUT_JAX)}\nassert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_files_stay_readable_in_one_sitting():
    folders = ("vdm_jax", "configs", "tests", "launch")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".sh")]
    lengths = {f.name: len(f.read_text().splitlines()) for f in files}
    long = {name: length for name, length in lengths.items() if length > 500}
    assert lengths and not long, f"files past 500 lines: {long}"
