"""Entry point of the vLLM plugin."""

ARCHITECTURE = "RadFMForConditionalGeneration"


def register() -> None:
    """Register the architecture of exported models. vLLM calls this in each of its processes, maybe several times."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"radfm_vllm_model:{ARCHITECTURE}")
