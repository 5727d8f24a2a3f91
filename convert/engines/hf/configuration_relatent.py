"""Configuration of `relatent` models: decoders whose attention reads cached latents."""

from typing import Any

from transformers import PreTrainedConfig

LAYOUT_VERSION = 1
LATENT_NORMS = ("none", "branch", "replicated")
LATENT_FEATURES = ("hidden", "normed_heads")
QK_NORMS = ("head", "width")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


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

    Layers from `first_k_dense_replace` on (None: no layer) have a mixture of experts in place of
    the MLP: `num_experts_per_tok` of `n_routed_experts` for every token, and `n_shared_experts`
    that all tokens pass. `topk_method` says how a token's experts are chosen: "greedy", the largest
    softmax scores; "group_limited_greedy", those within the `topk_group` of `n_group` groups of the
    largest best score; "noaux_tc", sigmoid scores, chosen with a bias within the groups whose two
    best sum highest.

    What this code does not know it refuses rather than runs wrongly. `layout_version` (absent: 1)
    counts the changes of names, shapes and meanings that older code cannot read. `latent_features`
    is what the latents are projections of: "hidden", the layer's normalised input; or
    "normed_heads", `num_key_value_heads` keys of `normed_head_dim` numbers, normalised each
    (`qk_norm` "head") or all together ("width"), and as many values. Queries then are a map of the
    head's own normalised query. `normed_bias` says whether these projections have biases. `layers`
    is kept for sizes that differ from layer to layer; it must be absent or None.
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
        layout_version: int = LAYOUT_VERSION,
        layers: None = None,
        attention_bias: bool = False,
        first_k_dense_replace: int | None = None,
        moe_intermediate_size: int | None = None,
        n_routed_experts: int | None = None,
        n_shared_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        n_group: int | None = None,
        topk_group: int | None = None,
        topk_method: str | None = None,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        hidden_act: str = "silu",
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
        self.attention_bias = attention_bias
        self.first_k_dense_replace = first_k_dense_replace
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.topk_method = topk_method
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.hidden_act = hidden_act
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
        self._check_layout()
        self._check_latents()
        self._check_experts()
        # MLPs alone: attention reads its heads' matrices without calling their modules, which is
        # where transformers' styles act.
        self.base_model_tp_plan = {}
        if not self.has_experts(0):
            self.base_model_tp_plan |= split_mlp("layers.*.mlp")
        if self.has_experts(num_hidden_layers - 1):
            self.base_model_tp_plan |= split_mlp("layers.*.mlp.experts.*")
            self.base_model_tp_plan |= split_mlp("layers.*.mlp.shared_experts")
        super().__init__(**kwargs)

    def _check_layout(self) -> None:
        if self.layout_version != LAYOUT_VERSION:
            raise ValueError(
                f"layout_version is {self.layout_version!r}, and this code reads {LAYOUT_VERSION}"
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
        if self.layers is not None:
            raise ValueError("layers must be absent or null: all layers have the same sizes")

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
        return self.first_k_dense_replace is not None and layer_idx >= self.first_k_dense_replace

    def _check_experts(self) -> None:
        if not self.has_experts(self.num_hidden_layers - 1):
            return
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"topk_method must be one of {TOPK_METHODS}, not {self.topk_method!r}")
        sizes = ["moe_intermediate_size", "n_routed_experts", "n_shared_experts"]
        sizes.append("num_experts_per_tok")
        if self.topk_method != "greedy":
            sizes += ["n_group", "topk_group"]
        for key in sizes:
            if not getattr(self, key):
                raise ValueError(f"a model with experts needs {key}")


__all__ = ["RelatentConfig"]
