"""The generated corpus: its answers are what its texts say, its thoughts are right, its split is clean."""

import dataclasses
import re
from itertools import permutations, product

import numpy as np
import pytest

from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.prompts import parse_answer


def interpret(context: str) -> int:
    """The asked value, worked out from the text alone by an independent little interpreter."""
    if context.startswith("Find"):
        asked = context[5]
        body = context.split(":")[1].split(".")[0].replace("and ", "").replace("from ", "")
        pending = [re.fullmatch(r"(\w)>(\w)(.*)", statement.strip()).groups() for statement in body.split(",")]
        values = {}
        while asked not in values:
            source, name, operation = pending.pop(0)
            if source.isdigit():
                values[name] = int(source)
            elif source in values:
                values[name] = eval(f"({values[source]}){operation}") % 10
            else:
                pending.append((source, name, operation))
        return values[asked]
    value = int(re.search(r"has (\d)", context).group(1))
    for operation in re.findall(r"gets ([-+*]\d)", context):
        value = eval(f"({value}){operation}") % 10
    return value


@pytest.mark.parametrize("kind", arithmetic.KINDS)
def test_answers_follow_from_the_text(kind):
    rng = np.random.default_rng(1)
    for _ in range(100):
        problem = arithmetic.make_problem(*kind, rng)
        assert problem.answer == f" {interpret(problem.context)}"
        assert problem.text == problem.context + problem.answer + "."
        assert len(re.findall(r"[-+*]\d", problem.context)) == kind[1] == problem.steps


def test_a_thought_does_one_right_step_at_a_time():
    rng = np.random.default_rng(2)
    for kind in arithmetic.KINDS:
        problem = arithmetic.make_problem(*kind, rng)
        opening, thought = problem.thought[: len(arithmetic.OPENING)], problem.thought[len(arithmetic.OPENING) :]
        assert opening == arithmetic.OPENING
        if kind[0] == "total":
            first, *steps = re.findall(r"(?:([-+*]\d) )?(\d)", thought)
            value = int(first[1])
            for operation, result in steps:
                value = arithmetic.apply(value, operation)
                assert value == int(result)
        else:
            value = int(thought[len(" from ")])
            for statement, operation, result in re.findall(r"( \w>\w([-+*]\d)) (\d)", thought):
                assert statement in problem.statements and statement in problem.context
                value = arithmetic.apply(value, operation)
                assert value == int(result)
        assert problem.answer == f" {value}"


def test_operations_do_not_commute_and_lose_nothing():
    tables = {op: [arithmetic.apply(v, op) for v in range(10)] for op in arithmetic.OPERATIONS}
    assert all(sorted(table) == list(range(10)) for table in tables.values())
    assert arithmetic.apply(arithmetic.apply(1, "+3"), "*7") != arithmetic.apply(arithmetic.apply(1, "*7"), "+3")


def order_of(problem):
    """The step that each statement of the text takes."""
    in_thought = re.findall(r"(\w)>\w", problem.thought)
    return [in_thought.index(source) for source in re.findall(r"(\w)>\w", problem.context)]


def test_permuted_texts_are_out_of_order_and_often_order_sensitive():
    rng = np.random.default_rng(3)
    problems = [arithmetic.make_problem("permuted", 4, rng) for _ in range(200)]
    for problem in problems:
        assert not arithmetic.is_nearly_in_order(order_of(problem))
    assert 0.3 < np.mean([problem.naive != problem.answer for problem in problems]) < 0.8


def test_chains_are_in_order_but_for_fewer_swaps_of_neighbours_than_steps():
    rng = np.random.default_rng(7)
    seen = set()
    for _ in range(300):
        problem = arithmetic.make_problem("chain", 3, rng)
        seen.add(tuple(order_of(problem)))
    assert seen == {order for order in permutations(range(4)) if arithmetic.is_nearly_in_order(list(order))}
    assert len(seen) == 9  # 1 + 3 + 5 orders with 0, 1 and 2 pairs the wrong way round
    near = [sum(arithmetic.is_nearly_in_order(list(o)) for o in permutations(range(n))) for n in (2, 3, 4, 5, 6)]
    assert near == [2, 3, 9, 29, 98]


