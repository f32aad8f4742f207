"""The processor of an export in a process without JAX: the voxels and token ids of our pipeline, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import edit, make_dicom, make_series
from PIL import Image
from pydicom import uid
from scan_files import dicom_file, nifti, patched, save_image, save_npy
from tokenizer_parts import FAMILIES, texts, write_folder

from input_pipeline import phantoms
from input_pipeline.images.planes import planes
from input_pipeline.samples import Scan
from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.convert import hf_folder
from radfm_jax.convert.hub import processor as hub_processor
from radfm_jax.inference import stored
from radfm_jax.inference.inputs import RELEASED, Preparation, encode_prompt, read_scans

SMALL = Preparation(size_2d=64, size_3d=64, depth=16, num_latents=3)
CT = "ct"  # name of a scan in Hounsfield units
PREPARATIONS = {
    "minmax": SMALL,
    "float32": dataclasses.replace(SMALL, storage="float32", size_2d=96, fit="pad"),
    "int16": dataclasses.replace(SMALL, storage="int16", intensities=("percentile",), fit="pad"),
    "slabs": dataclasses.replace(
        SMALL, patch=(14, 14, 1), position_tables=(16, 16, 64), patch_order="slabs", size_2d=112, size_3d=56,
        intensities=("percentile:5,80",),
    ),
    "window": dataclasses.replace(SMALL, intensities=("-700,500",), storage="int16"),
    "three": dataclasses.replace(SMALL, intensities=("lung/soft_tissue/bone",), storage="float32"),
    "header": dataclasses.replace(SMALL, intensities=("header",), storage="float32"),
    "several": dataclasses.replace(SMALL, intensities=("minmax", "brain")),
    "released": RELEASED,
    "demo": dataclasses.replace(RELEASED, size_3d=512),
}  # fmt: skip


def export_processor(folder: Path, tokenizer: Path, preparation: Preparation, channels: int = 3) -> Path:
    """Write what an export has for AutoProcessor."""
    folder.mkdir(parents=True)
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    else:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        hf_folder.write_json(folder / "tokenizer_config.json", hf_folder.tokenizer_config(load_tokenizer(tokenizer)))
    for path in hf_folder.CODE.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    config = hub_processor.processor_config(stored.to_record(preparation), channels, load_tokenizer(folder))
    hf_folder.write_json(folder / hub_processor.FILE, config)
    return folder


class Calls:
    """Calls of processors, which run in one process without JAX."""

    def __init__(self, root: Path):
        self.root, self.calls, self.ours = root, [], []
        root.mkdir()

    def add(self, folder, ours, method: str = "__call__", **arguments) -> None:
        """Add a call. `ours`: what our pipeline returns, a ValueError, or None."""
        plain = json.loads(json.dumps(arguments, default=str))
        self.calls.append({"folder": str(folder), "method": method, "arguments": plain})
        self.ours.append(ours)

    def run(self) -> list[tuple[dict, object, object]]:
        """Return (call, ours, inputs or message) of every call."""
        (self.root / "calls.json").write_text(json.dumps(self.calls))
        environment = {name: x for name, x in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHONPATH"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(self.root / "modules")}
        command = [sys.executable, Path(__file__).with_name("processor_child.py"), self.root / "calls.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd="/")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return list(zip(self.calls, self.ours, json.loads(done.stdout.strip().splitlines()[-1]), strict=True))


def our_voxels(scans: list, preparation: Preparation):
    """Return the patches and grids that our model reads, or the error of our pipeline."""
    try:
        with warnings.catch_warnings(action="ignore"):  # notices on contrast
            volumes = read_scans(scans, preparation)
    except ValueError as error:
        return error
    values, grids = [], []
    for volume in volumes:
        stored_planes, index = planes(volume)
        floats = stored_planes.astype(np.float32) * np.float32(volume.scale) + np.float32(volume.offset)
        values.append(floats[index].reshape(len(index), -1))
        grids.append(volume.patches.grid(volume.shape))
    return {"pixel_values": digest(np.concatenate(values)), "image_grid": [list(grid) for grid in grids]}


def digest(array: np.ndarray) -> str:
    """As in processor_child.py."""
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def our_ids(tokenizer, preparation: Preparation, prompt: str, scans: int, **options):
    """Return the ids of our prompt as an export numbers them, or the error."""
    try:
        encoded = encode_prompt(prompt, scans, tokenizer, preparation, **options)
    except ValueError as error:
        return error
    return {"input_ids": [np.where(encoded.visual[:, 0] >= 0, tokenizer.vocab_size + 2, encoded.ids).tolist()]}


def write_scans(root: Path) -> dict[str, list]:
    """Write a scan of every format and kind. Returns by name what our reader and what the processor get."""
    phantoms.write(root / "practice", train=30, test=0, seed=3, size=96, volumes=0.5, workers=1)
    rows = [json.loads(line) for line in (root / "practice" / "train" / "labels.jsonl").read_text().splitlines()]
    kinds = {f"{row['file_format']}-{row['modality']}-{row['shape'][2] > 1}": row["path"] for row in rows}
    files = {name: root / "practice" / path for name, path in kinds.items()}
    rng = np.random.default_rng(0)
    volume = np.sort(rng.integers(-1000, 1500, (23, 37, 11)).astype(np.int16), axis=0)
    pixels, shape = volume[..., 3].copy(), {"BitsStored": 12, "PixelRepresentation": 0}
    dicom = lambda name, array, **own: make_dicom(root / name, np.ascontiguousarray(array), **own)  # noqa: E731
    window = {"WindowCenter": [40, 300], "WindowWidth": [400, 1500]}
    tilted = nibabel.affines.from_matvec(np.array([[0.1, 0, -3.0], [0.8, 0.05, 0.1], [0, -0.9, 0.2]]), [1, 2, 3])
    files |= {
        CT: make_series(root / CT, volume, **window),
        "padded": dicom("padded.dcm", np.where(pixels < -900, -2000, pixels), PixelPaddingValue=-2000),
        "inverted": dicom("inverted.dcm", (pixels + 1000).astype(np.uint16), **shape, **window,
                          PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-7, Modality="CR"),
        "fractional": make_series(root / "fractional", volume, RescaleSlope=0.37, RescaleIntercept=1.5, Modality="PT"),
        "sagittal": dicom("sagittal.dcm", pixels, ImageOrientationPatient=[0, -1, 0, 0, 0, 1]),
        "bytes": dicom("bytes.dcm", (pixels % 251).astype(np.uint8), syntax=uid.ImplicitVRLittleEndian),
        "rle": Path(dicom_file("MR_small_RLE.dcm")),
        "jpeg2000": Path(dicom_file("MR_small_jp2klossless.dcm")),
        "oblique": nifti(root / "oblique.nii.gz", volume, tilted, cal_min=-200, cal_max=300),
        "scaled": nifti(root / "scaled.nii", volume, np.diag([-0.7, -0.7, 5, 1]), scl_slope=0.5, scl_inter=3),
        "float64": nifti(root / "float64.nii", volume / 7.0, np.diag([2, 2, 2, 1.0])),
        "flat": nifti(root / "flat.nii.gz", pixels.astype(np.int32) * 70, np.eye(4)),
    }  # fmt: skip
    Image.fromarray((pixels + 1000).astype(np.uint16)).save(root / "deep.png")
    Image.fromarray(rng.integers(0, 255, (30, 41, 3), np.uint8)).save(root / "colour.jpg", exif=_turned())
    gray = np.repeat(rng.integers(0, 255, (64, 64, 1), np.uint8), 3, axis=2)
    Image.fromarray(gray).save(root / "gray.png")
    np.save(root / "array.npy", volume[:, :, :9])
    files |= {name: root / name for name in ("deep.png", "colour.jpg", "gray.png", "array.npy")}
    scans = {name: [str(path), str(path)] for name, path in files.items()}
    scans["image"] = [Image.open(root / "deep.png"), {"pil": root / "deep.png"}]
    scans["array"] = [volume.astype(np.float32)[..., None], {"npy": root / "float.npy"}]
    np.save(root / "float.npy", scans["array"][0])
    return scans


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def add_voxels(calls: Calls, root: Path, scans: dict[str, list]) -> None:
    tokenizer = root / "scans" / "practice" / "tokenizer.model"
    for name, preparation in PREPARATIONS.items():
        folder = export_processor(root / name, tokenizer, preparation)
        windows = [None, "minmax", "brain"] if name == "several" else [None]
        big = name in ("released", "demo")
        every = 6 if big else 1 if name in ("minmax", "float32") else 3
        for scan, (ours, theirs) in list(scans.items())[::every]:
            for window in windows:
                mine = Scan(ours, window=window) if isinstance(ours, str) else ours
                image = theirs if window is None else {"image": theirs, "window": window}
                if window is None or isinstance(ours, str):
                    calls.add(folder, our_voxels([mine], preparation), text=f"{scan}?", images=[image])
    several = [scans[name] for name in (CT, "gray.png", "scaled")]
    for name in ("minmax", "released"):
        ours = our_voxels([mine for mine, _ in several], PREPARATIONS[name])
        calls.add(root / name, ours, text="Which?", images=[theirs for _, theirs in several])


PROMPTS = [
    ("Is <image-2> better than <image-1>, or <image-1>?", 2, {}),
    ("Any edema?\n\nAnswer in one word.\n", 1, {"context": "Chest pain (new).", "system": "Be brief."}),
    ("  3.5 mm, </s><|im_end|> [INST] <eos> ?", 3, {"place": "last", "context": "Known: </turn> <s>"}),
    ("And now?", 2, {"history": [["Was <image-1>.", "No."], ["Is <image-2>", ""]], "context": "A\r\nB"}),
    ("(<image-1>)", 1, {"history": [["Left?", "Right ("]]}),
    ("Compare.", 0, {"history": [["肺野清晰 e\u0301", "œdème"]]}),
    ("Where is <image-3>?", 2, {}),
    ("What is < image 1 >?", 1, {}),
    ("Only <image-1>", 2, {}),
    ("", 1, {}),
]


def add_prompts(calls: Calls, root: Path, scan: str) -> None:
    model = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
    folders = {"mistral_v1": model, "practice": root / "scans" / "practice" / "tokenizer.model"}
    folders |= {family.name: write_folder(family, root / "tokenizers" / family.name) for family in FAMILIES}
    systemless = {family.name for family in FAMILIES if not family.has_system}
    prompts = [*PROMPTS, *((text.replace("<", "("), 1, {"place": "last"}) for text in texts()[:: 2000 // 6])]
    for name, path in folders.items():
        tokenizer = load_tokenizer(path)
        layouts = [SMALL, dataclasses.replace(SMALL, template="chat")] if path.is_dir() else [SMALL]
        layouts += [] if tokenizer.bos_id is None else [dataclasses.replace(RELEASED, num_latents=3)]
        for i, preparation in enumerate(layouts):
            folder = export_processor(root / "folders" / f"{name}{i}", path, preparation)
            for prompt, count, options in prompts:
                if preparation.template == "chat" and name in systemless:
                    options = {key: value for key, value in options.items() if key != "system"}
                ours = our_ids(tokenizer, preparation, prompt, count, **options)
                calls.add(folder, ours, text=prompt, images=[scan] * count, **options)


def add_refusals(calls: Calls, root: Path) -> None:
    """Add scans and folders that are refused; `ours` is a pattern of the message."""
    ok, bad = root / "minmax", root / "bad"
    bad.mkdir()
    pixels = np.arange(300, dtype=np.int16).reshape(20, 15)
    volume = np.arange(1200, dtype=np.int16).reshape(10, 12, 10)
    colour = np.arange(216, dtype=np.uint8).reshape(8, 9, 3)
    (bad / "text.dcm").write_text("no scan")
    (bad / "empty").mkdir()
    gap = make_series(bad / "gap", volume)
    sorted(gap.iterdir())[5].unlink()
    mixed = make_series(bad / "mixed", volume, EchoTime=10)
    edit(sorted(mixed.iterdir())[3], EchoTime=20)
    plain = lambda name: nifti(bad / f"{name}.nii", volume, np.eye(4))  # noqa: E731
    scans = {
        "missing.png: there is no such file: check the path": bad / "missing.png",
        "text.dcm: is not NIfTI, DICOM, PNG, JPEG or .npy: prepare it with radfm_jax": bad / "text.dcm",
        "is an empty folder": bad / "empty",
        "a slice is missing": gap,
        "its files differ in EchoTime: give each series its own folder": mixed,
        "has colour, several frames": make_dicom(bad / "frames.dcm", pixels, NumberOfFrames=2),
        "values beyond its BitsStored": make_dicom(bad / "overlay.dcm", pixels, BitsStored=8, HighBit=7),
        "lossy or unknown transfer syntax": Path(dicom_file("JPEG2000.dcm")),
        "has several volumes: pass one": nifti(bad / "4d.nii", np.stack([volume] * 2, -1), np.eye(4)),
        "is constant": nifti(bad / "blank.nii", volume * 0, np.eye(4)),
        "voxels that are not finite": nifti(bad / "nan.nii", np.where(volume == 5, np.nan, volume), np.eye(4)),
        "16 bits and several channels": save_png16(bad / "deep.png"),
        "half of a pair of .hdr and .img": patched(plain("pair"), ("4s", 344, b"ni1\0")),
        "states 8 bits for int16 voxels": patched(plain("bits"), ("<h", 72, 8)),
        "states the scaling nan": patched(plain("slope"), ("<f", 112, np.nan)),
        "from 0 to 2e-35, which float32 cannot scale": save_npy(bad / "tiny.npy", (volume > 9) * np.float32(2e-35)),
        "has folders in it": bad,
        "is RGBA: save it": save_image(bad / "clear.png", np.dstack([colour, colour[..., :1] * 0])),
        "is ambiguous": save_npy(bad / "ambiguous.npy", colour),
    }
    for pattern, scan in scans.items():
        calls.add(ok, pattern, text="What?", images=[scan])
    good = str(root / "scans" / "gray.png")
    calls.add(ok, "2 lists of scans for 1 texts", text="What?", images=[[good], [good]])
    calls.add(ok, "a scan has the key windows", text="What?", images=[{"image": good, "windows": "lung"}])
    calls.add(ok, "a scan has no image", text="What?", images=[{"window": "lung"}])
    calls.add(ok, "`history` is not a list of", text="What?", history=[{"role": "user", "content": "a"}])
    calls.add(ok, "`context` or `system` is not a text", text=["a", "b"], context=["c", "d"])
    calls.add(ok, "there is no text", text=[])
    calls.add(ok, "intensity 'lunge' is unknown", text="What?", images=[{"image": good, "window": "lunge"}])
    calls.add(ok, "not in Hounsfield units", text="What?", images=[{"image": good, "window": "lung"}])
    calls.add(root / "several", "trained with minmax and brain: choose one", text="What?", images=[good])
    calls.add(root / "released", "no windows", text="What?", images=[{"image": good, "window": "lung"}])
    gray = export_processor(root / "gray", root / "scans" / "practice" / "tokenizer.model", SMALL, channels=1)
    calls.add(gray, "a scan has colour, but the model reads gray scans", text="?", images=[root / "scans/colour.jpg"])
    edits = {
        "`preparation` lacks size_2d": lambda config: config["preparation"].pop("size_2d"),
        "has an unknown fit 'crop'": lambda config: config["preparation"].update(fit="crop"),
        "lacks preparation": lambda config: config.pop("preparation"),
        "lacks bos_token_id": lambda config: config.pop("bos_token_id"),
        "is of radfm_jax 9.0.0, its code of": lambda config: config.update(code_version="9.0.0"),
        "does not encode a text as in training": lambda config: config["encoding_check"]["ids"].pop(),
    }
    for i, (pattern, change) in enumerate(edits.items()):
        folder = shutil.copytree(ok, root / f"edited{i}")
        config = json.loads((folder / hub_processor.FILE).read_text())
        change(config)
        hf_folder.write_json(folder / hub_processor.FILE, config)
        calls.add(folder, pattern, text="What?")
    (shutil.copytree(ok, root / "bare") / "tokenizer.model").unlink()
    calls.add(root / "bare", "the folder lacks tokenizer.model", text="What?")


def save_png16(path: Path) -> Path:
    """Write an 8-bit RGB image whose header states 16 bits."""
    save_image(path, np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    data = bytearray(path.read_bytes())
    data[24] = 16
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def message(role: str, *content) -> dict:
    items = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", **x} for x in content]
    return {"role": role, "content": content[0] if content == (content[0],) and isinstance(content[0], str) else items}


def add_messages(calls: Calls, root: Path) -> None:
    """Add pairs of a conversation and the same prompt as a call."""
    good, other = ({"path": str(root / "scans" / name)} for name in ("gray.png", "array.npy"))
    for folder in (root / "minmax", root / "folders" / "chatml1"):
        messages = [message("system", "Be brief."), message("user", good, "Left?"), message("assistant", "No."),
                    message("user", "Or in ", {"image": other["path"], "window": "minmax"}, "?")]  # fmt: skip
        history, images = [["<image-1>Left?", "No."]], [good["path"], other["path"]]
        options = {"tokenize": True, "return_dict": True}
        calls.add(folder, "same", "apply_chat_template", conversation=messages, **options)
        calls.add(folder, "same", text="Or in <image-2>?", system="Be brief.", history=history, images=images)
        calls.add(folder, "same", "apply_chat_template", conversation=[messages, messages[1:2]], **options)
        rendered = [message("user", good, "Left?")]
        calls.add(folder, "text", "apply_chat_template", conversation=rendered)
        calls.add(folder, "same", "apply_chat_template", conversation=rendered, **options)
        calls.add(folder, "saved", "save_pretrained", save_directory=str(root / f"saved-{folder.name}"))
    for pattern, wrong in (
        ("end the messages with a question", {"conversation": messages, "continue_final_message": True}),
        ("alternate the roles", {"conversation": messages[:3]}),
        ("a system message has a scan", {"conversation": [message("system", good), message("user", "a")]}),
        ("has the key windw", {"conversation": [message("user", {**good, "windw": "lung"}, "a")]}),
        ("has 'video' without text", {"conversation": [message("user", {"type": "video"})]}),
        ("there are no messages", {"conversation": []}),
        ("a text has a mark", {"conversation": [message("user", "<image-1>?")]}),
        ("an answer has a scan", {"conversation": [message("user", "a"), message("assistant", good), *messages[1:2]]}),
    ):
        calls.add(folder, pattern, "apply_chat_template", **wrong)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The calls of all tests: starting transformers takes most of the time."""
    root = tmp_path_factory.mktemp("processor")
    (root / "scans").mkdir()
    scans = write_scans(root / "scans")
    calls, ends = Calls(root / "calls"), [0]
    for add, *arguments in ((add_voxels, scans), (add_prompts, scans["gray.png"][1]), (add_refusals,), (add_messages,)):
        add(calls, root, *arguments)
        ends.append(len(calls.calls))
    done = calls.run()
    return root, *(done[start:end] for start, end in itertools.pairwise(ends))


