"""Our UNet3DConditionModel against that of diffusers: parameters, values, gradients, weights from a file."""

import copy
import math

import jax
import numpy as np
import pytest

from tests.helpers import weights
from tests.peers import unet3d
from vdm_jax import lora
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.models.published.unet3d_condition import UNet3DConditionModel
from vdm_jax.run import huggingface
from vdm_jax.system import adapters

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MODEL = UNet3DConditionModel(**unet3d.TINY)
JOB = dict(frames=3, size=5, words=5, batch=2)


@pytest.fixture(scope="module")
def theirs():
    torch.set_num_threads(1)
    return unet3d.randomize(diffusers.UNet3DConditionModel(**unet3d.TINY)).eval()  # eval: without dropout


def arrays(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors}


@pytest.fixture(scope="module")
def params(theirs):
    return naming.to_params(arrays(theirs.named_parameters()), MODEL)


def test_output_of_the_same_weights(theirs, params):
    video, timesteps, text = unet3d.job(unet3d.TINY, **JOB)
    with torch.no_grad():
        want = unet3d.call(theirs, video, timesteps, text).numpy()
    run = jax.jit(MODEL.apply)
    got = run({"params": params}, video, timesteps, text)
    assert want.shape == (2, 3, 5, 5, 3) and 0.3 < want.std() < 3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # Each input reaches the output.
    for i, (name, x) in enumerate({"video": video, "timesteps": timesteps, "text": text}.items()):
        inputs = [video, timesteps, text]
        inputs[i] = x[::-1]
        assert np.abs(run({"params": params}, *inputs) - got).max() > 1e-2, name


def test_gradients_of_the_same_loss(theirs, params):
    inputs = unet3d.job(unet3d.TINY, **JOB)
    theirs.zero_grad()
    unet3d.call(theirs, *inputs).square().mean().backward()
    want = naming.to_params(arrays((name, p.grad) for name, p in theirs.named_parameters()), MODEL)
    got = jax.jit(jax.grad(lambda params: (MODEL.apply({"params": params}, *inputs) ** 2).mean()))(params)

    def close(path, got, want):
        scale = np.abs(want).max()
        assert scale > 1e-8, path
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-3, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize(
    "settings, millions", [(unet3d.SETTINGS, 52.94), ({}, 1411.23)], ids=["benchmark", "ModelScope"]
)
def test_names_shapes_and_number_of_parameters(settings, millions):
    with torch.device("meta"):
        theirs = diffusers.UNet3DConditionModel(**settings)
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert naming.tensor_shapes(naming.from_config(UNet3DConditionModel, theirs.config)) == shapes
    assert round(sum(map(math.prod, shapes.values())) / 1e6, 2) == millions


def test_a_folder_of_diffusers_there_and_back(theirs, params, tmp_path):
    theirs.save_pretrained(tmp_path)
    name, config = huggingface.read_config(tmp_path)
    assert name == "UNet3DConditionModel" and config["norm_eps"] == 1e-5
    older = {"center_input_sample": False, "use_linear_projection": True}  # keys of files that the class does not have
    assert naming.from_config(UNet3DConditionModel, {**config, **older}) == MODEL
    loaded = naming.to_params(huggingface.read_tensors(tmp_path), MODEL)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(np.testing.assert_array_equal, naming.to_tensors(params), arrays(theirs.named_parameters()))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(act_fn="gelu"), "act_fn='gelu' is not supported, only with 'silu' or 'swish'"),
        (dict(mid_block_scale_factor=1.5), "mid_block_scale_factor=1.5 is not supported"),
        (dict(time_cond_proj_dim=8), "time_cond_proj_dim=8 is not supported"),
        (dict(num_attention_heads=8), "num_attention_heads=8 is not supported"),
        (dict(down_block_types=["DownBlock3D", "DownBlockMotion"]), "no type of block 'DownBlockMotion'"),
        (dict(block_out_channels=[8]), "another length"),
        (dict(attention_head_dim=[8, 8]), "must each be one number"),
        (dict(norm_num_groups=None), "must each be one number"),
        (dict(norm_num_groups=3), "must be multiples of norm_num_groups"),
    ],
)
def test_settings_that_are_not_supported(params, settings, said):
    model = naming.from_config(UNet3DConditionModel, {**unet3d.TINY, **settings})
    with pytest.raises(UserError, match=said) as error:
        naming.to_params(naming.to_tensors(params), model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("mid_block.attentions.0.proj_in.bias", None, "mid_block.attentions.0.proj_in.bias is missing"),
        ("conv_in.extra", (3,), "has no tensor conv_in.extra"),
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
        naming.to_params(flat, MODEL)
    assert "\n" not in str(error.value)


def test_adapters_of_peft_there_and_back(theirs, params, tmp_path):
    """Every layer has an adapter of ours. Of peft's, two kinds of layer have another rank."""
    peft = pytest.importorskip("peft")
    inputs, apply = unet3d.job(unet3d.TINY, **JOB), jax.jit(MODEL.apply)

    def compare(adapted, made, alpha):
        with torch.no_grad():
            want = unet3d.call(adapted.eval(), *inputs).numpy()
        got = apply({"params": lora.merge(params, made, alpha)}, *inputs)
        assert np.abs(got - apply({"params": params}, *inputs)).max() > 0.1 * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    ours = weights(lora.shapes(params, 2, ""), seed=1)
    adapters.write(tmp_path / "ours", ours, 0.5)
    compare(peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours"), ours, 0.5)

    layers = r".*(to_q|to_out\.0|ff\.net\.0\.proj|time_emb_proj|resnets\.\d\.conv1|conv2\.3|conv_shortcut|conv_in)"
    settings = dict(r=3, lora_alpha=2, rank_pattern={"to_q": 2, "conv1": 1}, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(target_modules=layers, **settings))
    adapted.save_pretrained(tmp_path / "theirs")
    compare(adapted, *adapters.read(tmp_path / "theirs" / adapters.FILE, params))
