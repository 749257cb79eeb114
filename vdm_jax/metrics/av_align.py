"""AV-Align: how well the onsets of a sound and the peaks of motion agree in time (arXiv:2309.16429, section 4).

No network is used. It tells little of short clips: each clip has few peaks. The package opencv-python-headless computes
the optical flow (extra `metrics`).
"""

import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.metrics import reconstruction, tracker

LEAST_FLOW = 0.1  # pixels a frame, mean over the frame; a smaller maximum is no peak


def score(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> float:
    """Returns the intersection over union of onsets and motion peaks, in 0..1; nan for a clip that has none of both.

    An onset and a peak that are less than a frame apart are a pair, each in one pair at most. Onsets are those of
    `tracker.onsets`, where the paper uses another detector.

    video: uint8 [F, H, W, 3]
    audio: float [N]
    """
    peaks, onsets = motion_peaks(motion(video), fps), tracker.onsets(audio, sample_rate)
    pairs = len(reconstruction.onset_errors(peaks, onsets, 1 / fps)) if len(peaks) and len(onsets) else 0
    union = len(peaks) + len(onsets) - pairs
    return pairs / union if union else float("nan")


def motion(video: np.ndarray) -> np.ndarray:
    """Returns the mean size of the optical flow (Farneback 2003) into each frame, in pixels, [F]; frame 0 has 0.

    video: uint8 [F, H, W, 3]
    """
    try:
        import cv2
    except ImportError:
        raise UserError("AV-Align needs the package opencv-python-headless: pip install 'vdm_jax[metrics]'") from None
    gray = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in video]
    settings = dict(pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0)
    flows = [cv2.calcOpticalFlowFarneback(a, b, None, **settings) for a, b in zip(gray, gray[1:])]
    return np.array([0.0, *(np.linalg.norm(flow, axis=-1).mean() for flow in flows)])


def motion_peaks(sizes: np.ndarray, fps: float) -> np.ndarray:
    """Returns the times (s) of the local maxima of a flow [F] that are at least LEAST_FLOW."""
    middle = sizes[1:-1]
    is_peak = (middle > sizes[:-2]) & (middle > sizes[2:]) & (middle >= LEAST_FLOW)
    return (np.flatnonzero(is_peak) + 1) / fps
