"""Rewards of groups -> advantages: how much better a rollout did than the others of its prompt (GRPO)."""

from typing import Literal

import jax
import jax.numpy as jnp

from rpt_jax.records import Array, InputError


def group_advantages(rewards_NG: Array, kind: Literal["std", "mean", "leave_one_out"], epsilon: float) -> jax.Array:
    """Advantage of each rollout within its group, float32 [N, G]; exactly 0 for a group that agrees.

    std            (r - mean_G r) / (std_G r + epsilon)  [GRPO, arXiv 2402.03300, section 4.1.2]; std is that of the
                   population (divides by G), as torch.std(correction=0) and unlike its default
    mean           r - mean_G r  [Dr. GRPO, arXiv 2503.20783, section 3.2]
    leave_one_out  r minus the mean of the other G - 1 = G / (G - 1) (r - mean_G r)  [RLOO, arXiv 2402.14740]

    Rounding of the mean could leave some 1e-8 where all rewards are equal, and "std" would divide it by epsilon;
    so agreement is decided on the rewards themselves. Raises InputError for G of 1, which nothing can be compared with.
    """
    rewards_NG = jnp.asarray(rewards_NG, jnp.float32)
    group_size = rewards_NG.shape[1]
    if group_size < 2:
        raise InputError("a group of 1 rollout has nothing to compare with: set sample.group_size to 2 or more")
    centred_NG = rewards_NG - rewards_NG.mean(axis=1, keepdims=True)
    if kind == "std":
        advantages_NG = centred_NG / (rewards_NG.std(axis=1, keepdims=True) + epsilon)
    elif kind == "mean":
        advantages_NG = centred_NG
    elif kind == "leave_one_out":
        advantages_NG = centred_NG * (group_size / (group_size - 1))
    else:
        raise InputError(f"update.advantage={kind!r} is none of std, mean, leave_one_out")
    return jnp.where(groups_agree(rewards_NG)[:, None], 0.0, advantages_NG)


def groups_agree(rewards_NG: Array) -> jax.Array:
    """bool [N]: all rollouts of the prompt earned the same, so the group teaches nothing."""
    rewards_NG = jnp.asarray(rewards_NG)
    return rewards_NG.max(axis=1) == rewards_NG.min(axis=1)
