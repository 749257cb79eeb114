"""The parameter table, and that a mesh of 8 devices computes what one device does.

The second needs its own process, whose devices are 8 virtual ones: python tests/test_sharding.py
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the process of its own

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.helpers import finish, names, start, weights
from vdm_jax import sharding, stages, text, train_state
from vdm_jax.errors import UserError

ONE = dict(data=-1, fsdp=1, sequence=1, tensor=1)
MESHES = {"data": dict(data=8), "fsdp": dict(fsdp=8), "fsdp, tensor": dict(fsdp=4, tensor=2)}


@pytest.fixture(scope="module")
def shapes():
    """{stage/path: shape} of all parameters, with attention everywhere."""
    trees = stages.abstract_params(with_attention(tiny.get_config()))
    return {path: shape for path, shape in names(trees).items()}


def with_attention(config):
    """One level of everything, and heads for the tensor axis."""
    config.unlock()
    config.denoiser.model.update(channels=(16,), blocks=(1,), attention=(True,), exchange=(True,), time_strides=())
    return config


# ----------------------------------------------------------------------------------------------------------- table


def test_every_rule_is_for_some_parameter(shapes):
    for pattern, _ in sharding.PARAMETER_RULES[:-1]:
        matched = [path for path in shapes if re.search(pattern, path)]
        assert matched, f"{pattern} matches nothing"
        # And no rule before it takes them all.
        earlier = sharding.PARAMETER_RULES[: [p for p, _ in sharding.PARAMETER_RULES].index(pattern)]
        assert any(not any(re.search(p, path) for p, _ in earlier) for path in matched), pattern
        for word in re.findall(r"\(([a-z|]+)\)", pattern):
            for alternative in word.split("|"):
                assert any(f"/{alternative}/kernel" in path for path in shapes), alternative


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
    # 2 heads over 4, and 12 outputs over 8, stay whole.
    four = dict(data=1, fsdp=1, sequence=1, tensor=4)
    assert spec(f"{attention}/query/kernel", four) == P(None, None, None)
    assert sharding.parameter_spec("x/kernel", (3, 12), dict(mesh, fsdp=8)) == P(None, None)
    alone = dict.fromkeys(mesh, 1)
    assert {axis for path in shapes for axis in spec(path, alone)} == {None}


def test_optimiser_and_average_are_split_like_the_parameters():
    config = tiny.get_config()
    params = stages.abstract_params(config)["clip"]
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
    for size, words in ((12, "use 8 or 16"), (3, "use 8$"), (0, "at least 1"), (-8, "at least 1")):
        with pytest.raises(UserError, match=words):
            sharding.check_batch(size, mesh)


def test_constrain_raises_on_unknown_names_and_is_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x
    with pytest.raises(ValueError, match="unknown activation dimension 'batches'"):
        sharding.constrain(x, "batches", "token")
    with pytest.raises(ValueError, match="1 names"):
        sharding.constrain(x, "batch")
    with jax.set_mesh(sharding.make_mesh({**ONE, "data": jax.device_count()})):
        jax.jit(lambda x: sharding.constrain(x, "batch", "channel"))(x)
        with pytest.raises(ValueError, match="unknown"):
            jax.jit(lambda x: sharding.constrain(x, "batch", "chanel"))(x)


# ------------------------------------------------------------------------------------------------------- 8 devices


def test_eight_devices_compute_what_one_does():
    code, out, err = finish(start(__file__, JAX_NUM_CPU_DEVICES="8"), seconds=900)
    assert code == 0, "\n".join(err[-20:])
    lines = [line for line in out.splitlines() if line.startswith("equal")]
    assert len(lines) == 2 * len(MESHES), out


def compare():
    assert jax.device_count() == 8
    config = with_attention(tiny.get_config())
    built, trees = stages.build(config), stages.abstract_params(config)
    rng = np.random.default_rng(0)
    size = stages.layout(config)
    z = {m: rng.normal(size=(8, *shape)).astype(np.float32) for m, shape in stages.latent_shapes(size).items()}
    tokens = text.encode([f"clip {i}" for i in range(8)], config.data.text_length)
    words = {"states": rng.normal(size=(8, 96, 16)), "pooled": rng.normal(size=(8, 16))}
    words = {k: x.astype(np.float32) for k, x in words.items()} | {"mask": text.mask(tokens)}
    batches = {
        "video_autoencoder": {"video": rng.integers(0, 256, (8, 5, 16, 16, 3), np.uint8)},
        "denoiser": {"z": z, "text": words},
    }
    for name, batch in batches.items():
        params = weights(trees[name])
        frozen = {"clip": weights(trees["clip"])} if name == "denoiser" else {}

        def run(params, batch, frozen, name=name):
            return jax.value_and_grad(built[name].loss, has_aux=True)(params, jax.random.key(0), batch, frozen)

        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        (want, _), want_grads = jax.device_get(jax.jit(run)(*jax.device_put((params, batch, frozen), one)))
        for title, sizes in MESHES.items():
            mesh = sharding.make_mesh({**ONE, **dict(data=1), **sizes})
            split = sharding.state_shardings(params, mesh)
            place = jax.device_put(params, split), jax.device_put(batch, sharding.batch_sharding(mesh))
            whole = sum(s.is_fully_replicated for s in jax.tree.leaves(split))
            assert (whole == len(jax.tree.leaves(split))) == (title == "data")
            with jax.set_mesh(mesh):
                program = jax.jit(run, out_shardings=((None, None), split)).lower(*place, frozen).compile()
                (loss, _), grads = program(*place, frozen)
            assert jax.tree.map(lambda g: g.sharding, grads) == split
            assert "all-reduce" in program.as_text()
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            scale = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(want_grads)))
            apart = jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a) - b), grads, want_grads)
            assert max(jax.tree.leaves(apart)) < 1e-5 * scale, apart
            print(f"equal: {name}, {title}, off by {max(jax.tree.leaves(apart)) / scale:.1e}")


if __name__ == "__main__":
    compare()
