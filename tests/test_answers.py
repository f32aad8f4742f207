"""Answers from Python: Model.answer, its variants and its errors."""

# ruff: noqa: F811 (fixtures that are imported)

import dataclasses
import json

import jax
import numpy as np
import pytest
from generation_parts import PREPARED, greedy, model, run, scans, tokenizer  # noqa: F401
from PIL import Image

import radfm_jax
from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.datasets import open_dataset
from input_pipeline.samples import Scan
from input_pipeline.sources import NoTerms
from input_pipeline.text.tokenizer import load_tokenizer
from input_pipeline.text.tokens import encode
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import GenerationError, Request, Sampling, inputs
from radfm_jax.models import radfm


def one_row(encoded, volumes, num_latents: int) -> dict[str, np.ndarray]:
    """Return a batch of one row with this prompt and its scans."""
    numbers = [int(scan.path) for scan in encoded.scans]
    shown = {number: ScanPlanes.of(volumes[number]) for number in numbers}
    limits = RowLimits(
        text_length=len(encoded.ids),
        vision_rows=max(len(volumes), 1),
        patch_length=max((len(p.plane_index) for p in shown.values()), default=1),
        planes=max(sum(len(p.planes) for p in shown.values()), 1),
        scans=max(len(volumes), 1),
    )
    row = LoadedRow([encoded], [numbers], {number: number for number in numbers}, shown)
    dtype = volumes[0].voxels.dtype if volumes else np.dtype(np.uint8)
    arrays = collate_row(row, limits, num_latents=num_latents, plane_dtype=dtype)
    return collate_batch([(arrays, None)], limits.planes).arrays


def test_answers_are_those_of_the_plain_forward_pass(model, scans):
    """Compare with the plain forward pass over prompt and scans in one training row."""
    files = [scans / "ct.nii.gz", scans / "film.png"]
    prompt = "Is there a lesion in <image-2> or <image-1>, none in <image-2>?"
    (answer,) = model.generator.answers([Request(prompt, files)], Sampling(6, stop_ids=()))
    encoded = inputs.encode_prompt(prompt, 2, model.tokenizer, model.preparation)
    n = len(encoded.ids)
    volumes = inputs.read_scans(files, model.preparation)
    row = one_row(encoded, volumes, 4)
    assert [v.shape for v in volumes] == [(32, 32, 8), (64, 64, 4)]
    # Append the answer to the row; the pass is causal.
    pad = lambda x, value: np.pad(x, ((0, 0), (0, 6)), constant_values=value)  # noqa: E731
    row |= {k: pad(row[k], v) for k, v in (("visual_index", -1), ("segments", 1), ("key_ok", True))}
    row["ids"] = np.concatenate([row["ids"], np.array(answer.ids)[None]], axis=1)
    row["positions"] = np.arange(n + 6)[None]
    logits, _ = jax.jit(lambda p, b: radfm.RadFM(model.config).apply({"params": p}, b))(model.params, row)
    expected = np.asarray(jax.nn.log_softmax(logits[0, n - 1 : -1]))
    assert list(answer.ids) == expected.argmax(-1).tolist()
    np.testing.assert_allclose(answer.logprobs, expected.max(-1), rtol=0, atol=2e-5)
    assert answer.text == model.tokenizer.decode(answer.ids).strip()


