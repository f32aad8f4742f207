"""Prefill and decode: parity with the released model, the cache, batches, meshes, sampling and failures."""

import dataclasses
import functools
import re

import golden
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from packed import CONFIG

from input_pipeline.images.planes import Volume
from radfm_jax.inference import GenerationError, Generator, Prompt, Sampling, decoding, require_answers
from radfm_jax.inference.sampling import draw, penalised, restricted
from radfm_jax.models import decoder, radfm
from radfm_jax.runtime.sharding import make_mesh, param_shardings

V, L, E = CONFIG.llama.vocab_size, CONFIG.num_latents, CONFIG.llama.width
PARAMS = parity.recipe_params(CONFIG)
ATOL = 2e-5  # of float32 log probabilities of order 1 to 10, with sums in another order
GREEDY = Sampling(max_new_tokens=12, stop_ids=())


def prompt(seed: int, length: int, scans: int) -> Prompt:
    """Return random text with the random visual tokens of each scan in it."""
    rng = np.random.default_rng(seed)
    ids, index = rng.integers(3, V, length).astype(np.int32), np.full(length, -1, np.int32)
    for s in range(scans):
        ids[4 * s + 1], ids[4 * s + 4] = V, V + 1
        index[4 * s + 2 : 4 * s + 4] = s * L + np.arange(L)
    return Prompt(ids, index, rng.standard_normal((scans, L, E), np.float32))


PROMPTS = (prompt(1, 20, 2), prompt(2, 3, 0), prompt(3, 29, 3), prompt(4, 11, 1))


@functools.cache
def generator(split: bool = True, mesh=None) -> Generator:
    params = PARAMS if mesh is None else jax.device_put(PARAMS, param_shardings(radfm.abstract_params(CONFIG), mesh)[0])
    return Generator(CONFIG, params, length=64, split=split, mesh=mesh)


@functools.cache
def plain(length: int):
    """Return a function for the logits [length, V] by the forward pass of training, without a cache."""

    def forward(network, ids, index, visual):
        ones = jnp.ones((1, length), jnp.int32)
        batch = {"ids": ids, "visual_index": index, "segments": ones}
        x, _ = network.fuse(batch, visual, jnp.zeros(visual.shape[:2], bool))
        hidden = network.llama(x, jnp.arange(length)[None], ones, ones > 0)
        return network.llama.logits(hidden)[0]

    params = jax.tree.map(jnp.asarray, PARAMS)
    return jax.jit(lambda *args: radfm.RadFM(CONFIG).apply({"params": params}, *args, method=forward))


def recomputed(p: Prompt, answer: list[int]) -> np.ndarray:
    """Return log P of the next token after the prompt and after each token of the answer, without a cache.

    The pass is causal, so one pass over the whole text gives the values of all its prefixes.
    """
    ids = np.zeros((1, 48), np.int32)
    index = np.full((1, 48), -1, np.int32)
    n = len(p.ids)
    ids[0, :n], ids[0, n : n + len(answer)], index[0, :n] = p.ids, answer, p.visual_index
    visual = np.zeros((1, 4, L, E), np.float32)
    visual[0, : len(p.visual)] = p.visual
    logits = plain(48)(ids, index, visual)
    return np.asarray(jax.nn.log_softmax(logits))[n - 1 : n - 1 + len(answer)]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.ids == b.ids and a.ended == b.ended and a.error == b.error
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=ATOL)


