"""A process without JAX that runs exported folders: `python hub_child.py FUNCTION ARGUMENTS`; it prints JSON."""

import no_jax  # noqa: F401, I001 (first, so that later imports do not find it)

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

logging.set_verbosity_error()
NEW = 6  # tokens that `generate` adds
torch.set_num_threads(2)


def load(folder, kind=AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()


def tensors(path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def all_models(root: str, *names: str) -> dict:
    """Write the logits and the greedy tokens of each model; return what else was found."""
    found = {}
    for name in names:
        folder = Path(root) / name
        model, left, right = load(folder), tensors(folder / "left.npz"), tensors(folder / "right.npz")
        with torch.no_grad():
            options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            greedy = model.generate(**left, **options, return_dict_in_generate=True, output_scores=True)
            new = greedy.sequences[:, -NEW:]
            chosen = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
            expected = torch.stack(greedy.scores, 1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
            uncached = model.generate(**left, **options, use_cache=False)
            padded = {"left": left, "right": right}
            logits = {side: model(**inputs).logits.numpy() for side, inputs in padded.items()}
            whole = {**left, "input_ids": torch.cat([left["input_ids"], new], dim=1)}
            whole["attention_mask"] = torch.cat([left["attention_mask"], torch.ones_like(new)], dim=1)
            logits["whole"] = model(**whole).logits.numpy()
        np.savez(folder / "torch.npz", new=new.numpy(), **logits)
        found[name] = {
            "columns": logits["left"].shape[-1],
            "lowest": bool((logits["left"][..., -3:] == np.finfo(np.float32).min).all()),
            "scores of tokens": float((chosen - expected).abs().max()),
            "same without cache": bool((uncached[:, -NEW:] == new).all()),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        model.save_pretrained(folder.with_name(f"{name} saved"))
    return found


def quick(root: str, *names: str) -> dict:
    """Run the models, and what damages the first of them."""
    folder = Path(root) / names[0]
    damage = errors(folder, Path(root) / "damaged", load(folder), tensors(folder / "left.npz"))
    return all_models(root, *names) | {"errors": damage}


def logits(folder: str, inputs: str, output: str) -> None:
    """Write the logits for an .npz of inputs."""
    with torch.no_grad():
        np.save(output, load(folder)(**tensors(inputs)).logits.numpy())


def shapes(folder: str) -> dict:
    """Build the model of a config.json without values; return the names and shapes of its tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def uses(folder: str, scratch: str) -> dict:
    """Use a model as other libraries do."""
    folder, scratch = Path(folder), Path(scratch)
    batch = tensors(folder / "left.npz")
    model = load(folder, AutoModelForImageTextToText)
    plain, real = model(**batch).logits, batch["attention_mask"] > 0
    found = {"attention": model.config._attn_implementation}
    eager = load(folder, attn_implementation="eager")
    found["eager"] = largest((eager(**batch).logits - plain)[real])
    half = load(folder, dtype=torch.bfloat16)
    found["bfloat16"] = largest((half(**batch).logits.float() - plain)[real])
    spread = load(folder, device_map="auto")
    found["device_map"] = largest(spread(**batch).logits - plain)
    found["split"] = sorted(model._no_split_modules)
    found["several answers"] = several_answers(model, batch)
    right = tensors(folder / "right.npz")
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    found["loss"] = float(model(**right, labels=labels).loss)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    tuple_output = model(**batch, return_dict=False)
    found["tuple"] = isinstance(tuple_output, tuple) and largest(tuple_output[0] - plain) == 0
    found["gradients"] = gradients(model, {**batch, "labels": labels})
    found |= adapters(load(folder), {**batch, "labels": labels}, scratch)
    found |= trainer(load(folder), {**batch, "labels": labels}, scratch)
    return found


def largest(x: torch.Tensor) -> float:
    return float(x[..., :-3].abs().max())


def several_answers(model, batch) -> bool:
    """Two beams and two answers of each row are those of the rows one by one."""
    options = {"max_new_tokens": NEW, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**batch, **options)
    row = len(together) // 2 - 1
    ids, mask = (batch[name][row:] for name in ("input_ids", "attention_mask"))
    scans = int((ids == model.config.image_start_token_id).sum())
    grid = batch["image_grid"][-scans:]
    patches = batch["pixel_values"][-int(grid.prod(-1).sum()) :]
    alone = model.generate(input_ids=ids, attention_mask=mask, pixel_values=patches, image_grid=grid, **options)
    return bool((together[-2:] == alone).all())


def gradients(model, batch) -> float:
    """Return the largest difference of a gradient with and without gradient checkpointing, of all parameters."""
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**batch, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(x is not None and x.abs().max() > 0 for x in found[0].values()), "a parameter has no gradient"
    return max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])


def adapters(model, batch, scratch) -> dict:
    """Train LoRA adapters of all linear maps for three steps, save them, and merge them."""
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    modules = {name.split(".lora_A")[0] for name, p in adapted.named_parameters() if "lora_A" in name}
    parts = {part for part in ("vision", "bridge", "language_model") if any(f".{part}." in m for m in modules)}
    optimizer, losses = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 3e-2), []
    for _ in range(3):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    adapted.eval()
    with torch.no_grad():
        trained = adapted(**batch).logits
        adapted.save_pretrained(scratch / "adapter")
        merged = adapted.merge_and_unload()
        return {"adapted": sorted(parts), "peft": losses, "merged": largest(merged(**batch).logits - trained)}


def trainer(model, batch, scratch) -> dict:
    """Train three steps with Trainer. The batch is one example, as its scans belong together."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(scratch / "trainer"), max_steps=3, per_device_train_batch_size=1, learning_rate=1e-3, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        run = Trainer(model, arguments, train_dataset=[batch] * 3, data_collator=lambda examples: examples[0])
        run.train()
    return {"trainer": [line["loss"] for line in run.state.log_history if "loss" in line]}


def sft(folder: str, scratch: str) -> list[float]:
    """Train three steps with SFTTrainer of TRL, which computes its loss from the hidden states; return the losses."""
    import datasets
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, batch = load(folder), tensors(Path(folder) / "left.npz")
    text = (batch["attention_mask"] > 0) & (batch["input_ids"] < model.config.image_start_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(~text, -100)
    words = tokenizers.models.WordLevel(
        {f"t{i}": i for i in range(model.config.text_config.vocab_size)}, unk_token="t0"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="t0", eos_token="t2")
    arguments = SFTConfig(
        str(Path(scratch) / "sft"), max_steps=3, per_device_train_batch_size=1, learning_rate=1e-3, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"row": i} for i in range(3)])
    run = SFTTrainer(model, arguments, lambda rows: dict(batch), rows, processing_class=tokenizer)
    run.train()
    return [float(line["loss"]) for line in run.state.log_history if "loss" in line] + [float(model(**batch).loss)]


def errors(folder, scratch, model, batch) -> dict[str, str]:
    """Return the messages for damaged folders and for inputs that do not fit."""

    def message(function, *arguments, **options) -> str:
        try:
            function(*arguments, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def edited(name: str, change) -> str:
        copy = scratch / name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        change(copy, config)
        (copy / "config.json").write_text(json.dumps(config))
        return message(load, copy)

    def without_tensor(copy: Path, config: dict) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(copy / "model.safetensors")
        del state["bridge.latents.weight"]
        save_file(state, copy / "model.safetensors", {"format": "pt"})

    def replace_code(copy: Path, config: dict) -> None:
        path = copy / "modeling_radfm.py"
        path.write_text(path.read_text().replace('VERSION = "', 'VERSION = "0.'))

    visual = batch["input_ids"].clone()
    visual[0, -1] = model.config.image_token_id
    unknown = {**batch, "input_ids": batch["input_ids"].clone()}
    unknown["input_ids"][0, -1] = model.config.vocab_size
    return {
        "missing tensor": edited("a", without_tensor),
        "other size": edited("b", lambda copy, config: config["text_config"].update(hidden_size=40)),
        "other version": edited("c", lambda copy, config: config.update(code_version="9.0.0")),
        "other code": edited("d", replace_code),
        "missing key": edited("e", lambda copy, config: config["vision_config"].pop("width")),
        "missing part": edited("h", lambda copy, config: config.pop("bridge_config")),
        "fewer layers": edited("i", lambda copy, config: config["text_config"].update(num_hidden_layers=1)),
        "other id": edited("f", lambda copy, config: config.update(image_token_id=7)),
        "unknown bridge": edited("g", lambda copy, config: config["bridge_config"].update(kind="qformer")),
        "no pixels": message(model, input_ids=batch["input_ids"]),
        "fewer patches": message(model, **{**batch, "pixel_values": batch["pixel_values"][:-1]}),
        "other grid": message(model, **{**batch, "image_grid": torch.ones(1, 3, dtype=torch.int64) * 99,
                                        "pixel_values": torch.zeros(99**3, 1).expand(-1, model.vision.voxels)}),
        "no grid": message(model, **{**batch, "image_grid": None}),
        "unknown id": message(model, **unknown),
        "resized": message(model.resize_token_embeddings, model.config.vocab_size + 5),
        "more visual tokens": message(model, **{**batch, "input_ids": visual}),
        "embeddings": message(model, inputs_embeds=torch.zeros(1, 2, 32), pixel_values=batch["pixel_values"]),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
