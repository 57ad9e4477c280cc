"""The workload of `rpt bench step`: a random Qwen2 decoder, prompts, responses and advantages, drawn from fixed seeds.

Seeds, order and scale of the draws are those of the benchmark's scripts for other implementations, which draw in
Hugging Face's layout, [outputs, inputs]: all of them get the same numbers, so their log-probs can be compared.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rpt_jax.config import ModelConfig
from rpt_jax.records import Array, InputError, Params, Prompts

WEIGHT_SEED, DATA_SEED, LENGTH_SEED = 1234, 4321, 5678


@dataclass(frozen=True)
class Workload:
    """Sizes of one step; the defaults are the workload W1."""

    vocabulary: int = 8192  # V, tokens that a policy can say
    prompt: int = 192  # tokens of each prompt
    prompts: int = 8  # N, of a step
    group: int = 8  # G, responses for each prompt, at least 2
    tokens: int = 64  # R, the most that a response has
    lengths: Literal["full", "geometric"] = "full"  # of responses: all R | ragged, as if each token could be the last
    mean_length: float = 16.0  # of geometric lengths before R cuts them
    positions_per_document: int = 1  # prompts that end at the last tokens, one apart, of one document
    width: int = 256  # D, of hidden states
    layers: int = 8  # L, of the decoder
    heads: int = 8  # H, query heads
    kv_heads: int = 4  # K, key/value heads, divides heads
    head_channels: int = 32  # C, of a head, even
    hidden: int = 768  # F, of the SwiGLU

    @property
    def model(self) -> ModelConfig:
        """Qwen2 in float32 with a head of its own."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_channels=self.head_channels,
            hidden=self.hidden,
            rope_theta=10000.0,
            norm_epsilon=1e-6,
            qkv_bias=True,
        )

    def check(self) -> None:
        self.model.check()
        least_of = {"prompt": 1, "prompts": 1, "group": 2, "tokens": 1, "mean_length": 1, "positions_per_document": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise InputError(f"workload.{name}={getattr(self, name)}: use {least} or more")
        if self.prompts % self.positions_per_document or self.positions_per_document > self.prompt:
            raise InputError(
                f"workload.positions_per_document={self.positions_per_document}: use a divisor of workload.prompts="
                f"{self.prompts} that is no more than workload.prompt={self.prompt}"
            )

    @property
    def distinct_prompt_tokens(self) -> int:
        """Tokens of the documents: what prompts have in common counts once."""
        return self.prompts // self.positions_per_document * self.prompt


# By the names that the scripts for other implementations give them.
WORKLOADS = {"W1": Workload(), "tiny": Workload(vocabulary=256, prompt=16, prompts=2, group=2, tokens=8)}


@struct.dataclass
class Data:
    """What a step works on, with responses that no policy sampled."""

    prompts: Prompts
    tokens_NGR: Array  # int32, 0 behind the response's end
    lengths_NG: Array  # int32
    advantages_NG: Array  # float32


def draw_params(workload: Workload) -> Params:
    """The decoder's parameters: matrices N(0, 1 / inputs), embedding N(0, 1), biases 0, norms 1."""
    V, D, L, F = workload.vocabulary, workload.width, workload.layers, workload.hidden
    H, K, C = workload.heads, workload.kv_heads, workload.head_channels
    random = np.random.default_rng(WEIGHT_SEED)

    def matrix(*shape, inputs):
        """Drawn as [outputs, inputs], returned with the inputs first, in our shape."""
        columns = int(np.prod(shape)) // inputs
        drawn = random.standard_normal((columns, inputs), dtype=np.float32) * np.float32(inputs**-0.5)
        return drawn.T.reshape(shape)

    def layer():
        return {
            "wq": matrix(D, H, C, inputs=D),
            "wk": matrix(D, K, C, inputs=D),
            "wv": matrix(D, K, C, inputs=D),
            "wo": matrix(H, C, D, inputs=H * C),
            "w_gate": matrix(D, F, inputs=D),
            "w_up": matrix(D, F, inputs=D),
            "w_down": matrix(F, D, inputs=F),
        }

    embedding_VD = random.standard_normal((V, D), dtype=np.float32)
    layers = jax.tree.map(lambda *each: np.stack(each), *[layer() for _ in range(L)])
    layers |= {"bq": np.zeros((L, H, C)), "bk": np.zeros((L, K, C)), "bv": np.zeros((L, K, C))}
    layers |= {"attention_norm": {"scale": np.ones((L, D))}, "mlp_norm": {"scale": np.ones((L, D))}}
    head_DV = matrix(D, V, inputs=D)
    params = {"embedding": embedding_VD, "layers": layers, "final_norm": {"scale": np.ones(D)}, "head": head_DV}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def draw_data(workload: Workload) -> Data:
    """Prompts, responses and their advantages, from rewards 0 or 1 with the sample's standard deviation (G - 1).

    Documents are the first of the prompts that are drawn, so the responses are the same however many positions they
    have.
    """
    N, G, R = workload.prompts, workload.group, workload.tokens
    random = np.random.default_rng(DATA_SEED)
    drawn_NT = random.integers(0, workload.vocabulary, (N, workload.prompt)).astype(np.int32)
    tokens_NGR = random.integers(0, workload.vocabulary, (N * G, R)).astype(np.int32).reshape(N, G, R)
    rewards_NG = random.integers(0, 2, N * G).astype(np.float32).reshape(N, G)
    spread_N1 = rewards_NG.std(axis=1, ddof=1, keepdims=True)
    advantages_NG = (rewards_NG - rewards_NG.mean(axis=1, keepdims=True)) / (spread_N1 + 1e-4)
    lengths_NG = np.full((N, G), R, np.int32)
    if workload.lengths == "geometric":  # draws of their own, so that the tokens stay those of full lengths
        drawn_NG = np.random.default_rng(LENGTH_SEED).geometric(1 / workload.mean_length, (N, G))
        lengths_NG = np.minimum(drawn_NG, R).astype(np.int32)
    live_NGR = np.arange(R)[None, None, :] < lengths_NG[:, :, None]
    return Data(
        _positions(workload, drawn_NT), np.where(live_NGR, tokens_NGR, 0), lengths_NG, advantages_NG.astype(np.float32)
    )


def _positions(workload: Workload, drawn_NT: np.ndarray) -> Prompts:
    """Each document's last positions: all of it, and beginnings that are a token shorter each."""
    documents_N, places_N = np.divmod(np.arange(workload.prompts), workload.positions_per_document)
    lengths_N = workload.prompt - workload.positions_per_document + 1 + places_N
    live_NT = np.arange(workload.prompt)[None] < lengths_N[:, None]
    tokens_NT = np.where(live_NT, drawn_NT[documents_N], 0)
    ids_N2 = np.stack([documents_N, places_N], axis=1).astype(np.uint32)
    return Prompts(tokens_NT, lengths_N.astype(np.int32), ids_N2, None, None, None)