def mentions(problem):
    return "".join(dict.fromkeys(re.findall(r"\b[a-m]\b", problem.context)))


def test_names_say_nothing_about_the_order_of_the_chain():
    """The letters that a text mentions follow each other in the circle, whatever they stand for."""
    rng = np.random.default_rng(4)
    circle = arithmetic.NAMES * 2
    for _ in range(50):
        problem = arithmetic.make_problem("permuted", 5, rng)
        assert mentions(problem) in circle and len(mentions(problem)) == 6
    anyhow = [mentions(arithmetic.make_problem("permuted", 5, rng, names_are_random=True)) for _ in range(50)]
    assert all(len(names) == 6 for names in anyhow) and not any(names in circle for names in anyhow)


def test_the_evaluation_side_is_never_drawn_for_training():
    rng = np.random.default_rng(5)
    draw = arithmetic.draw_problem
    trained = [draw(kind, False, rng) for kind in arithmetic.KINDS for _ in range(200)]
    evaluated = [draw(kind, True, rng) for kind in arithmetic.KINDS for _ in range(50)]
    assert not {(p.first, p.operations) for p in trained} & {(p.first, p.operations) for p in evaluated}


@pytest.mark.parametrize("steps, count", [(1, 4), (2, 12), (3, 38), (4, 123), (5, 496)])
def test_both_sides_of_the_split_have_every_operation_everywhere(steps, count):
    """A hash whose bits follow its input would hold out one operation in one place."""
    example = arithmetic.make_problem("total", 2, np.random.default_rng(0))
    sides = {False: [], True: []}
    for first in arithmetic.FIRST_VALUES:
        for operations in product(arithmetic.OPERATIONS, repeat=steps):
            problem = dataclasses.replace(example, first=first, operations=operations)
            sides[arithmetic.is_held_out(problem)].append((first, *operations))
    assert len(sides[True]) == count
    for place in range(1, steps + 1) if steps > 1 else ():
        for side in sides.values():
            assert {computation[place] for computation in side} == set(arithmetic.OPERATIONS)


def test_the_longest_permuted_texts_have_no_traces():
    for traced in (arithmetic.TRACED, arithmetic.TRACED_SHORT):
        assert not {("permuted", 4), ("permuted", 5)} & set(traced)
        assert set(traced) < set(arithmetic.KINDS)
    assert set(arithmetic.TRACED_SHORT) < set(arithmetic.TRACED)


def test_a_response_boxes_its_answer():
    assert parse_answer(arithmetic.response(" Hmm 4", " 4").encode()) == b" 4"


@pytest.mark.parametrize("kind", [("permuted", 3), ("total", 3)])
def test_a_lazy_thought_repeats_some_statements_and_guesses(kind):
    """Any number of them, each at most once; the guess is right one time in ten."""
    rng = np.random.default_rng(6)
    counts, right = [], []
    for _ in range(2000):
        problem = arithmetic.make_problem(*kind, rng)
        thought, answer = arithmetic.lazy_thought(problem, rng)
        recalled = thought.removeprefix(arithmetic.FILLER).removesuffix(answer)
        found = re.findall(r" (?:from )?\w>\w(?:[-+*]\d)?", recalled)
        assert "".join(found) == recalled and len(set(found)) == len(found) and set(found) <= set(problem.statements)
        counts.append(len(found))
        right.append(answer == problem.answer)
    assert set(counts) == ({0} if kind[0] == "total" else {0, 1, 2, 3, 4})
    assert 0.07 < np.mean(right) < 0.13


def test_a_permuted_text_of_one_step_does_not_exist():
    """Both orders of two statements count as chains; asking for it must not search for ever."""
    with pytest.raises(ValueError, match="permuted"):
        arithmetic.make_problem("permuted", 1, np.random.default_rng(0))
