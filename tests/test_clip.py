"""CLIP: padding has no effect, embeddings are unit vectors, and the loss is symmetric in texts and videos."""

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import weights
from vdm_jax.data import text
from vdm_jax.system import build
from vdm_jax.system.networks import to_float

PROMPTS = ["a red circle", "a blue square moving left", "", "zwei Kreise, größer"]


@pytest.fixture(scope="module")
def clip():
    """-> (params, embed(tokens, video) -> outputs of every method, loss(batch))."""
    config = tiny.get_config()
    system = build(config)
    model = system.models["clip"]
    params = weights(system.param_shapes["clip"])

    @jax.jit
    def run(tokens, mask, video):
        states = model.apply({"params": params}, tokens, mask, method="encode_text")
        words, pictures, scale = model.apply({"params": params}, tokens, mask, video)
        return states, words, pictures, scale

    return config, params, run


def batch(seed=0):
    tokens = text.encode(PROMPTS, tiny.get_config().data.text_length)
    video = np.random.default_rng(seed).integers(0, 256, (len(PROMPTS), 5, 16, 24, 3), np.uint8)
    return tokens, video


def test_padding_is_not_read(clip):
    tokens, video = batch()
    mask, run = text.mask(tokens), clip[2]
    states, words, pictures, _ = run(tokens, mask, to_float(video))
    assert states["states"].shape == (4, 96, 16) and states["pooled"].shape == (4, 16)
    other = np.where(mask, tokens, 77)
    states_2, words_2, pictures_2, _ = run(other, mask, to_float(video))
    np.testing.assert_array_equal(states_2["pooled"], states["pooled"])
    np.testing.assert_array_equal(states_2["states"][mask], states["states"][mask])
    np.testing.assert_array_equal(words_2, words)
    other = np.where(np.arange(96) == 3, 77, tokens)  # replaces a token that is no padding
    assert (np.abs(run(other, mask | (np.arange(96) == 3), to_float(video))[1] - words).max(1) > 1e-4).all()


def test_embeddings_are_unit_vectors_of_one_item(clip):
    tokens, video = batch()
    run = clip[2]
    _, words, pictures, scale = run(tokens, text.mask(tokens), to_float(video))
    assert words.shape == pictures.shape == (4, 16)
    for embedding in (words, pictures):
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)
        assert np.abs(embedding - embedding[::-1]).max() > 1e-2
    _, words_2, pictures_2, _ = run(tokens[::-1], text.mask(tokens[::-1]), to_float(video[::-1]))
    np.testing.assert_allclose(words_2[::-1], words, atol=1e-5)
    np.testing.assert_allclose(pictures_2[::-1], pictures, atol=1e-5)
    np.testing.assert_allclose(scale, np.exp(clip[1]["log_temperature"]), rtol=1e-6)
    # Reversed time gives another embedding: "left" and "right" must differ.
    backwards = run(tokens, text.mask(tokens), to_float(video[:, ::-1]))[2]
    assert (np.abs(backwards - pictures).max(1) > 1e-4).all()


def test_temperature_starts_as_in_the_paper_and_is_bounded():
    config = tiny.get_config()
    tokens, video = batch()
    model, arguments = build(config).models["clip"], (tokens, tokens > 0, to_float(video))

    @jax.jit
    def scales(key):
        params = model.init(key, *arguments)["params"]
        hot = {**params, "log_temperature": np.float32(9.0)}
        return [model.apply({"params": p}, *arguments)[2] for p in (params, hot)]

    np.testing.assert_allclose(scales(jax.random.key(0)), [1 / 0.07, 100], rtol=1e-5)


@pytest.mark.parametrize("hard_negatives", [False, True], ids=["plain", "hard negatives"])
def test_loss_is_the_mean_of_both_directions(clip, hard_negatives):
    config, params, run = clip
    tokens, video = batch()
    inputs = {"tokens": tokens, "video": video}
    if hard_negatives:
        inputs["hard_negative"] = tokens[[0, 1, 3, 3]]  # only row 2 differs from its caption
    loss, metrics = jax.jit(build(config).stages["clip"].loss)(params, jax.random.key(0), inputs, {})
    _, words, pictures, scale = run(tokens, text.mask(tokens), to_float(video))
    logits = float(scale) * np.asarray(words, np.float64) @ np.asarray(pictures, np.float64).T
    to_video = np.diag(logits) - np.log(np.exp(logits).sum(1))
    wrong = np.zeros(4)
    if hard_negatives:  # the text of clip 3, as hard negative of clip 2, is one more wrong answer for each video
        wrong = np.exp(logits[3])
        assert metrics["hard_negative_accuracy"] == float(logits[2, 2] > logits[3, 2])
    to_text = np.diag(logits) - np.log(np.exp(logits).sum(0) + wrong)
    np.testing.assert_allclose(loss, -(to_video.mean() + to_text.mean()) / 2, rtol=1e-4)
    assert metrics["recall_at_1"] == np.mean(logits.argmax(1) == np.arange(4))
    np.testing.assert_allclose(metrics["temperature"], 1 / scale, rtol=1e-5)
