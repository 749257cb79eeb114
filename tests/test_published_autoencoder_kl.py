"""Our AutoencoderKL against diffusers': parameters, values, older files, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers.unet3d import randomize
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl import _ACTIVATIONS, AutoencoderKL

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PLAIN = dict(
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    block_out_channels=[8, 16],
    norm_num_groups=4,
)
OTHER = dict(  # the other value of every setting
    down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    block_out_channels=[6, 6, 12],
    layers_per_block=2,
    act_fn="gelu",
    in_channels=4,
    out_channels=5,
    latent_channels=3,
    norm_num_groups=3,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)
STABLE_DIFFUSION = dict(
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
)


def peer(settings):
    torch.set_num_threads(1)
    return randomize(diffusers.AutoencoderKL(**settings)).eval()


def tensors_of(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def frames_first(x):
    """[B, T, H, W, C] -> a torch tensor [B * T, C, H, W]"""
    return torch.tensor(x).flatten(0, 1).permute(0, 3, 1, 2)


def assert_close(got, want, batch):
    """want: a torch tensor [B * T, C, H, W]"""
    want = want.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).numpy()
    assert got.dtype == np.float32 and want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("settings", [PLAIN, OTHER], ids=["plain", "other"])
def test_values_and_export_of_the_same_weights(settings):
    theirs, ours = peer(settings), naming.from_config(AutoencoderKL, settings)
    if theirs.quant_conv is not None:  # beyond both bounds of the log variance
        theirs.quant_conv.bias.data[-2:] = torch.tensor([-99.0, 99])
    params = naming.to_params(tensors_of(theirs), ours)
    rng = np.random.default_rng(0)
    video = rng.normal(size=(2, 3, 5 * ours.f_s, 3 * ours.f_s, ours.in_channels)).astype(np.float32)
    z = rng.normal(size=(2, 3, 5, 3, ours.latent_channels)).astype(np.float32)
    with torch.no_grad():
        latent = theirs.encode(frames_first(video)).latent_dist
        decoded = theirs.decode(frames_first(z)).sample
    encode, decode = (jax.jit(lambda p, x, m=m: ours.apply({"params": p}, x, method=m)) for m in ("encode", "decode"))
    mean, log_variance = encode(params, video)
    assert_close(mean, latent.mean, 2)
    assert_close(log_variance, latent.logvar, 2)
    assert settings is OTHER or (log_variance.min(), log_variance.max()) == (-30, 20)
    assert_close(decode(params, z), decoded, 2)

    exported = {name: torch.tensor(x) for name, x in naming.to_tensors(params).items()}
    again = diffusers.AutoencoderKL(**settings)
    again.load_state_dict(exported, strict=True)
    assert all((x == y).all() for x, y in zip(again.parameters(), theirs.parameters(), strict=True))


def test_activations():
    activations = pytest.importorskip("diffusers.models.activations")  # diffusers loads its modules when asked
    x = torch.linspace(-5, 5, 101)
    for name, ours in _ACTIVATIONS.items():
        np.testing.assert_allclose(ours(jnp.array(x)), activations.get_activation(name)(x), atol=1e-6)


def test_names_and_shapes_of_stable_diffusion():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**STABLE_DIFFUSION)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    ours = naming.from_config(AutoencoderKL, STABLE_DIFFUSION)
    assert naming.tensor_shapes(ours) == shapes and len(shapes) == 248
    assert sum(leaf.size for leaf in jax.tree.leaves(naming.param_shapes(ours))) == 83_653_863
    assert (ours.f_t, ours.f_s, ours.latent_channels) == (1, 8, 4)


def test_older_files():
    """Older files have other names of attention, or 1 x 1 convolutions, or both."""
    tensors, ours = tensors_of(peer(PLAIN)), naming.from_config(AutoencoderKL, PLAIN)
    renamed, windows = {}, {}
    for name, x in tensors.items():
        is_product = ".to_" in name and name.endswith("weight")
        windows[name] = x.reshape(x.shape + (1, 1)) if is_product else x
        older = name
        for today, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            older = older.replace(today, before)
        renamed[older] = x
    both = {older: x for older, x in zip(renamed, windows.values(), strict=True)}
    for other in (renamed, windows, both):
        assert {name: x.shape for name, x in other.items()} != {name: x.shape for name, x in tensors.items()}
        found = ours.from_older(other)
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_array_equal(found[name], x, strict=True)


def test_latent_statistics():
    mean, std = AutoencoderKL(scaling_factor=0.25).latent_statistics
    assert mean.dtype == std.dtype == np.float32
    assert mean.tolist() == [0] * 4 and std.tolist() == [4] * 4
    mean, std = AutoencoderKL(scaling_factor=0.25, shift_factor=0.5).latent_statistics
    assert mean.tolist() == [0.5] * 4 and std.tolist() == [4] * 4
    of_each = dict(latent_channels=2, latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0))
    mean, std = AutoencoderKL(scaling_factor=0.5, **of_each).latent_statistics
    assert mean.tolist() == [1, 2] and std.tolist() == [6, 8]


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(act_fn="elu"), "no act_fn 'elu': give one of silu, swish, mish, gelu, relu"),
        (dict(down_block_types=["DownBlock2D"] * 2), "down_block_types is .* give 2 of DownEncoderBlock2D or Attn"),
        (dict(up_block_types=["UpDecoderBlock2D"]), "up_block_types is .* give 2 of UpDecoderBlock2D or Attn"),
        (dict(norm_num_groups=32), "do not divide into norm_num_groups 32"),
        (dict(latents_std=[1.0]), "latents_std has 1 values: give 4"),
        (dict(latents_mean=[1.0] * 4, shift_factor=1.0), "shift_factor and latents_mean are two means"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_error(settings, said):
    with pytest.raises(UserError, match=said) as error:
        naming.param_shapes(naming.from_config(AutoencoderKL, PLAIN | settings))
    assert "\n" not in str(error.value)


def test_a_size_that_does_not_fit_is_one_clear_error():
    ours = naming.from_config(AutoencoderKL, PLAIN)
    with pytest.raises(UserError, match="multiples of 2, not 5 x 8: scale or pad them to 6 x 8"):
        ours.apply({"params": {}}, jnp.zeros((1, 1, 5, 8, 3)), method="encode")
