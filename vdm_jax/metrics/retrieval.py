"""Text-video retrieval: does a text find its own video among the others?"""

import numpy as np


def recall_at_k(queries: np.ndarray, candidates: np.ndarray, k: int = 1) -> float:
    """Share of queries, in 0..1, whose own candidate is among the k most similar ones by cosine.

    queries, candidates: [N, D]; row i of one belongs to row i of the other. (text, video) gives
    text-to-video recall, (video, text) the other direction. A tie counts against the query, so that
    embeddings that are all alike score 0 and not 1.
    """
    q, c = (np.asarray(x, np.float64) for x in (queries, candidates))
    if q.ndim != 2 or q.shape != c.shape or len(q) == 0:
        raise ValueError(f"want two arrays [N, D] of one shape, got {q.shape} and {c.shape}")
    # 1e-12: an embedding of zeros is similar to nothing, not nan
    q, c = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, c))
    similarity = q @ c.T  # [N, N]
    # 1e-9: equal vectors may differ by rounding, and should still tie
    others_ahead = np.sum(similarity >= np.diag(similarity)[:, None] - 1e-9, axis=-1) - 1
    return float(np.mean(others_ahead < k))
