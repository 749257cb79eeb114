"""The figures of each task, where the model is the world itself and where it does nothing."""

import dataclasses

import numpy as np
import pytest

from configs import world_tiny
from tests.helpers import weights
from vdm_jax.data.world import World
from vdm_jax.metrics import tasks as task_metrics
from vdm_jax.system import build

CLIPS = 12


class Oracle:
    """Completes every clip as it truly was."""

    def __init__(self, system, items, films):
        self.system, self.config, self.items, self.films = system, system.config, items, films
        self.params = {"video_autoencoder": weights(system.param_shapes["video_autoencoder"])}

    def sample(self, prompts, *, seed, context):
        has_context = context.video is not None or context.audio is not None
        assert has_context == (prompts == [item["caption"] for item in self.items])
        return tuple(np.stack([item[part] for item in self.items]) for part in ("video", "audio"))

    def rollout(self, prompts, frames, *, seed):
        source = dataclasses.replace(self.films, frames=frames)
        films = [source[i] for i in range(len(prompts))]
        return *(np.stack([film[part] for film in films]) for part in ("video", "audio")), None


class Still(Oracle):
    """Silence, and the first frame for ever."""

    def sample(self, prompts, **options):
        video, audio = super().sample(prompts, **options)
        return np.repeat(video[:, :1], video.shape[1], 1), np.zeros_like(audio)


class Jumping(Oracle):
    """The truth, but all generated frames lie a pixel beside it."""

    def sample(self, prompts, *, context, **options):
        video, audio = super().sample(prompts, context=context, **options)
        if made := np.flatnonzero(~context.masks["video"]).tolist():
            past = 1 + self.system.layout.f_t * (made[0] - 1) if made[0] else 0
            video[:, past:] = np.roll(video[:, past:], 1, axis=3)
        return video, audio


@pytest.fixture(scope="module")
def world():
    config = world_tiny.get_config()
    data = config.data
    films = World(9, frames=data.frames, size=data.size, fps=data.fps, sample_rate=data.sample_rate, **data.world)
    return build(config), [films[i] for i in range(CLIPS)], films


@pytest.fixture(scope="module")
def oracle(world):
    return task_metrics.measure(Oracle(*world), world[1], seed=0)


def test_the_truth_reaches_its_own_ceilings(oracle):
    assert oracle["image"]["moves"] == oracle["image"]["moves_truth"] == 1
    assert oracle["image"]["first_frame_psnr"] == np.inf or oracle["image"]["first_frame_psnr"] > 60
    assert oracle["image"]["first_frame_psnr_reconstructed"] < 30  # weights are random
    assert oracle["undirected"] == {"one_object": 1, "two_objects": 1}
    for key in ("given", "seam", "inside"):
        assert oracle["continue"][key] == oracle["continue"][f"{key}_truth"] < 0.05
    assert oracle["continue"]["right"] == 1
    for task in ("foley", "audio"):
        for key in ("sync_impacts", "sync_onsets"):
            assert oracle[task][key] == oracle[task][f"{key}_truth"] > 0.9
    curve = oracle["rollout"]
    assert curve["seconds"] == pytest.approx([2.125 * n for n in range(1, 11)])
    assert min(curve["right"]) == min(curve["permanence"]) == 1 and max(curve["size_drift"]) < 0.1


def test_a_model_that_does_nothing_is_seen_through(world):
    made = task_metrics.measure(Still(*world), world[1], seed=0)
    assert made["image"]["moves"] == 0
    assert made["foley"]["sync_impacts"] == 0 and made["foley"]["sync_onsets"] is None
    assert made["audio"]["sync_onsets"] == 0


def test_a_jump_shows_at_the_seam_alone(world, oracle):
    made = task_metrics.measure(Jumping(*world), world[1], seed=0)["continue"]
    for key in ("given", "inside"):
        assert made[key] == pytest.approx(oracle["continue"][key], abs=0.02)
    config = world[0].config
    assert made["seam"] == pytest.approx(config.data.fps / config.data.size[0], rel=0.1)  # a pixel a frame
