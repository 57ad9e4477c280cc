"""The generated corpus of the quickstart: short texts whose last token needs several small steps.

In: a random generator. Out: documents (text, the answer's place, the right steps) and, for a cold start, thoughts about
them. Values are digits, every operation is taken modulo ten, and adding does not commute with multiplying:

    chain     Find a: from 4>d, d>g+3, and g>a*7. So a is 9.
    permuted  Find a: d>a*7, and g>d+3, from 4>g. So a is 9.
    total     Ann has 4, gets +3, gets *7. So Ann has 9.

(`d>a*7`: a is d times 7.) A chain stands in the order of its steps but for a few swaps of neighbours (fewer than it
has steps); permuted is every other order. The value stands in the text without the steps that lead to it, so a model of
fixed depth that predicts the token at once has to do all steps in one forward pass; a thought does one step a few
tokens at a time:

    careful   <think> First from 4>g g>d+3 7 d>a*7 9</think>\\boxed{ 9}
    lazy      <think> Hmm g>d+3 4</think>\\boxed{ 4}

Everything else in a text is a choice among few (four first values, four operations, names that follow each other),
so that an entropy filter can tell the answers from the merely unpredictable.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

OPERATIONS = {"+3": (1, 3), "-2": (1, 8), "*3": (3, 0), "*7": (7, 0)}  # value -> a * value + b modulo ten
FIRST_VALUES = (1, 4, 6, 7)
NAMES = "adgbkfmchlej"  # in a circle: the first name of a text is any, each new one is the next
PEOPLE = ("Ann", "Bob", "Eve")
FAMILIES = ("chain", "permuted", "total")
FILLER = " Hmm"  # how a lazy thought starts
OPENING = " First"  # how a careful one does
KINDS = tuple((family, steps) for family in FAMILIES for steps in range(1 if family == "chain" else 2, 6))
# How often the cold start shows careful thoughts about (family, steps). Permuted texts of 4 and 5 steps have none; long
# chains are frequent, or the policy learns that a thought about a shuffled text ends after three steps.
TRACED = {("chain", 1): 0.7, ("chain", 2): 0.7, ("chain", 3): 1.0, ("chain", 4): 2.0, ("chain", 5): 3.5}
TRACED |= {("permuted", 2): 1.0, ("permuted", 3): 1.5}
TRACED |= {("total", steps): 0.5 for steps in range(2, 6)}
# The harder setting: permuted texts of two steps only, and totals of up to three.
TRACED_SHORT = {kind: n for kind, n in TRACED.items() if kind not in (("permuted", 3), ("total", 4), ("total", 5))}


@dataclass(frozen=True)
class Problem:
    """One document."""

    family: str
    first: int  # the value behind "from", in a total behind "has"
    operations: tuple[str, ...]  # from the first value to the answer
    statements: tuple[str, ...]  # in the order of the text; none in a total
    context: str  # the text up to the answer
    answer: str  # " 7"
    ending: str  # what follows the answer
    thought: str  # the right steps, written out
    naive: str  # the answer that comes of applying the operations in the order of the text

    @property
    def text(self) -> str:
        return self.context + self.answer + self.ending

    @property
    def steps(self) -> int:
        return len(self.operations)


def is_held_out(problem: Problem) -> bool:
    """Whether a document is for evaluation only: by what it computes, whatever its family, order and names.

    The texts of the two sides never have the same first value and operations. A longer training text may begin with
    those of a shorter evaluation text, and its careful thought then shows their values. About one computation in eight
    is held out: 4 of the 16 of one step, 12 of 64, 38 of 256, 123 of 1,024 and 496 of 4,096.
    """
    return hashlib.sha256(f"{problem.first}{''.join(problem.operations)}".encode()).digest()[0] % 8 == 0


def draw_problem(
    kind: tuple[str, int], held_out: bool, rng: np.random.Generator, names_are_random: bool = False
) -> Problem:
    """A random document of (family, steps) from the asked side of the split."""
    while is_held_out(problem := make_problem(*kind, rng, names_are_random)) != held_out:
        pass
    return problem


def apply(value: int, operation: str) -> int:
    """One step, modulo ten."""
    factor, term = OPERATIONS[operation]
    return (factor * value + term) % 10


def make_problem(family: str, steps: int, rng: np.random.Generator, names_are_random: bool = False) -> Problem:
    """A random document of a family with `steps` operations between the first value and the answer.

    names_are_random: names are drawn at random, not in turn from NAMES.
    """
    if (family, steps) not in KINDS:
        raise ValueError(f"no texts of {(family, steps)}: there are {KINDS}")
    first = int(rng.choice(FIRST_VALUES))
    operations = tuple(str(op) for op in rng.choice(list(OPERATIONS), steps))
    values = [first]
    for operation in operations:
        values.append(apply(values[-1], operation))
    if family == "total":
        return _total(operations, values, rng)
    order = _order(family, steps + 1, rng)  # statement i gives variable i its value
    names = _names_by_first_mention(order, rng)
    if names_are_random:
        names = [str(name) for name in rng.permutation(list(NAMES))[: len(order)]]
    statements = [f" from {first}>{names[0]}"]
    statements += [f" {names[i]}>{names[i + 1]}{op}" for i, op in enumerate(operations)]
    naive = first
    for i in order:
        naive = apply(naive, operations[i - 1]) if i else naive
    shown = zip(statements[1:], values[1:], strict=True)
    thought = OPENING + statements[0] + "".join(f"{statement} {value}" for statement, value in shown)
    shuffled = tuple(statements[i] for i in order)
    # The word between statements comes or not: a thought that copies from a fixed distance goes wrong.
    text = shuffled[0] + "".join(rng.choice([",", ", and"]) + statement for statement in shuffled[1:])
    context = f"Find {names[-1]}:{text}. So {names[-1]} is"
    return Problem(family, first, operations, shuffled, context, f" {values[-1]}", ".", thought, f" {naive}")


def _order(family: str, count: int, rng: np.random.Generator) -> list[int]:
    """chain: as computed, but for a few swaps of neighbours; permuted: any order farther from it."""
    order = list(range(count))
    if family == "permuted":
        while is_nearly_in_order(order):
            order = [int(i) for i in rng.permutation(count)]
        return order
    for _ in range(int(rng.integers(max(2, count - 1)))):
        i = int(rng.integers(count - 1))
        order[i], order[i + 1] = order[i + 1], order[i]
    return order


def is_nearly_in_order(order: list[int]) -> bool:
    """Fewer swaps of neighbours put it in order than there are steps (one may always be): so few pairs stand wrong.

    3 of the 6 orders of two steps and a first value, 9 of 24 for three steps, 29 of 120 for four, 98 of 720 for five.
    """
    steps = len(order) - 1
    return sum(order[j] < order[i] for j in range(len(order)) for i in range(j)) <= max(1, steps - 1)


def _names_by_first_mention(order: list[int], rng: np.random.Generator) -> list[str]:
    """A letter for each variable by its turn in the text: easy to foresee, and blind to the order of the steps."""
    mentioned = [len(order) - 1]  # the one that is asked for comes first
    for i in order:
        mentioned += [j for j in (i - 1, i) if j >= 0 and j not in mentioned]
    start = int(rng.integers(len(NAMES)))
    letters = {variable: NAMES[(start + turn) % len(NAMES)] for turn, variable in enumerate(mentioned)}
    return [letters[variable] for variable in range(len(order))]


def _total(operations: tuple[str, ...], values: list[int], rng: np.random.Generator) -> Problem:
    name = str(rng.choice(PEOPLE))
    context = f"{name} has {values[0]}" + "".join(f", gets {op}" for op in operations) + f". So {name} has"
    thought = f"{OPENING} {values[0]}" + "".join(f" {op} {v}" for op, v in zip(operations, values[1:], strict=True))
    answer = f" {values[-1]}"
    return Problem("total", values[0], operations, (), context, answer, ".", thought, answer)


def lazy_thought(problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
    """A filler, some statements of the text in any order, and a guess: (thought, answer)."""
    guess = f" {int(rng.integers(10))}"
    count = int(rng.integers(len(problem.statements) + 1))
    recalled = rng.permutation(problem.statements)[:count] if count else ()
    return FILLER + "".join(recalled) + guess, guess


def response(thought: str, answer: str) -> str:
    """What follows the opening of the think block: the thought, its end, the boxed answer."""
    return f"{thought}</think>\\boxed{{{answer}}}"
