r"""Positions -> prompts (token ids) with the bytes that really follow; response bytes -> the answer in its box.

A prompt is head + document[:t] + tail in token ids [RPT, arXiv 2506.08007, section 3 and its appendix on prompts].
The document stands right after the head, so all positions of a document share the head-and-document prefix.
For a masked span the prompt is head + text before + gap + text behind + tail: then positions share the head and what
stands before, as far as it is not cut.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.corpus.surroundings import context_around, truth
from rpt_jax.corpus.templates import Template
from rpt_jax.records import InputError, Prompts

BOX = b"\\boxed{"
THOUGHT_END = b"</think>"
LENGTH_STEP = 32  # tokens; padded prompt lengths are multiples, so that few shapes are compiled


def assemble(
    tokenizer,
    template: Template,
    config: PromptConfig,
    documents: Mapping[int, np.ndarray] | Sequence[np.ndarray],
    positions: Sequence[Position],
) -> Prompts:
    """Prompts for positions; documents[position.document] are the token ids of a document.

    A context that leaves no room for head and tail within config.max_tokens loses its left end; around a masked span,
    see `context_around`. The truth goes on to the end of the document, or of the target where the position gives its
    length. T is the smallest multiple of LENGTH_STEP that holds the batch. Raises InputError as `frame`,
    `context_around` and `truth` do, and for a position outside its document.
    """
    head, gap, tail = frame(tokenizer, template, config.max_tokens)
    room = config.max_tokens - len(head) - len(tail)
    prompts, truths = [], []
    for position in positions:
        tokens_T = np.asarray(documents[position.document], np.int32)
        if not 0 <= position.index < len(tokens_T):
            raise InputError(
                f"position {position.index} of document {position.document} lies outside its {len(tokens_T)} tokens: "
                "positions and documents come from different annotations"
            )
        context = tokens_T[max(0, position.index - room) : position.index]
        if gap is not None:
            context = context_around(tokens_T, position, gap, room)
        prompts.append(np.concatenate((head, context, tail)))
        truths.append(truth(tokenizer.token_bytes, tokens_T, position, config.truth_bytes))
    lengths_N = np.array([len(prompt) for prompt in prompts], np.int32)
    return Prompts(
        tokens_NT=_pad(prompts),
        lengths_N=lengths_N,
        ids_N2=np.array([(position.document, position.index) for position in positions], np.uint32).reshape(-1, 2),
        truth_NX=np.stack([truth_X for truth_X, _ in truths]),
        boundaries_NX=np.stack([boundaries_X for _, boundaries_X in truths]),
        entropies_N=np.array([position.entropy for position in positions], np.float32),
    )


def contexts_of(tokenizer, template: Template, prompts: Prompts) -> list[bytes]:
    """The bytes between head and tail of each prompt: the text that the policy was shown, with the gap of a span."""
    head, _, tail = frame(tokenizer, template, prompts.tokens_NT.shape[1] + 1)  # T + 1: what fitted once fits
    ends_N = np.asarray(prompts.lengths_N) - len(tail)
    return [
        tokenizer.bytes_of(tokens_T[len(head) : end].tolist())
        for tokens_T, end in zip(np.asarray(prompts.tokens_NT), ends_N, strict=True)
    ]


def parse_answer(response: bytes) -> bytes | None:
    r"""The content of the last `\boxed{` after the last `</think>`; None where there is no such box.

    The box ends at its balancing `}`: `\boxed{a}}` is `a`, `\boxed{\frac{1}{2}}.` is `\frac{1}{2}`. A token of
    LaTeX often has unequal braces, and then balancing finds nothing, or an empty content that is never right.
    In those two cases the box ends at the last `}` before the next space, counted from the first `}`:

        \boxed{}}   `}`      \boxed{}}}  `}}`     \boxed{}{}   `}{`     \boxed{}         empty (reward 0)
        \boxed{{}   `{`      \boxed{_{}  `_{`     \boxed{}$}   `}$`     \boxed{} or {x}  empty (reward 0)

    Beyond `{` and `}`, that is 6 % of the tokens of 600 Omni-MATH documents (Qwen2: `_{`, `^{`, `}{`, `}$`).
    What can be written: whatever is balanced, and, if no space comes after its first `}`, what lacks closings or
    starts with `}`. What cannot: a closing too many that is not the first byte, as in `)}` (0.1 % of those tokens).
    A box that no `}` follows is none. Backslashes escape nothing. Spaces and line breaks are kept. Never raises.
    """
    start = answer_start(response)
    if start is None:
        return None
    content = response[start:]
    first = content.find(b"}")
    if first < 0:
        return None
    balanced = _balancing(content)
    if balanced:
        return content[:balanced]
    space = content.find(b" ", first)
    return content[: content.rfind(b"}", first, space if space >= 0 else len(content))]


def answer_start(response: bytes) -> int | None:
    r"""Index of the byte behind the last `\boxed{` after the last `</think>`; None where there is no such box."""
    thought_end = response.rfind(THOUGHT_END)
    box = response.rfind(BOX, thought_end + len(THOUGHT_END)) if thought_end >= 0 else -1
    return box + len(BOX) if box >= 0 else None


def parse_answers(tokenizer, tokens_NGR, lengths_NG, finished_NG) -> list[list[bytes | None]]:
    """Answers of all rollouts, N rows of G; None also where the response hit the token limit before it ended."""
    tokens_NGR, lengths_NG, finished_NG = (np.asarray(array) for array in (tokens_NGR, lengths_NG, finished_NG))
    return [
        [
            parse_answer(tokenizer.bytes_of(tokens_R[:length].tolist())) if finished else None
            for tokens_R, length, finished in zip(tokens_GR, lengths_G, finished_G, strict=True)
        ]
        for tokens_GR, lengths_G, finished_G in zip(tokens_NGR, lengths_NG, finished_NG, strict=True)
    ]


def _balancing(content: bytes) -> int | None:
    """Index of the `}` that closes the box, None where there is none."""
    depth = 1
    for index, byte in enumerate(content):
        depth += (byte == ord("{")) - (byte == ord("}"))
        if depth == 0:
            return index
    return None


def frame(tokenizer, template: Template, max_tokens: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Token ids of head, gap (None but for masked spans) and tail.

    Raises InputError where the tokenizer lacks what they need or they fill the limit.
    """
    for piece in template.chat.pieces:
        if tokenizer.id_of(piece) is None:
            raise InputError(
                f"the tokenizer has no token {piece!r}, which the chat markers of prompt.chat need: set prompt.chat to "
                "that of the policy, or to none"
            )
    thought_end = tokenizer.id_of(THOUGHT_END.decode())
    if thought_end is not None and not tokenizer.token_bytes[thought_end]:
        raise InputError(
            "the tokenizer holds </think> for a control token without bytes, so no answer after it could be found: "
            'give it "special": false in tokenizer_config.json'
        )
    texts = template.before, template.gap or "", template.after
    head, gap, tail = (np.array(tokenizer.encode_markup(text), np.int32) for text in texts)
    taken = len(head) + len(gap) + len(tail)
    if taken >= max_tokens:
        raise InputError(
            f"template {template.name}: head and tail take {taken} tokens and prompt.max_tokens={max_tokens} leaves "
            "no room for the context: raise it or use a shorter template"
        )
    return head, None if template.gap is None else gap, tail


def _pad(prompts: list[np.ndarray]) -> np.ndarray:
    longest = max([1, *map(len, prompts)])
    tokens_NT = np.zeros((len(prompts), -(-longest // LENGTH_STEP) * LENGTH_STEP), np.int32)
    for tokens_T, prompt in zip(tokens_NT, prompts, strict=True):
        tokens_T[: len(prompt)] = prompt
    return tokens_NT
