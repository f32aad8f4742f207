"""`python -m radfm_jax.generate`: answer questions about scans."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

import jax

from input_pipeline.images.intensity import canonical_window
from input_pipeline.images.planes import MODES
from input_pipeline.messages import printable
from input_pipeline.samples import Scan
from input_pipeline.text.tokens import TEMPLATES
from radfm_jax import api, terminal
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.inference import inputs, stored
from radfm_jax.inference.batch_files import read_batch_file
from radfm_jax.inference.batch_run import answer_file, model_name
from radfm_jax.inference.requests import EncodedScans, Request, require_answers, suspicious
from radfm_jax.inference.sampling import Sampling
from radfm_jax.models.quantised import BASES
from radfm_jax.runtime import sharding

EPILOG = """\
examples:
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --scan ct.nii.gz --prompt "Is there a lesion?"
  python -m radfm_jax.generate --checkpoint radfm/ --scan old.png --scan new.png --show preview.png \\
      --prompt "<image-1> is from May. What has changed in <image-2>?"
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --scan ct.nii.gz --chat
  python -m radfm_jax.generate --checkpoint runs/quickstart/finetune --jsonl questions.jsonl --out answers.jsonl

The preparation of scans and the tokenizer come from the checkpoint. A chat keeps the encoded scans on the device. Each
question is independent, as in training, unless --history adds the earlier turns to it.

exit codes:
  0    success
  1    some prompts of --jsonl failed (run the command again to retry them), or some lines of a --chat that reads a file
  2    invalid arguments, or a scan or checkpoint that cannot be used
  130  interrupted
