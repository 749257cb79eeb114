"""Our AutoencoderOobleck against diffusers': parameters, values, other forms of weight norm, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers.unet3d import randomize
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_oobleck import AutoencoderOobleck

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

SMALL = dict(
    encoder_hidden_size=8,
    downsampling_ratios=[2, 6],
    channel_multiples=[1, 3],
    decoder_channels=6,
    decoder_input_channels=4,
    audio_channels=2,
    sampling_rate=8000,
)
OURS = naming.from_config(AutoencoderOobleck, SMALL)
ENCODE = jax.jit(lambda params, audio: OURS.apply({"params": params}, audio, method="encode"))
DECODE = jax.jit(lambda params, z: OURS.apply({"params": params}, z, method="decode"))


@pytest.fixture(scope="module")
def theirs():
    torch.set_num_threads(1)
    return randomize(diffusers.AutoencoderOobleck(**SMALL)).eval()


@pytest.fixture(scope="module")
def tensors(theirs):
    return {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}


@pytest.fixture(scope="module")
def params(tensors):
    return naming.to_params(tensors, OURS)


def assert_close(got, want):
    """want: a torch tensor [B, C, N]"""
    want = want.swapaxes(1, 2).numpy()
    assert got.dtype == np.float32 and want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_values_of_the_same_weights(theirs, params):
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(2, 7 * 12, 2)).astype(np.float32)
    z = rng.normal(size=(2, 7, 4)).astype(np.float32)
    with torch.no_grad():
        latent = theirs.encode(torch.tensor(audio).swapaxes(1, 2)).latent_dist
        decoded = theirs.decode(torch.tensor(z).swapaxes(1, 2)).sample
    mean, log_variance = ENCODE(params, audio)
    assert mean.shape == (2, 7, 4)
    assert_close(mean, latent.mean)
    assert_close(log_variance, latent.logvar)
    assert_close(jnp.exp(log_variance / 2), latent.std)
    assert_close(DECODE(params, z), decoded)


def test_export(theirs, params):
    exported = {name: torch.tensor(x) for name, x in naming.to_tensors(params).items()}
    again = diffusers.AutoencoderOobleck(**SMALL)
    again.load_state_dict(exported, strict=True)
    assert all((x == y).all() for x, y in zip(again.parameters(), theirs.parameters(), strict=True))


def test_names_and_shapes_of_stable_audio_open():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderOobleck()  # its defaults are the settings of Stable Audio Open
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    ours = AutoencoderOobleck()
    assert naming.tensor_shapes(ours) == shapes
    assert (ours.hop, ours.latent_channels, ours.sample_rate, ours.audio_channels) == (2048, 64, 44100, 2)
    mean, std = ours.latent_statistics
    assert mean.tolist() == [0] * 64 and std.tolist() == [1] * 64


def test_new_names_of_weight_norm(tensors):
    """torch.nn.utils.parametrizations.weight_norm names its parameters otherwise."""
    parts = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))
    renamed = {}
    for name, x in tensors.items():
        for before, after in parts:
            name = name.replace(before, after)
        renamed[name] = x
    assert renamed.keys() != tensors.keys()
    found = OURS.from_older(renamed)
    assert found.keys() == tensors.keys() and all(found[name] is x for name, x in tensors.items())


def test_folded_weight_norm(tensors, params):
    folded = {name: x for name, x in tensors.items() if not name.endswith(("weight_g", "weight_v"))}
    for name, v in tensors.items():
        if name.endswith("weight_v"):
            norm = torch._weight_norm(torch.tensor(v), torch.tensor(tensors[name[:-1] + "g"]), 0)
            folded[name[:-2]] = norm.numpy()
    zero = "decoder.block.0.conv_t1.weight"
    folded[zero][1] = 0.0  # what the second input channel adds to the output
    tensors = tensors | {f"{zero}_g": tensors[f"{zero}_g"].copy()}
    tensors[f"{zero}_g"][1] = 0.0
    z = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    got, want = (DECODE(naming.to_params(x, OURS), z) for x in (folded, tensors))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert np.abs(want - DECODE(params, z)).max() > 1e-3


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(downsampling_ratios=[2, 3]), "give one even ratio for each multiple"),
        (dict(downsampling_ratios=[2, 4, 4]), "give one even ratio for each multiple"),
        (dict(encoder_hidden_size=16), "encoder_hidden_size is 16: give 8, twice decoder_input_channels"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_error(settings, said):
    with pytest.raises(UserError, match=said) as error:
        naming.param_shapes(naming.from_config(AutoencoderOobleck, SMALL | settings))
    assert "\n" not in str(error.value)


def test_a_length_that_does_not_fit_is_one_clear_error():
    with pytest.raises(UserError, match="a multiple of 12 samples, not 25: pad the sound to 36"):
        OURS.apply({"params": {}}, jnp.zeros((1, 25, 2)), method="encode")
