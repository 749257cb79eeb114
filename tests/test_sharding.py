"""The table of parameters, and a mesh of 8 devices that computes what one device computes.

The second test runs this file in a process with 8 virtual devices: python tests/test_sharding.py
"""

import dataclasses
import importlib
import pkgutil
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the process with 8 devices

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.helpers import finish, names, start, weights
from vdm_jax import overview, pipeline, sharding, train_state
from vdm_jax.data import text
from vdm_jax.errors import UserError
from vdm_jax.models import ops, published
from vdm_jax.models.layers import REMAT
from vdm_jax.models.published import naming
from vdm_jax.models.published.text_layers import TextEncoder
from vdm_jax.system import build, sampling
from vdm_jax.system.layout import STAGES

ONE = dict(data=-1, fsdp=1, sequence=1, tensor=1)
MESHES = {  # together they have every axis
    "fsdp, tensor": dict(fsdp=4, tensor=2),
    "data, sequence": dict(data=4, sequence=2),
}
SAMPLED = MESHES | {"data": dict(data=8)}  # where each device has whole clips, samples are equal bit for bit
CUT = ("data, sequence",)  # the mesh that cuts clips in time or height


@pytest.fixture(scope="module")
def shapes():
    """{stage/path: shape} of all parameters, with attention everywhere."""
    trees = build(with_attention(tiny.get_config())).param_shapes
    return {path: shape for path, shape in names(trees).items()}


def with_attention(config):
    """One level with every kind of layer, and attention heads for the tensor axis."""
    config.unlock()
    config.denoiser.model.update(channels=(16,), blocks=(1,), attention=(True,), cross_modal=(True,), time_strides=())
    return config


# ----------------------------------------------------------------------------------------------------------- table


def test_every_rule_is_for_some_parameter(shapes):
    for pattern, _ in sharding.PARAMETER_RULES[:-1]:
        matched = [path for path in shapes if re.search(pattern, path)]
        assert matched, f"{pattern} matches nothing"
        # And no earlier rule matches all of them.
        earlier = sharding.PARAMETER_RULES[: [p for p, _ in sharding.PARAMETER_RULES].index(pattern)]
        assert any(not any(re.search(p, path) for p, _ in earlier) for path in matched), pattern
        for word in re.findall(r"\(([a-z|]+)\)", pattern):
            for alternative in word.split("|"):
                assert any(f"/{alternative}/kernel" in path for path in shapes), alternative


def published_classes():
    """The published models, each with one layer where its settings count layers."""
    for info in pkgutil.iter_modules(published.__path__, f"{published.__name__}."):
        for kind in vars(importlib.import_module(info.name)).values():
            if getattr(kind, "__module__", "") == info.name and hasattr(kind, "example") and kind is not TextEncoder:
                counts = {"num_hidden_layers", "num_layers", "layers_per_block", "num_res_blocks"}
                yield kind(**dict.fromkeys(counts & {field.name for field in dataclasses.fields(kind)}, 1))


@pytest.mark.parametrize("model", [*published_classes()], ids=lambda model: type(model).__name__)
def test_large_parameters_of_published_models_have_a_rule(model):
    for path, shape in names(naming.param_shapes(model)).items():
        is_large = np.prod(shape) > max(shape)
        is_split = any(re.search(pattern, path) for pattern, _ in sharding.PARAMETER_RULES[:-1])
        assert is_split == is_large, path


def test_kernels_are_split_and_small_ones_left_whole(shapes):
    mesh = dict(data=1, fsdp=4, sequence=1, tensor=2)

    def spec(path, mesh=mesh):
        return sharding.parameter_spec(path, shapes[path], mesh)

    attention = "denoiser/middle_attention_video/self"
    assert shapes[f"{attention}/query/kernel"] == (16, 2, 8)
    assert spec(f"{attention}/query/kernel") == P(("fsdp",), ("tensor",), None)  # by heads
    assert spec(f"{attention}/out/kernel") == P(("tensor",), None, ("fsdp",))
    assert spec("clip/text_encoder/expand_0/kernel") == P(("fsdp",), ("tensor",))
    assert spec("clip/text_encoder/contract_0/kernel") == P(("tensor",), ("fsdp",))
    assert spec("clip/text_encoder/tokens/embedding") == P(None, ("fsdp",))
    assert spec("denoiser/middle_in_video/conv_in/space/kernel") == P(None, None, None, None, ("fsdp",))
    assert spec("denoiser/middle_in_video/norm_in/scale") == P(None)
    # 2 heads are not cut into 4 parts, and 12 outputs are not cut into 8.
    four = dict(data=1, fsdp=1, sequence=1, tensor=4)
    assert spec(f"{attention}/query/kernel", four) == P(None, None, None)
    assert sharding.parameter_spec("x/kernel", (3, 12), dict(mesh, fsdp=8)) == P(None, None)
    alone = dict.fromkeys(mesh, 1)
    assert {axis for path in shapes for axis in spec(path, alone)} == {None}


