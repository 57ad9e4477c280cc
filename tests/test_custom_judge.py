"""Claims: the judge is asked once a batch, about answers alone, with what was shown and what is true; whatever it does
wrong is said with its name; the reward pays what it says."""

import numpy as np
import pytest

from rpt_jax.config import Config, RewardConfig
from rpt_jax.learning.custom_judge import judged, load_judge
from rpt_jax.learning.rewards import Outcomes, reward
from rpt_jax.records import InputError, Prompts

JUDGE = '''
asked = []

def half(contexts, predictions, truths):
    """1 for the truth, 0.5 for a beginning of it in any letters, else 0."""
    asked.append((contexts, predictions, truths))
    right = zip(predictions, truths)
    return [1.0 if p == t else 0.5 if t.lower().startswith(p.lower()) else 0.0 for p, t in right]

def breaks(contexts, predictions, truths):
    raise ConnectionError("no server")

def one(contexts, predictions, truths):
    return [1.0]

def undefined(contexts, predictions, truths):
    return [0.5] * (len(truths) - 1) + [float("nan")]

def beyond(contexts, predictions, truths):
    return [1.5] * len(truths)

def words(contexts, predictions, truths):
    return ["good"] * len(truths)

number = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "judges.py"
    path.write_text(JUDGE)
    return path


def prompts_of(pieces_N, width=8):
    truth_NX, boundaries_NX = np.zeros((len(pieces_N), width), np.uint8), np.zeros((len(pieces_N), width), bool)
    for n, pieces in enumerate(pieces_N):
        text = b"".join(pieces)
        truth_NX[n, : len(text)] = np.frombuffer(text, np.uint8)
        boundaries_NX[n, np.cumsum([len(piece) for piece in pieces]) - 1] = True
    return Prompts(None, None, None, truth_NX, boundaries_NX, None)


def test_scores_by_hand(file):
    config = RewardConfig("judged", judge=f"{file}:half")
    predictions = [[b"It is.", b"it", None], [b"", b"x", b"No"]]
    outcomes = Outcomes(predictions, prompts_of([[b"It", b" is."], [b"No", b"t"]]), contexts_N=[b"one", b"two"])
    rewards_NG = reward(config, outcomes)
    assert rewards_NG.dtype == np.float32 and rewards_NG.tolist() == [[1, 0.5, 0], [0, 0, 0.5]]
    (asked,) = load_judge(config.judge).__globals__["asked"]  # once, about answers that are there
    assert asked == (
        [b"one", b"one", b"two", b"two"],
        [b"It is.", b"it", b"x", b"No"],
        [b"It is.", b"It is.", b"Not", b"Not"],
    )
    assert judged(config.judge, [b"one"], [[None, b""]], [b"t"]).tolist() == [[0, 0]]
    assert len(load_judge(config.judge).__globals__["asked"]) == 1  # nothing to ask about


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("breaks", "judges.py:breaks' failed: ConnectionError: no server"),
        ("one", r"judges.py:one' gave scores of shape \(1,\) for 2 predictions"),
        ("undefined", "judges.py:undefined' gave the score nan for the prediction b'y'"),
        ("beyond", "judges.py:beyond' gave the score 1.5 for the prediction b'x'"),
        ("words", "judges.py:words' failed: ValueError"),
        ("number", "defines no function number"),
        ("missing", "defines no function missing"),
    ],
)
def test_what_a_judge_does_wrong_is_said_with_its_name(file, function, message):
    with pytest.raises(InputError, match=message):
        judged(f"{file}:{function}", [b"c"], [[b"x", b"y"]], [b"t"])


def test_names_that_lead_nowhere(tmp_path):
    for name in ("judges.py", ":f", "judges.py:"):
        with pytest.raises(InputError, match="FILE.py:FUNCTION"):
            load_judge(name)
    with pytest.raises(InputError, match="no experiment file"):
        load_judge(f"{tmp_path}/none.py:f")
    with pytest.raises(InputError, match="kind judged, and no other, needs a judge"):
        Config(reward=RewardConfig("judged")).check()
    with pytest.raises(InputError, match="reward.kind=prefix with reward.judge='a.py:f'"):
        Config(reward=RewardConfig(judge="a.py:f")).check()
