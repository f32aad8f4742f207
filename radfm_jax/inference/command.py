"""`python -m radfm_jax.generate`: ask a checkpoint about scans."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from pathlib import Path

import absl.logging
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from input_pipeline.images.intensity import ct_window
from input_pipeline.images.planes import MODES
from input_pipeline.samples import Scan
from radfm_jax import api
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.inference import inputs
from radfm_jax.inference.batch_files import answer_file, read_questions
from radfm_jax.inference.engine import EncodedScans, Request
from radfm_jax.inference.sampling import Sampling
from radfm_jax.runtime import sharding

EPILOG = """\
examples:
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --scan ct.nii.gz --prompt "Is there a lesion?"
  python -m radfm_jax.generate --checkpoint radfm/ --scan old.png --scan new.png --show seen.png \\
      --prompt "<image-1> is from May. What has changed in <image-2>?"
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --scan ct.nii.gz --chat
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --jsonl questions.jsonl --out answers.jsonl

The checkpoint says how scans are prepared for it, and holds its tokenizer. A dialogue keeps the scans on the device;
each question stands alone, as in training, unless --history puts the earlier ones before it.

exit codes: 0 done; 1 some questions of --jsonl have no answer (start it again to try them again), or some lines of a
--chat whose input is no terminal; 2 a mistake in what was given, or a scan or checkpoint that cannot be used; 130
interrupted.
"""
HELP = "/scan FILE adds a scan, /scans lists them, /new forgets scans and history, /quit ends"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m radfm_jax.generate",
        description="Ask a RadFM about scans. Research only, not for clinical use.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR",
        help="a checkpoint directory, or that of a training run (its best step, or its newest)",
    )  # fmt: skip
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the question; <image-1> marks say where scans stand")
    what.add_argument("--chat", action="store_true", help="a dialogue in the terminal")
    what.add_argument("--jsonl", type=Path, metavar="FILE", help="questions: one {id, prompt, scans, context} a line")
    scans = top.add_argument_group("scans")
    scans.add_argument("--scan", action="append", default=[], metavar="PATH", help="NIfTI, DICOM file or series, PNG, "
                       "JPEG, TIFF, .npy; repeat it for more")  # fmt: skip
    scans.add_argument(
        "--place", choices=inputs.PLACES, default="first", help="of scans without marks (default: first)"
    )
    scans.add_argument("--volume", type=int, help="which volume of 4D files, from 0")
    scans.add_argument("--window", help="a CT window by name, or LOW,HIGH in the scan's unit")
    scans.add_argument("--context", default="", help="what is known of the patient")
    scans.add_argument("--show", type=Path, metavar="FILE.png", help="save a picture of what the model sees")
    answer = top.add_argument_group("the answer")
    answer.add_argument("--max-new-tokens", type=int, help="default: 200, fewer where the text length ends")
    answer.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    answer.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest tokens (default: 0, all)")
    answer.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that reach p (default: 1)")
    answer.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids repetition (default: 1)")
    answer.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    answer.add_argument("--history", action="store_true", help="--chat: put earlier questions and answers before each")
    files = top.add_argument_group("files of questions")
    files.add_argument("--out", type=Path, metavar="FILE", help="answers of --jsonl; those that are there are kept")
    files.add_argument("--root", type=Path, metavar="DIR", help="of the scans (default: the folder of --jsonl)")
    files.add_argument("--batch", type=int, default=8, help="questions at a time (default: 8)")
    model = top.add_argument_group("the model")
    model.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model of a checkpoint without one")
    model.add_argument("--preprocess", choices=MODES, help="how scans and text are prepared, if not as in training")
    for name, what_of in (("2d", "2D scans, in pixels"), ("3d", "volumes, in pixels")):
        model.add_argument(f"--size-{name}", type=int, help=f"sides of {what_of}, if not as in training")
    model.add_argument("--depth", type=int, help="most slices of a volume, if not as in training")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute in, and keep "
                       "weights in (default: float32)")  # fmt: skip
    model.add_argument("--int8", action="store_true", help="keep the language model's matrices as int8: half of the "
                       "memory of bfloat16, a fourth of float32; answers may differ")  # fmt: skip
    model.add_argument("--devices", type=int, help="how many share the model (default: as many as its heads divide)")
    model.add_argument("--no-verify", action="store_true", help="do not compare files with their SHA-256 first")
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--window" in argv[:-1]:  # of -1000,400 argparse would take the first character for that of an option
        at = argv.index("--window")
        argv[at : at + 2] = [f"--window={argv[at + 1]}"]
    args = top.parse_args(argv)
    if (args.jsonl is None) != (args.out is None):
        top.error("--jsonl FILE and --out FILE belong together")
    read_so = args.window is not None or args.volume is not None
    if args.jsonl and (args.scan or args.context or args.show or read_so):
        top.error(
            "--jsonl: scans, their windows and volumes, and context stand in the file, and --show is for single "
            "questions"
        )
    if args.prompt is not None and read_so and not args.scan:
        top.error("--window and --volume say how a --scan is read, and none is given")
    if args.history and not args.chat:
        top.error("--history is for --chat")
    if args.batch < 1:
        top.error(f"--batch is {args.batch}: at least 1")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about merges that it rightly skips
    console = Console(stderr=True)  # what is said about the answers; they go to standard output
    try:
        sampling = Sampling(
            args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed,
            tuple(args.stop),
        )  # fmt: skip
        scans = [_scan(args, path) for path in args.scan]
        if args.jsonl and args.jsonl.is_file():  # a mistake in it should not cost the loading of a model
            read_questions(args.jsonl, (args.root or args.jsonl.parent).absolute())
        model = load(args)
        if args.jsonl:
            return many(args, model, sampling, console)
        if args.prompt is not None:  # a misspelt mark should not cost the reading of a scan
            model.generator.words(Request(args.prompt, scans, args.context, args.place))
        seen = model.encode_scans(scans) if scans else None
        if args.show:
            show(seen, args.show, console)
        if args.chat:
            return Chat(args, model, sampling, console, scans, seen).run()
        say(model, Request(args.prompt, seen or (), args.context, args.place), sampling)
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
        return 130
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def load(args: argparse.Namespace) -> api.Model:
    """The model as the options want it. Raises ValueError for whatever it lacks."""
    directory = run_directory.select_checkpoint(args.checkpoint)
    spared = () if args.tokenizer is None else (checkpoint.TOKENIZER,)
    checkpoint.verify(directory, hashes=not args.no_verify, allow_missing=spared)
    config = checkpoint.model_config(checkpoint.read_description(directory), directory)
    given = {"preprocess": args.preprocess, "size_2d": args.size_2d, "size_3d": args.size_3d, "depth": args.depth}
    given = {name: value for name, value in given.items() if value is not None}
    prepared = None
    if given:
        if args.preprocess is None:
            base = api.preparation_of(directory, config)
        else:  # a checkpoint that says nothing can be told
            base = inputs.Preparation()
            with contextlib.suppress(ValueError):
                base = api.preparation_of(directory, config)
            if args.preprocess != base.preprocess:
                base = (
                    inputs.RELEASED
                    if args.preprocess == "released"
                    else inputs.Preparation(text_length=base.text_length)
                )
            base = dataclasses.replace(base, num_latents=config.num_latents)
        prepared = dataclasses.replace(base, **given)
    model = api.load(
        directory,
        dtype=args.dtype,
        param_dtype=args.dtype if args.dtype != "float32" else None,
        int8=args.int8,
        mesh=mesh_of(config, args.devices),
        verify=False,
        tokenizer=args.tokenizer,
        prepared=prepared,
    )
    _ = model.tokenizer
    return model


def mesh_of(config, devices: int | None) -> jax.sharding.Mesh | None:
    """Heads over as many devices as they divide: weights and cache are spread, and each token takes all of them."""
    found, heads = jax.devices(), config.llama.num_kv_heads
    if devices is not None and (not 1 <= devices <= len(found) or heads % devices):
        raise ValueError(
            f"--devices is {devices}: there are {len(found)}, and they must divide the model's {heads} key/value heads"
        )
    count = devices or next(n for n in range(len(found), 0, -1) if heads % n == 0)
    return sharding.make_mesh(fsdp=1, tensor=count, devices=found[:count]) if count > 1 else None


def _scan(args: argparse.Namespace, path: str) -> Scan:
    window = args.window
    if window is not None and "," in window:
        try:
            low, high = map(float, window.split(","))
        except ValueError:
            raise ValueError(f"--window {window}: give a name, or two numbers as LOW,HIGH") from None
        window = ct_window((low, high))
    elif window is not None:
        ct_window(window)
    return Scan(path, args.volume, window)


def show(seen: EncodedScans | None, file: Path, console: Console) -> None:
    if seen is None:
        raise ValueError("--show needs a --scan")
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs.picture(seen.volumes, seen.names).save(file, format="PNG")
    console.print(f"what the model sees: {file}", highlight=False, markup=False, soft_wrap=True)


def say(model: api.Model, request: Request, sampling: Sampling) -> str:
    """Prints an answer while it comes, and returns it."""
    answer = model.answer(
        request.prompt, request.scans, context=request.context, place=request.place,
        on_text=functools.partial(print, end="", flush=True), **dataclasses.asdict(sampling),
    )  # fmt: skip
    print(flush=True)
    return answer


class Chat:
    """A dialogue in the terminal."""

    def __init__(self, args, model: api.Model, sampling: Sampling, console: Console, scans: list[Scan], seen):
        self.args, self.model, self.sampling, self.console = args, model, sampling, console
        self.scans, self.seen = list(scans), seen
        self.history: list[tuple[str, str]] = []

    def run(self) -> int:
        """0; where the lines come from a pipe or a file, 1 if one of them failed."""
        asked = sys.stdin.isatty()
        if asked:
            self.console.print(HELP, style="dim", highlight=False)
        failed = 0
        while True:
            try:
                line = input("> " if asked else "").strip()
            except EOFError:
                line = "/quit"
            if line in ("/quit", "/exit"):
                return int(failed > 0 and not asked)
            try:
                self.take(line)
            except (ValueError, OSError) as error:  # a mistake ends a question, not the dialogue
                failed += 1
                self.console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)

    def take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/scan":
            if not rest.strip():
                raise ValueError("/scan needs a file: /scan ct.nii.gz")
            scans = [*self.scans, _scan(self.args, rest.strip())]
            self.seen = self.model.encode_scans(scans)  # together: released mode brings them to one depth
            self.scans = scans
        elif line == "/scans":
            for number, scan in enumerate(self.scans, 1):
                self.console.print(f"<image-{number}> {scan.path}", markup=False, highlight=False, soft_wrap=True)
        elif line == "/new":
            self.scans, self.seen, self.history = [], None, []
        elif line.startswith("/"):
            raise ValueError(f"{command} is unknown: {HELP}")
        else:
            before = [f"{q} {a}" for q, a in self.history] if self.args.history else []
            context = "\n".join([self.args.context, *before]).strip()
            request = Request(line, self.seen or (), context, self.args.place)
            answer = say(self.model, request, self.sampling)
            # Later questions show their scans themselves: a mark would show them once more.
            self.history.append((inputs.without_marks(line), inputs.without_marks(answer)))


def many(args: argparse.Namespace, model: api.Model, sampling: Sampling, console: Console) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, began = bar.add_task("answers", total=None), time.perf_counter()

        def progress(done: int, failed: int, total: int) -> None:
            said = f"{failed} failed, {done / (time.perf_counter() - began):.2f} samples/s"
            bar.update(task, completed=done + failed, total=total, description=f"answers, {said}")
            if not console.is_terminal:  # a batch job's log shows no bar
                console.print(f"{done + failed}/{total}, {said}", highlight=False)

        outcome = answer_file(
            model.generator, args.jsonl, args.out, sampling, root=args.root, batch=args.batch, place=args.place,
            model=str(model.directory.resolve()), checkpoint=checkpoint.digest(model.directory), progress=progress,
        )  # fmt: skip
    rate = outcome.answered / max(outcome.seconds, 1e-9)
    console.print(
        f"{outcome.answered} answers in {outcome.seconds:.1f} s ({rate:.2f} samples/s), {outcome.before} were there, "
        f"{len(outcome.failed)} failed: {args.out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for row_id, reason in outcome.failed.items():
        console.print(f"  {row_id}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if outcome.failed else 0