def test_optimizer_and_average_are_split_like_the_parameters():
    config = tiny.get_config()
    params = build(config).param_shapes["clip"]
    state = jax.eval_shape(lambda p: train_state.create(p, config.clip), params)
    mesh = sharding.make_mesh(ONE)
    found = sharding.state_shardings(state, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    mesh_shape = dict(data=1, fsdp=4, sequence=1, tensor=2)
    specs = {p: sharding.parameter_spec(p, s, mesh_shape) for p, s in names(state).items()}
    for path in names(params):
        same = [spec for p, spec in specs.items() if p.endswith(f"/{path}")]
        assert len(same) == 4 and len(set(same)) == 1, path  # params, ema, and Adam's two moments


# ------------------------------------------------------------------------------------------ meshes and activations


@pytest.mark.parametrize(
    "sizes",
    [dict(data=0), dict(data=-1, fsdp=0), dict(fsdp=-1), dict(data=-2), dict(data=-2, fsdp=-2), dict(data=7, fsdp=3)],
)
def test_meshes_that_do_not_fill_the_devices_are_told(sizes):
    with pytest.raises(UserError, match=f"does not fill {jax.device_count()} device"):
        sharding.make_mesh({**ONE, **sizes})


def test_batches_that_do_not_divide_are_told():
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), sharding.MESH_AXES)
    sharding.check_batch(16, mesh)
    for size, words in ((12, "use 8 or 16"), (3, "use 8$")):
        with pytest.raises(UserError, match=words):
            sharding.check_batch(size, mesh)


def test_parts_of_a_batch_must_divide_too():
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), sharding.MESH_AXES)
    sharding.check_batch(32, mesh, 4)
    for size, parts, words in (
        (16, 4, r"x 4 parts \(accumulate\): use 32$"),
        (40, 2, "use 32 or 48"),
    ):
        with pytest.raises(UserError, match=words):
            sharding.check_batch(size, mesh, parts)
    sharding.check_batch(48, mesh, 2, group=3)
    with pytest.raises(UserError, match=r"x 2 parts \(accumulate\) x 3 clips \(some.key\): use 48$"):
        sharding.check_batch(32, mesh, 2, group=3, group_key="some.key")


@pytest.mark.parametrize("sizes, told", [
    (dict(tensor=4), "mesh.tensor=4 does not divide the 2 of .*/kernel: use 1 or 2$"),
    (dict(sequence=5), "mesh.sequence=5 does not divide time or height of the clips of denoiser .*: use 1, 2, 3"),
])  # fmt: skip
def test_axes_that_split_nothing_are_told(sizes, told):
    system = build(with_attention(tiny.get_config()))
    mesh = jax.sharding.AbstractMesh(tuple({**ONE, "data": 1, **sizes}.values()), sharding.MESH_AXES)
    with pytest.raises(UserError, match=told):
        system.check_mesh(mesh, ["denoiser"])
    two = jax.sharding.AbstractMesh((1, 1, 2, 2), sharding.MESH_AXES)
    system.check_mesh(two, STAGES)


def test_sequence_takes_height_where_frames_do_not_divide():
    mesh = dict(data=2, fsdp=2, sequence=2, tensor=1)
    assert sharding.activation_spec((4, 6, 8, 8, 3), mesh) == P(("data", "fsdp"), "sequence", None, None, None)
    spec = sharding.activation_spec((4, 5, 8, 8, 3), mesh)
    assert spec == P(("data", "fsdp"), None, "sequence", None, None)