def differences(done) -> list[str]:
    found = []
    for call, ours, theirs in done:
        name = f"{Path(call['folder']).name}: {str(call['arguments'])[-300:]}"
        if isinstance(ours, ValueError) != isinstance(theirs, str):
            found.append(f"{name}: ours {str(ours)[:200]}, theirs {str(theirs)[:200]}")
        elif not isinstance(ours, ValueError):
            found += [f"{name}: {key}" for key, value in ours.items() if theirs[key] != value]
    return found


def test_voxels_equal_ours_bit_for_bit(results):
    _, voxels, *_ = results
    assert differences(voxels) == []
    read = [call for call, ours, _ in voxels if isinstance(ours, dict)]
    assert len(read) > 80, len(read)


def test_prompts_have_our_ids(results):
    _, _, prompts, *_ = results
    assert differences(prompts) == []
    assert sum(isinstance(ours, dict) for _, ours, _ in prompts) > 150


def test_what_cannot_be_read_exactly_is_refused(results):
    """Each message names the reason and a remedy, and nothing of the patient."""
    *_, refusals, _ = results
    wrong = [(pattern, str(found)[:200]) for _, pattern, found in refusals if not re.search(pattern, str(found))]
    assert wrong == []
    assert all(isinstance(found, str) and found.startswith("ValueError: ") for _, _, found in refusals)
    assert not re.search("Secret|Person|4711", str([found for *_, found in refusals]))