"""
HELP = "/scan FILE adds a scan, /scans lists them, /new clears scans and history, /quit ends"


def add_model_options(group, *, required: bool = False) -> None:
    """Add the options that select and load a model; `load` reads them."""
    group.add_argument("--checkpoint", required=required, type=Path, metavar="DIR", help="a checkpoint, or a training "
                       "run (its best checkpoint, else its newest)")  # fmt: skip
    group.add_argument("--tokenizer", type=Path, metavar="PATH", help="SentencePiece model, tokenizer.json "
                       "or a folder with one, if the checkpoint has none")  # fmt: skip
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the computation "
                       "and of the decoder's weights (default: float32)")  # fmt: skip
    group.add_argument("--int8", action="store_true", help="keep the decoder's matrices in int8: half the memory of "
                       "bfloat16, a quarter of float32; answers may differ")  # fmt: skip
    group.add_argument("--weights", choices=BASES, help="how the decoder's weights are held; nf4 takes a quarter of "
                       "the memory of bfloat16 (default: as in the training of adapters, otherwise "
                       "--dtype)")  # fmt: skip
    group.add_argument("--base", type=Path, metavar="DIR", help="the checkpoint that a run trained adapters for, if it "
                       "has moved")  # fmt: skip
    group.add_argument("--devices", type=int, help="number of devices for tensor parallelism (default: the most that "
                       "divide the heads)")  # fmt: skip
    group.add_argument("--batch", type=int, default=8, help="prompts per batch (default: 8)")
    group.add_argument("--max-new-tokens", type=int, help="length limit of an answer (default: 200, or fewer if the "
                       "text length ends)")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = terminal.parser(
        "python -m radfm_jax.generate", "Answer questions about scans. Research only, not for clinical use.", EPILOG
    )
    modes = top.add_mutually_exclusive_group(required=True)
    modes.add_argument("--prompt", help="the question; <image-1> marks set the positions of scans")
    modes.add_argument("--chat", action="store_true", help="interactive chat")
    modes.add_argument("--jsonl", type=Path, metavar="FILE", help="batch file: {id, prompt, scans, context} per line")
    scans = top.add_argument_group("scans")
    scans.add_argument("--scan", action="append", default=[], metavar="PATH", help="NIfTI, DICOM file, series or study "
                       "(folder, DICOMDIR, zip, tar), PNG, JPEG, TIFF or .npy; repeat for more")  # fmt: skip
    scans.add_argument("--place", choices=inputs.PLACES, default="first", help="position of scans without marks "
                       "(default: first)")  # fmt: skip
    scans.add_argument("--volume", type=int, help="index of the volume in 4D files and dynamic "
                       "series, from 0")  # fmt: skip
    scans.add_argument("--series", metavar="WORDS", help="the series of a DICOM study: its number, or words of its "
                       "description, modality and plane, such as \"axial lung\"; `python -m input_pipeline.series` "
                       "lists them")  # fmt: skip
    scans.add_argument("--window", help="intensities that become black and white: a CT window (brain, lung, ...), "
                       "LOW,HIGH in the unit of the scan, lung/soft_tissue/bone as channels, header, percentile or "
                       "minmax (default: as in training)")  # fmt: skip
    scans.add_argument("--context", default="", help="clinical context, inserted before the question")
    scans.add_argument("--system", default="", help="how to answer, inserted first; with --prompt and --chat")
    scans.add_argument("--show", type=Path, metavar="FILE.png", help="save an image of the prepared scans")
    answer = top.add_argument_group("decoding")
    answer.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default: 0)")
    answer.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens (default: 0, all)")
    answer.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens that reach "
                        "probability p (default: 1)")  # fmt: skip
    answer.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 reduces repetition (default: 1)")
    answer.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    answer.add_argument("--history", action="store_true", help="--chat: add earlier questions and answers to each one")
    batch = top.add_argument_group("batch files")
    batch.add_argument("--out", type=Path, metavar="FILE", help="answers of --jsonl; existing answers are kept")
    batch.add_argument(
        "--root", type=Path, metavar="DIR", help="root of relative scan paths (default: that of --jsonl)"
    )
    model = top.add_argument_group("model")
    add_model_options(model, required=True)
    model.add_argument("--preprocess", choices=MODES, help="override the preprocessing of the checkpoint")
    model.add_argument("--template", choices=TEMPLATES, help="override the form of a conversation: chat is the chat "
                       "template of the tokenizer")  # fmt: skip
    model.add_argument("--size-2d", type=int, help="override the side of 2D scans, in pixels")
    model.add_argument("--size-3d", type=int, help="override the side of volumes, in pixels")
    model.add_argument("--depth", type=int, help="override the maximum number of slices of a volume")
    model.add_argument("--no-verify", action="store_true", help="skip the SHA-256 check of the checkpoint's files")
    return top


def _parse(argv: list[str]) -> argparse.Namespace:
    top = parser()
    if "--window" in argv[:-1]:  # argparse would read the minus of -1000,400 as an option
        i = argv.index("--window")
        argv[i : i + 2] = [f"--window={argv[i + 1]}"]
    args = top.parse_args(argv)
    scan_options = any(option is not None for option in (args.window, args.volume, args.series))
    if (args.jsonl is None) != (args.out is None):
        top.error("--jsonl FILE and --out FILE require each other")
    if args.jsonl and (args.scan or args.context or args.system or args.show or scan_options):
        top.error(
            "--jsonl excludes --scan, --window, --volume, --series, --context, --system and --show: the batch file has "
            "these fields"
        )
    if args.prompt is not None and scan_options and not args.scan:
        top.error("--window, --volume and --series need a --scan")
    if args.history and not args.chat:
        top.error("--history needs --chat")
    if args.batch < 1:
        top.error(f"--batch must be at least 1 (got {args.batch})")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    return terminal.run(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    # Check all inputs before the slower steps: loading a model, then reading scans.
    scans = [_scan(args, path) for path in args.scan]
    if args.jsonl and args.jsonl.is_file():
        read_batch_file(args.jsonl, (args.root or args.jsonl.parent).absolute())
    model = load(args)
    if reason := stored.untrained(model.directory):
        terminal.message(f"warning: {reason}", style="yellow")
    if args.jsonl:
        return run_batch_file(args, model, sampling)
    if args.prompt is not None:
        model.generator.encode_text(Request(args.prompt, scans, args.context, args.place, args.system))
    encoded = model.encode_scans(scans) if scans else None
    if args.show:
        if encoded is None:
            raise ValueError("--show needs a --scan")
        args.show.parent.mkdir(parents=True, exist_ok=True)
        inputs.preview_image(encoded.volumes, encoded.names).save(args.show, format="PNG")
        terminal.message(f"saved the prepared scans: {args.show}")
    if args.chat:
        return Chat(args, model, sampling, scans, encoded).run()
    print_answer(model, Request(args.prompt, encoded or (), args.context, args.place, args.system), sampling)
    return 0


def load(args: argparse.Namespace) -> api.Model:
    """Load the model that the options select. Raises ValueError if it cannot be used, or has no tokenizer."""
    directory = run_directory.select_checkpoint(args.checkpoint)
    allow_missing = () if args.tokenizer is None else checkpoint.TOKENIZERS
    checkpoint.verify(directory, hashes=not getattr(args, "no_verify", False), allow_missing=allow_missing)
    if (base := checkpoint.base_of(directory, args.base)) is not None:
        checkpoint.verify(base, hashes=not getattr(args, "no_verify", False))
    config = checkpoint.model_config(checkpoint.read_description(directory), directory)
    overrides = {name: getattr(args, name, None) for name in ("preprocess", "template", "size_2d", "size_3d", "depth")}
    prepared = _preparation(directory, config, {k: v for k, v in overrides.items() if v is not None})
    model = api.load(
        directory, dtype=args.dtype, param_dtype=None if args.dtype == "float32" else args.dtype, int8=args.int8,
        weights=args.weights, base=args.base, mesh=mesh_of(config, args.devices), verify=False,
        tokenizer=args.tokenizer, prepared=prepared,
    )  # fmt: skip
    _ = model.tokenizer
    return model


def _preparation(directory: Path, config, overrides: dict) -> inputs.Preparation | None:
    """Return the checkpoint's preparation with overrides; None without overrides."""
    if not overrides:
        return None
    mode = overrides.get("preprocess")
    if mode is None:
        base = stored.preparation_of(directory, config)
    else:  # the checkpoint need not record a preparation
        base = inputs.Preparation()
        with contextlib.suppress(ValueError):
            base = stored.preparation_of(directory, config)
        if mode != base.preprocess:
            base = inputs.RELEASED if mode == "released" else inputs.Preparation(text_length=base.text_length)
        base = dataclasses.replace(base, num_latents=config.num_latents)
    return dataclasses.replace(base, **overrides)


