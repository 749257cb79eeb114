import shutil

import numpy as np
import pytest

from configs import common
from tests.helpers import finish, start
from vdm_jax.data import batches, content
from vdm_jax.data.tfds import Tfds
from vdm_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

RATE, FPS = 8000, 8


class TinyClips(tfds.core.GeneratorBasedBuilder):
    """Clip k: gray level 40 * k + frame, a tone as loud as k / 8, two captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "clip": tfds.features.Tensor(shape=(None, 16, 24, 3), dtype=np.uint8, encoding="zlib"),
                "sound": tfds.features.Tensor(shape=(None,), dtype=np.float32, encoding="zlib"),
                "pcm": tfds.features.Tensor(shape=(None, 2), dtype=np.int16, encoding="zlib"),
                "text": tfds.features.Text(),
                "texts": tfds.features.Sequence(tfds.features.Text()),
                "label": tfds.features.ClassLabel(names=["up", "down"]),
            }
        )
        # A builder outside a package has no metadata files, so its info is a plain DatasetInfo.
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(5)), "short": self._generate_examples([5])}

    def _generate_examples(self, ids):
        for k in ids:
            frames = 3 if k == 5 else 20
            clip = np.zeros((frames, 16, 24, 3), np.uint8)
            clip += (40 * k + np.arange(frames, dtype=np.uint8))[:, None, None, None]
            tone = np.sin(2 * np.pi * 500 * np.arange(frames * 1000) / RATE) * k / 8
            yield (
                k,
                {
                    "clip": clip,
                    "sound": tone.astype(np.float32),
                    "pcm": (np.stack([tone, tone], axis=1) * 32767).astype(np.int16),
                    "text": f"clip número {k}",
                    "texts": [f"one {k}", f"two {k}"],
                    "label": k % 2,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyClips(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(folder)


def open_tfds(data_dir, name="tiny_clips", **settings):
    defaults = {"frames": 9, "size": 16, "fps": FPS, "sample_rate": RATE, "seed": 0}
    return Tfds(name, **{**defaults, "data_dir": data_dir, "video_key": "clip", **settings})


@pytest.mark.parametrize("audio_key", ["sound", "pcm", ""])
def test_items(data_dir, audio_key):
    source = open_tfds(data_dir, audio_key=audio_key, caption_key="text")
    starts = set()
    for epoch in range(3):
        seen = set()
        for i in range(5 * epoch, 5 * epoch + 5):
            item = source[i]
            level = item["video"].mean((1, 2, 3))
            assert item["video"].shape == (9, 16, 16, 3) and item["video"].dtype == np.uint8
            np.testing.assert_array_equal(np.diff(level), 1)
            k, start = divmod(int(level[0]), 40)
            assert item["caption"] == f"clip número {k}"
            assert item["audio"].shape == (9000,) and item["audio"].dtype == np.float32
            t = np.arange(1000 * start, 1000 * start + 9000) / RATE
            tone = np.sin(2 * np.pi * 500 * t) * k / 8 if audio_key else np.zeros(9000)
            np.testing.assert_allclose(item["audio"], tone, atol=1e-3)
            seen.add(k)
            starts.add(start)
        assert seen == set(range(5))  # each example once an epoch
    assert len(starts) > 4


def test_a_recipe_names_the_data_set(data_dir):
    config = common.get_config()
    config.data.update(source="tfds", path=str(data_dir), frames=4, size=(16, 16))
    config.data.tfds.update(name="tiny_clips", video_key="clip", caption_key="text", source_fps=2.0 * FPS)
    silent = batches.source(config)[2]
    assert silent["caption"] and not silent["audio"].any()
    grays = silent["video"].mean((1, 2, 3))
    np.testing.assert_allclose(np.diff(grays), 2)  # every second frame
    config.data.tfds.audio_key = "sound"
    assert any(batches.source(config)[i]["audio"].any() for i in range(3))


def test_items_depend_on_seed_and_index_alone(data_dir):
    first, second, other = (open_tfds(data_dir, seed=seed) for seed in (0, 0, 1))
    assert second[3]["caption"] == ""
    for i in (7, 0, 10**9):
        np.testing.assert_array_equal(first[i]["video"], second[i]["video"])
    assert any((first[i]["video"] != other[i]["video"]).any() for i in range(5))


def test_rates_are_converted(data_dir):
    settings = {"fps": 4, "source_fps": 8, "sample_rate": 16000, "source_sample_rate": RATE}
    source = open_tfds(data_dir, audio_key="sound", **settings, frames=6, size=(8, 12))
    for i in range(5):
        item = source[i]
        level = item["video"].mean((1, 2, 3))
        assert item["video"].shape == (6, 8, 12, 3) and item["audio"].shape == (24000,)
        np.testing.assert_array_equal(np.diff(level), 2)
        k, start = divmod(int(level[0]), 40)
        t = start / 8 + np.arange(24000) / 16000
        tone = np.sin(2 * np.pi * 500 * t) * k / 8
        np.testing.assert_allclose(item["audio"][300:-300], tone[300:-300], atol=0.01)


def test_short_clips_repeat_their_last_frame(data_dir):
    item = open_tfds(data_dir, split="short", audio_key="sound")[0]
    np.testing.assert_array_equal(item["video"].mean((1, 2, 3)) - 200, [0, 1, 2] + [2] * 6)
    assert np.abs(item["audio"][:3000]).max() > 0.6 and not item["audio"][3000:].any()


def test_captions_of_every_kind(data_dir):
    several = open_tfds(data_dir, caption_key="texts")
    assert {several[i]["caption"].split()[0] for i in range(10)} == {"one", "two"}
    label = open_tfds(data_dir, caption_key="label")
    for i in range(5):
        k = int(label[i]["video"][0].mean()) // 40
        assert label[i]["caption"] == ["up", "down"][k % 2]


def test_splits_and_folders(data_dir):
    folder = f"{data_dir}/tiny_clips/1.0.0"
    parts = []
    for split in ("train[:3]", "train[3:]"):
        source = open_tfds(None, name=folder, split=split)
        parts.append({int(source[i]["video"][0].mean()) // 40 for i in range(6)})
    assert len(parts[0]) == 3 and len(parts[1]) == 2 and not parts[0] & parts[1]


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"name": ""}, "tfds.name is empty"),
        ({"video_key": ""}, "no feature '', only"),
        ({"name": "no_such_data_set"}, "no_such_data_set.*cannot be opened"),
        ({"split": "absent"}, "absent.*cannot be opened"),
        ({"held_out": "absent"}, "absent"),
        ({"held_out": "train[99", "part": "held_out"}, "train.99.*cannot be opened"),
        ({"video_key": "film"}, "no feature 'film', only"),
        ({"audio_key": "noise"}, "no feature 'noise'"),
        ({"caption_key": "words"}, "no feature 'words'"),
        ({"video_key": "text"}, "not uint8"),
        ({"audio_key": "clip"}, "not float"),
        ({"split": "train[:0]"}, "is empty|cannot be opened"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(data_dir, settings, fault):
    with pytest.raises(UserError, match=fault) as error:
        open_tfds(data_dir, **settings)
    assert "\n" not in str(error.value)


def test_features_that_need_tensorflow(data_dir, tmp_path):
    import importlib.util
    import shutil

    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    folder = tmp_path / "tiny_clips"
    shutil.copytree(f"{data_dir}/tiny_clips", folder)
    path = folder / "1.0.0" / "features.json"
    text = path.read_text()
    old = "tensorflow_datasets.core.features.text_feature.Text"
    assert old in text
    path.write_text(text.replace(old, "tensorflow_datasets.core.features.image_feature.Image", 1))
    with pytest.raises(UserError, match="cannot be opened|TensorFlow"):
        open_tfds(None, name=str(folder / "1.0.0"), caption_key="text")


def test_a_data_set_in_a_bucket(data_dir, bucket):
    code, _, err = finish(start("-m", "tests.test_bucket", "data", data_dir, **bucket))
    assert code == 0, "\n".join(err[-20:])


def held_out_config(data_dir, **settings):
    config = common.get_config()
    config.data.update(source="tfds", path=str(data_dir), frames=4, size=(16, 16))
    config.data.tfds.update(name="tiny_clips", video_key="clip", caption_key="text", **settings)
    return config


@pytest.mark.parametrize(
    "settings, known", [({}, 5), ({"split": "train", "held_out": "short"}, 6), ({"held_out": ""}, 4)]
)
def test_training_never_sees_what_is_held_out(data_dir, caplog, settings, known):
    config, seen = held_out_config(data_dir, **settings), {}
    for split in ("train", "held_out"):
        source = batches.source(config, split)
        seen[split] = {source[i]["caption"] for i in range(20)}
    assert len(seen["train"] | seen["held_out"]) == known
    nothing = settings == {"held_out": ""}
    assert (seen["train"] == seen["held_out"]) == nothing == (not batches.holds_out(config))
    assert nothing or not seen["train"] & seen["held_out"]
    assert [message for message in caplog.messages if "nothing is held out" in message] == caplog.messages[:nothing]


@pytest.mark.parametrize(
    "split, held_out",
    [("train", "train[90%:]"), ("train[:3]", "train[2:]"), ("short+train", "short"), ("all", "train[:1]")],
)
def test_splits_that_share_an_example_are_refused(data_dir, split, held_out):
    for part in ("train", "held_out"):
        with pytest.raises(UserError, match="share examples"):
            batches.source(held_out_config(data_dir, split=split, held_out=held_out), part)


def test_another_data_set_has_another_hash(data_dir, tmp_path):
    config = common.get_config()
    config.data.update(source="tfds", path=data_dir)
    assert content.digest(config) == ""  # without a name
    config.data.tfds.name = "tiny_clips"
    before = content.digest(config)
    config.data.path = str(shutil.copytree(data_dir, tmp_path / "copy"))
    assert len(before) == 64 and content.digest(config) == before
    shard = max((tmp_path / "copy").rglob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert content.digest(config) not in ("", before)
