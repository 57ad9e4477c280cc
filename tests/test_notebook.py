"""Claims: the notebook's cells run, on fewer texts and updates, and say what its stored outputs say where size plays no
part; these are of one run from top to bottom, in which reasoning got better."""

import json
import re
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent.parent / "rpt_jax" / "docs" / "first_look.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SIZES = {"documents=512": "documents=39", "evaluation_documents=140": "evaluation_documents=26", "steps=20": "steps=2"}


def stored(cell) -> str:
    return "".join(line for output in cell["outputs"] for line in output["text"])


def test_stored_outputs_are_of_one_whole_run():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(output["output_type"] == "stream" for cell in CELLS for output in cell["outputs"])
    before, after = re.search(r"reasoning (\S+) -> (\S+)", stored(CELLS[-1])).groups()
    assert f"reasoning {before}\n" in "".join(map(stored, CELLS[:-1])) and float(after) > float(before) + 0.2


def run(cells, capsys) -> list[str]:
    """What each of the cells prints, at the small sizes."""
    code = "\n".join("".join(cell["source"]) + "\nprint('~')" for cell in cells)
    for full, small in SIZES.items():
        assert full in code
        code = re.sub(rf"\b{full}\b", small, code)
    exec(compile(code, str(NOTEBOOK), "exec"), {})
    return capsys.readouterr().out.split("~\n")[: len(cells)]


def test_the_first_cells_run(capsys):
    base, text, positions = run(CELLS[:3], capsys)
    assert base == stored(CELLS[0])  # parameters and tokens
    columns = [[line[:8] for line in output.splitlines()] for output in (text, stored(CELLS[1]))]
    assert columns[0] == columns[1]  # the tokens of the text
    assert re.fullmatch(r"\d+ of \d+ tokens are above 1.5 nats\n", positions)


def test_all_cells_run(capsys):
    *_, thoughts, _, updates, after = run(CELLS, capsys)
    rewards = re.findall(r"^  ([01])   .* -> (.*)$", thoughts, re.MULTILINE)
    truth = re.search("truth: (.*)", thoughts)[1]
    assert len(rewards) == 8 and all((answer == truth) == (reward == "1") for reward, answer in rewards)
    assert re.search(r"update  1  reward 0\.\d+", updates) and re.search(r"reasoning \S+ -> \S+\n", after)