def mesh_of(config, devices: int | None) -> jax.sharding.Mesh | None:
    """Return a mesh that shards the heads over `devices`. None: as many devices as divide the heads."""
    available, heads = jax.devices(), config.llama.num_kv_heads
    if devices is not None and (not 1 <= devices <= len(available) or heads % devices):
        raise ValueError(
            f"--devices must be at most {len(available)} and divide the model's {heads} key/value heads (got {devices})"
        )
    count = devices or next(n for n in range(len(available), 0, -1) if heads % n == 0)
    return sharding.make_mesh(fsdp=1, tensor=count, devices=available[:count]) if count > 1 else None


def _scan(args: argparse.Namespace, path: str) -> Scan:
    try:
        window = None if args.window is None else canonical_window(args.window)
        return Scan(path, args.volume, window, args.series)
    except ValueError as error:
        raise ValueError(f"--window: {error}") from None


def print_answer(model: api.Model, request: Request, sampling: Sampling) -> str:
    """Print an answer to standard output while it is generated, and return it."""
    for pieces, answers in model.generator.stream([request], sampling, chunk=api.CHUNK):
        (answer,) = require_answers(answers)
        print(printable(pieces[0], keep="\n\t"), end="", flush=True)
    print(flush=True)
    if reason := suspicious(answer):
        terminal.message(f"warning: {reason}", style="yellow")
    return answer.text


class Chat:
    def __init__(self, args, model: api.Model, sampling: Sampling, scans: list[Scan], encoded: EncodedScans | None):
        self.args, self.model, self.sampling = args, model, sampling
        self.scans, self.encoded = list(scans), encoded
        self.history: list[tuple[str, str]] = []

    def run(self) -> int:
        """Run the command. Returns 0, or 1 if the input is a pipe or a file and one of its lines failed."""
        interactive = sys.stdin.isatty()
        if interactive:
            terminal.message(HELP, style="dim")
        failed = 0
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                line = "/quit"
            if line in ("/quit", "/exit"):
                return int(failed > 0 and not interactive)
            try:
                self.handle(line)
            except (ValueError, OSError) as error:  # an error ends the line, not the chat
                failed += 1
                terminal.message(f"error: {error}", style="red")

    def handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line:
            return
        if command == "/scan":
            if not argument.strip():
                raise ValueError("/scan needs a file: /scan ct.nii.gz")
            scans = [*self.scans, _scan(self.args, argument.strip())]
            self.encoded = self.model.encode_scans(scans)  # all of them: released mode gives them one depth
            self.scans = scans
        elif line == "/scans":
            for number, scan in enumerate(self.scans, 1):
                terminal.message(f"<image-{number}> {scan.path}")
        elif line == "/new":
            self.scans, self.encoded, self.history = [], None, []
        elif line.startswith("/"):
            raise ValueError(f"unknown command {command}: {HELP}")
        else:
            history = self.history if self.args.history else ()
            request = Request(
                line, self.encoded or (), self.args.context, self.args.place, self.args.system, tuple(history)
            )
            answer = print_answer(self.model, request, self.sampling)
            # A mark in the history would insert its scan once more.
            self.history.append((inputs.without_marks(line), inputs.without_marks(answer)))


def run_batch_file(args: argparse.Namespace, model: api.Model, sampling: Sampling) -> int:
    with terminal.answer_progress() as progress:
        result = answer_file(
            model.generator, args.jsonl, args.out, sampling, root=args.root, batch=args.batch, place=args.place,
            model=model_name(model.directory), checkpoint=checkpoint.digest(model.directory), progress=progress,
        )  # fmt: skip
    terminal.message(f"{result.summary()}: {args.out}")
    if result.suspicious:
        listed = ", ".join(list(result.suspicious)[:5]) + (", ..." if len(result.suspicious) > 5 else "")
        first = next(iter(result.suspicious.values()))
        message = f"warning: {len(result.suspicious)} answers look wrong ({listed}): {first}"
        terminal.message(message, style="yellow")
    for row_id, error in result.failed.items():
        terminal.message(f"  {row_id}: {error}", style="red")
    return 1 if result.failed else 0
