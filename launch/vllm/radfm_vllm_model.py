"""RadFM in vLLM: encoder and bridge are those of the export's own code, the language model is vLLM's.

A prompt has one mark `<image-1>`, `<image-2>`, ... for each scan, in their order, or no marks. A scan in
`multi_modal_data` is anything that scans_radfm.py of the export reads. Letters: V vocabulary, L visual tokens of a
scan, E width of the language model. A scan has L + 2 tokens: its mark, its visual tokens, its end mark. vLLM rejects
ids from V on, so here all of them have the id of the unknown or of the padding token; their embeddings replace it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

CODE = "modeling_radfm.RadFMForConditionalGeneration"
SCAN = "image"  # vLLM's name of the modality


class ScanItems(ProcessorBatchItems):
    """The scans of a prompt."""

    def __init__(self, scans: Sequence[Any]):
        super().__init__(scans, SCAN)

    def get_item_for_hash(self, index: int) -> object:
        """Return what identifies a scan in vLLM's caches: for a path also size and time of its files."""
        item = super().get_item_for_hash(index)
        scan = item["image"] if isinstance(item, dict) else item
        if not isinstance(scan, (str, Path)):
            return item
        files = sorted(Path(scan).iterdir()) if os.path.isdir(scan) else [Path(scan)]
        stats = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.exists()]
        return "\n".join([str(item), *stats])


class ScanParser(MultiModalDataParser):
    """Passes scans on as they are; vLLM would convert images to 8-bit colour."""

    def _parse_image_data(self, data):
        return None if data is None else ScanItems(data if isinstance(data, (list, tuple)) else [data])


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the processor of a model."""

    def get_data_parser(self) -> ScanParser:
        return ScanParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return 1 for the released mode: it scales the scans of a prompt together, but vLLM caches each alone."""
        return {SCAN: 1 if self.preparation["preprocess"] == "released" else None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {SCAN: len(self.mark)}

    @property
    def preparation(self) -> dict:
        return self.get_hf_config().preparation

    @property
    def mark(self) -> list[int]:
        """The L + 2 tokens of a scan."""
        tokenizer = self.get_tokenizer()
        ids = (tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
        return [next(token for token in ids if token is not None)] * (self.preparation["num_latents"] + 2)


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest scans, with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(f"<image-{i + 1}>" for i in range(mm_counts.get(SCAN, 0))) + "Findings?"

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict:
        p = self.info.preparation
        sides = (p["size_3d"], p["size_3d"], max(p["depth"], 2), 1)
        if p["size_2d"] ** 2 * p["patch"][2] > np.prod(sides):
            sides = (p["size_2d"], p["size_2d"], 1, 1)
        voxels = np.arange(np.prod(sides), dtype=np.int32).reshape(sides)
        windows = {} if len(p["intensities"]) == 1 and p["intensities"][0] != "header" else {"window": "minmax"}
        return {SCAN: [{"image": voxels, **windows}] * mm_counts.get(SCAN, 0)}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Turns prompts and scans into tokens and patches by the processor of the export."""

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.dummy_inputs.get_dummy_text(mm_counts)

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Encode the text of a prompt again, as in training, with the tokens of its scans at their marks."""
        processor, chat = self.info.get_hf_processor(), self.info.preparation["template"] == "chat"
        text = self.info.get_tokenizer().decode(prompt, skip_special_tokens=not chat)
        marks = re.findall("<image-([0-9]+)>", text)
        if marks != [str(i + 1) for i in range(len(marks))]:
            raise ValueError(f"the prompt has the marks {', '.join(marks)}: number scans in the order of their marks")
        ids = processor.ids(processor.parts(text, len(marks), rendered=chat))
        return [token if token < processor.image_start_token_id else self.info.mark[0] for token in ids]

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        grids = hf_inputs.get("image_grid", torch.empty((0, 3), dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes(SCAN, grids.prod(-1)),
            "image_grid": MultiModalFieldConfig.batched(SCAN),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> list[PromptReplacement]:
        return [PromptReplacement(modality=SCAN, target=self.info.mark, replacement=self.info.mark)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class RadFMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Names of parameters are those of the export."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<image-{i}>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model = vllm_config.model_config
        config = self.config = model.hf_config
        self.code = get_class_from_dynamic_module(CODE, model.model, code_revision=model.code_revision)
        with self._mark_tower_model(vllm_config, SCAN):
            self.code.add_vision(self, config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, pixel_values=None, image_grid=None, **kwargs: object) -> MultiModalEmbeddings:
        """Return [L + 2, E] for each scan: its mark, its visual tokens, its end mark."""
        if pixel_values is None:
            return []
        dtype = self.projection.weight.dtype
        features = self.code.get_image_features(self, pixel_values.to(dtype), image_grid)
        start, end = self.image_marks.weight
        return [torch.cat([start[None], x, end[None]]) for x in features.unflatten(0, (len(image_grid), -1))]

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs: object):
        """Return the hidden states of the language model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
