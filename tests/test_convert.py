"""radfm_jax.convert: PyTorch files <-> checkpoint directories, with the released tensor names."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import golden
import numpy as np
import parity
import pytest
import torch
from convert_parts import SMALL, only_source, save_bin, state_of, write_sizes

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import model_config, table, weights
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models import radfm

CASE = "p1_2d_s1"
ROOT = Path(__file__).parents[1]


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.fixture(scope="module")
def golden_bin(tmp_path_factory) -> Path:
    config = parity.config_of(golden.Sizes.of_golden(golden.load(CASE)))
    return save_bin(tmp_path_factory.mktemp("golden") / "pytorch_model.bin", golden.state_dict(CASE), config=config)


@pytest.fixture(scope="module")
def golden_checkpoint(golden_bin) -> Path:
    path = golden_bin.parent / "checkpoint"
    from_torch(golden_bin, path, unused="keep")
    return path


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    from_torch(save_bin(folder / "small.bin", state_of()), folder / "checkpoint")
    return folder / "checkpoint"


# --- round trips ------------------------------------------------------------------------------------------------------


def test_kept_tensors_round_trip_exactly(golden_bin, golden_checkpoint, tmp_path):
    to_torch(golden_checkpoint, tmp_path / "back.bin")
    before, after = load_bin(golden_bin), load_bin(tmp_path / "back.bin")
    assert before.keys() == after.keys()
    assert [k for k in before if not same_bits(before[k], after[k])] == []
    pointers = [after[k].untyped_storage().data_ptr() for k in (table.EMBEDDING, table.EMBEDDING_ALIAS)]
    assert pointers[0] == pointers[1], "both names of the embedding share one storage, as in the released file"


def test_safetensors_folder_round_trip(golden_checkpoint, tmp_path):
    to_torch(golden_checkpoint, tmp_path / "folder", max_shard_bytes=4 * 10**6)
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert {"README.md", "config.json", "model.safetensors.index.json"} < set(names) and "manifest.json" not in names
    assert "not for clinical use" in (tmp_path / "folder" / "README.md").read_text()
    from_torch(tmp_path / "folder", tmp_path / "again", unused="keep")
    first, second = (checkpoint.StoredParams(d) for d in (golden_checkpoint, tmp_path / "again"))
    assert first.shapes == second.shapes
    for name in first.shapes:
        np.testing.assert_array_equal(first.read(name), second.read(name), err_msg=name)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_published_zip(compression, small_checkpoint, tmp_path):
    save_bin(tmp_path / "pytorch_model.bin", state_of())
    with zipfile.ZipFile(tmp_path / "published.zip", "w", compression) as z:
        z.write(tmp_path / "pytorch_model.bin", "RadFM/pytorch_model.bin")
    write_sizes(tmp_path / "published.zip", SMALL)
    from_torch(tmp_path / "published.zip", tmp_path / "checkpoint")
    first, second = (checkpoint.StoredParams(d) for d in (small_checkpoint, tmp_path / "checkpoint"))
    assert all(np.array_equal(first.read(k), second.read(k)) for k in first.shapes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_option_and_unchanged_dtype(dtype, small_checkpoint, tmp_path):
    state = {k: torch.from_numpy(v) for k, v in state_of().items()}
    to_torch(small_checkpoint, tmp_path / "narrow.bin", dtype=dtype)
    narrow = load_bin(tmp_path / "narrow.bin")
    name = "lang_model.model.layers.1.mlp.up_proj.weight"
    assert same_bits(narrow[name], state[name].to(getattr(torch, dtype)))
    from_torch(tmp_path / "narrow.bin", tmp_path / "checkpoint", unused="keep")
    assert {str(d) for d in checkpoint.StoredParams(tmp_path / "checkpoint").dtypes.values()} == {dtype}
    to_torch(tmp_path / "checkpoint", tmp_path / "back.bin")
    back = load_bin(tmp_path / "back.bin")
    assert back.keys() == narrow.keys() and all(same_bits(back[k], narrow[k]) for k in back)


def test_buffers_by_layout(small_checkpoint, tmp_path):
    to_torch(small_checkpoint, tmp_path / "4.28.bin")
    to_torch(small_checkpoint, tmp_path / "plain.bin", layout="plain")
    full, plain = load_bin(tmp_path / "4.28.bin"), load_bin(tmp_path / "plain.bin")
    extra = full.keys() - plain.keys()
    assert {k for k in full if table.is_buffer(k)} == extra and len(extra) == 3 + 1
    # as transformers 4.28 computes them
    expected = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    torch.testing.assert_close(
        full["lang_model.model.layers.2.self_attn.rotary_emb.inv_freq"], expected, rtol=0, atol=0
    )
    assert torch.equal(full[table.POSITION_IDS], torch.arange(512)[None])


def test_dropped_tensors_are_reported_and_restored_as_zeros(golden_bin, tmp_path):
    report = from_torch(golden_bin, tmp_path / "checkpoint", unused="drop")
    assert any("dropped" in line and "bert_model" in line and "cls_head" in line for line in report.lines)
    report = to_torch(tmp_path / "checkpoint", tmp_path / "back.bin")
    assert any("filled with zeros" in line for line in report.lines)
    before, after = load_bin(golden_bin), load_bin(tmp_path / "back.bin")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    unused = [k for k in before if table.UNUSED.fullmatch(k) and not table.is_buffer(k)]
    assert unused and all(not after[k].any() for k in unused)
    assert all(same_bits(before[k], after[k]) for k in before if k not in unused and not table.is_buffer(k))


def test_unused_tensors_at_released_size():
    """The released file has 143,079,969 unused parameters, not counting batch-norm statistics."""
    shapes = table.unused_shapes(radfm.radfm_14b())
    counters = ("running_mean", "running_var", "num_batches_tracked")
    parameters = {k: shape for k, (shape, _) in shapes.items() if not k.endswith(counters)}
    assert sum(int(np.prod(s)) for s in parameters.values()) == 143_079_969
    assert len(table.buffers(radfm.radfm_14b())) == 41
    names = [*shapes, *table.buffers(radfm.radfm_14b()), *(e.name for e in table.entries(radfm.radfm_14b()))]
    assert len(names) + 1 == 908  # + the second name of the embedding


def test_large_tensors_are_read_in_blocks_of_rows(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 100)
    from_torch(save_bin(tmp_path / "small.bin", state_of()), tmp_path / "checkpoint")
    first, second = (checkpoint.StoredParams(d) for d in (small_checkpoint, tmp_path / "checkpoint"))
    assert all(np.array_equal(first.read(k), second.read(k)) for k in first.shapes)


def test_embeddings_that_differ(tmp_path):
    """The second name is used, as when the released code loads the file."""
    state = state_of()
    state[table.EMBEDDING_ALIAS] = state[table.EMBEDDING] + 1
    report = from_torch(save_bin(tmp_path / "x.bin", state, tie=False), tmp_path / "checkpoint")
    assert any("differ" in line for line in report.lines)
    stored = checkpoint.StoredParams(tmp_path / "checkpoint").read("llama/embedding")
    np.testing.assert_array_equal(stored, state[table.EMBEDDING_ALIAS])


@pytest.mark.parametrize("absent", [table.EMBEDDING, table.EMBEDDING_ALIAS])
def test_one_name_of_the_embedding_is_enough(absent, tmp_path):
    state = state_of()
    del state[absent]
    report = from_torch(save_bin(tmp_path / "x.bin", state, tie=False), tmp_path / "checkpoint")
    assert any(absent in line and "absent" in line for line in report.lines)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_config(golden_checkpoint, small_checkpoint):
    assert radfm_jax.load(small_checkpoint).config == SMALL
    config, case = radfm_jax.load(golden_checkpoint).config, golden.load(CASE).meta["llama"]
    assert (config.llama.vocab_size, config.llama.num_heads, config.vision.width) == (160, 4, 24)
    assert (config.llama.width, config.llama.mlp_width) == (case["hidden"], case["inter"])
    assert (config.vision.num_layers, config.perceiver.num_layers, config.num_latents) == (12, 6, 32)


def test_released_sizes_need_no_config():
    """Released shapes are enough, even without the rotary buffers."""
    shapes = {e.name: e.torch_shape for e in table.entries(radfm.radfm_14b())}
    assert model_config.radfm_from_shapes(shapes, None, "x") == radfm.radfm_14b()


def test_a_config_of_sizes_must_not_contradict_the_buffers(tmp_path):
    """Four heads of 4 and two of 8 have the same shapes; only the rotary buffers show the difference."""
    config = SMALL.to_dict()
    config["llama"] |= {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}
    with pytest.raises(ValueError, match="heads of \\[8\\], but the config says 4 heads of 4"):
        from_torch(save_bin(tmp_path / "x.bin", state_of()), tmp_path / "checkpoint", config={"model": config})


# --- bad input --------------------------------------------------------------------------------------------------------


def test_all_problems_are_in_one_error_and_nothing_is_written(tmp_path):
    state = state_of()
    del state["lang_model.model.norm.weight"], state["embedding_layer.perceiver.layers.1.0.to_q.weight"]
    state["embedding_layer.extra.weight"] = np.zeros(3, np.float32)
    state["embedding_layer.fc.bias"] = np.zeros(17, np.float32)
    state["lang_model.model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    state["embedding_layer.perceiver.latents"][0, 0] = np.inf
    path = save_bin(tmp_path / "x.bin", state)
    with pytest.raises(ValueError) as e:
        # the width comes from norm.weight, which is missing here, so pass a config
        from_torch(path, tmp_path / "checkpoint", config={"model": SMALL.to_dict()})
    for line in (
        "missing: lang_model.model.norm.weight (16,)",
        "missing: embedding_layer.perceiver.layers.1.0.to_q.weight (128, 12)",
        "unexpected: embedding_layer.extra.weight (3,)",
        "shape of embedding_layer.fc.bias: (17,), expected (16,)",
        "not finite: lang_model.model.layers.1.mlp.up_proj.weight",
        "not finite: embedding_layer.perceiver.latents",
    ):
        assert line in str(e.value)
    assert only_source(tmp_path)


def test_all_non_finite_tensors_are_listed(tmp_path):
    state = state_of()
    state["lang_model.model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    state["lang_model.lm_head.weight"][1, 1] = -np.inf
    with pytest.raises(ValueError, match="(?s)not finite: .*layers.0.mlp.up_proj.*not finite: lang_model.lm_head"):
        from_torch(save_bin(tmp_path / "x.bin", state), tmp_path / "checkpoint")
    assert only_source(tmp_path)


def test_a_narrow_dtype_that_overflows(tmp_path):
    state = state_of()
    state["embedding_layer.fc.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match="not finite as float16: embedding_layer.fc.weight"):
        from_torch(save_bin(tmp_path / "x.bin", state), tmp_path / "checkpoint", dtype="float16")


def test_layers_of_different_dtypes(tmp_path):
    state = state_of()
    name = "lang_model.model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].astype(np.float16)
    path = save_bin(tmp_path / "x.bin", state)
    with pytest.raises(ValueError, match="llama/blocks/up/kernel are float16 and float32: pass --dtype"):
        from_torch(path, tmp_path / "checkpoint")
    from_torch(path, tmp_path / "checkpoint", dtype="bfloat16")


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_payload_never_runs(tmp_path):
    torch.save(
        {"x": Payload(tmp_path / "ran"), **{k: torch.from_numpy(v) for k, v in state_of().items()}},
        tmp_path / "x.bin",
    )
    with pytest.raises(ValueError, match="refused by torch's safe loader"):
        from_torch(tmp_path / "x.bin", tmp_path / "checkpoint")
    assert only_source(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(keep, tmp_path):
    path = save_bin(tmp_path / "x.bin", state_of())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        from_torch(path, tmp_path / "checkpoint")
    assert only_source(tmp_path)


def test_a_destination_that_exists(small_checkpoint, tmp_path):
    path = save_bin(tmp_path / "x.bin", state_of())
    (tmp_path / "existing").mkdir()
    for convert in (lambda: from_torch(path, tmp_path / "existing"), lambda: to_torch(small_checkpoint, path)):
        with pytest.raises(ValueError, match="exists: choose another name"):
            convert()


def test_too_little_disk_space_is_reported_first(small_checkpoint, tmp_path, monkeypatch):
    path = save_bin(tmp_path / "x.bin", state_of())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs [0-9.]+ kB, but the disk of .* has 1.0 kB free"):
        from_torch(path, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="1.0 kB free"):
        to_torch(small_checkpoint, tmp_path / "out")
    assert only_source(tmp_path)


def test_an_interrupt_leaves_no_files(tmp_path, monkeypatch):
    path = save_bin(tmp_path / "x.bin", state_of())
    written = []

    def interrupted(self, name, value, index=()):
        written.append(name)
        if len(written) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ParamWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_torch(path, tmp_path / "checkpoint")
    assert only_source(tmp_path)


def test_sigkill_leaves_only_a_hidden_partial_directory(tmp_path):
    """Kill the process while it waits after its tenth write, so that the kill happens mid-conversion."""
    save_bin(tmp_path / "x.bin", state_of())
    code = f"""
        import time
        from radfm_jax.checkpoints import checkpoint
        from radfm_jax.convert.from_torch import from_torch
        write, count = checkpoint.ParamWriter.write, 0
        def slow(self, *args):
            global count
            count += 1
            write(self, *args)
            if count == 10:
                open({str(tmp_path / "tenth")!r}, "w").close()
                time.sleep(600)
        checkpoint.ParamWriter.write = slow
        from_torch({str(tmp_path / "x.bin")!r}, {str(tmp_path / "checkpoint")!r})
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "tenth").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoint").exists()
    (partial,) = tmp_path.glob(".checkpoint.partial-*")
    with pytest.raises(ValueError, match="it is not a checkpoint, or it is incomplete"):
        radfm_jax.load(partial)
    from_torch(tmp_path / "x.bin", tmp_path / "checkpoint")  # the leftover does not block the next attempt


def test_tokenizer_is_copied_and_must_match_the_vocabulary(tmp_path):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "the lungs are clear and the heart is of normal size, no fracture of a rib or joint is visible\n" * 9
    )
    for vocabulary in (40, 39):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(tmp_path / str(vocabulary)),
            vocab_size=vocabulary,
            model_type="bpe",
            minloglevel=2,
        )
    path = save_bin(tmp_path / "x.bin", state_of())
    with pytest.raises(ValueError, match="39.model is 39, but the embedding has 40 rows"):
        from_torch(path, tmp_path / "a", tokenizer=tmp_path / "39.model")
    with pytest.raises(ValueError, match="corpus.txt is not a SentencePiece model"):
        from_torch(path, tmp_path / "a", tokenizer=corpus)
    report = from_torch(path, tmp_path / "a")
    assert any("no tokenizer" in line for line in report.lines)
    shutil.copy(tmp_path / "40.model", tmp_path / "tokenizer.model")
    from_torch(path, tmp_path / "b")  # tokenizer.model next to the source
    to_torch(tmp_path / "b", tmp_path / "folder")
    assert (tmp_path / "folder" / "tokenizer.model").read_bytes() == (tmp_path / "40.model").read_bytes()
