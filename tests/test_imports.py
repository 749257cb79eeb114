"""Who may import whom: folder rules, read from the source. They keep each idea in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train", "sample", "evaluate", "weights", "bench", "dry_run", "overview", "app", "prepare")
# (modules that the rule is for, what they must not import, exceptions); names are inside vdm_jax
RULES = [
    (["models"], [""], ["models", "errors", "sharding"]),
    (["diffusion", "samplers", "tasks"], ["models", "data", "system", "run", "perf", "metrics"], []),
    (["data", "run", "perf"], ["models", "system", "pipeline", "metrics"], ["models.ops"]),
    (["system", "train_state", "optim", "sharding", "errors"], ["pipeline"], []),
    (["metrics"], ["models", "system", "pipeline", "run"], ["run.storage"]),
]
ONLY_IN_MODELS = "flax"
WITHOUT_JAX = [  # what a process that only loads or measures data needs, quick to start
    "vdm_jax",
    "vdm_jax.data.files",
    "vdm_jax.data.world",
    "vdm_jax.metrics.reconstruction",
    "vdm_jax.metrics.report",
    "vdm_jax.metrics.tracker",
]


def imports(module, source):
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


def is_within(name, packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def inside(names):
    """['data', ''] -> ['vdm_jax.data', 'vdm_jax']."""
    return [f"vdm_jax.{name}".rstrip(".") for name in names]


def violations(module, source):
    """The imports of a module, by its dotted name, that the rules do not allow."""
    found = []
    for name in sorted(imports(module, source)):
        if is_within(name, [ONLY_IN_MODELS]) and not is_within(module, inside(["models"])):
            found.append(name)
        if is_within(name, inside(COMMANDS)) and not is_within(module, inside(COMMANDS)):
            found.append(name)  # commands are at the top
        for modules, forbidden, allowed in RULES:
            if not is_within(module, inside(modules)) or not is_within(name, inside(forbidden)):
                continue
            if not is_within(name, inside([*allowed, *modules])):
                found.append(name)
    return list(dict.fromkeys(found))


def modules():
    files = [f for folder in ("vdm_jax", "configs") for f in (ROOT / folder).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in sorted(files)}


@pytest.mark.parametrize("module, path", modules().items(), ids=modules())
def test_folder_rules(module, path):
    found = violations(module, path.read_text())
    assert not found, f"{module} must not import {', '.join(found)}"


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("vdm_jax.models.unet", "from vdm_jax.sharding import constrain", []),
        ("vdm_jax.models.unet", "import flax.linen as nn\nfrom vdm_jax.models import layers", []),
        ("vdm_jax.models.unet", "from vdm_jax import diffusion", ["diffusion"]),
        ("vdm_jax.models.unet", "from .. import data", ["data"]),
        ("vdm_jax.models.__init__", "from ..data.text import encode", ["data.text.encode"]),
        ("vdm_jax.diffusion", "def f():\n    import vdm_jax.models.unet", ["models.unet"]),
        ("vdm_jax.samplers", "from vdm_jax.data.world import World", ["data.world.World"]),
        ("vdm_jax.samplers", "from vdm_jax import diffusion", []),
        ("vdm_jax.data.world", "from vdm_jax.models import clip", ["models.clip"]),
        ("vdm_jax.data.world", "from vdm_jax.errors import UserError", []),
        ("vdm_jax.run.folder", "from vdm_jax.system import build", ["system.build"]),
        ("vdm_jax.perf.hlo", "from vdm_jax.models.unet import UNet", ["models.unet.UNet"]),
        ("vdm_jax.metrics.tasks", "from vdm_jax import train", ["train"]),
        ("vdm_jax.train_state", "from vdm_jax import trainers", []),
        ("vdm_jax.system.losses", "from vdm_jax.models import clip\nfrom vdm_jax import data", []),
        ("vdm_jax.system.losses", "from vdm_jax.sample import main", ["sample.main"]),
        ("vdm_jax.system.losses", "from vdm_jax.pipeline import load", ["pipeline.load"]),
        ("vdm_jax.pipeline", "import flax", ["flax"]),
        ("vdm_jax.evaluate", "from vdm_jax import sample", []),
    ],
)
def test_the_rules_themselves(module, source, found):
    inner = [name.removeprefix("vdm_jax.") for name in violations(module, source)]
    assert inner == found


def test_there_is_no_circle():
    """Every import goes one way: what a module imports does not import it back, directly or through others."""
    known = modules()
    graph = {}
    for module, path in known.items():
        names = imports(module, path.read_text())
        reached = {n for n in known for name in names if name == n or name.startswith(n + ".")}
        reached |= {n for n in known if n.endswith(".__init__") and n.removesuffix(".__init__") in names}
        package = module.removesuffix(".__init__")
        graph[module] = {n for n in reached if n not in (module, "vdm_jax.__init__") and n != package}

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    done = set()
    for module in graph:
        visit(module, [])


def test_data_and_metrics_start_without_jax():
    code = f"import sys, {', '.join(WITHOUT_JAX)}\nassert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