def test_the_resolved_table_is_shown(command):
    done = command(overview, "--config=tests/tiny.py", "--stage=clip", "--chips=8", "--config.mesh.fsdp=4")
    assert done.code == 0 and "mesh     data=2, fsdp=4, sequence=1, tensor=1" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    kernel = next(line for line in lines if line and line[-1] == "text_encoder/expand_0/kernel")
    assert kernel[:-1] == ["1,024", "(16,", "64)", "fsdp", "-"]
    assert any(line[1:] and line[1] == "x" and line[2:4] == ["-", "fsdp"] for line in lines)  # a line of the table
    whole = next(line for line in lines if line and line[-1] == "log_temperature")
    assert whole[-2] == "-"
    counted = sum(float(line[-3]) for line in lines if len(line) > 4 and line[1] == "x" and line[-2] == "M")
    assert counted == pytest.approx(0.023, abs=0.01)  # the table's lines hold all parameters
    assert command(overview, "--config=tests/tiny.py", "--chips=8", "--config.mesh.fsdp=3").code == 2


def test_each_process_loads_the_rows_that_its_devices_hold():
    mesh = sharding.make_mesh({**ONE, "data": jax.device_count()})
    assert sharding.local_rows(sharding.batch_sharding(mesh), 6) == list(range(6))


def test_parts_along_sequence_are_not_smaller_than_a_convolution_needs():
    mesh = dict(data=2, fsdp=1, sequence=4, tensor=1)
    assert sharding.activation_spec((2, 8, 3), mesh) == P("data", "sequence", None)
    assert sharding.activation_spec((2, 4, 3), mesh) == P("data", None, None)
    assert sharding.activation_spec((2, 4, 8, 8, 3), mesh) == P("data", None, "sequence", None, None)


def test_constrain_is_nothing_without_a_mesh():
    x = jnp.ones((2, 3, 4))
    assert sharding.constrain(x) is x


# ------------------------------------------------------------------------------------------------------- 8 devices


def test_eight_devices_compute_what_one_does():
    code, out, err = finish(start(__file__, JAX_NUM_CPU_DEVICES="8"), seconds=2400)
    assert code == 0, "\n".join(err[-20:])
    lines = [line for line in out.splitlines() if line.startswith("equal")]
    assert len(lines) == 4 * len(MESHES) + 2 * len(SAMPLED) + 2 * len(CUT) + 2, out


def distance(tree, want):
    """Returns the largest distance between two leaves, divided by the norm of the whole tree `want`."""
    scale = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(want)))
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a) - b) / scale, tree, want)))


def on_meshes(among):
    for title in among:
        sizes = SAMPLED[title]
        yield title, sharding.make_mesh({**ONE, **dict(data=1), **sizes})


def batches(system, rng):
    """{stage: 8 examples}; the denoiser's examples are encoded already."""
    length = system.config.data.text_length
    windows = system.config.denoiser.memory.windows
    lead = (8, windows) if windows > 1 else (8,)
    z = {m: rng.normal(size=(*lead, *shape)).astype(np.float32) for m, shape in system.layout.latent_shapes.items()}
    tokens = text.encode([f"clip {i}" for i in range(8)], length)
    words = {"states": rng.normal(size=(8, 96, 16)), "pooled": rng.normal(size=(8, 16))}
    words = {k: x.astype(np.float32) for k, x in words.items()} | {"mask": text.mask(tokens)}
    wrong = words | {"states": words["states"][::-1]}
    negatives = {"hard_negative": wrong} if system.stages["denoiser"].make_hard_negative else {}
    video = rng.integers(0, 256, (8, 5, 16, 24, 3), np.uint8)
    audio = rng.uniform(-1, 1, (8, system.layout.samples)).astype(np.float32)
    return {
        "video_autoencoder": {"video": video},
        "audio_autoencoder": {"audio": audio},
        "clip": {"tokens": tokens, "video": video},
        "denoiser": {"z": z, "text": words, **negatives},
    }


