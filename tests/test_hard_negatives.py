"""Hard negatives: the draw of the words, the loss by hand, and the one network call for two batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.gaussian import prediction_of
from tests.test_diffusion import latents, make_config
from vdm_jax import diffusion
from vdm_jax.system import System, build, hard_negatives

GROUPS = (("red", "green", "blue"), ("circle", "square"), ("left", "right", "up"))
SETTINGS = dict(every=1, log_snr=(-6.0, -2.0), weight=0.5, anchor=0.25)


def test_two_words_of_a_group_swap_places():
    swap = functools.partial(hard_negatives.swap_words, groups=GROUPS)
    caption = "a red circle moving left and a small blue circle, going left"
    assert swap(caption) == "a blue circle moving left and a small red circle, going left"
    seen = {swap(f"{'a ' * i}red circle left, blue square up")[2 * i :] for i in range(30)}
    assert seen == {
        "blue circle left, red square up",
        "red square left, blue circle up",
        "red circle up, blue square left",
    }


def test_a_caption_of_one_object_gets_one_word_replaced():
    for i in range(20):
        caption = f"{'a ' * i}red circle moving up"
        wrong = hard_negatives.swap_words(caption, GROUPS)
        changed = [(a, b) for a, b in zip(caption.split(), wrong.split()) if a != b]
        assert len(changed) == 1 and any(set(changed[0]) <= set(group) for group in GROUPS)
        assert hard_negatives.swap_words(caption, GROUPS) == wrong
    assert hard_negatives.swap_words("an empty box, redder", GROUPS) == "an empty box, redder"


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_loss_by_hand(target):
    z, seen = latents(batch=4), {}
    right, wrong = {"off": jnp.array([0.1, 0.2, 0.3, 0.4])}, {"off": jnp.array([0.2, 0.1, 0.3, 0.5])}

    def denoise(z_t, log_snr, cond):  # the condition says how far each element of the video's eps is off
        assert cond["off"].shape == (8,)
        seen["log_snr"] = log_snr
        x = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), z)
        exact = prediction_of(x, z_t, log_snr, target)
        off = cond["off"][:, None] / jnp.sqrt(diffusion.eps_error_factor(log_snr["video"], target))
        return exact | {"video": exact["video"] + diffusion.broadcast_to_latent(off, exact["video"])}

    def measured(wrong):
        pairs = hard_negatives.make_pairs(jax.random.key(0), z, right, wrong, target, SETTINGS)
        prediction = denoise(pairs.z_t, pairs.log_snr, pairs.cond)
        return hard_negatives.classification_loss(prediction, pairs, SETTINGS)

    total, metrics = measured(wrong)
    for log_snr in seen["log_snr"].values():  # one noise level per clip, one clip in each quarter of the range
        np.testing.assert_array_equal(log_snr, np.repeat(log_snr[::2, :1], 2, axis=0) + 0 * log_snr)
        assert sorted(np.floor(log_snr[::2, 0])) == [-6, -5, -4, -3]
    error = np.square(np.stack([right["off"], wrong["off"]])) * 5 * 2 * 2 * 3
    logit = (error[1] - error[0])[[0, 1, 3]]  # the third clip's captions are the same
    classification = np.log1p(np.exp(-logit)).mean()
    np.testing.assert_allclose(metrics["hard_negative_loss"], classification, rtol=1e-3)
    np.testing.assert_allclose(metrics["hard_negative_accuracy"], 2 / 3)
    np.testing.assert_allclose(total, 0.5 * classification + 0.25 * error[0].mean(), rtol=1e-3)

    total, metrics = measured(right)
    np.testing.assert_allclose(total, 0.25 * error[0].mean(), rtol=1e-3)
    assert np.isnan(metrics["hard_negative_accuracy"])


def test_two_batches_share_one_network_call():
    z, calls, config = latents(batch=6), [], make_config()
    cond = {"number": jnp.arange(6)}
    right, wrong = {"number": jnp.arange(10, 16)}, {"number": jnp.arange(20, 26)}
    noised = diffusion.corrupt(jax.random.key(0), z, config)
    settings = {**SETTINGS, "every": 3}
    pairs = hard_negatives.make_pairs(jax.random.key(1), z, right, wrong, config["target"], settings)

    def denoise(z_t, log_snr, cond):  # a row does not depend on its neighbors
        calls.append(cond["number"])
        off = 0.01 * cond["number"][:, None]
        return {name: x + diffusion.broadcast_to_latent(off + log_snr[name], x) for name, x in z_t.items()}

    rows = (noised.z_t, noised.log_snr, cond), (pairs.z_t, pairs.log_snr, pairs.cond)
    together = hard_negatives.call_together(denoise, *rows)
    (numbers,) = calls
    # On two devices, each has half of the clips and one of the two pairs.
    np.testing.assert_array_equal(numbers, [0, 1, 2, 10, 20, 3, 4, 5, 13, 23])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), together, tuple(denoise(*part) for part in rows)
    )


def test_pairs_share_no_key_with_the_noise_of_the_batch(monkeypatch):
    """diffusion.corrupt splits its key, and the second half of split(key) is fold_in(key, 1)."""
    keys = {}

    def spy(module, name):
        original = getattr(module, name)

        def call(key, *rest):
            keys[name] = jax.random.key_data(key).tolist()
            return original(key, *rest)

        monkeypatch.setattr(module, name, call)

    system = build(tiny.get_config("hard_negatives"))
    stage = system.stages["denoiser"]
    monkeypatch.setattr(System, "denoise_fn", lambda self, *params: lambda z, *rest: z)
    spy(hard_negatives, "make_pairs")
    spy(diffusion, "corrupt")
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stage.batch)
    encoder_params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), stage.encoder_shapes)
    stage.loss({}, jax.random.key(0), batch, encoder_params)
    halves = jax.random.key_data(jax.random.split(jax.random.wrap_key_data(jnp.array(keys["corrupt"], jnp.uint32))))
    assert keys["make_pairs"] not in [keys["corrupt"], *halves.tolist()]
