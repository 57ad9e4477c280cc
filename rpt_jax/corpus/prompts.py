r"""Positions -> prompts (token ids) with the bytes that really follow; response bytes -> the answer in its box.

A prompt is head + document[:t] + tail in token ids [RPT, arXiv 2506.08007, section 3 and its appendix on prompts].
The document stands right after the head, so all positions of a document share the head-and-document prefix.
The seven templates follow the paper's in content, not in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpt_jax.config import PromptConfig
from rpt_jax.corpus.positions import Position
from rpt_jax.records import InputError, Prompts

CONTEXT = "{context}"  # the one marker of a template file
BOX = b"\\boxed{"
THOUGHT_END = b"</think>"
LENGTH_STEP = 32  # tokens; padded prompt lengths are multiples, so that few shapes are compiled


@dataclass(frozen=True)
class Chat:
    """Turn markers of a chat model: `opening` before the head, `closing` between tail and thought."""

    opening: str = ""
    closing: str = ""
    pieces: tuple[str, ...] = ()  # must each be one token: spelled out, they would mean nothing to the model


CHATS = {
    "none": Chat(),
    "r1": Chat(
        "<｜begin▁of▁sentence｜><｜User｜>",
        "<｜Assistant｜>",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
    "chatml": Chat("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", ("<|im_start|>", "<|im_end|>")),
}


@dataclass(frozen=True)
class Template:
    """Text around the context: chat opening, head, (context), tail, chat closing, thought opening."""

    name: str
    head: str = ""
    tail: str = ""
    thought: str = "<think>\n"  # "": the model opens its thought itself
    chat: Chat = CHATS["none"]

    @property
    def thinking_opened(self) -> bool:
        """The prompt ends inside a thought; answers are looked for after `</think>` in the response either way."""
        return bool(self.thought)

    @property
    def before(self) -> str:
        return self.chat.opening + self.head

    @property
    def after(self) -> str:
        return self.tail + self.chat.closing + self.thought


BOX_NOTE = (
    "Give exactly one token inside \\boxed{}, as it would stand in the text: if it begins with a space, the space "
    "belongs into the box, as in \\boxed{ sum} beside \\boxed{sum}. Do not write \\text{} in the box."
)
FENCE_NOTE = "The line break before the closing fence is not part of the text."
CANDIDATES = (
    "First write down several different tokens that could come next and weigh for each what speaks for and against "
    "it. Then settle on the most likely one."
)
ONE_TOKEN = "Think step by step about how this text goes on, then name its most likely next token. "

EXAMPLES = r"""Some solved cases:

Text: The angles of a triangle add up to 180
Next token: \boxed{ degrees}

Text: Substituting gives $x^
Next token: \boxed{2}