# --- the released model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.CASES)
def test_the_released_answers(name):
    """The batch has a longer prompt with three scans as well, so that all cases of a size share a program."""
    case = golden.load(name)
    config = parity.config_of(golden.Sizes.of_golden(case))
    v, latents = config.llama.vocab_size, config.num_latents
    ids = case["gen_prompt"].astype(np.int32)
    index = np.where(ids >= v + 2, ids - v - 2, -1).astype(np.int32)
    # The released model's own visual tokens; the next test encodes scans.
    visual = case["visual_tokens"][0].reshape(-1, latents, config.llama.width)
    ours = Prompt(np.where(index >= 0, 0, ids), index, visual)
    stranger = Prompt(np.full(120, 5, np.int32), np.full(120, -1, np.int32), np.ones((3, *visual.shape[1:])))
    params = parity.params_of(config, golden.state_dict(name))
    answer, _ = Generator(config, params, length=256).answers([ours, stranger], Sampling(20, stop_ids=(1,)))
    assert list(answer.ids) == case["gen_new"].tolist()
    assert answer.ended == ("stop id" if answer.ids[-1] == 1 else "length")
    # With the stop id that the case names, the answer ends there (gen_eos_raw begins with the BOS that 4.28 adds).
    stop = int(case["gen_eos_id"])
    ended = next(i for i, token in enumerate(answer.ids) if token == stop) + 1
    assert list(answer.ids[:ended]) == case["gen_eos_raw"][1:].tolist()


def test_scans_become_the_released_visual_tokens():
    case = golden.load("p1_2d_s1")
    config = parity.config_of(golden.Sizes.of_golden(case))
    ours = Generator(config, parity.params_of(config, golden.state_dict(case.name)))
    volume = Volume(golden.vision(case)[0, 0].transpose(1, 2, 3, 0))
    encoded, nothing = ours.encode_volumes([[volume], []])
    np.testing.assert_allclose(encoded.tokens[0], case["visual_tokens"][0], rtol=0, atol=1e-4)
    assert len(encoded) == 1 and len(nothing) == 0
    with pytest.raises(ValueError, match="x.nii: values are not finite"):
        ours.encode_volumes([[Volume(np.full_like(volume.voxels, np.nan))]], [["x.nii"]])


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
def test_cached_decoding_equals_recomputation(split):
    """Each token is the most likely one of the plain forward pass, with its probability, at all prompt lengths."""
    for p, answer in zip(PROMPTS, generator(split).answers(PROMPTS, GREEDY), strict=True):
        expected = recomputed(p, list(answer.ids))
        assert len(answer.ids) == 12 and answer.ended == "length"
        assert list(answer.ids) == expected.argmax(-1).tolist()
        np.testing.assert_allclose(answer.logprobs, expected.max(-1), rtol=0, atol=ATOL)


def test_a_tied_head():
    config = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, tied_head=True))
    params = PARAMS | {"llama": {name: x for name, x in PARAMS["llama"].items() if name != "head"}}
    ours, theirs = (Generator(config, params, length=64, split=split) for split in (True, False))
    same(ours.answers(PROMPTS[:2], GREEDY), theirs.answers(PROMPTS[:2], GREEDY))


@pytest.mark.parametrize("rows", [1, 2])
def test_no_token_copies_the_cache(rows):
    """In the compiled step on a CPU. With one row, a copy would take a quarter of the time."""
    ours = generator()
    run = ours.stream(PROMPTS[:rows], GREEDY, chunk=1)
    next(run)
    state, steps, stop = run.gi_frame.f_locals["batch"].state, np.int32(1), np.zeros(rows, bool)
    text = decoding.more_tokens.lower(CONFIG, False, False, ours.decode_params, state, steps, stop).compile().as_text()
    shape = ",".join(map(str, state["cache"].key[0].shape))
    written = re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", text)
    assert "fusion" in written and "copy" not in written, written


