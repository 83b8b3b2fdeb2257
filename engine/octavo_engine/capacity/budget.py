"""One device's memory, shared between weights, activations, graphs and KV blocks, and the limits that follow."""

from dataclasses import dataclass, replace

from octavo_kernels.hardware import Hardware

from octavo_engine.capacity.limits import (
    TYPICAL_CONTEXT,
    Choice,
    choose_batched_tokens,
    choose_seqs,
    launch_bound_tokens,
)
from octavo_engine.capacity.memory import (
    GIB,
    activation_bytes,
    activation_dtype,
    graph_bytes,
    runtime_bytes,
    weight_bytes,
)
from octavo_engine.capacity.roofline import decode_step_s, prefill_tokens_per_s, time_to_first_token_s
from octavo_engine.errors import CapacityError
from octavo_engine.geometry import DTYPE_BYTES, Geometry

# A CPU's memory is everybody's: without an explicit num_kv_blocks the cache takes no more than this, or one context.
CPU_KV_BYTES = 4 * GIB
# Unless a shorter context is asked for, a device that holds no context of this many tokens does not hold the model.
SHORTEST_MODEL_LEN = 2048

_FIXED = "the configuration fixes it"
# Graphs without a GPU are Triton's interpreter's, whose steps all go that way.
_ANY_STEP = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user fixed; None leaves the choice to the plan."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int = 16
    quantization: str = "none"
    enable_cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class LimitReasons:
    """Why each limit is what it is, as a short sentence."""

    max_model_len: str
    max_num_seqs: str
    max_num_batched_tokens: str
    num_kv_blocks: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory plan of one engine and the limits that follow from it. All sizes in bytes.

    runtime_bytes:        the process itself and what the allocator loses
    launch_bound_tokens:  steps with prompts of up to so many tokens take a host longer to launch than the device to
                          compute, so that they are better CUDA graphs; 0: no step is one
    predicted_decode_ms:  a decode step with max_num_seqs sequences at contexts of predicted_context tokens
    predicted_ttft_ms:    a prompt of that length, alone
    """

    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    runtime_bytes: int
    kv_block_bytes: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    launch_bound_tokens: int
    predicted_context: int
    predicted_decode_ms: float
    predicted_prefill_tokens_per_s: float
    predicted_ttft_ms: float
    why: LimitReasons

    @property
    def kv_bytes(self) -> int:
        """The KV cache as a whole."""
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def total_bytes(self) -> int:
        """Everything that the engine will hold."""
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.runtime_bytes + self.kv_bytes

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_kv_blocks * self.block_size

    def of_stages(self, count: int) -> "Capacity":
        """The plan of each of so many stages, with the times of all, which a step passes in turn."""
        return replace(
            self,
            predicted_decode_ms=self.predicted_decode_ms * count,
            predicted_prefill_tokens_per_s=self.predicted_prefill_tokens_per_s / count,
            predicted_ttft_ms=self.predicted_ttft_ms * count,
        )


def plan_capacity(
    geometry: Geometry,
    hardware: Hardware,
    memory_bytes: int,
    *,
    dtype: str,
    kv_cache_dtype: str,
    limits: Limits,
    memory_utilization: float = 0.9,
) -> Capacity:
    """Share `memory_bytes` of one device between weights, activations and KV blocks, and derive the limits.

    Raises CapacityError that says what does not fit and the smallest memory that would do.
    """
    weights = weight_bytes(geometry, hardware, dtype, limits.quantization)
    budget = _Budget(geometry, hardware, memory_bytes, memory_utilization, dtype, kv_cache_dtype, limits, weights)
    seqs = budget.choose_seqs()
    tokens = budget.choose_tokens(seqs.value)
    shares = budget.shares(tokens.value, seqs.value)
    model_len, blocks = budget.choose_blocks(shares, seqs.value)
    num_seqs = seqs if seqs.value <= blocks.value else Choice(blocks.value, "the KV cache has one block for each")
    num_tokens = tokens if tokens.value >= num_seqs.value else Choice(num_seqs.value, "one token of each sequence")
    context = min(model_len.value, TYPICAL_CONTEXT)
    prediction = budget.predict(num_seqs.value, num_tokens.value, context)
    return Capacity(
        weight_bytes=weights,
        activation_bytes=shares.activations,
        graph_bytes=shares.graphs,
        runtime_bytes=shares.runtime,
        kv_block_bytes=budget.block_bytes,
        num_kv_blocks=blocks.value,
        block_size=limits.block_size,
        max_model_len=model_len.value,
        max_num_seqs=num_seqs.value,
        max_num_batched_tokens=num_tokens.value,
        launch_bound_tokens=budget.launch_bound_tokens(),
        predicted_context=context,
        predicted_decode_ms=prediction.decode_s * 1e3,
        predicted_prefill_tokens_per_s=prediction.prefill_tokens_per_s,
        predicted_ttft_ms=prediction.ttft_s * 1e3,
        why=LimitReasons(model_len.why, num_seqs.why, num_tokens.why, blocks.why),
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """Bytes beside the weights and the KV cache."""

    activations: int
    graphs: int
    runtime: int


@dataclass(frozen=True, slots=True)
class _Prediction:
    decode_s: float
    prefill_tokens_per_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class _Budget:
    """What `plan_capacity` was asked, and the steps of its answer."""

    geometry: Geometry
    hardware: Hardware
    memory_bytes: int
    memory_utilization: float
    dtype: str
    kv_cache_dtype: str
    limits: Limits
    weights: int

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.memory_utilization)

    @property
    def block_bytes(self) -> int:
        return self.geometry.kv_bytes_per_token(self.kv_cache_dtype) * self.limits.block_size

    @property
    def linear_bytes(self) -> int:
        """Those of the weights that every token is multiplied with."""
        geometry = self.geometry
        rest = (geometry.num_embedding_parameters + geometry.num_other_parameters) * DTYPE_BYTES[self.dtype]
        return max(self.weights - rest, 1)

    def choose_tokens(self, num_seqs: int) -> Choice:
        """Tokens of a step with so many sequences."""
        if self.limits.max_num_batched_tokens is not None:
            return Choice(self.limits.max_num_batched_tokens, _FIXED)
        return choose_batched_tokens(
            self.geometry,
            self.hardware,
            self.usable_bytes,
            linear_bytes=self.linear_bytes,
            dtype=activation_dtype(self.dtype, self.hardware),
            num_seqs=num_seqs,
        )

    def choose_seqs(self) -> Choice:
        """Sequences of a step."""
        if self.limits.max_num_seqs is not None:
            return Choice(self.limits.max_num_seqs, _FIXED)
        return choose_seqs(
            self.geometry,
            self.hardware,
            linear_bytes=self.linear_bytes,
            weight_bytes=self.weights,
            dtype=activation_dtype(self.dtype, self.hardware),
            kv_cache_dtype=self.kv_cache_dtype,
            memory_bytes=self.usable_bytes,
            free_bytes=max(0, self.usable_bytes - self.weights - runtime_bytes(self.hardware, 0)),
        )

    def launch_bound_tokens(self) -> int:
        """As `Capacity.launch_bound_tokens`."""
        if not self.limits.enable_cuda_graphs:
            return 0
        if not self.hardware.is_gpu:
            return _ANY_STEP
        return launch_bound_tokens(self.geometry, self.hardware, activation_dtype(self.dtype, self.hardware))

    def shares(self, num_tokens: int, num_seqs: int) -> _Shares:
        """What a step of that size takes beside the weights and the cache."""
        dtype = activation_dtype(self.dtype, self.hardware)
        activations = activation_bytes(self.geometry, dtype, num_tokens, num_seqs)
        graph_tokens = min(num_tokens, self.launch_bound_tokens())
        graphs = (
            graph_bytes(self.geometry, dtype, graph_tokens, num_seqs) if graph_tokens and self.hardware.is_gpu else 0
        )
        return _Shares(activations, graphs, runtime_bytes(self.hardware, activations + graphs))

    def choose_blocks(self, shares: _Shares, num_seqs: int) -> tuple[Choice, Choice]:
        """The longest context and the blocks of the cache.

        Raises CapacityError if no request of that context fits.
        """
        fixed = self.weights + shares.activations + shares.graphs + shares.runtime
        num_fitting = max(0, self.usable_bytes - fixed) // self.block_bytes
        model_len = self._choose_model_len(num_fitting)
        one_request = _ceil_div(model_len.value, self.limits.block_size)
        blocks = self._choose_num_blocks(num_fitting, one_request, num_seqs)
        if blocks.value < one_request <= num_fitting:
            raise CapacityError(
                f"num_kv_blocks={blocks.value} holds {blocks.value * self.limits.block_size} tokens, fewer than one "
                f"context of {model_len.value}: raise it to {one_request}, or lower max_model_len"
            )
        if not one_request <= blocks.value <= num_fitting:
            raise CapacityError(self._does_not_fit(fixed))
        return model_len, blocks

    def _choose_model_len(self, num_fitting: int) -> Choice:
        if self.limits.max_model_len is not None:
            return Choice(self.limits.max_model_len, _FIXED)
        num_blocks = min(num_fitting, self.limits.num_kv_blocks or num_fitting)
        own, held = self.geometry.max_position_embeddings, num_blocks * self.limits.block_size
        if min(SHORTEST_MODEL_LEN, own) <= held < own:
            return Choice(held, f"what the KV cache holds; the model's own is {own:,}")
        return Choice(own, "the model's own")

    def _choose_num_blocks(self, num_fitting: int, one_request: int, num_seqs: int) -> Choice:
        if self.limits.num_kv_blocks is not None:
            return Choice(self.limits.num_kv_blocks, _FIXED)
        most = Choice(one_request * num_seqs, "max_num_seqs sequences of max_model_len tokens need no more")
        on_cpu = max(one_request, CPU_KV_BYTES // self.block_bytes)
        if not self.hardware.is_gpu and on_cpu < most.value:
            most = Choice(on_cpu, f"a CPU's memory is everybody's: {CPU_KV_BYTES // GIB} GiB, or one context")
        if num_fitting < most.value:
            return Choice(num_fitting, "what weights, activations, graphs and runtime leave of the memory")
        return most

    def _does_not_fit(self, fixed_bytes: int) -> str:
        """What is needed for the context that was asked for, or else for the shortest that is worth serving."""
        limits = self.limits
        model_len = limits.max_model_len or min(SHORTEST_MODEL_LEN, self.geometry.max_position_embeddings)
        num_blocks = max(limits.num_kv_blocks or 0, _ceil_div(model_len, limits.block_size))
        needed = (fixed_bytes + num_blocks * self.block_bytes) / self.memory_utilization
        return (
            f"{self.geometry.architecture} in {self.dtype} needs {needed / GIB:.1f} GiB for a context of {model_len} "
            f"tokens ({self.weights / GIB:.1f} GiB of weights); {self.hardware.title} offers "
            f"{self.memory_bytes / GIB:.1f} GiB: lower max_model_len or num_kv_blocks, or take larger hardware"
        )

    def predict(self, num_seqs: int, num_tokens: int, context: int) -> _Prediction:
        """The roofline of full steps with contexts, and prompts, of `context` tokens."""
        geometry, hardware, weights, cache = self.geometry, self.hardware, self.weights, self.kv_cache_dtype
        return _Prediction(
            decode_s=decode_step_s(
                geometry, hardware, weight_bytes=weights, kv_cache_dtype=cache, num_seqs=num_seqs, num_context=context
            ),
            prefill_tokens_per_s=prefill_tokens_per_s(
                geometry, hardware, weight_bytes=weights, num_tokens=num_tokens, num_context=context
            ),
            ttft_s=time_to_first_token_s(
                geometry,
                hardware,
                weight_bytes=weights,
                kv_cache_dtype=cache,
                num_prompt_tokens=context,
                max_num_batched_tokens=num_tokens,
            ),
        )


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
