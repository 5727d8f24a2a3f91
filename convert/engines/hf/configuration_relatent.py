"""Configuration of `relatent` models: decoders whose attention reads cached latents."""

from typing import Any

from transformers import PreTrainedConfig

LAYOUT_VERSIONS = (1, 2)
LATENT_NORMS = ("none", "branch", "replicated")
LATENT_FEATURES = ("hidden", "normed_heads")
QK_NORMS = ("head", "width")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
NORM_PLACEMENTS = ("before", "both", "behind")
# Of an entry of `layers`.
GROUPED_QUERY_KEYS = {
    "attention",
    "head_dim",
    "num_key_value_heads",
    "o_bias",
    "qk_norm",
    "qkv_bias",
    "rope_list",
    "scaling",
    "sliding_window",
}


def split_mlp(name: str) -> dict[str, str]:
    """How tensor-parallel devices share the MLP of that name."""
    styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    return {f"{name}.{projection}": style for projection, style in styles.items()}


class RelatentConfig(PreTrainedConfig):
    """Sizes of a decoder with latent attention.

    A token leaves one rotary key of `qk_rope_head_dim` numbers, which all heads share, and
    `kv_lora_rank` latent numbers in the cache of a layer: the shared latents, whose sizes are
    `latent_shared_ranks`, and then the own latent of every branch.

    `latent_branches` lists the branches as dictionaries: a branch serves heads `first_head` to
    `first_head + num_heads - 1`, and its latent is the shared latent number `shared` (None for
    none) followed by `rank` numbers of its own. Heads that several branches serve add up what they
    read.

    `latent_norm` is "none"; "branch", an RMSNorm on every branch's latent; or "replicated", where
    the root mean square of `latent_norm_rank` further projections divides all latents.

    Layers from `first_k_dense_replace` on (None: no layer), but those of `mlp_only_layers`, have a
    mixture of experts in place of the MLP: `num_experts_per_tok` of `n_routed_experts` for every
    token, and `n_shared_experts` that all tokens pass, or one of `shared_expert_intermediate_size`
    (None: there is none), whose output is multiplied by the sigmoid of a gate. `topk_method` says
    how a token's experts are chosen: "greedy", the largest softmax scores; "group_limited_greedy",
    those within the `topk_group` of `n_group` groups of the largest best score; "noaux_tc", sigmoid
    scores, chosen with a bias within the groups whose two best sum highest. `norm_topk_prob`
    divides the scores of the chosen ones by their sum.

    `layers` (None: all layers have that latent attention) has None for every layer of latent
    attention and a dictionary for every layer that is grouped-query attention, as it was before the
    conversion: "num_key_value_heads" and "head_dim", "qkv_bias" and "o_bias", "qk_norm" (as below,
    or "none"), "scaling" of the scores, "sliding_window" (positions that a query sees, or None for
    all) and "rope_list", which of `rope_lists` it rotates by.

    What models have beyond Llama: `hidden_activation` ("gelu_pytorch_tanh") in place of hidden_act;
    `norm_placement` "both" or "behind", norms of what attention and MLP add; `norm_unit_offset`,
    norms that multiply by 1 + their weight; `embedding_multiplier`; `attn_logit_softcapping` of
    scores and `final_logit_softcapping` of logits, where x becomes cap tanh(x / cap).

    `no_rope_layers`, as SmolLM3 has it, is 1 for each layer that rotates and 0 for the others
    (None: all do). Their rotary keys are numbers like any; a layer of `layers` rotates by its list.

    What attention and MLPs add to the stream is multiplied by `residual_multiplier`, and logits are
    divided by `logits_scaling`, as in Granite's configurations.

    `latent_rope_lists` (None: every layer of latents rotates by `rope_parameters`) names for each
    layer of latents one of `rope_lists`, and has None for the others.

    What this code does not know it refuses rather than runs wrongly. `layout_version` (absent: 1)
    counts the changes of names, shapes and meanings that older code cannot read. `latent_features`
    is what the latents are projections of: "hidden", the layer's normalised input; or
    "normed_heads", `num_key_value_heads` keys of `normed_head_dim` numbers, normalised each
    (`qk_norm` "head") or all together ("width"), and as many values. Queries then are a map of the
    head's own normalised query. `normed_bias` says whether these projections have biases.
    """

    model_type = "relatent"
    # The second is what newer versions of transformers call the first.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

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
        latent_form: str = "mla",
        latent_branches: list[dict[str, int | None]] | None = None,
        latent_shared_ranks: list[int] | None = None,
        latent_norm: str = "none",
        latent_norm_rank: int | None = None,
        latent_features: str = "hidden",
        num_key_value_heads: int | None = None,
        normed_head_dim: int | None = None,
        normed_bias: bool = False,
        qk_norm: str | None = None,
        layout_version: int = 1,
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
        self.latent_form = latent_form
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
        self.latent_features = latent_features
        self.num_key_value_heads = num_key_value_heads
        self.normed_head_dim = normed_head_dim
        self.normed_bias = normed_bias
        self.qk_norm = qk_norm
        self.layout_version = layout_version
        self.layers = layers
        self.no_rope_layers = no_rope_layers
        self.rope_lists = list(rope_lists or [])
        self.latent_rope_lists = latent_rope_lists
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
        # transformers takes the size of rope from here; config.json says it too, for readers that
        # know nothing else of this layout.
        self.head_dim = kwargs["head_dim"] = qk_rope_head_dim
        # Follow from `layers`, and stand in files that transformers itself has saved.
        for key in ("layer_types", "sliding_window"):
            kwargs.pop(key, None)
        self._check_layout()
        self._check_layers()
        self._check_latents()
        self._check_experts()
        # MLPs alone: attention reads its heads' matrices without calling their modules, which is
        # where transformers' styles act.
        self.base_model_tp_plan = {}
        mixtures = [self.has_experts(layer) for layer in range(num_hidden_layers)]
        if not all(mixtures):
            self.base_model_tp_plan |= split_mlp("layers.*.mlp")
        if any(mixtures):
            self.base_model_tp_plan |= split_mlp("layers.*.mlp.experts.*")
            self.base_model_tp_plan |= split_mlp("layers.*.mlp.shared_experts")
        super().__init__(**kwargs)

    def _check_layout(self) -> None:
        if self.layout_version not in LAYOUT_VERSIONS:
            raise ValueError(
                f"layout_version is {self.layout_version!r}, and this code reads {LAYOUT_VERSIONS}"
            )
        if self.latent_features not in LATENT_FEATURES:
            raise ValueError(
                f"latent_features must be one of {LATENT_FEATURES}, not {self.latent_features!r}"
            )
        if self.latent_features == "normed_heads":
            if self.qk_norm not in QK_NORMS:
                raise ValueError(f"qk_norm must be one of {QK_NORMS}, not {self.qk_norm!r}")
            for key in ("num_key_value_heads", "normed_head_dim"):
                if not getattr(self, key):
                    raise ValueError(f"latent_features 'normed_heads' needs {key}")
            if self.q_lora_rank is not None or self.latent_norm == "replicated":
                raise ValueError("normed_heads have neither q_lora_rank nor a replicated norm")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, not {self.activation!r}")
        if self.norm_placement not in NORM_PLACEMENTS:
            raise ValueError(
                f"norm_placement must be one of {NORM_PLACEMENTS}, not {self.norm_placement!r}"
            )

    @property
    def activation(self) -> str:
        return self.hidden_activation or self.hidden_act

    def carried_layer(self, layer_idx: int) -> dict[str, Any] | None:
        """A layer that is grouped-query attention; None for one of latents."""
        return None if self.layers is None else self.layers[layer_idx]

    def rotates(self, layer_idx: int) -> bool:
        """Of a layer of latents."""
        return self.no_rope_layers is None or self.no_rope_layers[layer_idx] == 1

    def _check_layers(self) -> None:
        """Checks `layers`, and says of them what transformers' caches and masks want to know."""
        if self.no_rope_layers is not None and (
            len(self.no_rope_layers) != self.num_hidden_layers
            or set(self.no_rope_layers) - {0, 1}
        ):
            raise ValueError(f"no_rope_layers must be 0 or 1 for each of {self.num_hidden_layers}")
        if self.latent_rope_lists is not None:
            latent = [self.carried_layer(layer) is None for layer in range(self.num_hidden_layers)]
            fits = len(self.latent_rope_lists) == self.num_hidden_layers and all(
                rope_list in range(len(self.rope_lists)) if is_latent else rope_list is None
                for rope_list, is_latent in zip(self.latent_rope_lists, latent)
            )
            if not fits:
                raise ValueError(
                    "latent_rope_lists must name one of rope_lists for each layer of latents, and "
                    "be null for the others"
                )
        if self.layers is None:
            return
        if len(self.layers) != self.num_hidden_layers:
            raise ValueError(
                f"layers has {len(self.layers)} entries for {self.num_hidden_layers} layers"
            )
        carried = [layer for layer in self.layers if layer is not None]
        for layer in carried:
            if set(layer) != GROUPED_QUERY_KEYS or layer["attention"] != "grouped_query":
                raise ValueError(
                    "an entry of layers must be null or grouped-query attention with the keys "
                    f"{sorted(GROUPED_QUERY_KEYS)}, not {layer!r}"
                )
            if layer["qk_norm"] not in ("none", *QK_NORMS):
                raise ValueError(f"qk_norm of a layer cannot be {layer['qk_norm']!r}")
            if layer["rope_list"] not in range(len(self.rope_lists)):
                raise ValueError(f"there is no rope list {layer['rope_list']}")
        windows = {layer["sliding_window"] for layer in carried} - {None}
        if len(windows) > 1:
            raise ValueError(f"all sliding windows must be equal, and there are {sorted(windows)}")
        if windows:
            self.sliding_window = windows.pop()
            self.layer_types = [
                "full_attention"
                if layer is None or layer["sliding_window"] is None
                else "sliding_attention"
                for layer in self.layers
            ]

    def _check_latents(self) -> None:
        if self.latent_norm not in LATENT_NORMS:
            raise ValueError(f"latent_norm must be one of {LATENT_NORMS}, not {self.latent_norm!r}")
        if self.latent_norm == "replicated" and not self.latent_norm_rank:
            raise ValueError("latent_norm 'replicated' needs latent_norm_rank")
        ranks = self.latent_shared_ranks + [branch["rank"] for branch in self.latent_branches]
        if sum(ranks) != self.kv_lora_rank:
            raise ValueError(f"the latents have {sum(ranks)} numbers, not {self.kv_lora_rank}")
        served: set[int] = set()
        for branch in self.latent_branches:
            first, shared = branch["first_head"], branch.get("shared")
            served.update(range(first, first + branch["num_heads"]))
            if shared is not None and shared not in range(len(self.latent_shared_ranks)):
                raise ValueError(f"there is no shared latent {shared}")
        if served != set(range(self.num_attention_heads)):
            raise ValueError("latent_branches must serve every head, and no others")

    def has_experts(self, layer_idx: int) -> bool:
        first = self.first_k_dense_replace
        return first is not None and layer_idx >= first and layer_idx not in self.mlp_only_layers

    def shared_size(self) -> int:
        """Inner size of the MLP that all tokens of a mixture pass; 0 for none."""
        if self.shared_expert_intermediate_size:
            return self.shared_expert_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size

    def _check_experts(self) -> None:
        if not any(self.has_experts(layer) for layer in range(self.num_hidden_layers)):
            return
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"topk_method must be one of {TOPK_METHODS}, not {self.topk_method!r}")
        sizes = ["moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
        if self.topk_method != "greedy":
            sizes += ["n_group", "topk_group"]
        for key in sizes:
            if not getattr(self, key):
                raise ValueError(f"a model with experts needs {key}")
        if self.n_shared_experts is None:
            raise ValueError("a model with experts needs n_shared_experts, 0 for none")
        if self.n_shared_experts and self.shared_expert_intermediate_size:
            raise ValueError("beside shared_expert_intermediate_size, n_shared_experts must be 0")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most n_routed_experts = {self.n_routed_experts}, "
                f"not {self.num_experts_per_tok}"
            )


__all__ = ["RelatentConfig"]
