"""What stands around the context of a prompt: templates by name, or from a file.

v0 to v6 follow the paper's [RPT, arXiv 2506.08007, its appendix on prompts] in content, not in words; `question` asks
for the answer to a problem, `segment` and `span` for other targets than the next token.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from rpt_jax.records import InputError

CONTEXT, AFTER = "{context}", "{after}"  # markers of a template file; the second one of those for masked spans only


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
    """Text around the context: chat opening, head, (context), tail, chat closing, thought opening.

    For masked spans (context) is the text before, gap, the text behind.
    """

    name: str
    head: str = ""
    tail: str = ""
    thought: str = "<think>\n"  # "": the model opens its thought itself
    chat: Chat = CHATS["none"]
    gap: str | None = None  # stands where the masked span was; None: nothing that comes later is shown

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
        Template(
            "question",  # of questions.py, not of positions in a text
            "Solve the following problem. Work it out step by step, and write your final answer, and nothing else, "
            "into \\boxed{}.\n\n### Problem\n",
            "\n\n",
        ),
        Template("bare", head="<predict>", thought="<think>"),  # for models trained by this project: marks, no words
    )
}

SEGMENT_NOTE = (
    "Put the whole of it inside \\boxed{}, word for word as it would stand in the text and nothing else. Do not write "
    "\\text{} in the box."
)
TARGET_TEMPLATES = {  # for positions.target next_segment and masked_span
    template.name: template
    for template in (
        Template(
            "segment",
            "Here is the beginning of a text:\n```\n",
            f"\n```\n{FENCE_NOTE} Reason step by step about where the text is heading, then write down the sentence or "
            f"line that comes next. {SEGMENT_NOTE}\n\n",
        ),
        Template(
            "span",
            "One sentence or line was taken out of the text below; [GAP] stands in its place:\n```\n",
            f"\n```\n{FENCE_NOTE} Reason step by step about what leads from the part before the gap to the part behind "
            f"it, then write down what is missing. {SEGMENT_NOTE}\n\n",
            gap=" [GAP] ",
        ),
        Template("bare_span", thought="<think>", gap="<predict>"),  # the mark of `bare`, where the span was
    )
}
FITTING = {"next_token": tuple(TEMPLATES), "next_segment": ("segment", "bare"), "masked_span": ("span", "bare_span")}


def require_fitting(template: Template, target: str) -> None:
    """Raises InputError where a template asks for something else than positions.target."""
    is_known = template.name in TEMPLATES or template.name in TARGET_TEMPLATES
    has_gap = template.gap is not None
    if has_gap != (target == "masked_span") or (is_known and template.name not in FITTING[target]):
        raise InputError(
            f"prompt.template={template.name} does not ask for what positions.target={target} wants: use "
            f"{', '.join(FITTING[target])}, or a file with{'' if target == 'masked_span' else 'out'} {AFTER}"
        )


def load_template(name_or_path: str, chat: str = "none") -> Template:
    """A template by name (v0..v6, question, bare, segment, span, bare_span) or from a text file with one {context}.

    A file for masked spans also has one {after} behind that; what stands between the two marks the gap. The file is
    taken literally, its last line break included: no other brace or field means anything. Where it ends in <think> (and
    perhaps white space), chat closings go before that. Raises InputError.
    """
    if chat not in CHATS:
        raise InputError(f"prompt.chat={chat!r} is none of {', '.join(CHATS)}")
    named = TEMPLATES | TARGET_TEMPLATES
    if name_or_path in named:
        return replace(named[name_or_path], chat=CHATS[chat])
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"prompt.template={name_or_path!r} is no file and none of {', '.join(named)}")
    try:
        text = path.read_bytes().decode("utf-8")  # bytes: line ends stay as they are
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start + 1}): save the template as UTF-8 text") from error
    if text.count(CONTEXT) != 1:
        raise InputError(
            f"{path} has {text.count(CONTEXT)} markers {CONTEXT}: a template has exactly one, where the text goes"
        )
    head, tail = text.split(CONTEXT)
    if text.count(AFTER) > 1 or AFTER in head:
        raise InputError(f"{path}: {AFTER} stands once, behind {CONTEXT}, or not at all")
    gap, tail = tail.split(AFTER) if AFTER in tail else (None, tail)
    start = tail.rfind("<think>")
    if start < 0 or tail[start:].rstrip() != "<think>":
        start = len(tail)
    return Template(str(path), head, tail[:start], tail[start:], CHATS[chat], gap)