def test_messages_have_the_ids_of_the_prompt(results):
    """apply_chat_template, a batch of unequal lengths, rendered text, and a saved processor."""
    root, *_, found = results
    for start in (0, 6):
        chat, call, batch, text, short, saved = (result for *_, result in found[start : start + 6])
        assert isinstance(chat, dict) and chat == call, chat
        ids, mask = np.array(batch["input_ids"]), np.array(batch["attention_mask"], bool)
        assert ids[0].tolist() == call["input_ids"][0] and ids[1, mask[1]].tolist() == short["input_ids"][0]
        assert mask[0].all() and (np.diff(mask[1].astype(int)) >= 0).all() and not mask[1].all()
        assert batch["image_grid"] == call["image_grid"] + short["image_grid"]
        assert "<image-1>Left?" in text and saved is not None
    assert "<|im_start|>user" in text
    for name, tokenizer in (("minmax", "tokenizer.model"), ("chatml1", "tokenizer.json")):
        again, first = root / f"saved-{name}", root / ("folders" if name == "chatml1" else "") / name
        assert load_tokenizer(again / tokenizer).encode("Any edema?") == load_tokenizer(first).encode("Any edema?")
        assert json.loads((again / hub_processor.FILE).read_text())["preparation"]["num_latents"] == 3
    wrong = [(pattern, result) for _, pattern, result in found[12:] if not re.search(pattern, str(result))]
    assert wrong == [] and len(found) == 20