def test_one_by_one_batched_streamed_and_with_kept_scans(model, scans):
    film, ct = scans / "film.png", scans / "ct.nii.gz"
    alone = [greedy(model, "Is there a lesion?", [film]), greedy(model, "Report the findings.")]
    alone.append(greedy(model, "Compare <image-2> with <image-1>.", [film, ct]))
    requests = [("Is there a lesion?", [film]), ("Report the findings.",)]
    requests.append(Request("Compare <image-2> with <image-1>.", [film, ct]))
    assert model.answers(requests, max_new_tokens=12) == alone and len(set(alone)) == 3
    seen = model.encode_scans([film, ct])
    assert greedy(model, "Compare <image-2> with <image-1>.", seen) == alone[2]
    pieces = list(model.stream("Is there a lesion?", [film], max_new_tokens=12, chunk=4))
    assert "".join(pieces) == alone[0] and len(pieces) == 4
    pieces_seen = []
    assert greedy(model, "Is there a lesion?", [film], on_text=pieces_seen.append) == alone[0]
    assert "".join(pieces_seen) == alone[0] and len(pieces_seen) > 1
    stop = alone[0][5:8]
    assert greedy(model, "Is there a lesion?", [film], stop=stop) == alone[0][: alone[0].index(stop)].strip()
    # The answer depends on the scans and on their positions.
    assert greedy(model, "Is there a lesion?", [ct]) != alone[0]
    assert greedy(model, "<image-1> Is there a lesion?", [film]) == alone[0]
    last = greedy(model, "Is there a lesion?", [film], place="last")
    assert last == greedy(model, "Is there a lesion? <image-1>", [film]) != alone[0]
    told = greedy(model, "Is there a lesion?", [film], context="small lung")
    assert told == greedy(model, "small lung Is there a lesion?", [film])


def test_arrays_as_scans(model, scans):
    pixels = np.asarray(Image.open(scans / "film.png"))[..., None, None]
    assert greedy(model, "Is there a lesion?", [pixels]) == greedy(model, "Is there a lesion?", [scans / "film.png"])
    windowed = inputs.read_scans([Scan(str(scans / "ct.nii.gz"), window=(-100.0, 100.0))], model.preparation)
    plain = inputs.read_scans([str(scans / "ct.nii.gz")], model.preparation)
    assert windowed[0].voxels.std() > 1.5 * plain[0].voxels.std()


def test_images_and_2d_arrays_as_scans(model, scans):
    """The same pixels give the same volume, whether from a file, a PIL image or an array."""
    (file,) = inputs.read_scans([scans / "film.png"], model.preparation)
    image = Image.open(scans / "film.png")
    pixels = np.asarray(image)
    rgb, palette = image.convert("RGB"), image.convert("P")
    opaque = image.convert("RGBA")
    sixteen, floats = Image.fromarray(pixels.astype(np.uint16)), Image.fromarray(pixels.astype(np.float32))
    arrays = [pixels, pixels[..., None], pixels[..., None, None], np.stack([pixels] * 3, -1)[:, :, None]]
    same = [image, rgb, palette, opaque, sixteen, floats, image.convert("I"), *arrays]
    for volume in inputs.read_scans(same, model.preparation):
        np.testing.assert_array_equal(volume.voxels, file.voxels)
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # the display is a quarter turn clockwise
    (volume,) = inputs.read_scans([turned], model.preparation)
    (expected,) = inputs.read_scans([np.rot90(pixels, -1)], model.preparation)
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    colour = Image.merge("RGB", [image, image.rotate(180), image])
    (volume,) = inputs.read_scans([colour], model.preparation)
    assert volume.voxels.shape[-1] == 3
    assert greedy(model, "Is there a lesion?", [image]) == greedy(model, "Is there a lesion?", [scans / "film.png"])


def test_white_space_around_a_prompt_has_no_meaning(model):
    for preparation in (model.preparation, dataclasses.replace(inputs.RELEASED, num_latents=4)):
        plain = inputs.encode_prompt("Lesion?", 0, model.tokenizer, preparation, context="left\nlung")
        spaced = inputs.encode_prompt(" Lesion?\r\n", 0, model.tokenizer, preparation, context="\n left\r\nlung\n")
        assert plain.ids.tolist() == spaced.ids.tolist()


