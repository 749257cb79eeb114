import numpy as np
import pytest

from vdm_jax.metrics.retrieval import recall_at_k


def test_recall_counts_what_is_ahead():
    candidates = np.eye(3)
    queries = np.array(
        [
            [5.0, 1.0, 0.0],  # own first; length does not count
            [0.9, 0.8, 0.0],  # own second
            [0.9, 0.8, 0.1],  # own third
        ]
    )
    assert [recall_at_k(queries, candidates, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_directions_differ():
    text = np.array([[1.0, 0.0], [0.9, 0.1]])
    video = np.array([[1.0, 0.0], [1.0, 0.05]])
    assert recall_at_k(text, video) == 1.0
    assert recall_at_k(video, text) == 0.5


def test_alike_embeddings_find_nothing():
    collapsed = np.ones((8, 4)) / 3
    assert recall_at_k(collapsed, collapsed) == 0
    assert recall_at_k(np.zeros((8, 4)), np.eye(8, 4)) == 0
    assert recall_at_k(collapsed, collapsed, k=8) == 1


def test_chance_is_k_of_n():
    rng = np.random.default_rng(0)
    recalls = [recall_at_k(rng.normal(size=(64, 32)), rng.normal(size=(64, 32)), k=8) for _ in range(50)]
    # 3200 draws of a share of 1/8: standard error 0.006
    assert np.mean(recalls) == pytest.approx(8 / 64, abs=0.02)


def test_shapes_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        recall_at_k(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="one shape"):
        recall_at_k(np.zeros((0, 4)), np.zeros((0, 4)))
