"""What is wrong with a weight file, and what to do: one right message for each kind."""

import numpy as np
import pytest
import torch
from convert_parts import SMALL, only_source, save_bin, state_of, write_sizes

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.to_torch import to_torch


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    from_torch(save_bin(folder / "x.bin", state_of()), folder / "checkpoint")
    return checkpoint.StoredParams(folder / "checkpoint")


def same(first: checkpoint.StoredParams, directory) -> bool:
    second = checkpoint.StoredParams(directory)
    return all(np.array_equal(first.read(k), second.read(k)) for k in first.shapes)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "net.model."])
def test_prefixes_of_wrappers_are_removed(prefix, small, tmp_path):
    wrapped = {prefix + name: value for name, value in state_of().items()}
    report = from_torch(save_bin(tmp_path / "x.bin", wrapped), tmp_path / "checkpoint")
    assert same(small, tmp_path / "checkpoint")
    assert any(f"as in {prefix}" in line for line in report.lines)


def test_wrappers_inside_a_name(small, tmp_path):
    state = {n.replace("lang_model.", "lang_model._orig_mod."): v for n, v in state_of().items()}
    from_torch(save_bin(tmp_path / "x.bin", state, tie=False), tmp_path / "checkpoint")
    assert same(small, tmp_path / "checkpoint")
    state["module." + table.EMBEDDING] = state["lang_model._orig_mod." + table.EMBEDDING.removeprefix("lang_model.")]
    with pytest.raises(ValueError, match="names are equal without the prefixes of wrappers: .* and module.lang_model"):
        from_torch(save_bin(tmp_path / "x.bin", state, tie=False), tmp_path / "other")


def test_no_tensors(tmp_path):
    torch.save({}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin has no tensors: save model.state_dict"):
        from_torch(tmp_path / "x.bin", tmp_path / "checkpoint")


@pytest.mark.parametrize("prefix", ["", "lang_model.", "module.lang_model."])
def test_a_language_model_alone(prefix, tmp_path):
    entries = table.entries(SMALL, "llama")
    state = {prefix + e.name: np.ones(e.torch_shape, np.float32) for e in entries}
    path = save_bin(tmp_path / "x.bin", state, config=None)
    with pytest.raises(ValueError, match="has the tensors of a llama .a language model alone.: use `from-hf`"):
        from_torch(path, tmp_path / "checkpoint")
    write_sizes(path)
    from_torch(path, tmp_path / "checkpoint", part="llama")
    assert checkpoint.read_description(tmp_path / "checkpoint")["part"] == "llama"
    with pytest.raises(ValueError, match="has the tensors of a radfm: use `from-torch`"):
        from_torch(save_bin(tmp_path / "radfm.bin", state_of()), tmp_path / "other", part="llama")


def test_tensors_of_another_model(tmp_path):
    path = save_bin(tmp_path / "x.bin", {"conv1.weight": np.ones((3, 3), np.float32)}, config=None)
    with pytest.raises(ValueError, match="is not a RadFM checkpoint: no tensor named embedding_layer.vision_encoder"):
        from_torch(path, tmp_path / "checkpoint")


@pytest.mark.parametrize("key", ["state_dict", "module", "model_state_dict"])
def test_a_nested_state_dict(key, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in state_of().items()}
    torch.save({"epoch": 3, key: state}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=f"its tensors are under '{key}': save .*torch.load.'x.bin'.*\\['{key}'\\]"):
        from_torch(tmp_path / "x.bin", tmp_path / "checkpoint")
    assert only_source(tmp_path)


@pytest.mark.parametrize(
    "file, words",
    [
        ("zero_to_fp32.py", "is a DeepSpeed checkpoint: .*zero_to_fp32.py"),
        ("global_step9/mp_rank_00_model_states.pt", "is a DeepSpeed checkpoint: .*zero_to_fp32.py"),
        ("__0_0.distcp", "is a checkpoint of torch.distributed: .*dcp_to_torch"),
    ],
)
def test_sharded_training_checkpoints(file, words, tmp_path):
    path = tmp_path / "folder" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=words):
        from_torch(tmp_path / "folder", tmp_path / "checkpoint")
    if path.suffix == ".pt":
        for shard in (path, path.parent):
            with pytest.raises(ValueError, match="of a DeepSpeed checkpoint|is a DeepSpeed checkpoint"):
                from_torch(shard, tmp_path / "checkpoint")


