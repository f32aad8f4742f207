"""Processor of RadFM: prompts and scans -> input_ids and pixel_values, as in the training of the model.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="Is <image-2> better than <image-1>?", images=["old.nii.gz", "new.nii.gz"])

scans_radfm.py says what a scan can be. Letters: B rows, T tokens, V vocabulary, S scans and N patches of a batch.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .prompts_radfm import TODAY, Part, Texts, place_scans, prompt_ids, prompt_parts, question_of
from .scans_radfm import require
from .volumes_radfm import ORDERS, QUANTIZATION, prepare_scans

VERSION = "0.6.0"
CHOICES = {
    "preprocess": ("paper", "released"),
    "storage": (*QUANTIZATION,),
    "fit": ("stretch", "pad"),
    "template": ("radfm", "chat"),
    "patch_order": (*ORDERS,),
}  # of the preparation
NUMBERS = ("size_2d", "size_3d", "depth", "num_latents", "intensities", "patch")  # and others without choices


class RadFMProcessor(ProcessorMixin):
    """Turns prompts and scans into the inputs of the model. processor_config.json has its arguments.

    Args:
      preparation: how scans and texts were prepared in training.
      channels: of the vision encoder.
      image_start_token_id: V. A scan is V, a V + 2 for each visual token, V + 1.
      bos_token_id: the first id of every text of the form `radfm`; null for none.
      stop_token_ids: end an answer.
      text_model: tokenizer.model or tokenizer.json.
      encoding_check: a text and its ids in training.
    """

    def __init__(
        self, tokenizer, preparation=None, channels=3, image_start_token_id=None, bos_token_id=-1, stop_token_ids=(),
        text_model="tokenizer.json", encoding_check=None, code_version=VERSION, chat_template=None,
    ):  # fmt: skip
        needed = {"preparation": preparation, "image_start_token_id": image_start_token_id}
        absent = [name for name, value in needed.items() if value is None] + ["bos_token_id"] * (bos_token_id == -1)
        require(not absent, f"processor_config.json lacks {', '.join(absent)}", "export again")
        same = code_version == VERSION
        require(same, f"the folder is of radfm_jax {code_version}, its code of {VERSION}", "take files of one export")
        lacking = [name for name in (*CHOICES, *NUMBERS) if preparation.get(name) is None]
        require(not lacking, f"processor_config.json: `preparation` lacks {', '.join(lacking)}", "export again")
        wrong = [f"{name} {preparation[name]!r}" for name, known in CHOICES.items() if preparation[name] not in known]
        require(not wrong, f"processor_config.json: `preparation` has an unknown {', '.join(wrong)}", "export again")
        super().__init__(tokenizer, chat_template=chat_template)
        self.preparation, self.channels, self.image_start_token_id = preparation, channels, image_start_token_id
        self.bos_token_id, self.stop_token_ids, self.text_model = bos_token_id, stop_token_ids, text_model
        self.encoding_check, self.code_version = encoding_check, code_version
        self.texts = Texts(tokenizer, text_model, stop_token_ids)
        same = encoding_check is None or self.texts.encode(encoding_check["text"]) == encoding_check["ids"]
        require(same, f"{text_model} does not encode a text as in training", "export the folder again")

    def __call__(
        self, images=None, text=None, context="", system="", history=(), place="first", rendered=False, padding=True,
        return_tensors="pt",
    ) -> BatchFeature:  # fmt: skip
        """Return input_ids and attention_mask [B, T], pixel_values float32[N, d*C*h*w] and image_grid [S, 3].

        Args:
          text: one question, or a list. `<image-1>` is the position of a scan; without marks scans are at `place`.
          images: the scans of the question, or a list of lists of scans.
          context, system, history: known facts; how to answer; earlier (question, answer). One for all questions.
          place: first or last.
          rendered: `text` is from apply_chat_template without `tokenize`.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        require(prompts, "there is no text", "write a question")
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        nested = images and all(isinstance(image, (list, tuple)) for image in images)
        groups = images if nested else [images] if len(prompts) == 1 else [[image] for image in images]
        groups = groups or [[]] * len(prompts)
        require(
            len(groups) == len(prompts), f"{len(groups)} lists of scans for {len(prompts)} texts", "pass one a text"
        )
        options = {"context": context, "system": system, "history": history, "place": place}
        parts = [
            self.parts(prompt, len(scans), rendered, **options) for prompt, scans in zip(prompts, groups, strict=True)
        ]
        return self.batch(parts, groups, padding, return_tensors)

    def parts(self, prompt: str, scans: int, rendered: bool = False, **options: Any) -> list[Part]:
        """Return the texts and scans of a prompt in reading order. The other arguments are those of a call."""
        if rendered and self.preparation["template"] == "chat":
            return [("rendered", piece) for piece in place_scans([prompt], scans, "first")[0]]
        return prompt_parts(prompt, scans, self.preparation["template"], **options)

    def ids(self, parts: list[Part]) -> list[int]:
        """Return the ids of a prompt."""
        v = self.image_start_token_id
        mark = [v, *[v + 2] * self.preparation["num_latents"], v + 1]
        return prompt_ids(parts, mark, self.texts, self.preparation, self.bos_token_id)

    def batch(self, parts: list[list[Part]], groups: list[list], padding: Any, return_tensors: Any) -> BatchFeature:
        """Return the inputs for the parts and the scans of each prompt. Rows are padded on the left."""
        rows, patches, grids = [], [], []
        for own, scans in zip(parts, groups, strict=True):
            values, grid = prepare_scans(scans, self.preparation, self.channels)
            starts = np.cumsum([0, *(np.prod(sides) for sides in grid)]).astype(int)
            rows.append(self.ids(own))
            order = [part for _, part in own if isinstance(part, int)]  # a scan that is referred to twice appears twice
            patches += [values[starts[scan] : starts[scan + 1]] for scan in order]
            grids += [grid[scan] for scan in order]
        longest, pads = max(map(len, rows)), (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        require(padding or {len(row) for row in rows} == {longest}, "rows differ in length", "pass padding=True")
        pad = next(token for token in pads if token is not None)
        data = {
            "input_ids": [[pad] * (longest - len(row)) + row for row in rows],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in rows],
        }
        if grids:
            data |= {"pixel_values": np.concatenate(patches), "image_grid": np.array(grids, np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self, conversation, tokenize=False, padding=True, return_tensors=None, return_dict=True,
        add_generation_prompt=True, continue_final_message=False, processor_kwargs=None,
    ):  # fmt: skip
        """Return the inputs for messages, or for a list of conversations; the last message of each is a question.

        A content is a text, or a list of {"type": "text", "text": ...} and {"type": "image", "image": a scan, "window":
        optional}. The chat template of the tokenizer is used only if the model was trained with it. Without `tokenize`
        the result is text with marks.
        """
        question = add_generation_prompt and not continue_final_message
        require(question, "an answer cannot be continued", "end the messages with a question")
        require(conversation, "there are no messages", "write a question")
        several = not isinstance(conversation[0], dict)
        turns = [question_of(messages) for messages in (conversation if several else [conversation])]
        if not tokenize:
            texts = [self.rendered(prompt, system, history) for prompt, _, system, history in turns]
            return texts if several else texts[0]
        parts = [self.parts(prompt, len(scans), system=system, history=past) for prompt, scans, system, past in turns]
        options = {"padding": padding, "return_tensors": return_tensors} | (processor_kwargs or {})
        inputs = self.batch(parts, [scans for _, scans, _, _ in turns], **options)
        return inputs if return_dict else inputs["input_ids"]

    def rendered(self, prompt: str, system: str, history: list[tuple[str, str]]) -> str:
        """Return the text of a conversation, with marks."""
        if self.preparation["template"] == "radfm":
            return "\n".join(text for text in (system, *(" ".join(turn) for turn in history), prompt) if text)
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": prompt})
        options = {"tokenize": False, "add_generation_prompt": True, "strftime_now": TODAY.strftime}
        return self.tokenizer.apply_chat_template(messages, **options)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Save the processor, with the SentencePiece model that transformers does not save."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = Path(save_directory, self.text_model)
        if target.suffix == ".model" and Path(self.tokenizer.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.tokenizer.vocab_file, target)
        return files

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid"]
