"""Configuration of folders with model_type `relatent`, and what this package refuses to serve."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

LAYOUT_VERSIONS = (1, 2)
LATENT_FEATURES = ("hidden", "normed_heads")
QK_NORMS = ("head", "width")
LATENT_NORMS = ("none", "branch", "replicated")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
ROPE_TYPES = ("default", "longrope")
# What models may have beyond Llama, and the only value of it that this package serves.
PLAIN = {
    "hidden_activation": "silu",
    "norm_placement": "before",
    "norm_unit_offset": False,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


class RelatentConfig(PreTrainedConfig):
    """Sizes of a decoder with latent attention.

    A token leaves one rotary key of `qk_rope_head_dim` numbers, which all heads share, and
    `kv_lora_rank` latent numbers: the shared latents, whose sizes are `latent_shared_ranks`, and
    then the own latent of every branch.

    `latent_branches` lists the branches as dictionaries: a branch serves heads `first_head` to
    `first_head + num_heads - 1`, and its latent is the shared latent number `shared` (None for
    none) followed by `rank` numbers of its own. Heads that several branches serve add up what they
    read.

    `latent_rope_lists` (None: all layers rotate by `rope_parameters`) names for each layer one of
    `rope_lists`.

    `latent_norm` is "none"; "branch", an RMSNorm on every branch's latent; or "replicated", where
    the root mean square of `latent_norm_rank` further projections divides all latents.

    `latent_features` is what the latents are projections of: "hidden", the layer's normalised
    input, or "normed_heads", `num_key_value_heads` keys of `normed_head_dim` numbers, normalised
    each (`qk_norm` "head") or all together ("width"), and as many values. Queries then are a map of
    the head's own normalised query. `normed_bias` says whether these projections have biases.

    Layers from `first_k_dense_replace` on (None: no layer), but those of `mlp_only_layers`, have a
    mixture of experts in place of the MLP, whose sizes and `topk_method` are those of DeepSeek's
    configurations. `n_shared_experts` may be 0; `shared_expert_intermediate_size` is that of one
    shared expert whose output is multiplied by the sigmoid of a gate.
    """

    model_type = "relatent"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        layout_version: int = 1,
        latent_form: str = "mla",
        latent_features: str = "hidden",
        latent_branches: list[dict[str, int | None]] | None = None,
        latent_shared_ranks: list[int] | None = None,
        latent_norm: str = "none",
        latent_norm_rank: int | None = None,
        num_key_value_heads: int | None = None,
        normed_head_dim: int | None = None,
        normed_bias: bool = False,
        qk_norm: str | None = None,
        layers: list[dict[str, Any] | None] | None = None,
        rope_lists: list[dict[str, Any]] | None = None,
        latent_rope_lists: list[int | None] | None = None,
        no_rope_layers: list[int] | None = None,
        attention_bias: bool = False,
        first_k_dense_replace: int | None = None,
        mlp_only_layers: list[int] | None = None,
        moe_intermediate_size: int | None = None,
        n_routed_experts: int | None = None,
        n_shared_experts: int | None = None,
        shared_expert_intermediate_size: int | None = None,
        num_experts_per_tok: int | None = None,
        n_group: int | None = None,
        topk_group: int | None = None,
        topk_method: str | None = None,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        hidden_act: str = "silu",
        hidden_activation: str | None = None,
        norm_placement: str = "before",
        norm_unit_offset: bool = False,
        embedding_multiplier: float = 1.0,
        attn_logit_softcapping: float | None = None,
        final_logit_softcapping: float | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.layout_version = layout_version
        self.latent_form = latent_form
        self.latent_features = latent_features
        self.latent_shared_ranks = list(latent_shared_ranks or [])
        if latent_branches is None:
            latent_branches = [
                {
                    "first_head": 0,
                    "num_heads": num_attention_heads,
                    "shared": None,
                    "rank": kv_lora_rank,
                }
            ]
        self.latent_branches = latent_branches
        self.latent_norm = latent_norm
        self.latent_norm_rank = latent_norm_rank
        # vLLM wants a number of every config.
        if num_key_value_heads is None and latent_features == "hidden":
            num_key_value_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.normed_head_dim = normed_head_dim
        self.normed_bias = normed_bias
        self.qk_norm = qk_norm
        self.layers = layers
        self.rope_lists = list(rope_lists or [])
        self.latent_rope_lists = latent_rope_lists
        self.no_rope_layers = no_rope_layers
        self.attention_bias = attention_bias
        self.first_k_dense_replace = first_k_dense_replace
        self.mlp_only_layers = list(mlp_only_layers or [])
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.topk_method = topk_method
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.residual_multiplier = residual_multiplier
        self.logits_scaling = logits_scaling
        self.hidden_act = hidden_act
        self.hidden_activation = hidden_activation
        self.norm_placement = norm_placement
        self.norm_unit_offset = norm_unit_offset
        self.embedding_multiplier = embedding_multiplier
        self.attn_logit_softcapping = attn_logit_softcapping
        self.final_logit_softcapping = final_logit_softcapping
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        # transformers takes the size of rope from here.
        self.head_dim = qk_rope_head_dim
        # transformers builds one without arguments to compare with; that has nothing to check.
        if rope_parameters is not None:
            check_layout(self, kwargs.get("quantization_config"))
        super().__init__(**kwargs)

    def has_experts(self, layer_idx: int) -> bool:
        first = self.first_k_dense_replace
        return first is not None and layer_idx >= first and layer_idx not in self.mlp_only_layers

    def shared_size(self) -> int:
        """Inner size of the MLP that all tokens of a mixture pass; 0 for none."""
        if self.shared_expert_intermediate_size:
            return self.shared_expert_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size


def check_layout(config: PreTrainedConfig, quantization: Any = None) -> None:
    """Raises ValueError, in one sentence, for anything that this package cannot serve exactly."""
    version = getattr(config, "layout_version", 1)
    if version not in LAYOUT_VERSIONS:
        raise ValueError(
            f"config.json has layout_version {version!r}, and this reader knows only "
            f"{LAYOUT_VERSIONS}"
        )
    features = getattr(config, "latent_features", "hidden")
    if features not in LATENT_FEATURES:
        raise ValueError(
            f"config.json has latent_features {features!r}, and this reader knows only "
            f"{LATENT_FEATURES}"
        )
    if features == "normed_heads":
        _check_normed_heads(config)
    if getattr(config, "layers", None) is not None:
        raise ValueError(
            "config.json lists layers that differ in size or kind, which this reader does not know"
        )
    for key, plain in PLAIN.items():
        found = getattr(config, key, plain)
        if found not in (plain, None):
            raise ValueError(
                f"config.json has {key} {found!r}, and this reader knows only {plain!r}"
            )
    quantization = quantization or getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"config.json has a quantization_config ({method or 'of unknown method'}), and "
            "relatent folders are served with unquantised weights only"
        )
    if 0 in (getattr(config, "no_rope_layers", None) or []):
        raise ValueError(
            "config.json has no_rope_layers, and this reader rotates the keys of every layer"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu', not {config.hidden_act!r}")
    _check_rope(config.rope_parameters)
    _check_rope_lists(config)
    _check_latents(config)
    if any(config.has_experts(layer) for layer in range(config.num_hidden_layers)):
        _check_experts(config)


def _check_normed_heads(config: PreTrainedConfig) -> None:
    if config.qk_norm not in QK_NORMS:
        raise ValueError(f"qk_norm must be one of {QK_NORMS}, not {config.qk_norm!r}")
    for key in ("num_key_value_heads", "normed_head_dim"):
        if not getattr(config, key):
            raise ValueError(f"latent_features 'normed_heads' needs {key}")
    if config.q_lora_rank is not None or config.latent_norm == "replicated":
        raise ValueError("normed_heads have neither q_lora_rank nor a replicated norm")


def _check_rope(rope: dict[str, Any] | None) -> None:
    kind = (rope or {}).get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {ROPE_TYPES}, not {kind!r}")
    if kind == "longrope" and rope["short_factor"] != rope["long_factor"]:
        raise ValueError("short_factor and long_factor of rope_type longrope must be equal")


def _check_rope_lists(config: PreTrainedConfig) -> None:
    lists = getattr(config, "rope_lists", None) or []
    for rope in lists:
        _check_rope(rope)
    named = getattr(config, "latent_rope_lists", None)
    if named is None:
        return
    if len(named) != config.num_hidden_layers or not set(named) <= set(range(len(lists))):
        raise ValueError("latent_rope_lists must name one of rope_lists for each layer")


def _check_latents(config: PreTrainedConfig) -> None:
    if config.latent_norm not in LATENT_NORMS:
        raise ValueError(f"latent_norm must be one of {LATENT_NORMS}, not {config.latent_norm!r}")
    if config.latent_norm == "replicated" and not config.latent_norm_rank:
        raise ValueError("latent_norm 'replicated' needs latent_norm_rank")
    ranks = config.latent_shared_ranks + [branch["rank"] for branch in config.latent_branches]
    if sum(ranks) != config.kv_lora_rank:
        raise ValueError(f"the latents have {sum(ranks)} numbers, not {config.kv_lora_rank}")
    served: set[int] = set()
    for branch in config.latent_branches:
        first, shared = branch["first_head"], branch.get("shared")
        served.update(range(first, first + branch["num_heads"]))
        if shared is not None and shared not in range(len(config.latent_shared_ranks)):
            raise ValueError(f"there is no shared latent {shared}")
    if served != set(range(config.num_attention_heads)):
        raise ValueError("latent_branches must serve every head, and no others")


def _check_experts(config: PreTrainedConfig) -> None:
    if config.topk_method not in TOPK_METHODS:
        raise ValueError(f"topk_method must be one of {TOPK_METHODS}, not {config.topk_method!r}")
    sizes = ["moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
    if config.topk_method != "greedy":
        sizes += ["n_group", "topk_group"]
    for key in sizes:
        if not getattr(config, key):
            raise ValueError(f"a model with experts needs {key}")
    if config.n_shared_experts is None:
        raise ValueError("a model with experts needs n_shared_experts, 0 for none")
    if config.n_shared_experts and config.shared_expert_intermediate_size:
        raise ValueError("beside shared_expert_intermediate_size, n_shared_experts must be 0")
    if config.num_experts_per_tok > config.n_routed_experts:
        raise ValueError(
            f"num_experts_per_tok must be at most n_routed_experts = {config.n_routed_experts}, "
            f"not {config.num_experts_per_tok}"
        )