@pytest.mark.parametrize("marks", ["Compare.", "<image-2> Compare <image-1> with <image-3>."])
def test_scans_are_where_training_puts_them(tokenizer, tmp_path, marks):
    """A training row and a prompt with the same texts have the same tokens up to the response."""
    row = {"id": "a", "task": "vqa", "scans": ["0", "1", "2"], "context": "Small lung.", "instruction": marks}
    (tmp_path / "t.jsonl").write_text(json.dumps(row | {"response": "Yes."}))
    sample = open_dataset("jsonl", table="t.jsonl", root=tmp_path).sample(0, np.random.default_rng(0))
    t = load_tokenizer(tokenizer)
    trained = encode(sample, t, NoTerms(), max_scans=3, num_latents=4)
    asked = inputs.encode_prompt(marks, 3, t, inputs.Preparation(**PREPARED), context="Small lung.")
    length = len(asked.ids)
    assert trained.ids[:length].tolist() == asked.ids.tolist() and len(trained.ids) > length
    assert trained.visual[:length].tolist() == asked.visual.tolist() and trained.scans == asked.scans


def test_released_form(tokenizer, scans):
    """2D scans are 512 x 512, all scans have one depth, and an image at the end precedes the last character."""
    t, released = load_tokenizer(tokenizer), dataclasses.replace(inputs.RELEASED, num_latents=4)
    volumes = inputs.read_scans([scans / "film.png", scans / "ct.nii.gz"], released)
    assert [v.shape for v in volumes] == [(256, 256, 8)] * 2 and volumes[0].voxels.dtype == np.float32
    tested = inputs.read_scans([scans / "ct.nii.gz"], dataclasses.replace(released, size_3d=512))
    assert tested[0].shape == (512, 512, 8)
    encoded = inputs.encode_prompt("Is there a lesion?", 1, t, released, place="last")
    image = [t.image_id, 0, 0, 0, 0, t.image_end_id]
    assert encoded.ids.tolist() == [1, *t.encode("Is there a lesion"), *image, *t.encode("?")]
    assert inputs.visual_index(encoded, 4)[-6 - len(t.encode("?")) :][1:5].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "prompt, files, options, words",
    [
        ("<image-2> Lesion?", ["film.png"], {}, "no scan for <image-2>.*no mark <image-1>"),
        ("<image-1> Lesion?", ["film.png", "ct.nii.gz"], {}, "2 scans, but no mark <image-2>"),
        ("  ", ["film.png"], {}, "the prompt is empty: write a question"),
        (None, ["film.png"], {}, "prompt, context and system must be str .got NoneType, str, str"),
        ("<image-1>", ["film.png"], {}, "has scans but no text"),
        ("Lesion?", ["film.png"], {"history": [{"role": "user", "content": "a"}]}, "history must have pairs of texts"),
        ("<image-1> Lesion?", [], {}, "no scan for <image-1> .no scans are given"),
        (
            "<image> or <Image-1>?",
            ["film.png"],
            {},
            "contains <image>, <Image-1>, which is not a valid mark: write <image-1>",
        ),
        ("<image 1> Lesion?", [], {}, "contains <image 1>, which is not a valid mark"),
        (
            "Lesion?",
            ["film.png"],
            {"context": "was <Image-1>"},
            "the context contains <Image-1>, which is not a valid mark",
        ),
        ("Lesion?", ["broken.png"], {}, "broken.png: "),
        ("Lesion?", ["absent.png"], {}, "absent.png: there is no such file"),
        ("Lesion? " * 60, [], {}, "prompt 1 has .* tokens: with an answer of 1 it exceeds the cache length of 128"),
        ("Lesion?", [], {"max_new_tokens": 500}, "with an answer of 500 it exceeds"),
        ("Lesion?", [], {"place": "middle"}, "place must be one of first, last .got 'middle'"),
        ("Lesion \ud800?", [], {}, "not valid Unicode"),
        ("Lesion?", "film.png", {}, "scans are a str: pass a list"),
        ("Lesion?", [np.zeros((3, 20, 20))], {}, "scan 1 .array.*channels seem to come before rows"),
        ("Lesion?", [np.zeros((20, 20, 5))], {}, "scan 1 .array.*constant"),
        ("Lesion?", [7], {}, "scan 1 is a int: pass a path"),
        ("Lesion?", [Image.new("RGBA", (20, 20))], {}, "scan 1 .image.*transparent"),
        ("Lesion?", [Image.new("HSV", (20, 20))], {}, "scan 1 .image.*pixel mode HSV"),
        ("Lesion?", [Image.new("L", (20, 20))], {}, "scan 1 .image.*constant"),
        ("Lesion?", Image.new("L", (20, 20)), {}, "scans are a Image: pass a list"),
    ],
)
def test_invalid_prompts(model, scans, prompt, files, options, words):
    files = files if isinstance(files, str | Image.Image) else [scans / f if isinstance(f, str) else f for f in files]
    with pytest.raises(ValueError, match=words):
        model.answer(prompt, files, **options)


