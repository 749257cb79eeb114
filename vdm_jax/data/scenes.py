"""Where a film is cut, and which clips show nothing, do not move or are silent."""

import numpy as np

STILL = 1.0  # in levels of 0..255: no frame of a clip that stands still differs more from the first one, on average
BLACK = 16.0  # in levels of 0..255: below it are all but a hundredth of the values in each frame of a black clip
SILENT = 1e-3  # peak of a silent sound; full scale is 1
SIDE = 32  # frames are compared on a grid of at most about this many pixels in each direction


def _sorted_quarters(video: np.ndarray) -> np.ndarray:
    """Returns the values of each quarter and color of each frame in order: uint8 [F, 4, n, 3]. video: [F, H, W, 3]."""
    down, right = (max(1, length // SIDE) for length in video.shape[1:3])
    video = video[:, ::down, ::right]
    frames, height, width, _ = video.shape
    half_h, half_w = max(1, height // 2), max(1, width // 2)
    corners = [(y, x) for y in (0, height - half_h) for x in (0, width - half_w)]
    quarters = [video[:, y : y + half_h, x : x + half_w].reshape(frames, -1, 3) for y, x in corners]
    return np.sort(np.stack(quarters, axis=1), axis=2, kind="stable")


def changes(video: np.ndarray) -> np.ndarray:
    """Returns how much each frame differs from the one before: float [F - 1] in 0..1.

    It is the earth mover's distance between the histograms of red, green and blue, averaged over the quarters of the
    picture. Motion inside a quarter changes nothing, a slow fade little, another scene much.

    video: uint8 [F, H, W, 3]
    """
    values = _sorted_quarters(video).astype(np.int16)
    return np.abs(np.diff(values, axis=0)).mean((1, 2, 3)) / 255


def is_still(video: np.ndarray) -> bool:
    """Returns whether no frame differs from the first one. A single frame, such as an image, does not stand still."""
    first = video[0].astype(np.int16)
    return len(video) > 1 and all(np.abs(frame - first).mean() <= STILL for frame in video[1:])


def is_black(video: np.ndarray) -> bool:
    """Returns whether all frames are black."""
    return all(np.percentile(frame, 99) < BLACK for frame in video)


def is_silent(audio: np.ndarray) -> bool:
    """Returns whether a sound, float [N] in [-1, 1], is silent."""
    return not (np.abs(audio) > SILENT).any()