def test_prompts_are_read_as_in_training():
    """Hidden states at all positions of a prompt are equal with and without a cache."""
    x = np.random.default_rng(0).standard_normal((2, 16, E), np.float32)
    lengths = np.array([16, 9], np.int32)

    @jax.jit
    def both(x, lengths):
        c = CONFIG.llama
        cached, cache = decoder.prefill(c, PARAMS["llama"], x, lengths, decoder.empty_cache(c, 2, 32))
        segments = (jnp.arange(16) < lengths[:, None]).astype(jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
        return (
            cached,
            decoder.Decoder(c).apply({"params": PARAMS["llama"]}, x, positions, segments, segments > 0),
            cache,
        )

    cached, whole, cache = both(x, lengths)
    np.testing.assert_allclose(cached, whole, rtol=0, atol=5e-6)
    c = CONFIG.llama
    assert cache.key.shape == cache.value.shape == (c.num_layers, 2, c.num_kv_heads, 32, c.head_dim)
    key = np.abs(cache.key).max(axis=(-1, -3))
    assert key[:, :, :16].min() > 0 and not key[:, :, 16:].any()


def test_batched_is_one_by_one():
    """Answers do not depend on the other prompts, and one program serves all batches of a bucket."""
    together = generator().answers(PROMPTS, GREEDY)
    programs = decoding.first_token._cache_size(), decoding.more_tokens._cache_size()
    same(generator().answers(PROMPTS[::-1], GREEDY)[::-1], together)
    same(generator().answers([PROMPTS[3], PROMPTS[0], PROMPTS[2]], GREEDY), [together[i] for i in (3, 0, 2)])
    assert (decoding.first_token._cache_size(), decoding.more_tokens._cache_size()) == programs
    for i in (0, 1):
        same(generator().answers([PROMPTS[i]], GREEDY), [together[i]])


def test_on_a_mesh():
    """Rows and heads are sharded over two devices each, with fewer prompts than devices."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    found = []
    run = generator(False, mesh).stream(PROMPTS[:3], GREEDY, chunk=5)
    for _, answers in run:
        found = answers
        cache = run.gi_frame.f_locals["batch"].state["cache"].key
        assert cache.sharding.shard_shape(cache.shape) == (2, 2, 1, 64, 8), cache.sharding
    same(found, generator().answers(PROMPTS[:3], GREEDY))
    with pytest.raises(ValueError, match="split layers need one device"):
        generator(True, mesh)


def test_bfloat16():
    config = CONFIG.with_compute(dtype="bfloat16")
    ours = Generator(config, PARAMS, length=64)
    kinds = {x.dtype.name for x in jax.tree.leaves(ours.decode_params["llama"]["blocks"][0]["query"])}
    assert kinds == {"bfloat16"}
    (answer,) = ours.answers([PROMPTS[0]], GREEDY)
    expected = recomputed(PROMPTS[0], list(answer.ids))
    # bfloat16 has a mantissa of 8 bits.
    np.testing.assert_allclose(answer.logprobs, np.take_along_axis(expected, np.array(answer.ids)[:, None], 1)[:, 0],
                               rtol=0, atol=0.4)  # fmt: skip


# --- ends -------------------------------------------------------------------------------------------------------------


def test_stop_ids_and_lengths():
    whole = generator().answers(PROMPTS, GREEDY)
    stop = whole[0].ids[4]
    ends = [a.ids.index(stop) + 1 if stop in a.ids else 12 for a in whole]
    never = next(i for i in range(40) if all(i not in a.ids for a in whole))
    cut = generator().answers(PROMPTS, dataclasses.replace(GREEDY, stop_ids=(never, stop)))
    assert [a.ids for a in cut] == [a.ids[:end] for a, end in zip(whole, ends, strict=True)]
    assert cut[0].ended == "stop id" and len(cut[0].logprobs) == len(cut[0].ids)
    assert generator().answers(PROMPTS, dataclasses.replace(GREEDY, max_new_tokens=1))[2].ids == whole[2].ids[:1]


def test_pieces_are_the_whole():
    """A stream yields the answers so far after each chunk."""
    whole = generator().answers(PROMPTS, GREEDY)
    seen = [[a.ids for a in answers] for _, answers in generator().stream(PROMPTS, GREEDY, chunk=5)]
    assert seen == [[a.ids[:n] for a in whole] for n in (1, 6, 11, 12)]


def test_a_row_that_is_not_finite_fails_alone():
    """Either in the prompt, or later, at a token whose embedding is not finite."""
    broken = Prompt(PROMPTS[3].ids, PROMPTS[3].visual_index, np.full((1, L, E), np.nan, np.float32))
    whole = generator().answers(PROMPTS, GREEDY)
    found = generator().answers([PROMPTS[0], broken, PROMPTS[2], PROMPTS[1]], GREEDY)
    same([found[0], found[2], found[3]], [whole[0], whole[2], whole[1]])
    assert (found[1].ids, found[1].text, found[1].ended) == ((), "", "failed")
    with pytest.raises(GenerationError, match="the logits of token 1 of answer 2 are not finite: there is no answer"):
        require_answers(found)
    third = whole[0].ids[2]
    params = {**PARAMS, "llama": {**PARAMS["llama"], "embedding": np.array(PARAMS["llama"]["embedding"])}}
    params["llama"]["embedding"][third] = np.inf
    (late,) = Generator(CONFIG, params, length=64).answers([PROMPTS[0]], GREEDY)
    first = whole[0].ids.index(third)
    assert late.ended == "failed" and late.ids == whole[0].ids[: first + 1] and third not in PROMPTS[0].ids


@pytest.mark.parametrize(
    "changes, sampling, words",
    [
        ({}, {"max_new_tokens": 50}, "prompt 2 has 20 tokens: with an answer of 50 it exceeds the cache length of 64"),
        ({"ids": np.full(64, 5), "visual_index": np.full(64, -1)}, {}, "prompt 2 has 64 tokens: with an answer of 1 "),
        ({"visual": None}, {}, "prompt 2: visual_index refers to visual token 3, but there are 0 scans"),
        ({"ids": np.full(20, V + 2)}, {}, f"prompt 2: ids run from {V + 2} to {V + 2}; valid are 0 to {V + 1}"),
        ({"ids": np.zeros(0, np.int32), "visual_index": np.zeros(0, np.int32)}, {}, r"prompt 2: ids have shape \[0\]"),
        ({}, {"stop_ids": range(17)}, "17 stop ids, at most 16"),
    ],
)
def test_prompts_that_cannot_be_used(changes, sampling, words):
    with pytest.raises(ValueError, match=words):
        generator().answers([PROMPTS[1], dataclasses.replace(PROMPTS[0], **changes)], Sampling(**sampling))


def test_without_a_limit_an_answer_ends_with_the_cache():
    longest = Prompt(np.full(60, 5, np.int32), np.full(60, -1, np.int32))
    assert [len(a.ids) for a in generator().answers([longest], Sampling(stop_ids=()))] == [4]


# --- drawing ----------------------------------------------------------------------------------------------------------


def slow(logits, temperature, top_k, top_p):
    """Return the sampling probabilities, computed token by token."""
    scores = logits.astype(np.float64) / temperature
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k or None]
    weights = {i: np.exp(scores[i] - scores[order[0]]) for i in order}
    total, kept, sum_before = sum(weights.values()), {}, 0.0
    for i in order:
        if sum_before / total >= top_p and top_p < 1:
            break
        kept[i], sum_before = weights[i], sum_before + weights[i]
    return np.array([kept.get(i, 0.0) for i in range(len(scores))]) / sum(kept.values())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_restricted_is_the_slow_form(temperature):
    rng = np.random.default_rng(int(temperature * 10))
    logits = rng.standard_normal((64, V), np.float32) * 2
    for top_k, top_p in ((0, 1.0), (1, 1.0), (7, 1.0), (0, 0.5), (0, 0.9), (5, 0.8), (V + 9, 0.999)):
        scores = restricted(logits, np.float32(temperature), np.int32(top_k), np.float32(top_p))
        expected = [slow(row, temperature, top_k, top_p) for row in logits]
        np.testing.assert_allclose(jax.nn.softmax(scores), expected, rtol=0, atol=1e-6)
    tied = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(restricted(tied, np.float32(1), np.int32(1), np.float32(1))).tolist() == [
        [False, True, True, False]
    ]


def test_draws_have_the_probabilities():
    scores = np.log(np.array([0.5, 0.25, 0.2, 0.05], np.float32))
    n = 4000
    keys = np.stack([np.zeros(n), np.arange(n)], 1).astype(np.uint32)
    drawn = draw(np.broadcast_to(scores, (n, 4)), keys, np.full(n, 3, np.int32))
    share = np.bincount(drawn, minlength=4) / n
    # Four standard deviations of a proportion of one half.
    np.testing.assert_allclose(share, np.exp(scores), rtol=0, atol=0.032)


def test_seeds():
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_k=30, seed=5, stop_ids=())
    drawn = generator().answers(PROMPTS, sampling)
    same(generator().answers(PROMPTS, sampling), drawn)
    pieces = list(generator().stream(PROMPTS, sampling, chunk=3))
    same(pieces[-1][1], drawn)
    # The sample depends on the seed of the prompt, not on the other prompts.
    others = [PROMPTS[2], PROMPTS[2], PROMPTS[0]]
    same(generator().answers(others, dataclasses.replace(sampling, seed=7))[:1], [drawn[2]])
    same(generator().answers(others, sampling, seeds=[0, 7, 5])[1:], [drawn[2], drawn[0]])
    other = generator().answers(PROMPTS, dataclasses.replace(sampling, seed=6))
    assert all(a.ids != b.ids for a, b in zip(drawn, other, strict=True))
    for p, answer in zip(PROMPTS, drawn, strict=True):
        expected = recomputed(p, list(answer.ids))
        chosen = np.take_along_axis(expected, np.array(answer.ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(answer.logprobs, chosen, rtol=0, atol=ATOL)


def test_repetition_penalty():
    logits = np.array([[2.0, -2.0, 1.0, -1.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    np.testing.assert_array_equal(penalised(logits, seen, np.float32(4)), [[0.5, -8.0, 1.0, -1.0]])
    plain_answers = generator().answers(PROMPTS, GREEDY)
    assert any(len(set(a.ids)) < 12 for a in plain_answers)
    hard = generator().answers(PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=1e6))
    assert all(len(set(a.ids)) == 12 for a in hard)
    for p, answer in zip(PROMPTS, hard, strict=True):
        expected = recomputed(p, list(answer.ids))
        for step, token in enumerate(answer.ids):
            allowed = np.delete(np.arange(V), answer.ids[:step])
            assert token == allowed[expected[step][allowed].argmax()]


def test_options_are_checked_together():
    with pytest.raises(
        ValueError, match="max_new_tokens .*got 0.*temperature .*got -1.*top_k .*got -1.*top_p .*got 0.*seed .*got -1"
    ):
        Sampling(max_new_tokens=0, temperature=-1, top_k=-1, top_p=0, seed=-1)
    of_kind = {"max_new_tokens": 1.5, "top_k": True, "seed": None, "temperature": "0"}
    for name, wrong in of_kind.items():
        with pytest.raises(ValueError, match=f"{name} must be (an integer|a number) .got {wrong!r}"):
            Sampling(**{name: wrong})
    with pytest.raises(ValueError, match="top_k must be .* .got 2147483648"):
        Sampling(top_k=2**31)
    for wrong in ((3,), None, 3):
        with pytest.raises(ValueError, match="stop must be a str or a list of str"):
            Sampling(stop=wrong)
    for wrong in (3, ["a"]):
        with pytest.raises(ValueError, match="stop_ids must be a list of integers"):
            Sampling(stop_ids=wrong)
    with pytest.raises(ValueError, match="stop_ids contains 99999: token ids run from 0 to"):
        generator().answers(PROMPTS[:1], Sampling(2, stop_ids=(99999,)))
    assert repr(Sampling(np.int64(3), np.float32(0.5))) == repr(Sampling(3, 0.5))
    assert Sampling(stop="END").stop == ("END",)