def test_a_prompt_that_fails_has_no_answer(model, scans):
    seen = model.encode_scans([scans / "film.png"])
    broken = dataclasses.replace(seen, tokens=seen.tokens * np.nan)
    with pytest.raises(GenerationError, match="answer 2 are not finite"):
        model.answers([("Lesion?", seen), ("Lesion?", broken)], max_new_tokens=4)


def test_encoded_scans_belong_to_the_encoder_of_an_adapter(model, scans):
    """Adapters may have learned another vision encoder, for which other visual tokens would be wrong."""
    projection = jax.tree.map(lambda x: x + 0.5, model.params["projection"])
    own = dataclasses.replace(model, params={**model.params, "projection": projection})
    several = dataclasses.replace(model, adapters={"same": model, "own": own})
    films, options = [scans / "film.png"], {"max_new_tokens": 4}
    seen = several.encode_scans(films)
    assert several.answer("Lesion?", seen, adapter="same", **options) == model.answer("Lesion?", films, **options)
    with pytest.raises(
        ValueError, match=r"encoded with no adapter, but 'own' has .* encode_scans\(scans, adapter='own'"
    ):
        several.answer("Lesion?", seen, adapter="own", **options)
    seen = several.encode_scans(films, adapter="own")
    np.testing.assert_array_equal(seen.tokens, own.encode_scans(films).tokens)
    assert several.answer("Lesion?", seen, adapter="own", **options) == own.answer("Lesion?", films, **options)
    with pytest.raises(ValueError, match='has the name "", which is this model itself'):
        model.with_adapters({"": "run"})


def test_checkpoints_that_lack_something(model, run, tokenizer, scans, tmp_path):
    directory = run / "checkpoints" / "5"
    assert model.directory == directory and model.preparation == inputs.Preparation(**PREPARED, text_length=128)
    with checkpoint.new_directory(tmp_path / "bare") as bare:
        checkpoint.save_params(bare, model.params)
        checkpoint.write_description(bare, "radfm", model.config.to_dict())
    bare = radfm_jax.load(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer.model and no tokenizer.json: load it with .*--tokenizer FILE"):
        bare.answer("Lesion?")
    bare = radfm_jax.load(tmp_path / "bare", tokenizer=tokenizer)
    assert bare.answer("Lesion?", max_new_tokens=4) == model.answer("Lesion?", max_new_tokens=4)
    with pytest.raises(
        ValueError, match="bare has no run.json that records how scans were prepared.*--preprocess paper"
    ):
        bare.answer("Lesion?", [scans / "film.png"])
    told = radfm_jax.load(tmp_path / "bare", tokenizer=tokenizer, prepared=model.preparation)
    assert greedy(told, "Lesion?", [scans / "film.png"]) == greedy(model, "Lesion?", [scans / "film.png"])
    # A saved model keeps its preparation.
    radfm_jax.save(model, tmp_path / "again")
    assert radfm_jax.load(tmp_path / "again").preparation == model.preparation
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="a training run without any saved step"):
        radfm_jax.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="tokenizer nowhere does not exist"):
        radfm_jax.load(run, tokenizer="nowhere")
