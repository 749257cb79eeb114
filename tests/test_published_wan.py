"""Our AutoencoderKLWan against diffusers': names and shapes, values at once and in chunks; sizes that do not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers import unet3d
from vdm_jax.errors import UserError
from vdm_jax.models import ops
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl_wan import AutoencoderKLWan

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

WAN_21 = dict(base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True])
WAN_22 = dict(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=3,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[False, True],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
)


def channels_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


def assert_close(got, want):
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [WAN_21, WAN_22], ids=["2.1", "2.2"])
def test_values_at_once_and_in_chunks(config):
    torch.set_num_threads(1)
    theirs = unet3d.randomize(diffusers.AutoencoderKLWan(**config)).eval()
    video = np.random.default_rng(0).uniform(-1, 1, (2, 17, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        theirs.decoder.conv_out.weight *= 0.5  # so that few pixels are outside [-1, 1]
        latent = theirs.encode(torch.as_tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = channels_last(theirs.decode(latent.mean).sample)
    mean, log_variance = channels_last(latent.mean), channels_last(latent.logvar)
    assert 0 < (np.abs(decoded) == 1).mean() < 0.2

    model = naming.from_config(AutoencoderKLWan, config)
    params = naming.to_params({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, model)
    for run in (
        lambda method, x: model.apply({"params": params}, x, method=method),
        lambda method, x: model.in_chunks(params, method, x),
    ):
        run = jax.jit(run, static_argnums=0)
        jax.tree.map(assert_close, run("encode", video), (mean, log_variance))
        assert_close(run("decode", mean), decoded)


def test_names_and_shapes_of_the_published_model():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in diffusers.AutoencoderKLWan().named_parameters()}
    assert naming.tensor_shapes(AutoencoderKLWan()) == shapes
    assert len(shapes) == 194 and sum(map(math.prod, shapes.values())) == 126_892_531


def test_statistics_of_the_published_latents():
    with torch.device("meta"):
        config = diffusers.AutoencoderKLWan().config
    mean, std = naming.from_config(AutoencoderKLWan, dict(config)).latent_statistics
    np.testing.assert_array_equal(mean, np.float32(config.latents_mean))
    np.testing.assert_array_equal(std, np.float32(config.latents_std))
    with pytest.raises(UserError, match="latents_mean has 16 values, but z_dim is 48"):
        AutoencoderKLWan(z_dim=48).latent_statistics  # noqa: B018


@pytest.mark.parametrize(
    "shape, said",
    [
        ((7, 64, 64), r"7 frames do not fit: give 1 \+ 4\*n frames, such as 5 or 9\b"),
        ((2, 64, 64), r"such as 1 or 5\b"),
        ((0, 64, 64), r"such as 1 or 5\b"),
        ((5, 60, 24), r"60 x 24 do not fit: give multiples of 8, such as 56 x 24\b"),
    ],
)
def test_sizes_that_do_not_fit(shape, said):
    with pytest.raises(UserError, match=said):
        AutoencoderKLWan().in_chunks({}, "encode", np.zeros((1, *shape, 3)))
    with pytest.raises(UserError, match=said):
        AutoencoderKLWan().apply({}, np.zeros((1, *shape, 3)), method="encode")


@pytest.mark.parametrize("frames", [1, 5])
def test_sizes_of_chunks_on_an_accelerator(frames):
    model = naming.from_config(AutoencoderKLWan, WAN_21, dtype=jnp.bfloat16)
    params, f32 = naming.param_shapes(model), jnp.float32
    video = jax.ShapeDtypeStruct((1, frames, 8, 12, 3), f32)
    latent = jax.ShapeDtypeStruct((1, 1 + frames // 4, 2, 3, 3), f32)
    with ops.backend("tpu"):
        assert jax.eval_shape(lambda p, x: model.in_chunks(p, "encode", x), params, video) == (latent, latent)
        assert jax.eval_shape(lambda p, x: model.in_chunks(p, "decode", x), params, latent) == video


def test_chunks_that_do_not_fit():
    model = AutoencoderKLWan()
    with pytest.raises(UserError, match=r"5 frames do not fit: give 4\*n frames, such as 4 or 8\b"):
        model.stream({}, "encode", np.zeros((1, 5, 8, 8, 3)), cache={"encoder": {}})


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(attn_scales=(0.5,)), "give weights whose attn_scales is empty"),
        (dict(temperal_downsample=(True,)), "has 1 values, but dim_mult has 4"),
    ],
)
def test_settings_without_a_meaning(settings, said):
    with pytest.raises(UserError, match=said):
        naming.param_shapes(AutoencoderKLWan(**settings))
