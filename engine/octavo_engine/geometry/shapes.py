"""The values that a geometry is made of, and the counts that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass

# `dtype` of a checkpoint or of a cache -> bytes of one element.
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Matrix:
    """`count` weights of linear layers of one shape, as a checkpoint stores them. is_expert: of a routed expert."""

    name: str
    out_features: int
    in_features: int
    count: int
    is_expert: bool = False

    @property
    def num_parameters(self) -> int:
        """Weights of all of them."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixtures of experts, which some or all layers have in place of one MLP. All MLPs are gated.

    num_layers:               layers that have one
    num_experts:              routed experts of such a layer, of which a token passes num_experts_per_token
    intermediate_size:        of one routed expert
    shared_intermediate_size: of the MLP that every token passes beside them; 0: there is none
    has_shared_gate:          that MLP's output is weighted by a gate with one row
    """

    num_layers: int
    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    has_shared_gate: bool = False

    def touched_share(self, num_tokens: float) -> float:
        """Share of the routed experts that a step reads, expected, if each token chooses independently."""
        missed: float = (1 - self.num_experts_per_token / self.num_experts) ** num_tokens
        return 1 - missed


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: the cache holds one compressed vector a token instead of keys and values of heads.

    kv_rank:    size of the compressed keys and values
    rotary_dim: the part of a key that carries the position, one for all heads, kept beside the compressed vector
    plain_dim:  the part of a query or key head without position
    value_dim:  of a value head
    query_rank: inner size of the queries' two projections; None: one projection
    """

    kv_rank: int
    rotary_dim: int
    plain_dim: int
    value_dim: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a quantised checkpoint stores the weights of its linear layers; all others are as without quantisation.

    method:           `quant_method` of config.json
    bits:             of one weight
    group_columns:    inputs that share a scale; 0: all of a row
    group_rows:       outputs that share a scale; 0: all
    scale_bytes:      of one scale
    zero_point_bits:  of the zero point beside each scale; 0: symmetric
    index_bytes:      for each input: its group, where inputs were sorted
    """

    method: str
    bits: int
    group_columns: int = 0
    group_rows: int = 1
    scale_bytes: int = 2
    zero_point_bits: int = 0
    index_bytes: int = 0

    def matrix_bytes(self, matrix: Matrix) -> int:
        """Bytes of all weights of that shape with their scales, zero points and indices."""
        rows, columns = matrix.out_features, matrix.in_features
        num_groups = ceil_div(rows, self.group_rows or rows) * ceil_div(columns, self.group_columns or columns)
        bits = rows * columns * self.bits + num_groups * (8 * self.scale_bytes + self.zero_point_bits)
        return matrix.count * (ceil_div(bits, 8) + columns * self.index_bytes)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a decoder-only transformer. The defaults are LLaMA's.

    architecture:       the class name of `config.json`, such as LlamaForCausalLM
    intermediate_size:  of the MLP of a layer without experts
    dtype:              data type of the checkpoint's weights; for quantised GGUF files the type they dequantise to
    has_attention_bias: of the query, key and value projections; has_output_bias: of the one after attention
    sliding_window:     tokens that a layer with a window sees; None: no layer has one
    num_full_layers:    layers without a window, where the others have one
    has_qk_norm:        each query and key head is normalised, with one weight for all heads of a layer
    has_gated_mlp:      two projections up, one of them the gate of the other; else one
    has_norm_bias:      norms have a bias beside their weight
    num_layer_norms:    norms of the residual stream in each layer
    experts:            None: every layer has one MLP
    latent:             None: the cache holds keys and values of each KV head
    weight_format:      None: linear layers are stored in `dtype`, or come out of GGUF as such
    checkpoint_bytes:   bytes of the weights as stored, from the files' headers; None: nobody read them
    gathered_vocab_size: of a device's share of a model: the whole vocabulary, of which it gets all logits though it
                        holds and computes `vocab_size` of them; None: it is the model
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    sliding_window: int | None = None
    has_output_bias: bool = False
    has_qk_norm: bool = False
    has_gated_mlp: bool = True
    has_norm_bias: bool = False
    num_layer_norms: int = 2
    num_full_layers: int = 0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    weight_format: WeightFormat | None = None
    checkpoint_bytes: int | None = None
    gathered_vocab_size: int | None = None

    @property
    def num_logits(self) -> int:
        """Logits of one row that a device holds."""
        return self.gathered_vocab_size or self.vocab_size

    @property
    def num_qkv_features(self) -> int:
        """Outputs of a layer's query, key and value projections, where attention is not latent."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_up_features(self) -> int:
        """Outputs of what comes first in a layer's MLP."""
        return self.intermediate_size * (2 if self.has_gated_mlp else 1)

    @property
    def num_dense_layers(self) -> int:
        """Layers with one MLP."""
        return self.num_layers - (self.experts.num_layers if self.experts else 0)

    @property
    def num_window_layers(self) -> int:
        """Layers that see only a sliding window."""
        return self.num_layers - self.num_full_layers if self.sliding_window else 0

    def matrices(self) -> Iterator[Matrix]:
        """The weights of attention and MLPs: what a quantisation of linear layers shrinks."""
        yield from self._latent_matrices(self.latent) if self.latent else self._attention_matrices()
        yield from self._mlp_matrices("", self.intermediate_size, self.num_dense_layers)
        if self.experts:
            each = self.experts
            yield from self._mlp_matrices("shared_expert.", each.shared_intermediate_size, each.num_layers)
            num_routed = each.num_layers * each.num_experts
            yield from self._mlp_matrices("expert.", each.intermediate_size, num_routed, is_expert=True)

    def _attention_matrices(self) -> Iterator[Matrix]:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield Matrix("q_proj", queries, self.hidden_size, self.num_layers)
        yield Matrix("k_proj", keys, self.hidden_size, self.num_layers)
        yield Matrix("v_proj", keys, self.hidden_size, self.num_layers)
        yield Matrix("o_proj", self.hidden_size, queries, self.num_layers)

    def _latent_matrices(self, latent: LatentAttention) -> Iterator[Matrix]:
        queries = self.num_heads * (latent.plain_dim + latent.rotary_dim)
        if latent.query_rank:
            yield Matrix("q_a_proj", latent.query_rank, self.hidden_size, self.num_layers)
        yield Matrix("q_b_proj", queries, latent.query_rank or self.hidden_size, self.num_layers)
        yield Matrix("kv_a_proj", latent.kv_rank + latent.rotary_dim, self.hidden_size, self.num_layers)
        values = self.num_heads * latent.value_dim
        yield Matrix("kv_b_proj", self.num_heads * latent.plain_dim + values, latent.kv_rank, self.num_layers)
        yield Matrix("o_proj", self.hidden_size, values, self.num_layers)

    def _mlp_matrices(self, prefix: str, width: int, count: int, *, is_expert: bool = False) -> Iterator[Matrix]:
        if not width or not count:
            return
        if self.has_gated_mlp:
            yield Matrix(f"{prefix}gate_proj", width, self.hidden_size, count, is_expert)
        yield Matrix(f"{prefix}up_proj", width, self.hidden_size, count, is_expert)
        yield Matrix(f"{prefix}down_proj", self.hidden_size, width, count, is_expert)

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the attention and MLP projections, all experts included."""
        return sum(each.num_parameters for each in self.matrices())

    @property
    def num_expert_parameters(self) -> int:
        """Those of them that belong to routed experts."""
        return sum(each.num_parameters for each in self.matrices() if each.is_expert)

    @property
    def num_active_linear_parameters(self) -> int:
        """Weights of the attention and MLP projections that one token is multiplied with."""
        if not self.experts:
            return self.num_linear_parameters
        idle = 1 - self.experts.num_experts_per_token / self.experts.num_experts
        return self.num_linear_parameters - round(self.num_expert_parameters * idle)

    @property
    def num_embedding_parameters(self) -> int:
        """Input embedding, and output embedding where it is not tied to it."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_other_parameters(self) -> int:
        """Norms, biases and the routers of experts."""
        norms = (self.num_layers * self.num_layer_norms + 1) * self.hidden_size * (2 if self.has_norm_bias else 1)
        mlp = self.num_up_features + self.hidden_size if self.has_mlp_bias else 0
        routers = 0
        if self.experts:
            rows = self.experts.num_experts + (1 if self.experts.has_shared_gate else 0)
            routers = self.experts.num_layers * rows * self.hidden_size
        return norms + self.num_layers * self._num_attention_extras() + self.num_dense_layers * mlp + routers

    def _num_attention_extras(self) -> int:
        """Norms and biases inside one layer's attention."""
        if self.latent:
            norms = (self.latent.query_rank or 0) + self.latent.kv_rank
            inputs = (self.latent.query_rank or 0) + self.latent.kv_rank + self.latent.rotary_dim
        else:
            norms = 2 * self.head_dim if self.has_qk_norm else 0
            inputs = self.num_qkv_features
        biases = (inputs if self.has_attention_bias else 0) + (self.hidden_size if self.has_output_bias else 0)
        return norms + biases

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.num_linear_parameters + self.num_embedding_parameters + self.num_other_parameters

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one layer keeps of one token."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rotary_dim
        return 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token keeps, over all layers. A window does not shrink them: the cache has
        one block table for all layers."""
        return self.num_layers * self.kv_values_per_token * DTYPE_BYTES[dtype]

    def kv_read_bytes(self, num_context_tokens: int, dtype: str) -> int:
        """Bytes of keys and values that a sequence's next token reads; a layer with a window reads no more than it."""
        seen = min(num_context_tokens, self.sliding_window or num_context_tokens)
        num_window_layers = self.num_window_layers
        num_tokens = (self.num_layers - num_window_layers) * num_context_tokens + num_window_layers * seen
        return num_tokens * self.kv_values_per_token * DTYPE_BYTES[dtype]

    @property
    def pair_flops(self) -> int:
        """Operations of one pair of query and key, scores and values, over all layers."""
        if self.latent:
            # In the compressed space, as a decode step computes it: no key or value is expanded.
            return 2 * self.num_layers * self.num_heads * (2 * self.latent.kv_rank + self.latent.rotary_dim)
        return 4 * self.num_layers * self.num_heads * self.head_dim


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)
