"""Claims: each template asks for what its name says and frames the context as it should; a user's file is taken
literally, and one that cannot be used is named."""

import pytest

from rpt_jax.corpus.templates import CHATS, TEMPLATES, load_template
from rpt_jax.records import InputError


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_open_the_thought_and_frame_the_context(name):
    template = load_template(name)
    assert template.thought and template.after.endswith("<think>" if name == "bare" else "<think>\n")
    text = template.before + template.after
    if name == "bare":
        assert text == "<predict><think>"
        return
    if name == "question":  # asks for an answer, not for a token
        assert "step by step" in text and text.count("\\boxed{") == 1 and "token" not in text
        return
    assert text.count("\\boxed{") >= 2 and "\\text{}" in text and "space" in text
    assert (template.before.endswith("```\n") or template.before.endswith("```text\n")) == (
        name in ("v1", "v2", "v5", "v6")
    )


def test_templates_differ_as_the_paper_says():
    text = {name: template.before + "CONTEXT" + template.after for name, template in TEMPLATES.items()}
    assert "### Context\n" in text["v0"] and "step by step" in text["v0"]
    assert text["v2"].endswith(text["v1"]) and text["v2"].startswith("You are")  # v1 and a role
    assert all("several different tokens" in text[name] for name in ("v3", "v6"))
    assert "\\boxed{.\n}" in text["v4"] and text["v4"].count("Next token:") == 3
    assert text["v6"].endswith("CONTEXT\n```\n<think>\n")  # the context comes last
    assert len(set(text.values())) == len(TEMPLATES) == 9


def test_a_users_template_is_taken_literally(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("É {0} %s {{x}} {context}\r\n{__class__}<think>\n".encode())
    template = load_template(str(path), chat="chatml")
    assert template.head == "É {0} %s {{x}} " and template.tail == "\r\n{__class__}" and template.thought == "<think>\n"
    assert template.after.endswith("{__class__}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    path.write_text("{context}\n<think> first\n")
    assert load_template(str(path)).after == "\n<think> first\n" and not load_template(str(path)).thought


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"no marker", "has 0 markers"),
        (b"{context} {context}", "has 2 markers"),
        (b"\xff{context}", "not UTF-8 .byte 1."),
    ],
)
def test_template_files_that_cannot_be_used(tmp_path, content, complaint):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"bad.txt.*{complaint}"):
        load_template(str(tmp_path / "bad.txt"))


def test_names_that_are_not_there():
    with pytest.raises(InputError, match="'v9' is no file and none of v0, .* bare"):
        load_template("v9")
    with pytest.raises(InputError, match="prompt.chat='llama' is none of none, r1, chatml"):
        load_template("v6", chat="llama")
    assert set(CHATS) == {"none", "r1", "chatml"}
