"""Adapters: the maths, a run that trains them, and the files that this package and `peft` exchange."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tests import tiny
from tests.helpers import digest, final_state, init_weights, names
from tests.helpers import weights as random_weights
from vdm_jax import lora, sample, sharding, train, validation, weights
from vdm_jax.errors import UserError
from vdm_jax.models import layers
from vdm_jax.perf import programs
from vdm_jax.pipeline import load
from vdm_jax.run import folder
from vdm_jax.system import adapters, build

LAYERS = r"(query|out|film|conv_in/time)/kernel$"
FLAGS = ["--config=tests/tiny.py", "--config.denoiser.lora.rank=2", "--config.validation.every=0"]
FLAGS += [f"--config.denoiser.lora.layers={LAYERS}", "--config.denoiser.learning_rate=0.02"]
TRAIN = ["--stage=denoiser", *FLAGS]


def recipe(**settings):
    config = tiny.get_config()
    config.denoiser.lora.update(settings)
    return config


# ---------------------------------------------------------------------------------------------------------- maths


@pytest.mark.parametrize(
    "layer, shape, first, second",
    [
        (layers.Dense(6), (2, 5), layers.Dense(3, use_bias=False), layers.Dense(6, use_bias=False)),
        (layers.Dense((3, 4), name="query"), (2, 5), layers.Dense(3, use_bias=False), layers.Dense(12, use_bias=False)),
        (layers.Dense(6, axes=2, name="out"), (2, 3, 4), layers.Dense(3, axes=2, use_bias=False), None),
        (layers.Conv(6, (3,)), (2, 7, 5), layers.Conv(3, (3,), use_bias=False), layers.Conv(6, (1,), use_bias=False)),
        (
            layers.Conv(6, (3, 3), strides=(2, 2)),
            (2, 3, 6, 4, 5),
            layers.Conv(3, (3, 3), strides=(2, 2), use_bias=False),
            layers.Conv(6, (1, 1), use_bias=False),
        ),
        (
            layers.Conv(6, (3, 1, 1)),
            (2, 3, 6, 4, 5),
            layers.Conv(3, (3, 1, 1), use_bias=False),
            layers.Conv(6, (1, 1, 1), use_bias=False),
        ),
    ],
    ids=["dense", "query", "out", "sound", "frames", "time"],
)
def test_merged_equals_unmerged(layer, shape, first, second):
    """A layer with a merged kernel equals the layer plus alpha / rank times the layers A and B, one after another."""
    second = second or layers.Dense(6, use_bias=False)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    name = layer.name or "layer"
    base = {name: init_weights(layer, x)}
    made = random_weights(lora.shapes(base, 3, ""), seed=1)
    a, b = (made[name][factor]["kernel"] for factor in ("lora_A", "lora_B"))
    if name == "out":
        a = a.reshape(3, 4, 3)
    low = first.apply({"params": {"kernel": a}}, x)
    want = layer.apply({"params": base[name]}, x)
    want += 1.5 / 3 * second.apply({"params": {"kernel": b}}, low).reshape(want.shape)
    got = layer.apply({"params": lora.merge(base, made, 1.5)[name]}, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - layer.apply({"params": base[name]}, x)).max() > 0.1


def test_new_adapters_change_nothing_and_the_first_factor_has_the_scale_of_its_inputs():
    base = {"x": {"kernel": jnp.ones((3, 40, 50)), "bias": jnp.ones(50)}}
    made = lora.init(jax.random.key(0), base, 20, "")
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base, made, 8.0), base)
    assert np.std(made["x"]["lora_A"]["kernel"]) == pytest.approx(120**-0.5, rel=0.05)


@pytest.mark.parametrize(
    "layers, message",
    [
        ("x/b/quary", r"is found in no path of a kernel; the nearest are x/b/query/kernel, x/a/query/kernel"),
        ("query_norm/scale", r"is found in no path of a kernel; the nearest are "),
        ("(query", r"layers='\(query' is no regular expression: missing \)"),
    ],
)
def test_layers_that_find_no_kernel_are_told(layers, message):
    kernels = {name: {"kernel": np.zeros((2, 2))} for name in ("query", "key", "value")}
    base = {"x": {"a": kernels | {"query_norm": {"scale": np.zeros(2)}}, "b": kernels}}
    with pytest.raises(UserError, match=message) as error:
        lora.shapes(base, 2, layers)
    assert "\n" not in str(error.value)


def test_only_the_state_of_adapters_is_planned():
    system = build(recipe(rank=2, layers=LAYERS))
    trained, base = system.stages["denoiser"].param_shapes, system.param_shapes["denoiser"]
    assert names(base) == names(build(tiny.get_config()).param_shapes["denoiser"])
    count = programs.count_parameters(trained)
    program = programs.train_step(system, "denoiser", sharding.make_mesh(dict(data=-1, fsdp=1, sequence=1, tensor=1)))
    assert program.params == count < programs.count_parameters(base) / 2
    state, _, _, encoders = program.arguments
    # Parameters, EMA and two moments, with four counters: the step, the mean of the loss, and two of the optimizer.
    assert programs.count_parameters(state) == 4 * count + 4
    assert names(encoders["base"]) == names(base)


def test_validation_shows_the_merged_denoiser(monkeypatch):
    system = build(recipe(rank=2, layers=LAYERS))
    base = random_weights(system.param_shapes["denoiser"])
    made = random_weights(system.stages["denoiser"].param_shapes, seed=1)

    class Pipe:
        def __init__(self, *arguments):
            self.params = {}

        def __call__(self, text, seed):
            return SimpleNamespace(video=self.params["denoiser"], audio=None)

    monkeypatch.setattr(validation, "Pipeline", Pipe)
    (clip,) = validation.samples(system, None, [{"text": "x", "seed": 0}])(made, {"base": base})
    shown = clip.video
    want = lora.merge(base, made, 8.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), shown, want)


# ----------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def base(tiny_run, tmp_path_factory):
    """The exported weights of the tiny run."""
    out = tmp_path_factory.mktemp("lora") / "base"
    folder.write_exported(out, folder.load(tiny_run, build), tiny_run)
    return out


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("lora") / "run"


@pytest.fixture
def run(command, base, workdir):
    """A run whose adapters are trained on the exported weights."""
    if not workdir.exists():
        flags = [*FLAGS, f"--workdir={workdir}", f"--config.denoiser.lora.base={base}"]
        done = command(weights, "import", f"--weights={base}", *flags)
        assert done.code == 0 and "denoiser restarts at step 0: its adapters are freshly initialized" in done.out
        assert [folder.newest_step(workdir, stage) for stage in ("clip", "denoiser")] == [8, 0]
        assert command(train, "--stage=denoiser", *flags).code == 0
    return workdir


def test_training_changes_only_adapters_and_resumes_bit_for_bit(command, run, base, tmp_path):
    state = final_state(run, "denoiser", recipe(rank=2, layers=LAYERS))
    moved = jax.tree.map(lambda x: np.abs(x).max() > 0, state["params"])
    assert all(jax.tree.leaves(moved))
    trained, before = (load(path).params["denoiser"] for path in (run, base))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(before), strict=True):
        is_adapted = re.search(LAYERS, sharding.path_name(path)) is not None
        assert np.array_equal(x, y) != is_adapted, path

    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "denoiser" / "checkpoints" / "8")
    # The folder of the base may move; its content may not change.
    moved = shutil.copytree(base, tmp_path / "moved")
    done = command(train, *TRAIN, f"--workdir={copy}", f"--config.denoiser.lora.base={moved}")
    assert done.code == 0 and any("4 of 8 steps done" in line for line in done.err)
    assert digest(final_state(copy, "denoiser", recipe(rank=2, layers=LAYERS))) == digest(state)


def test_exports_merged_and_alone(command, run, base, tmp_path):
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    assert command(weights, "export", f"--workdir={run}", f"--out={merged}").code == 0
    done = command(weights, "export", f"--workdir={run}", f"--out={alone}", "--adapters")
    assert done.code == 0 and "adapters of rank 2 at step 8" in done.out
    want = load(run).params["denoiser"]
    pipe = load(merged)
    assert not pipe.config.denoiser.lora.rank
    jax.tree.map(np.testing.assert_array_equal, pipe.params["denoiser"], folder.as_exported(want))
    file = alone / adapters.FILE
    jax.tree.map(np.testing.assert_array_equal, load(base, lora=str(file)).params["denoiser"], want)
    twice = load(base, lora=[f"{file}:0.5", f"{file}:0.5"]).params["denoiser"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), twice, want)

    jax.tree.map(
        np.testing.assert_array_equal, load(base, lora=f"{file}:0").params["denoiser"], load(base).params["denoiser"]
    )

    done = command(sample, "--prompt=a red circle", f"--weights={base}", f"--lora={file}:x", f"--out={tmp_path}/a.mp4")
    assert done.code == 2 and done.err == [f"error: lora={file}:x: the scale 'x' is no finite number: write FILE:0.5"]
    done = command(weights, "verify", str(run))
    assert done.code == 0 and f"{run}/denoiser/base.json: good" in done.out
    done = command(weights, "export", f"--workdir={base}", f"--out={alone}", "--adapters")
    assert done.code == 2 and "has no adapters" in done.err[-1]


def test_a_base_that_does_not_fit_is_refused(command, run, base, tiny_run, tmp_path):
    trained = folder.load(base, build)
    system = build(recipe(rank=2, layers=LAYERS))
    workdir, statistics = epath.Path(run), trained.params["statistics"]

    def refused(message, statistics=statistics, **settings):
        config = system.config.copy_and_resolve_references()
        config.update_from_flattened_dict({f"denoiser.{key.replace('__', '.')}": x for key, x in settings.items()})
        with pytest.raises(UserError, match=message) as error:
            folder.read_base(workdir, dataclasses.replace(system, config=config), statistics)
        assert "\n" not in str(error.value)

    refused("adapters need a base")
    refused("has adapters itself: merge them", lora__base=str(run))
    refused("target='v', and have no meaning with 'x0'", lora__base=str(base), diffusion__target="x0")
    scaled = jax.tree.map(lambda x: 2 * x, statistics)
    refused("have another mean and scale", scaled, lora__base=str(base))

    copy = shutil.copytree(run, tmp_path / "copy")
    trained.params["denoiser"]["stem_video"]["bias"] += 1
    folder.write_exported(tmp_path / "other", trained, tiny_run)
    done = command(
        train, *TRAIN, f"--workdir={copy}", "--config.denoiser.steps=9", f"--config.denoiser.lora.base={tmp_path}/other"
    )
    assert done.code == 2 and f"other differs from the weights that {copy} began with" in done.err[-1]
    (copy / "denoiser" / "base.json").unlink()
    with pytest.raises(UserError, match="base.json is missing"):
        load(copy)
    done = command(train, *TRAIN, f"--workdir={tmp_path}/new", "--config.denoiser.lora.rank=0")
    assert done.code == 2 and "get no adapters with denoiser.lora.rank=0: give a rank" in done.err[-1]


# ----------------------------------------------------------------------------------------------------------- files

NETWORK = {"a": {"query": {"kernel": (6, 2, 4), "bias": (2, 4)}, "conv": {"kernel": (3, 3, 6, 5)}}}
SHAPES = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), NETWORK, is_leaf=lambda x: isinstance(x, tuple)
)


def test_files_there_and_back_have_the_names_and_shapes_of_peft(tmp_path):
    made = random_weights(lora.shapes(SHAPES, 2, ""))
    adapters.write(tmp_path, made, 4.0)
    tensors = safetensors.numpy.load_file(tmp_path / adapters.FILE)
    assert {name: x.shape for name, x in tensors.items()} == {
        "base_model.model.a.query.lora_A.weight": (2, 6),
        "base_model.model.a.query.lora_B.weight": (8, 2),
        "base_model.model.a.conv.lora_A.weight": (2, 6, 3, 3),
        "base_model.model.a.conv.lora_B.weight": (5, 2, 1, 1),
    }
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4.0, r"a\.conv|a\.query")
    read, alpha = adapters.read(tmp_path / adapters.FILE, SHAPES)
    assert alpha == 4.0
    jax.tree.map(np.testing.assert_array_equal, read, made)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), "is no readable safetensors file"),
        (lambda f: f.write_bytes(b"\x80\x04pickle"), "is no readable safetensors file"),
        (lambda f: rewrite(f, b=np.ones((5, 3, 1, 1), "f")), r"lora_B.weight has shape \(5, 3, 1, 1\), but .* needs"),
        (lambda f: rewrite(f, a=np.ones((), "f")), r"lora_A.weight has shape \(\)"),
        (lambda f: rewrite(f, a=np.full((2, 6, 3, 3), np.nan, "f")), "not finite"),
        (lambda f: rewrite(f, b=None), "the other half of an adapter"),
        (lambda f: rewrite(f, more="base_model.model.a.conf.lora_A.weight"), "its nearest layer: a.conv"),
        (lambda f: rewrite(f, more="base_model.model.a.conv.lora_B.bias"), "lora_B.bias, which is of no adapter"),
        (lambda f: safetensors.numpy.save_file({}, f), "holds no adapter"),
        (lambda f: configure(f, use_dora=True), "use_dora=True is not supported"),
        (lambda f: configure(f, init_lora_weights="pissa"), "init_lora_weights=pissa is not supported"),
        (lambda f: configure(f, alpha_pattern={"conv": 3}), "alpha_pattern={'conv': 3} is not supported"),
        (lambda f: configure(f, peft_type="LOHA"), "peft_type=LOHA is not supported"),
        (lambda f: configure(f, lora_alpha="8"), "lora_alpha=8 is no number"),
        (lambda f: (f.parent / adapters.CONFIG).unlink(), "adapter_config.json is missing"),
        (lambda f: (f.parent / adapters.CONFIG).write_text("{"), "adapter_config.json is damaged"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, change, message):
    adapters.write(tmp_path, random_weights(lora.shapes(SHAPES, 2, "")), 4.0)
    change(tmp_path / adapters.FILE)
    with pytest.raises(UserError, match=message) as error:
        adapters.merge_files(SHAPES, [str(tmp_path / adapters.FILE)])
    assert "\n" not in str(error.value)


def rewrite(file, more=None, **changed):
    """Changes the factors a and b of the layer a.conv, or adds a tensor `more`."""
    tensors = safetensors.numpy.load_file(file)
    for factor, x in changed.items():
        name = f"base_model.model.a.conv.lora_{factor.upper()}.weight"
        tensors[name] = x
        if x is None:
            del tensors[name]
    if more:
        tensors[more] = np.ones(2, np.float32)
    safetensors.numpy.save_file(tensors, file)


def configure(file, **settings):
    path = file.parent / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "text, message",
    [
        ("FILE:much", "the scale 'much' is no finite number"),
        ("FILE:nan", "the scale 'nan' is no finite number"),
        ("FILE:1e39", "the scale '1e39' is no finite number"),
        ("FILE:", "the scale '' is no finite number"),
        (".", "is a folder: give the file"),
        ("none.safetensors", "none.safetensors is missing"),
    ],
)
def test_a_bad_flag_is_one_clear_error(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        adapters.merge_files(SHAPES, [text])
