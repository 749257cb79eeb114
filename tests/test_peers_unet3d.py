"""Our UNet3DCondition against diffusers' UNet3DConditionModel: parameters, values, gradients, weights from a file."""

import math

import jax
import numpy as np
import pytest

from tests.peers import unet3d
from vdm_jax.errors import UserError
from vdm_jax.models.published.unet3d_condition import (
    MODELSCOPE,
    UNet3DCondition,
    diffusers_shapes,
    load_diffusers,
    param_shapes,
)

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

MODEL = UNet3DCondition(**unet3d.TINY)
JOB = dict(frames=3, size=5, words=5, batch=2)


@pytest.fixture(scope="module")
def theirs():
    torch.set_num_threads(1)
    return unet3d.randomize(unet3d.build(unet3d.TINY)).eval()  # eval: without dropout


def arrays(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors}


@pytest.fixture(scope="module")
def params(theirs):
    return load_diffusers(arrays(theirs.named_parameters()), MODEL)


def test_output_of_the_same_weights(theirs, params):
    video, timesteps, text = unet3d.job(unet3d.TINY, **JOB)
    with torch.no_grad():
        want = unet3d.call(theirs, video, timesteps, text).numpy()
    run = jax.jit(MODEL.apply)
    got = run({"params": params}, video, timesteps, text)
    assert want.shape == (2, 3, 5, 5, 3) and 0.3 < want.std() < 3
    np.testing.assert_allclose(got, want, atol=1e-4)
    # Each input reaches the output.
    for i, (name, x) in enumerate({"video": video, "timesteps": timesteps, "text": text}.items()):
        inputs = [video, timesteps, text]
        inputs[i] = x[::-1]
        assert np.abs(run({"params": params}, *inputs) - got).max() > 1e-2, name


def test_gradients_of_the_same_loss(theirs, params):
    inputs = unet3d.job(unet3d.TINY, **JOB)
    theirs.zero_grad()
    unet3d.call(theirs, *inputs).square().mean().backward()
    want = load_diffusers(arrays((name, p.grad) for name, p in theirs.named_parameters()), MODEL)
    got = jax.jit(jax.grad(lambda params: (MODEL.apply({"params": params}, *inputs) ** 2).mean()))(params)

    def close(path, got, want):
        scale = np.abs(want).max()
        assert scale > 1e-8, path
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-3, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize(
    "settings, millions", [(unet3d.SETTINGS, 52.94), (MODELSCOPE, 1411.23)], ids=["benchmark", "ModelScope"]
)
def test_names_shapes_and_number_of_parameters(settings, millions):
    model = UNet3DCondition(**settings)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in unet3d.build(settings).named_parameters()}
    assert diffusers_shapes(model) == shapes
    number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(model)))
    assert number == sum(map(math.prod, shapes.values())) and round(number / 1e6, 2) == millions


def test_weights_from_a_file(theirs, params, tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors_torch.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, path)
    loaded = load_diffusers(safetensors_numpy.load_file(path), MODEL)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("mid_block.attentions.0.proj_in.bias", None, "mid_block.attentions.0.proj_in.bias is missing"),
        ("conv_in.extra", (3,), "conv_in.extra has no place"),
        ("conv_in.weight", (8, 4, 3, 1), r"conv_in.weight has shape \(8, 4, 3, 1\)"),
        ("conv_in.weight", (4, 8, 3, 3), r"needs \(8, 4, 3, 3\)"),  # the same number of values in another order
    ],
    ids=["missing", "too many", "another window", "another order"],
)
def test_wrong_weights_are_one_clear_error(theirs, name, shape, said):
    flat = arrays(theirs.named_parameters())
    if shape is None:
        del flat[name]
    else:
        flat[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=said) as error:
        load_diffusers(flat, MODEL)
    assert "\n" not in str(error.value)
