"""A batch is a pure function of the seed and the step."""

import functools
import itertools
import os

import jax
import numpy as np
import pytest

from tests import tiny
from vdm_jax import sharding
from vdm_jax.data import batches, text, writing
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError

DATA = tiny.get_config().data


class Numbers:
    """Items {'number': i}: a batch tells which items it holds."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        assert 0 <= i < self.length
        return {"number": np.int64(i)}

    def take(self, numbers):
        return {"number": np.stack([self[i]["number"] for i in numbers])}


def numbers(count, start=0, seed=0, batch_size=4, length=10, rows=None, stop=None):
    """[count, rows]: the items in `count` batches from step `start` on."""
    source = Numbers(length)
    drawn = batches.batches(source, batch_size=batch_size, seed=seed, start=start, data=DATA, rows=rows, stop=stop)
    return np.stack([batch["number"] for batch in itertools.islice(drawn, count)])


def test_a_batch_follows_from_seed_and_step():
    whole = numbers(12)
    for start in (0, 1, 5, 9):
        np.testing.assert_array_equal(numbers(3, start), whole[start : start + 3])
    assert (numbers(12, seed=1) != whole).any()
    np.testing.assert_array_equal(numbers(12, 5, stop=8), whole[5:8])
    far = numbers(1, start=50_000_000)  # two billion examples on
    assert far.shape == (1, 4)
    np.testing.assert_array_equal(numbers(2, start=49_999_999)[1:], far)


def test_the_samples_of_a_step_can_be_named():
    whole = numbers(12)
    for step in (0, 5, 11):
        ids = batches.sample_ids([Numbers(10)], [1], batch_size=4, seed=0, step=step)
        np.testing.assert_array_equal(ids, whole[step])
    assert batches.sample_ids([Numbers(10)], [1], batch_size=4, seed=1, step=0) != list(whole[0])


def test_every_epoch_holds_every_item_once_in_another_order():
    epochs = numbers(10).reshape(4, 10)
    assert (np.sort(epochs, 1) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(10)).any()
    assert len(set(numbers(100, length=2**31 - 1).ravel())) == 400  # the world's length


def test_rows_of_all_processes_are_the_batch_of_one():
    whole = numbers(5, start=3, batch_size=8)
    parts = [numbers(5, start=3, batch_size=8, rows=rows) for rows in ([0, 1, 2, 3], [4, 6], [5, 7])]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole[:, [0, 1, 2, 3, 4, 6, 5, 7]])


def test_batches_of_the_world():
    config = tiny.get_config()
    source = batches.source(config)

    def from_step(start):
        examples = batches.Examples(source, functools.partial(text.encode, length=96))
        return batches.batches(examples, batch_size=3, seed=0, start=start, data=config.data)

    first, second = itertools.islice(from_step(0), 2)
    assert {k: (x.shape, x.dtype) for k, x in first.items()} == {
        "video": ((3, 5, 16, 24, 3), np.uint8),
        "audio": ((3, 1250), np.float32),
        "tokens": ((3, 96), np.int32),
    }
    again = next(from_step(1))
    jax.tree.map(np.testing.assert_array_equal, again, second)
    assert (first["video"] != second["video"]).any()
    assert (text.mask(first["tokens"]).sum(1) > 7).all()
    held_out = batches.source(config, "held_out")
    assert (held_out[0]["video"] != source[0]["video"]).any()

    mesh = sharding.make_mesh(config.mesh)
    on_devices = batches.to_devices(first, sharding.batch_sharding(mesh), 3)
    jax.tree.map(np.testing.assert_array_equal, on_devices, first)
    assert on_devices["video"].sharding.spec == jax.P(("data", "fsdp"))


def test_examples_have_a_wrong_caption_where_one_is_drawn():
    source = [{"video": np.zeros(2), "audio": np.zeros(3), "caption": caption} for caption in ("a red cat", "a dog")]
    tokenize = functools.partial(text.encode, length=16)
    plain = batches.Examples(source, tokenize).take([1, 0])
    assert set(plain) == {"video", "audio", "tokens"}
    np.testing.assert_array_equal(plain["tokens"], text.encode(["a dog", "a red cat"], 16))
    wrong = batches.Examples(source, tokenize, lambda caption: caption.upper()).take([1, 0])
    np.testing.assert_array_equal(wrong["hard_negative"], text.encode(["A DOG", "A RED CAT"], 16))


def test_an_epoch_of_a_folder_is_every_video_once_from_any_step(tmp_path):
    writing.write_mp4(tmp_path / "0.mp4", np.zeros((5, 16, 16, 3), np.uint8), None, 8, 8000)
    for number in range(10):
        if number:
            os.link(tmp_path / "0.mp4", tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.txt").write_text(str(number))
    source = Files(tmp_path, frames=1, size=16, fps=8, sample_rate=8000, seed=0)
    examples = batches.Examples(source, lambda texts: np.array([int(text) for text in texts]))

    def drawn(start, count):
        found = batches.batches(examples, batch_size=4, seed=0, start=start, data=DATA)
        return np.concatenate([batch["tokens"] for batch in itertools.islice(found, count)])

    whole = drawn(0, 5)  # two epochs of ten
    assert sorted(whole[:10]) == sorted(whole[10:]) == list(range(10)) and (whole[:10] != whole[10:]).any()
    np.testing.assert_array_equal(drawn(3, 2), whole[12:])
    ids = batches.sample_ids([examples], [1], batch_size=4, seed=0, step=3)
    assert [int(source[i]["caption"]) for i in ids] == list(whole[12:16])


class Named:
    in_epochs = True

    def name_of(self, number):
        return f"{number % 10}.mp4"


def test_a_message_names_the_files_of_a_batch():
    order = dict(batch_size=2, seed=0, step=3)
    examples = batches.Examples(Named(), None)
    assert batches.sample_names([examples], [examples], [1], **order) == ["6 ('6.mp4')", "7 ('7.mp4')"]
    encoded = Numbers(4)  # clips 0 to 3 of the training order, kept as latents
    numbers = batches.sample_ids([encoded], [1], **order)
    assert batches.sample_names([encoded], [examples], [1], **order) == [f"{n} ('{n}.mp4')" for n in numbers]
    assert batches.sample_names([encoded], [batches.Examples(Numbers(4), None)], [1], **order) == numbers


def test_a_source_without_a_path():
    config = tiny.get_config()
    config.data.source = "files"
    with pytest.raises(UserError, match="--config.data.path=FOLDER"):
        batches.source(config)
