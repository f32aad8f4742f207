"""Folders of language models: LLaMA by transformers, its config and tokenizer, and the language model of a RadFM."""

import json
from pathlib import Path

import llama_oracle
import numpy as np
import pytest
import torch
from convert_parts import save_bin, state_of
from test_convert import small_checkpoint  # noqa: F401

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.tensor_files import open_tensors
from radfm_jax.convert.to_torch import to_torch


@pytest.mark.parametrize("variant", ["gqa", "llama31", "tied", "head_dim"])
def test_llama_folder_and_back(variant, tmp_path):
    """A folder written by transformers has the same logits after a round trip through a checkpoint."""
    import transformers

    state, logits, save = llama_oracle.build(llama_oracle.variants()[variant], seed=3)
    save(tmp_path / "hf")
    from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama")
    to_torch(tmp_path / "checkpoint", tmp_path / "back", part="llama")
    with open_tensors(tmp_path / "back") as reader:
        assert all(np.array_equal(reader.read(k), state[k]) for k in reader.infos)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    ids = np.random.default_rng(0).integers(3, again.config.vocab_size, size=(2, 48))
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.from_numpy(ids)).logits.numpy(), logits(ids))
    with pytest.raises(ValueError, match="has only the part 'llama'"):
        radfm_jax.load(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="language model alone.: use `from-hf`"):
        from_torch(tmp_path / "hf", tmp_path / "other")


def test_unused_config_values_round_trip(tmp_path):
    """The round trip keeps context length, special tokens and tokenizer files."""
    _, _, save = llama_oracle.build(llama_oracle.variants()["llama31"], seed=3)
    save(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 8192, "bos_token_id": 90}))
    write_tokenizer(tmp_path / "hf", 60)
    from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama")
    to_torch(tmp_path / "checkpoint", tmp_path / "back", part="llama")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["bos_token_id"]) == (8192, 90)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def write_tokenizer(folder: Path, size: int, **config) -> None:
    """Write a Hugging Face tokenizer of single words, with `</s>` as its end and a chat template."""
    import tokenizers

    words = {"</s>": 0, **{f"word{i}": i for i in range(1, size)}}
    model = tokenizers.models.WordLevel(words, unk_token="</s>")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | config))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def test_a_hugging_face_tokenizer_must_fit_the_vocabulary(tmp_path):
    """Rows of the embedding beyond the tokenizer are padding; a tokenizer with more ids is another model's."""
    _, _, save = llama_oracle.build(llama_oracle.variants()["mha"], seed=3)
    save(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    write_tokenizer(tmp_path / "hf", 65)
    with pytest.raises(ValueError, match="tokenizer .*hf/tokenizer.json has 65 ids, but the model has 64"):
        from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama")
    write_tokenizer(tmp_path / "hf", 60, eos_token=None)
    with pytest.raises(
        ValueError, match="hf/tokenizer.json has no end-of-text token: set `eos_token` in tokenizer_conf"
    ):
        from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama")
    assert not (tmp_path / "checkpoint").exists()
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other", 60)
    from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama", tokenizer=tmp_path / "other")
    stored = checkpoint.list_files(tmp_path / "checkpoint")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= stored.keys()
    options = {"part": "llama", "tokenizer": tmp_path / "other", "trim_vocabulary": True}
    from_torch(tmp_path / "hf", tmp_path / "trimmed", **options)
    assert checkpoint.StoredParams(tmp_path / "trimmed").shapes["llama/embedding"] == (60, 32)


def test_a_tied_head_in_a_state_dict(tmp_path):
    """torch.save(model.state_dict()) of a tied model has the embedding twice; a head that differs is an error."""
    variant = llama_oracle.variants()["tied"]
    state, _, save = llama_oracle.build(variant, seed=3)
    save(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    both = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    save_bin(tmp_path / "hf" / "pytorch_model.bin", both, config=None)
    from_torch(tmp_path / "hf", tmp_path / "checkpoint", part="llama")
    different = {**both, "lm_head.weight": both["lm_head.weight"] + 1}
    save_bin(tmp_path / "hf" / "pytorch_model.bin", different, config=None)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        from_torch(tmp_path / "hf", tmp_path / "again", part="llama")


def test_language_model_of_a_radfm(small_checkpoint, tmp_path):
    to_torch(small_checkpoint, tmp_path / "llm", part="llama")
    with open_tensors(tmp_path / "llm") as reader:
        state = state_of()
        assert all(np.array_equal(reader.read(k), state[f"lang_model.{k}"]) for k in reader.infos)