def compare_losses(config, among=MESHES, only=STAGES):
    """Compares loss and gradients of stages. The stages differ in `remat`, and half of them use two microbatches."""
    system = build(config)
    for i, (name, batch) in enumerate(batches(system, np.random.default_rng(0)).items()):
        if name not in only:
            continue
        config[name].remat = (*REMAT, ",".join(["blocks", "pointwise"][: len(config.denoiser.model.blocks)]))[i]
        config[name].accumulate = 1 + i % 2 if name != "clip" else 1
        loss = build(config).stages[name].loss
        params = weights(system.stages[name].param_shapes)
        encoders = system.stages[name].encoder_shapes
        encoder_params = {other: weights(encoders[other]) for other in ("clip", "base") if other in encoders}
        gradients = train_state.accumulated(jax.grad(loss, has_aux=True), config[name].accumulate)

        def run(params, batch, encoder_params, gradients=gradients):
            return gradients(params, jax.random.key(0), batch, encoder_params)

        want_grads, want = jax.device_get(jax.jit(run)(params, batch, encoder_params))
        for title, mesh in on_meshes(among):
            split = sharding.state_shardings(params, mesh)
            place = jax.device_put(params, split), jax.device_put(batch, sharding.batch_sharding(mesh))
            whole = sum(s.is_fully_replicated for s in jax.tree.leaves(split))
            assert (whole == len(jax.tree.leaves(split))) == ("fsdp" not in title)
            with jax.set_mesh(mesh):
                place += (jax.device_put(encoder_params, sharding.state_shardings(encoder_params, mesh)),)
                program = jax.jit(run, out_shardings=(split, None)).lower(*place).compile()
                grads, metrics = program(*place)
            assert jax.tree.map(lambda g: g.sharding, grads) == split
            assert "all-reduce" in program.as_text()
            np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
            assert distance(grads, want_grads) < 1e-5
            print(f"equal: {name}, {title}, off by {distance(grads, want_grads):.1e}")


def compare_samples(config):
    """The noise that sampling begins with, and what it ends with."""
    system = build(config)
    shapes = system.layout.latent_shapes
    params = {name: weights(tree) for name, tree in system.param_shapes.items()}
    params["statistics"] = {m: {"mean": np.zeros(s[-1], "f"), "std": np.ones(s[-1], "f")} for m, s in shapes.items()}
    prompts = [f"clip {i}" for i in range(8)]
    sampler = sampling.Sampler(system)
    together = sampler(params, prompts)
    # A device that has one of eight clips computes what one device does with that clip alone, to the last bit. With
    # eight at once its products are of other shapes, and round otherwise.
    arrays, static = sampler.arguments(params)
    tokens, key = text.encode(prompts, config.data.text_length), jax.random.fold_in(jax.random.key(0), 0)
    singly = [
        jax.device_get(
            sampler.program(params, key=key, numbers=np.arange(i, i + 1), tokens=tokens[i : i + 1], **arrays, **static)
        )[:2]
        for i in range(8)
    ]
    singly = [np.concatenate(parts) for parts in zip(*singly)]

    def noise():
        return sampling.draw_noise(jax.random.key(3), jnp.arange(8), shapes, 0)

    want = jax.device_get(jax.jit(noise)())
    for title, mesh in on_meshes(SAMPLED):
        with jax.set_mesh(mesh):
            drawn = jax.jit(noise, out_shardings=sharding.batch_sharding(mesh))()
        video, audio = pipeline.Pipeline(system, params, mesh).sample(prompts)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(drawn), want)
        print(f"equal: noise, {title}")
        if title == "data":
            np.testing.assert_array_equal(video, singly[0])
            np.testing.assert_array_equal(audio, singly[1])
        # A frame may round to the next of 256 values.
        assert np.abs(video.astype(int) - together[0].astype(int)).max() <= 1
        np.testing.assert_allclose(audio, together[1], atol=1e-4)
        print(f"equal: samples, {title}, off by {np.abs(audio - together[1]).max():.1e}")


if __name__ == "__main__":
    assert jax.device_count() == 8
    compare_losses(with_attention(tiny.get_config("hard_negatives")))
    with ops.backend("tpu"):  # the autoencoder with factorized convolutions, the denoiser with full ones
        recipe = tiny.get_config()
        recipe.unlock()
        recipe.denoiser.model.factorized = False
        compare_losses(recipe, CUT, ("video_autoencoder", "denoiser"))
    recipe = with_attention(tiny.get_config())
    recipe.denoiser.lora.update(rank=4, layers="query|out|space")
    compare_losses(recipe, ("fsdp, tensor",), ("denoiser",))
    compare_losses(with_attention(tiny.get_config("memory")), ("fsdp, tensor",), ("denoiser",))
    compare_samples(with_attention(tiny.get_config()))
