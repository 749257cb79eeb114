"""Scores of coherence: right on true films, at chance on other films, and lowered by the fault that they are for."""

import dataclasses

import numpy as np
import pytest

from tests import coherence_truth as truth
from vdm_jax.metrics import coherence, episodes


def test_true_films_are_coherent_and_films_of_chance_are_not():
    found, gates = coherence.curves(truth.true_films(12, (1, 4)))
    low = {(n, name): share for n, row in found.items() for name, share in row.items() if share is not None}
    assert min(low.values()) >= 0.99, low
    assert all(max(gates[n][name] for n in gates) > 0.1 for name in coherence.SCORES)  # each event takes place
    chance = coherence.curves(truth.films_of_chance(6, (4,)))[0][4]
    assert chance["identity"] < 0.2 and chance["heard"] < 0.7 and not chance["permanence"]


@pytest.mark.parametrize("fault", truth.LOWERED)
def test_a_fault_lowers_the_scores_that_are_declared_and_no_other(fault):
    wrong, falls = truth.check(*truth.with_fault(fault, 10), truth.LOWERED[fault])
    assert not wrong, falls


def test_what_must_not_change_stays_and_what_must_changes():
    world = episodes.worlds(truth.FULL, truth.CLIP)["plain"]
    for recolor in (False, True):
        changed = next(found for n in range(20) if (found := episodes.change(world, n, recolor)))
        before, after, old, new = changed
        films = []
        for clip in (before, after):
            scene = coherence.scene_of(clip, world.size, world.outside)
            films.append(coherence.read(clip["video"], clip["audio"], truth.FPS, truth.RATE, scene))
        right = episodes.counterfactual(films, (before, after), old, new)
        assert all(value for events in right.values() for _, value in events)
        assert all(len(events) > 3 for events in right.values())
        unchanged = episodes.counterfactual([films[0], films[0]], (before, after), old, new)
        assert not any(value for _, value in unchanged["changed"])
        assert (new is None) != recolor and after["state"]["color"].tolist() != before["state"]["color"].tolist()


def test_an_episode_with_a_change_is_the_same_until_the_change_matters():
    world = dataclasses.replace(truth.FULL, frames=40)
    number = next(n for n in range(20) if len(world.episode(n)["color"]) > 1)
    before, after, *_ = episodes.change(world, number, recolor=True)
    np.testing.assert_array_equal(before["state"]["position"], after["state"]["position"])
    np.testing.assert_array_equal(before["audio"], after["audio"])
    assert (before["video"] != after["video"]).any()


def test_things_of_far_episodes_are_away_for_two_clips():
    world = episodes.worlds(truth.FULL, 4 * truth.CLIP)["far"]
    film = truth.measured(world, 0, world[0]["video"], world[0]["audio"], (4,))
    assert film["identity"][4][1] > 0
    away = [(world[n]["state"]["visible"] == 0).sum(0).max() / truth.CLIP for n in range(8)]
    assert 1 < np.median(away) < 3


def test_the_half_life_is_where_half_is_lost():
    ceiling, chance = dict.fromkeys((1, 2, 4, 8), 1.0), dict.fromkeys((1, 2, 4, 8), 0.2)
    assert coherence.half_life({1: 1.0, 2: 0.9, 4: 0.8, 8: 0.7}, ceiling, chance) is None
    assert coherence.half_life({1: 1.0, 2: 0.8, 4: 0.6, 8: 0.2}, ceiling, chance) == pytest.approx(4)
    assert coherence.half_life({1: 1.0, 2: 0.7, 4: 0.5, 8: None}, ceiling, chance) == pytest.approx(2**1.5)
    assert coherence.half_life({1: 0.3, 2: 0.2, 4: 0.2, 8: 0.2}, ceiling, chance) == 1.0


def test_scores_are_of_the_half_before_a_length():
    found = {name: [] for name in coherence.SCORES}
    found["identity"] = [(frame, frame < 20) for frame in range(40)]
    by_length, _ = coherence.by_length(found, 10, 8, (1, 2, 4))
    assert by_length["identity"] == {1: (10.0, 10), 2: (10.0, 10), 4: (0.0, 20)}
    shares, gates = coherence.curves([by_length])
    assert shares[2]["identity"] == 1.0 and gates[2] == dict.fromkeys(coherence.SCORES, 0.0) | {"identity": 1.0}
