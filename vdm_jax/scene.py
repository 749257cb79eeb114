"""The state of a scene: all that a clip needs to go on, in the same process or, from a file, in another one.

The file is a safetensors file. Its metadata has the hash of the weights that made the scene and a CRC-32 of all else.
"""

import json
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, storage
from vdm_jax.sharding import named_leaves, path_name

KIND = "vdm_jax scene"
MAX_BYTES = 1 << 30  # of a file
FIX = "save the scene again with --save-state"


class Scene(NamedTuple):
    """The state of P scenes after their newest window. Its size does not depend on how long the scenes are."""

    video: np.ndarray  # uint8 [P, n, H, W, 3], the last frames: the context of the next window
    audio: np.ndarray  # float32 [P, n * samples_per_frame], their sound
    memory: Any  # see system/memory.py; {} for weights without memory
    window: int  # number of the next window; with the seed it decides the noise
    seed: int
    maker: Any = None  # the System that made it: to another one its memory means nothing

    @property
    def arrays(self):
        return {"video": self.video, "audio": self.audio, "memory": self.memory}

    def of_clip(self, number):
        """The Scene of one of the P clips."""
        return self._replace(**jax.tree.map(lambda x: x[number : number + 1], self.arrays))


def save(path, scene, weights):
    """Writes a Scene to a file. weights: hash of the weights that made it. Raises UserError."""
    arrays = {name: np.ascontiguousarray(x) for name, x in named_leaves(scene.arrays).items()}
    told = {"kind": KIND, "weights": weights, "window": str(scene.window), "seed": str(scene.seed)}
    try:
        with storage.writing(storage.given(path)) as file:
            file.write(safetensors.numpy.save(arrays, metadata=told | {"crc32": _crc(arrays, told)}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read(path, expected, weights):
    """Returns the Scene in a file.

    expected: {'video', 'audio', 'memory'}, a tree of arrays with the names, shapes and dtypes of its arrays.
    weights: hash of the weights that are to go on with it.
    Raises UserError for a file that is missing, damaged, or of other weights.
    """
    path = storage.given(path)
    if not storage.is_file(path):
        raise UserError(f"{path} is missing or no file: give the file of --save-state")
    try:
        if path.stat().length > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        content = path.read_bytes()
        arrays = safetensors.numpy.load(content)
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])["__metadata__"]
        if told.pop("crc32") != _crc(arrays, told) or told["kind"] != KIND:
            raise ValueError("its content differs from its checksum")
        window, seed = int(told["window"]), int(told["seed"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or no scene ({str(error)[:200]}): {FIX}") from None
    if told["weights"] != weights:
        raise UserError(f"{path} is a scene of other weights: give the --workdir or --weights that made it")
    checkpoint.check_arrays(path, arrays, named_leaves(expected))
    found = jax.tree_util.tree_map_with_path(lambda place, _: arrays[path_name(place)], expected)
    return Scene(**found, window=window, seed=seed)


def _crc(arrays, told):
    """Returns the CRC-32 of arrays {name: x}, with their names and shapes, and of the texts {name: text}."""
    crc = zlib.crc32(json.dumps(sorted(told.items())).encode())
    for name, x in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(x).tobytes(), crc)
    return str(crc)