Text: Hence there are 12 such numbers
Next token: \boxed{.
}
(The last box holds a full stop and a line break, written as a real line break.)
"""

TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "v0",
            "Below, under the heading Context, stands the beginning of a text. Reason step by step about what comes "
            f"next and finish with the most likely next token. {BOX_NOTE}\n\n### Context\n",
            "\n\n",
        ),
        Template("v1", "Here is the beginning of a text:\n```\n", f"\n```\n{FENCE_NOTE} {ONE_TOKEN}{BOX_NOTE}\n\n"),
        Template(
            "v2",
            "You are an expert reader who foresees how a text continues. Here is the beginning of a text:\n```\n",
            f"\n```\n{FENCE_NOTE} {ONE_TOKEN}{BOX_NOTE}\n\n",
        ),
        Template("v3", "### Context\n", f"\n\n### Task\nThe text above breaks off. {CANDIDATES} {BOX_NOTE}\n\n"),
        Template(
            "v4",
            f"Predict the next token of a text. {EXAMPLES}\nNow your case.\n\nText: ",
            f"\n\n{ONE_TOKEN}{BOX_NOTE}\n\n",
        ),
        Template(
            "v5",
            "A text breaks off in the middle. What is there of it stands between the fences.\n\n```text\n",
            f"\n```\n\n{FENCE_NOTE} Which token follows directly? Work it out with care, then answer. {BOX_NOTE}\n\n",
        ),
        Template(
            "v6",
            f"Predict the next token of the fenced text at the end of this message. {CANDIDATES} {BOX_NOTE} "
            f"{FENCE_NOTE}\n\n```\n",
            "\n```\n",
        ),
        Template("bare", head="<predict>", thought="<think>"),  # for models trained by this project: marks, no words
    )
}


def load_template(name_or_path: str, chat: str = "none") -> Template:
    """A template by name (v0..v6, bare) or from a text file with exactly one {context}.

    The file is taken literally, its last line break included: no other brace or field means anything. Where it ends
    in <think> (and perhaps white space), chat closings go before that. Raises InputError.
    """
    if chat not in CHATS:
        raise InputError(f"prompt.chat={chat!r} is none of {', '.join(CHATS)}")
    if name_or_path in TEMPLATES:
        template = TEMPLATES[name_or_path]
        return Template(template.name, template.head, template.tail, template.thought, CHATS[chat])
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"prompt.template={name_or_path!r} is no file and none of {', '.join(TEMPLATES)}")
    try:
        text = path.read_bytes().decode("utf-8")  # bytes: line ends stay as they are
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save the template as UTF-8 text") from error
    if text.count(CONTEXT) != 1:
        raise InputError(
            f"{path} has {text.count(CONTEXT)} markers {CONTEXT}: a template has exactly one, where the text goes"
        )
    head, tail = text.split(CONTEXT)
    start = tail.rfind("<think>")
    if start < 0 or tail[start:].rstrip() != "<think>":
        start = len(tail)
    return Template(str(path), head, tail[:start], tail[start:], CHATS[chat])


def assemble(
    tokenizer,
    template: Template,
    config: PromptConfig,
    documents: Mapping[int, np.ndarray] | Sequence[np.ndarray],
    positions: Sequence[Position],
    length: int | None = None,
) -> Prompts:
    """Prompts for positions; documents[position.document] are the token ids of a document.

    A context that leaves no room for head and tail within config.max_tokens loses its left end. `length` is the
    padded T; left out, it is the smallest multiple of 32 that holds the batch. Raises InputError where head and tail
    alone fill the limit, a prompt is longer than `length`, or a chat marker is no token of the tokenizer.
    """
    head, tail = _frame(tokenizer, template, config.max_tokens)
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
        prompts.append(np.concatenate((head, context, tail)))
        truths.append(continuation(tokenizer.token_bytes, tokens_T[position.index :], config.truth_bytes))
    lengths_N = np.array([len(prompt) for prompt in prompts], np.int32)
    return Prompts(
        tokens_NT=_pad(prompts, lengths_N, length),
        lengths_N=lengths_N,
        ids_N2=np.array([(position.document, position.index) for position in positions], np.uint32).reshape(-1, 2),
        truth_NX=np.stack([truth_X for truth_X, _ in truths]),
        boundaries_NX=np.stack([boundaries_X for _, boundaries_X in truths]),
        entropies_N=np.array([position.entropy for position in positions], np.float32),
    )


def continuation(token_bytes: Sequence[bytes], tokens_T: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """What follows a position: its first `width` bytes, and which of them end a token.

    truth_X uint8, padded with 0; boundaries_X bool, [i] says that the first i + 1 bytes are whole tokens (i + 1 is
    in B of Eq. 3). A token without bytes (a control token) ends where the one before it did, so it adds nothing, and
    nothing at 0. After the end of the document, or past `width`, there is no boundary.
    """
    text, ends = b"", []
    for token in tokens_T:
        piece = token_bytes[token]
        if len(text) + len(piece) > width:
            text = (text + piece)[:width]
            break
        text += piece
        if text:
            ends.append(len(text) - 1)
    boundaries_X = np.zeros(width, bool)
    boundaries_X[ends] = True
    return np.frombuffer(text.ljust(width, b"\0"), np.uint8), boundaries_X


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


def _frame(tokenizer, template: Template, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of head and tail, checked against the tokenizer and the limit."""
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
    head = np.array(tokenizer.encode_markup(template.before), np.int32)
    tail = np.array(tokenizer.encode_markup(template.after), np.int32)
    if len(head) + len(tail) >= max_tokens:
        raise InputError(
            f"template {template.name}: head and tail take {len(head) + len(tail)} tokens and prompt.max_tokens="
            f"{max_tokens} leaves no room for the context: raise it or use a shorter template"
        )
    return head, tail


def _pad(prompts: list[np.ndarray], lengths_N: np.ndarray, length: int | None) -> np.ndarray:
    longest = int(lengths_N.max(initial=1))
    if length is None:
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    if longest > length:
        raise InputError(f"a prompt of {longest} tokens does not fit into a batch of length {length}: raise the length")
    tokens_NT = np.zeros((len(prompts), length), np.int32)
    for tokens_T, prompt in zip(tokens_NT, prompts, strict=True):
        tokens_T[: len(prompt)] = prompt
    return tokens_NT