def test_float64(small, tmp_path):
    path = save_bin(tmp_path / "x.bin", state_of(dtype=np.float64))
    with pytest.raises(ValueError, match="parameters are float64 .*pass --dtype float32"):
        from_torch(path, tmp_path / "checkpoint")
    from_torch(path, tmp_path / "checkpoint", dtype="float32")
    assert {str(d) for d in checkpoint.StoredParams(tmp_path / "checkpoint").dtypes.values()} == {"float32"}


# --- vocabulary -------------------------------------------------------------------------------------------------------


def tokenizer_of(pieces: int, folder):
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("the lungs are clear and the heart is of normal size, no fracture of a rib or joint\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=pieces, model_type="bpe", minloglevel=2
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize("extra", [1, 24])
def test_rows_beyond_the_tokenizer(extra, small, tmp_path):
    """LLaMA with a [PAD] token has 32,001 rows; padded to a multiple of 64, it has 32,064."""
    tokenizer = tokenizer_of(40, tmp_path)
    state, pad = state_of(), np.ones((extra, 16), np.float32)
    for name in (table.EMBEDDING, "lang_model.lm_head.weight"):
        state[name] = np.concatenate([state[name], pad])
    sizes = SMALL.to_dict()
    sizes["llama"]["vocab_size"] += extra
    path = save_bin(tmp_path / "x.bin", state)
    options = {"tokenizer": tokenizer, "config": {"model": sizes}}
    with pytest.raises(ValueError, match=f"has {40 + extra} rows.*other {extra} rows.*--trim-vocabulary drops them"):
        from_torch(path, tmp_path / "checkpoint", **options)
    report = from_torch(path, tmp_path / "checkpoint", trim_vocabulary=True, **options)
    assert any(f"dropped rows 40 to {39 + extra} of the vocabulary" in line for line in report.lines)
    assert same(small, tmp_path / "checkpoint") and radfm_jax.load(tmp_path / "checkpoint").config == SMALL
    # The config may also have the tokenizer's size already.
    command = ["from-torch", str(path), str(tmp_path / "again"), "--tokenizer", str(tokenizer), "--trim-vocabulary"]
    assert main(command) == 0 and same(small, tmp_path / "again")
    to_torch(tmp_path / "again", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back[table.EMBEDDING].shape == (40, 16) and torch.equal(back[table.EMBEDDING_ALIAS], back[table.EMBEDDING])


def test_trimming_needs_a_smaller_tokenizer(tmp_path):
    path = save_bin(tmp_path / "x.bin", state_of())
    with pytest.raises(ValueError, match="--trim-vocabulary needs the tokenizer: .*pass --tokenizer"):
        from_torch(path, tmp_path / "checkpoint", trim_vocabulary=True)
    with pytest.raises(ValueError, match="the embedding has 40 rows, the tokenizer 45 pieces"):
        from_torch(path, tmp_path / "checkpoint", trim_vocabulary=True, tokenizer=tokenizer_of(45, tmp_path))


def test_an_empty_vocabulary(tmp_path):
    """DeepSpeed's ZeRO-3 saves empty tensors in place of those that it shards."""
    state = state_of()
    for name in (table.EMBEDDING, "lang_model.lm_head.weight"):
        state[name] = state[name][:0]
    with pytest.raises(ValueError, match="has 3 tensors without values .*lang_model.lm_head.weight.*ZeRO-3"):
        from_torch(save_bin(tmp_path / "x.bin", state), tmp_path / "checkpoint")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="tokenizer.model"):
        from_torch(save_bin(tmp_path / "x.bin", state_of()), tmp_path / "checkpoint")
