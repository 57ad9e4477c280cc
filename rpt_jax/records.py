"""The axis key, the records that flow between rooms, and the error that a user can mend.

Arrays are named after their axes, one capital per axis, everywhere in the project:

    N prompts of a step        T tokens of a prompt or sequence   H query heads
    G rollouts per prompt      R tokens of a response             K key/value heads
    B sequences (often N*G)    S cache slots                      C channels per head
    L layers                   D width                            F hidden width
    V vocabulary               X bytes of an answer or truth      Z accepted candidates
    U units, the parts of a batch on data x fsdp (the letters within one: policy/stream.py)

`rewards_NG` is one reward per prompt and rollout; einsum strings use the same letters in lower case.
P is left to jax.sharding.PartitionSpec. Records are frozen pytrees: they cross jit boundaries whole.
"""

from typing import Any

from flax import struct

Array = Any  # numpy on the host, jax.Array on the device
Params = Any  # nested dict of arrays, as decoder.init makes it


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do.

    The command line prints it without a traceback and ends with status 2.
    """


def words_of(what) -> str:
    """What an exception of another library, or a name out of a file, says: on one line, for a message."""
    return " ".join(str(what).split()) or type(what).__name__


@struct.dataclass
class Prompts:
    """A batch of contexts with what really follows them."""

    tokens_NT: Array  # int32, head + document[:t] + tail, padded on the right with 0
    lengths_N: Array  # int32, live tokens
    ids_N2: Array  # uint32, (document, t): the identity of the position, source of its random keys
    truth_NX: Array  # uint8, bytes that continue the text, padded with 0
    boundaries_NX: Array  # bool, [n, i]: a token of the continuation ends with byte i (so i + 1 is in B)
    entropies_N: Array  # float32 nats, the proxy's next-token entropy at the position


@struct.dataclass
class Rollouts:
    """G responses per prompt, as sampled."""

    tokens_NGR: Array  # int32, padded on the right with 0
    lengths_NG: Array  # int32, live tokens, the end token included
    logprobs_NGR: Array  # float32, log-prob of each token under softmax(z / temperature), 0 in padding
    finished_NG: Array  # bool, ended by an end token rather than by the limit
    # Slots times decode steps that sampling took: the tokens, if no slot was ever idle. A fact, not an array to place.
    slot_steps: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Batch:
    """What one policy update reads."""

    prompt_tokens_NT: Array
    prompt_lengths_N: Array
    tokens_NGR: Array
    lengths_NG: Array
    logprobs_NGR: Array  # the sampler's, for the mismatch metric and, off-policy, the ratio
    advantages_NG: Array
    stream: Any = None  # policy.stream.Stream of these very rows, [microbatches, units, ...]; None: padding runs along
