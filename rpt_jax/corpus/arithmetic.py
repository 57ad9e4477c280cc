"""The generated corpus of the quickstart: short texts whose last token needs several small steps.

In: a random generator. Out: documents (text, the answer's place, the right steps) and, for a cold start, thoughts about
them. Values are digits, every operation is taken modulo ten, and adding does not commute with multiplying:

    chain     Find b: 8 in c, c+3 in f, and f*7 in b. So b is 7.
    permuted  Find b: c*7 in b, and e-2 in g, 8 in k, k+3 in c. So b is 7.
    total     Ann has 8, gets +3, gets *7. So Ann has 7.

A chain stands in the order of its steps, or with one pair of neighbours swapped; permuted is every other order.
The value stands in the text without the steps that lead to it, so a model of fixed depth that predicts the token at
once has to do all steps in one forward pass; a thought does one step a few tokens at a time:

    careful   <think> First 8 in k k+3 in c 1 c*7 in b 7</think>\\boxed{ 7}
    lazy      <think> Hmm 4</think>\\boxed{ 4}

Everything else in a text is a choice among few (four first values, four operations, two names for each new variable),
so that an entropy filter can tell the answers from the merely unpredictable. Statements that lead nowhere (e-2 in g)
keep a reader from taking the next name for the next step.
"""

import zlib
from dataclasses import dataclass

import numpy as np

OPERATIONS = {"+3": (1, 3), "-2": (1, 8), "*3": (3, 0), "*7": (7, 0)}  # value -> a * value + b modulo ten
FIRST_VALUES = (1, 4, 6, 7)
NAMES = (
    "ab",
    "cd",
    "ef",
    "gh",
    "jk",
    "lm",
    "np",
    "qr",
    "st",
    "uv",
)  # the i-th new variable of a text takes a letter of the i-th pair
PEOPLE = ("Ann", "Bob", "Eve")
FAMILIES = ("chain", "permuted", "total")
STRAYS = 2  # at most so many statements of a text lead nowhere
FILLER = " Hmm"  # how a lazy thought starts
OPENING = " First"  # how a careful one does
KINDS = tuple((family, steps) for family in FAMILIES for steps in range(1 if family == "chain" else 2, 6))
# How often the cold start shows careful thoughts about (family, steps). Permuted texts of 4 and 5 steps have none; long
# chains are frequent, or the policy learns that a thought about a shuffled text ends after three steps.
TRACED = {("chain", 1): 0.7, ("chain", 2): 1.0, ("chain", 3): 1.0, ("chain", 4): 1.5, ("chain", 5): 2.5}
TRACED |= {("permuted", 2): 1.0, ("permuted", 3): 2.0}
TRACED |= {("total", steps): 0.5 for steps in range(2, 6)}
# The harder setting: permuted texts of two steps only, and totals of up to three.
TRACED_SHORT = {kind: n for kind, n in TRACED.items() if kind not in (("permuted", 3), ("total", 4), ("total", 5))}


