"""What a run will need, without the hardware: topologies, the text of a compiled program, the ladder, the command."""

import dataclasses
import json
import math
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from practice import practice

from configs import pretrain, tiny
from input_pipeline.batching.collate import collate_batch
from input_pipeline.batching.pipeline import Rows
from radfm_jax.cost import command as command
from radfm_jax.cost import estimate, hlo, ladder, program, show
from radfm_jax.cost.topology import parse
from radfm_jax.runtime import sharding
from radfm_jax.training.experiment import Experiment

# --- topologies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, count, memory, bandwidth",
    [
        ("v5p:4x4x2", 32, 95 * 2**30, 270e9),  # three open axes: a ring needs 4 x 4 x 4
        ("v5p:4x4x4", 64, 95 * 2**30, 540e9),
        ("v4:2x2x1", 4, 32 * 2**30, 90e9),  # an axis of one has no neighbours
        ("v5e:8x8", 64, 16 * 2**30, 90e9),
        ("v5e:16x16", 256, 16 * 2**30, 180e9),
        ("v6e:4x8", 32, 32 * 2**30, 180e9),
        ("gpu:8xA100-80GB", 8, 80e9, 300e9),  # inside a node
        ("gpu:32xA100-80GB", 32, 80e9, 200e9),  # 8 adapters of 25 GB/s bring it into each node
        ("gpu:16xH100", 16, 80e9, 400e9),
        ("gpu:1xH200", 1, 141e9, None),
        ("cpu:4", 4, None, None),
    ],
)
def test_topologies(text, count, memory, bandwidth):
    found = parse(text)
    assert (found.count, found.memory, found.bandwidth) == (count, memory, bandwidth)
    assert (found.peak is None) == (found.kind == "cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("v5p:4x4", "a slice of v5p has 3 dimensions, for example v5p:4x4x2"),
        ("v7:4x4", "'v7:4x4' is no topology; for example v4:2x4x4"),
        ("gpu:8xA100", "say which memory: gpu:8xA100-40GB or gpu:8xA100-80GB"),
        ("gpu:0xH100", "is no topology"),
        ("gpu:8xGTX1080", "is no topology"),
    ],
)
def test_no_topology(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


# --- what a compiled program sends ------------------------------------------------------------------------------------

# A loop of 5 that gathers bf16[8, 64] over 4 devices; in it one of 16 by steps of 2, with a permute of f32[10] in both
# directions; around them a sum of two arrays; a kernel whose own text has lines that begin like a computation's end.
TEXT = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %inner_body (p: (f32[10], u32[])) -> (f32[10], u32[]) {
      %p = (f32[10]{0}, u32[]) parameter(0)
      %two = u32[]{:T(128)} constant(2)
      %i = u32[]{:T(128)} get-tuple-element(%p), index=1
      %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="x"}
      %x = f32[10]{0} get-tuple-element(%p), index=0
      %there.1 = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
      %here.1 = f32[10]{0} collective-permute-done(%there.1)
      %there.2 = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%here.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
      %here.2 = f32[10]{0} collective-permute-done(%there.2)
      ROOT %t = (f32[10]{0}, u32[]) tuple(%here.2, %next)
    }

    %inner_condition (p.1: (f32[10], u32[])) -> pred[] {
      %p.1 = (f32[10]{0}, u32[]) parameter(0)
      %end = u32[]{:T(128)} constant(16)
      %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
      ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
    }

    %body (q: (f32[10], u32[])) -> (f32[10], u32[]) {
      %q = (f32[10]{0}, u32[]) parameter(0)
      %kernel = f32[10]{0} custom-call(%q), backend_config={"text":{
     "of a kernel": "and
    }}, metadata={op_name="splash"}
      %gathered = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
      ROOT %inner = (f32[10]{0}, u32[]) while(%q), condition=%inner_condition, body=%inner_body
    }

    %condition (r: (f32[10], u32[])) -> pred[] {
      ROOT %opaque = pred[] custom-call(%r)
    }

    ENTRY %main (a: f32[100]) -> f32[100] {
      %a = f32[100]{0} parameter(0)
      %loop = (f32[10]{0}, u32[]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
      %sum = (f32[100]{0}, s8[100]{0}) all-reduce(%a, %b), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      %scattered = f32[25]{0} reduce-scatter(%a), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
      %alone = f32[100]{0} all-gather(%a), channel_id=6, replica_groups=[8,1]<=[8], dimensions={0}
      ROOT %out = f32[100]{0} copy(%a)
    }
    """)  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run():
    found = hlo.traffic(TEXT)
    assert found.bytes == {
        "all-gather": 5 * 8 * 64 * 2 * 3 / 4,
        "reduce-scatter": 25 * 4 * 4 * 3 / 4,
        "all-reduce": 2 * (400 + 100) * 3 / 4,
        "all-to-all": 0,
        "collective-permute": 5 * 8 * 2 * 40,
    }
    assert found.counts["all-gather"] == 5 and found.counts["collective-permute"] == 80 and not found.unknown


def test_loops_of_unknown_length_are_said():
    found = hlo.traffic(TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
    assert found.counts["all-gather"] == 1 and set(found.unknown) == {"gathered", "there.1", "there.2"}
    with pytest.raises(ValueError, match="no text of an HLO module"):
        hlo.traffic("")


# A gather beside two products, each of which names it whole; before a loop, and in it.
PIECES = textwrap.dedent("""\
    %piece.1 (w: bf16[2,64]) -> bf16[8,64] {
      ROOT %gather.1 = bf16[8,64]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
    }

    %piece.2 (w: bf16[2,64]) -> bf16[8,64] {
      ROOT %gather.2 = bf16[8,64]{1,0} all-gather(%w), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
    }

    %body (p: f32[]) -> f32[] {
      %one = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
      ROOT %two = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
    }

    %condition (r: f32[]) -> pred[] {
      ROOT %opaque = pred[] custom-call(%r)
    }

    ENTRY %main (a: f32[]) -> f32[] {
      %before.1 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece.1
      %before.2 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%piece.2
      ROOT %loop = f32[] while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
    }
    """)


def test_the_pieces_of_a_collective_are_one():
    found = hlo.traffic(PIECES)
    assert found.counts["all-gather"] == 6 and found.bytes["all-gather"] == 6 * 8 * 64 * 2 * 3 / 4


def test_traffic_of_a_program_that_xla_made():
    """Three layers that FSDP gathers over eight devices, twice: forward, and again in the backward pass."""
    mesh = sharding.make_mesh()
    weights = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loss(w, x):
        rows = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("fsdp")))  # noqa: E731
        layer = jax.checkpoint(lambda x, w: (rows(jnp.tanh(rows(x) @ w)), None))
        return jax.lax.scan(layer, x, w)[0].sum()

    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    found = hlo.traffic(gradient.lower(weights, x).compile().as_text())
    whole = 3 * 64 * 64 * 4 * 7 / 8
    assert not found.unknown
    assert found.bytes["all-gather"] == pytest.approx(2 * whole, rel=0.02)
    # On a CPU the sums of gradients are not scattered.
    assert found.bytes["all-reduce"] == pytest.approx(2 * whole, rel=0.02)


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_planned_batch_is_that_of_the_pipeline(tmp_path):
    data = practice(tmp_path)
    config = Experiment.from_dict(tiny.get_config())
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch=4, accumulation=2))
    with Rows(data, "train", batch=4, host=0, hosts=1) as rows:
        real = collate_batch([(rows.empty_row, None)] * 4, data.planes).arrays
    planned = estimate.abstract_batch(config)
    assert {k: ((2, 2, *x.shape[1:]), x.dtype) for k, x in real.items()} == {
        k: (x.shape, x.dtype) for k, x in planned.items()
    }


def test_the_kernels_are_those_of_the_platform():
    config = Experiment.from_dict(pretrain.get_config())
    found = program.with_kernels(config, "tpu")
    # 32 latents that look at 1,056 tokens fit no kernel.
    assert (found.llama.attention, found.vision.attention, found.perceiver.attention) == ("splash", "splash", "xla")
    assert program.with_kernels(config, "cpu").llama.attention == "blocks"


# --- the ladder -------------------------------------------------------------------------------------------------------


def rungs(text: str, batch: int = 128):
    config = Experiment.from_dict(pretrain.get_config())
    return ladder.ladder(config, parse(text), [batch], 0.5)


def test_merged_micro_batches_send_a_quarter():
    """The recommended setting for 32 A100 against the gather for every row."""
    config, where = Experiment.from_dict(pretrain.get_config()), parse("gpu:32xA100-80GB")
    found, plain = rungs("gpu:32xA100-80GB"), ladder.plain(config, where, 128, 0.5)
    assert len(found) == 3 * 5 and found[0].fits and found[0].config.train.accumulation == 1
    assert plain.config.train.accumulation == 4 and plain.rows == 1 and plain.config.train.remat == "full"
    assert found[0].sent == plain.sent / 4
    times = [r.hidden[1] for r in found if r.fits]
    assert times == sorted(times) and not any(r.fits for r in found[len(times) :])
    # None of it hidden: arithmetic and 3 x 2 bytes of each parameter at 200 GB/s.
    sent = 3 * 2 * 13_123_822_336 * 31 / 32
    assert found[0].hidden[1] - found[0].compute == pytest.approx(sent / 200e9)


def test_time_follows_what_remat_computes_again():
    by_remat = {r.config.train.remat: r for r in rungs("gpu:32xA100-80GB") if r.rows == 4}
    flops_of_a_row = estimate.row_flops(by_remat["none"].config)
    assert ladder.executed(by_remat["none"].config) == flops_of_a_row
    # A third more for full remat, but for the head and the patch embedding.
    assert 1.30 < ladder.executed(by_remat["full"].config) / flops_of_a_row < 1.34
    order = ["none", "dots", "projections", "attention", "full"]
    computed = [by_remat[name].compute for name in order]
    assert computed == sorted(computed) and len(set(computed)) == 5
    # The stated share of the peak is reached with full remat.
    assert by_remat["full"].compute == pytest.approx(flops_of_a_row * 128 / 32 / (0.5 * 312e12))


def test_the_compiler_has_the_last_word():
    """A rung that arithmetic likes and the compiler does not is passed over; the next one is asked."""
    asked = []

    def compile_(rung):
        asked.append(rung.config.train.remat)
        if len(asked) == 1:
            raise program.CompileError("RESOURCE_EXHAUSTED")
        size = 33e9 if len(asked) == 2 else 10e9  # of 34
        return program.Program(0, int(size), 0, {"all-gather": 5e9}, {"all-gather": 1}, 0, 60.0, 100.0)

    found, best = ladder.asked(rungs("v6e:4x8"), compile_)
    assert len(asked) == 3 and best.config.train.remat == asked[2] and best.program is not None
    refused = next(r for r in found if r.refused)
    assert refused.config.train.remat == asked[0] and not refused.fits and found.index(refused) > found.index(best)
    assert best.sent == 5e9 and best.total == 10e9 + best.memory["batch"] // 2


def test_batches_that_do_not_divide():
    config = Experiment.from_dict(pretrain.get_config())
    assert ladder.batch_for(config, parse("v5p:8x8x4")) == 256
    with pytest.raises(ValueError, match="a batch of 0 rows: at least 1"):
        ladder.ladder(config, parse("v5p:4x4x2"), [0], 0.5)
    with pytest.raises(ValueError, match="a batch of 100 rows does not divide over 32 devices"):
        ladder.ladder(config, parse("v5p:4x4x2"), [100], 0.5)


# --- the command ------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = command.main(list(arguments))
    return code, capsys.readouterr()


def test_the_command(tmp_path, capsys):
    """By arithmetic: what is printed is what the JSON holds."""
    code, said = run(
        capsys, "--config=configs/pretrain.py", "--topology=gpu:32xA100-80GB", "--compile=none", "--price=2",
        f"--json={tmp_path / 'plan.json'}", f"--picture={tmp_path / 'plan.png'}",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "plan.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "plan.json").read_text())
    take = found["take"]
    assert f"--config.train.accumulation={take['accumulation']} --config.train.remat={take['remat']}" in said.out
    assert take["memory_total"] == sum(take["memory_by_part"].values()) < 0.9 * 80e9
    assert "25% of what gathering for every micro-batch of one row sends (arithmetic)" in said.out
    steps = estimate.epoch(Experiment.from_dict(pretrain.get_config()), pretrain.SIZES).steps
    cost = 2 * 32 * steps * take["seconds_not_hidden"] / 3600
    assert f" to {cost:,.0f}\n" in said.out and ", cost " in said.out and len(found["ladder"]) == 15
    assert math.isclose(found["take"]["can_hide"], 1.0)


def test_nothing_fits_and_mistakes(capsys):
    code, said = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:1xA100-40GB", "--compile=none")
    assert code == 1 and "nothing fits with 10% of the memory left free" in said.out
    code, said = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:32", "--compile=none")
    assert code == 2 and "is no topology" in said.err
    code, said = run(capsys, "--config=configs/pretrain.py", "--topology=gpu:12xH100", "--compile=none")
    assert code == 1 and "99% of the parameters lie on each device, not 1/12" in said.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--price=-2",), "--price -2.0: 0 or more is needed"),
        (("--price=nan",), "--price nan: 0 or more is needed"),
        (("--batch=0",), "a batch of 0 rows: at least 1 is needed"),
        (("--config.train.accumulation=0",), "train.accumulation is 0: at least 1 is needed"),
        (("--json={there}/none/plan.json",), "cannot be written"),
        (("--picture={there}",), "cannot be written"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_compiled(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "compiled", lambda *_, **__: pytest.fail("compiled"))
    given = ("--config=configs/pretrain.py", "--topology=gpu:32xA100-80GB", *arguments)
    code, said = run(capsys, *(argument.format(there=tmp_path) for argument in given))
    assert code == 2 and said.err.startswith("error: ") and words in said.err and not said.out


def test_what_is_arithmetic_is_called_so(capsys):
    """Of a TPU slice too, where nothing was compiled; and the roofline is what the links allow, if that is longer."""
    code, said = run(capsys, "--config=configs/pretrain.py", "--topology=v6e:4x8", "--compile=none")
    assert code == 0 and "of one row sends (arithmetic)" in said.out
    config = Experiment.from_dict(pretrain.get_config())
    slow = ladder.ladder(config, parse("gpu:256xH100"), [256], 0.4)[0]
    assert show.roofline(slow) == slow.hidden[1] - slow.compute > slow.compute * 0.4
    assert show.brief(0.0) == "0.0" and show.brief(0.0030) == "0.0030" and show.brief(1234.5, 0) == "1,234"


def test_compiled_for_simulated_devices_and_kept(tmp_path, monkeypatch, capsys):
    """The tiny model on two devices, in a process of its own; the second time nothing is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ("--config=configs/tiny.py", "--topology=cpu:2", "--config.train.batch=2", "--config.train.remat=full")
    code, said = run(capsys, *arguments)
    assert code == 0 and "compiled batch 2 = 1 x 1 a device" in said.err
    assert "memory, compiled for 2 simulated devices of the CPU" in said.out and "sent, compiled" in said.out
    code, again = run(capsys, *arguments)
    assert code == 0 and "compiled batch" not in again.err
    assert [line for line in again.out.splitlines() if line.startswith("memory")] == [
        line for line in said.out.splitlines() if line.startswith("memory")
    ]
