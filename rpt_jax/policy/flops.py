"""Matmul FLOPs of the decoder, counted from shapes: what sampling and updates cost, for controls at equal compute.

A multiply-add is two FLOPs. Norms, softmax, rotary embedding and the optimizer are left out (a few per cent).
"""

from rpt_jax.config import ModelConfig


def forward(model: ModelConfig, tokens: float, seen: float, predicted: float) -> float:
    """FLOPs of one forward pass.

    tokens: live tokens that run through the layers. seen: keys that each of them attends to, on average.
    predicted: positions whose logits are computed.
    """
    D, H, K, C, F = model.width, model.heads, model.kv_heads, model.head_channels, model.hidden
    weights = D * C * (2 * H + 2 * K) + 3 * D * F
    attention = 2 * H * C * seen  # scores and weighted sum
    return 2.0 * (model.layers * tokens * (weights + attention) + predicted * D * model.vocab_size)


def sampling(
    model: ModelConfig,
    prompts: int,
    prompt_tokens: int,
    rollouts: int,
    response_tokens: int,
    distinct_tokens: int | None = None,
) -> float:
    """Prefill once per prompt, then every response token once; arguments are sums over the batch.

    distinct_tokens: those of the prompts with common beginnings counted once; None: prompt_tokens.
    """
    P, R = prompt_tokens / max(prompts, 1), response_tokens / max(rollouts, 1)
    prefilled = prompt_tokens if distinct_tokens is None else distinct_tokens
    return forward(model, prefilled, P / 2, prompts) + forward(model, response_tokens, P + R / 2, response_tokens)


def update(
    model: ModelConfig,
    prompts: int,
    prompt_tokens: int,
    rollouts: int,
    response_tokens: int,
    distinct_tokens: int | None = None,
) -> float:
    """Forward and backward with the prompt shared by its group; backward counts twice the forward."""
    return 3.0 * sampling(model, prompts, prompt_tokens, rollouts, response_tokens, distinct_tokens)


def pretraining(model: ModelConfig, rows: int, tokens: int) -> float:
    """Forward and backward of next-token training on `tokens` live tokens in `rows` rows."""
    return 3.0 * forward(model, tokens, tokens / max(rows, 1) / 2, tokens)