@dataclass(frozen=True)
class Problem:
    """One document."""

    family: str
    steps: int  # operations between the first value and the answer
    context: str  # the text up to the answer
    answer: str  # " 7"
    ending: str  # what follows the answer
    thought: str  # the right steps, written out
    naive: str  # the answer that comes of applying the operations in the order of the text

    @property
    def text(self) -> str:
        return self.context + self.answer + self.ending


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the evaluation side; one in eight does, none of them is ever trained on."""
    return zlib.crc32(text.encode()) % 8 == 0


def draw_problem(kind: tuple[str, int], held_out: bool, rng: np.random.Generator) -> Problem:
    """A random document of (family, steps) from the asked side of the split."""
    while is_held_out((problem := make_problem(*kind, rng)).text) != held_out:
        pass
    return problem


def apply(value: int, operation: str) -> int:
    """One step, modulo ten."""
    factor, term = OPERATIONS[operation]
    return (factor * value + term) % 10


def make_problem(family: str, steps: int, rng: np.random.Generator) -> Problem:
    """A random document of a family with `steps` operations between the first value and the answer."""
    first = int(rng.choice(FIRST_VALUES))
    operations = [str(op) for op in rng.choice(list(OPERATIONS), steps)]
    values = [first]
    for operation in operations:
        values.append(apply(values[-1], operation))
    if family == "total":
        return _total(operations, values, rng)
    # Statement i gives variable i its value; one that leads nowhere takes a variable that nobody gives a value.
    strays = int(rng.integers(STRAYS + 1))
    order = _order(family, steps + 1, rng)
    for stray in range(steps + 1, steps + 1 + strays):
        order.insert(int(rng.integers(len(order) + 1)), stray)
    names, sources = _names_by_first_mention(order, steps, rng)
    operations += [str(op) for op in rng.choice(list(OPERATIONS), strays)]
    statements = [f" {first} in {names[0]}"]
    statements += [f" {sources[i]}{op} in {names[i]}" for i, op in enumerate(operations, 1)]
    naive = first
    for i in order:
        naive = apply(naive, operations[i - 1]) if 0 < i <= steps else naive
    shown = zip(statements[1:], values[1:], strict=False)
    thought = OPENING + statements[0] + "".join(f"{statement} {value}" for statement, value in shown)
    # The word between statements comes or not: a thought that copies from a fixed distance goes wrong.
    text = statements[order[0]] + "".join(rng.choice([",", ", and"]) + statements[i] for i in order[1:])
    context = f"Find {names[steps]}:{text}. So {names[steps]} is"
    return Problem(family, steps, context, f" {values[-1]}", ".", thought, f" {naive}")


def _order(family: str, count: int, rng: np.random.Generator) -> list[int]:
    """chain: as computed, or with one pair of neighbours swapped (half of the time); permuted: any other order."""
    order = list(range(count))
    if family == "permuted":
        while is_nearly_in_order(order):
            order = [int(i) for i in rng.permutation(count)]
    elif rng.random() < 0.5:
        i = int(rng.integers(count - 1))
        order[i], order[i + 1] = order[i + 1], order[i]
    return order


def is_nearly_in_order(order: list[int]) -> bool:
    """At most one pair of neighbours is swapped."""
    return sum(abs(i - place) for place, i in enumerate(order)) <= 2


def _names_by_first_mention(order: list[int], steps: int, rng: np.random.Generator) -> tuple[list[str], dict[int, str]]:
    """(name that statement i defines, name that it takes), from the pair of its turn in the text.

    So each new name is one of two for a reader, and says nothing about the order of the chain.
    """
    letters: dict[tuple[str, int], str] = {}

    def name(variable: tuple[str, int]) -> str:
        if variable not in letters:
            letters[variable] = NAMES[len(letters)][int(rng.integers(2))]
        return letters[variable]

    name(("made", steps))  # the one that is asked for comes first
    taken, made = {}, {}
    for i in order:
        if i > 0:
            taken[i] = name(("made", i - 1) if i <= steps else ("unknown", i))
        made[i] = name(("made", i))
    return [made[i] for i in range(len(order))], taken


def _total(operations: list[str], values: list[int], rng: np.random.Generator) -> Problem:
    name = str(rng.choice(PEOPLE))
    context = f"{name} has {values[0]}" + "".join(f", gets {op}" for op in operations) + f". So {name} has"
    thought = f"{OPENING} {values[0]}" + "".join(f" {op} {v}" for op, v in zip(operations, values[1:], strict=True))
    return Problem("total", len(operations), context, f" {values[-1]}", ".", thought, f" {values[-1]}")


def lazy_thought(rng: np.random.Generator) -> tuple[str, str]:
    """A filler and a guess: (thought, answer)."""
    guess = f" {int(rng.integers(10))}"
    return FILLER + guess, guess


def response(thought: str, answer: str) -> str:
    """What follows the opening of the think block: the thought, its end, the boxed answer."""
    return f"{thought}</think>\\boxed{{{answer}}}"
