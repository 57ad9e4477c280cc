"""Targets: documents, questions, annotations, rows of runs and tables, in every kind of file that is read."""

import contextlib
import csv
import functools
import gzip
import io
import json
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import toy
from array_record.python.array_record_module import ArrayRecordWriter
from fuzz_mutate import damaged, lines_rewritten, rewritten, unpacked
from fuzz_targets import Target, file_in, file_of, scratch

from rpt_jax.config import CorpusConfig, PositionConfig, PromptConfig, QuestionConfig
from rpt_jax.corpus import annotated_record, choices, documents, positions, questions
from rpt_jax.corpus.tokenizer import Tokenizer, train_sentencepiece
from rpt_jax.learning import run_rows
from rpt_jax.records import InputError
from rpt_jax.scaling import claims, fit, sweep_cell, table
from rpt_jax.scaling.fit import FitSettings
from rpt_jax.study import patterns, report
from rpt_jax.study.report import ReportConfig

RECORDS = [{"text": "a 3. b", "problem": "1 + 1?", "answer": "so #### 2"}, {"text": "é日", "problem": "x", "answer": 3}]
CHOICES = {
    "mmlu_pro": {"question": "q?", "options": ["a", "b"], "answer": "B", "answer_index": 1, "category": "c"},
    "supergpqa": {"question": "q?", "options": ["a", "b"], "answer": "b", "answer_letter": "B", "discipline": "d"},
    "mmlu": {"question": "q?", "choices": ["a", "b"], "answer": 1, "subject": "s"},
}


def targets() -> tuple[Target, ...]:
    """A table, a reader a line or two, and so longer than 40 lines."""
    lines = _lines(RECORDS)
    options = tuple(_lines([record] * 2) for record in CHOICES.values())
    annotated, run = toy.annotate(scratch() / "annotated"), _run(scratch() / "run")
    parts = {name: file_in(annotated, name) for name in ("header.json", "part-00000.arrayrecord")}
    rows = {
        name: file_in(run, name)
        for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "results.json", "x.fit.json")
    }
    files = {
        name: file_of(name)
        for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.arrayrecord", "q.jsonl", "q.parquet")
    }
    files |= {
        name: file_of(name) for name in ("c.jsonl", "c.parquet", "t.csv", "cells/x.json", "m/metrics.jsonl", "p.jsonl")
    }
    claim = scratch() / "claims"
    claim.mkdir()

    def corpus(name):
        return lambda content: reads_documents(str(files[name](content)))

    def of_run(name):
        return lambda content: reports(rows[name](content))

    def of_part(name):
        return lambda content: reads_annotated(parts[name](content))

    first = (run / "rollouts.jsonl").read_bytes()
    return (
        Target("jsonl", (lines, b"\xef\xbb\xbf" + lines), corpus("a.jsonl"), lines_rewritten, 4),
        Target("gzip", (gzip.compress(lines),), corpus("a.jsonl.gz"), unpacked(lines_rewritten), 2),
        Target("text", (b"page \xc3\xa9",), corpus("a.txt"), damaged, 0.5),
        Target("parquet", (_parquet(RECORDS[:1]), _parquet(RECORDS[:1], "none")), corpus("a.parquet"), damaged, 1.5),
        Target("arrayrecord", (_records(RECORDS),), corpus("a.arrayrecord"), damaged, 0.7),
        Target("questions", (lines,), lambda c: reads_questions(str(files["q.jsonl"](c))), lines_rewritten, 3),
        Target(
            "questions-parquet",
            (_parquet(RECORDS[:1]),),
            lambda c: reads_questions(str(files["q.parquet"](c))),
            damaged,
            0.5,
        ),
        Target("choices", options, lambda c: reads_choices(str(files["c.jsonl"](c))), lines_rewritten, 3),
        Target(
            "choices-parquet",
            (_parquet([CHOICES["mmlu"]]),),
            lambda c: reads_choices(str(files["c.parquet"](c))),
            damaged,
            0.5,
        ),
        Target("header", ((annotated / "header.json").read_bytes(),), of_part("header.json"), rewritten, 0.7),
        Target(
            "part",
            ((annotated / "part-00000.arrayrecord").read_bytes(),),
            of_part("part-00000.arrayrecord"),
            damaged,
            0.5,
        ),
        Target("record", (_record(),), record, damaged, 4),
        Target(
            "rows",
            ((run / "metrics.jsonl").read_bytes(),),
            lambda c: rows_of(files["m/metrics.jsonl"](c)),
            lines_rewritten,
            3,
        ),
        Target("metrics", ((run / "metrics.jsonl").read_bytes(),), of_run("metrics.jsonl"), lines_rewritten, 0.3),
        Target("rollouts", (first,), of_run("rollouts.jsonl"), lines_rewritten, 0.3),
        Target(
            "evaluations",
            (b'{"step": 1, "hard": {"argmax": 0.5}}\n',),
            of_run("evaluations.jsonl"),
            lines_rewritten,
            0.3,
        ),
        Target("results", (_results(),), of_run("results.json"), rewritten, 0.3),
        Target("fits", (b'{"s": {"hard": {"A": -1, "alpha": 1, "P_star": 1}}}',), of_run("x.fit.json"), rewritten, 0.3),
        Target("patterns", (first,), lambda c: counts(files["p.jsonl"](c)), lines_rewritten, 1.5),
        Target("table", (_table(),), lambda c: fits(files["t.csv"](c)), damaged, 3),
        Target(
            "result-of-cell",
            (b'{"status": "done", "cell": "x"}',),
            lambda c: cell(files["cells/x.json"](c)),
            rewritten,
            2,
        ),
        Target(
            "claim", (b'{"host": "h", "pid": 1}', b'{"given_back": true}'), lambda c: claimed(claim, c), rewritten, 1
        ),
    )


def _lines(records) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in records).encode()


def _parquet(records, compression="snappy") -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, compression=compression)
    return sink.getvalue()


def _records(records) -> bytes:
    path = scratch() / "seed.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in records:
        writer.write(json.dumps(each).encode())
    writer.close()
    return path.read_bytes()


def _record() -> bytes:
    arrays = np.arange(4, dtype=np.int32), np.arange(4, dtype=np.float32), np.arange(4, dtype=np.int32)
    return annotated_record.pack(annotated_record.Annotated(3, "a.jsonl:1", *arrays))


def _run(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"name": "x", "update": {"learning_rate": 1e-6}}}))
    row = {"step": 1, "reward": 0.5, "flops_sample": 1.0, "flops_update": 2.0, "seconds": 1.0}
    (folder / "metrics.jsonl").write_bytes(_lines([row, row | {"step": 2}]))
    rollout = {
        "step": 1,
        "thought": "wait, so",
        "prediction": None,
        "reward": 0.0,
        "pieces": [["a", -0.5], ["b", None]],
    }
    (folder / "rollouts.jsonl").write_bytes(_lines([rollout] * 2))
    return folder


def _results() -> bytes:
    hard = {"argmax_base": 0.1, "reasoning_after": 0.9, "positions": 9, "control_sft": {"argmax": 0.1}}
    return json.dumps({"hard": hard, "medium": hard, "parts_of_hard": {"sums": hard, "sums3": hard}}).encode()


def _table() -> bytes:
    sink = io.StringIO()
    columns = ("cell", "size", "seed", "steps", "status", "flops_sample", "flops_update")
    writer = csv.writer(sink)
    writer.writerow([*columns, "hard.reasoning", "hard.positions", "hard.standard_error"])
    for steps in (1, 2, 4, 8):
        writer.writerow([f"s-{steps}", "s", 0, steps, "done", steps * 1e9, 1e9, 0.1 * steps, 400, 0.02])
    return sink.getvalue().encode()


def reads_documents(path: str) -> None:
    """What is read is text with UTF-8, the same at random as in order, and skipping leaves the good ones."""
    config = CorpusConfig(files=(path,), template="{text}", on_bad_record="skip")
    try:
        found = documents.read_documents(config)
    except InputError:
        with contextlib.suppress(InputError):
            documents.read_documents(CorpusConfig(files=(path,), template="{text}"))
        raise
    for index in range(len(found)):
        assert found[index].text.strip() and found[index].text.encode()
    split = documents.open_corpus(config, toy_bytes(), 0)
    assert len(split.train) + len(split.holdout) <= len(found)


def toy_bytes():
    """A tokenizer of bytes, as `rpt pretrain` has before there is one."""
    return types.SimpleNamespace(represents_all=True, longest_token=1, encode=str.encode)


def reads_questions(path: str) -> None:
    config = QuestionConfig(files=(path,), on_bad_record="skip", answer_after="####" if len(path) % 2 else "")
    made = questions.open_questions(config, PromptConfig(template="question", max_tokens=512), _plain(), 0)
    assert len(made.train) and all(answer.strip() == answer and answer for answer in made.answers)


@functools.cache
def _plain() -> Tokenizer:
    return train_sentencepiece(["one two a b"] * 20, 270, scratch() / "plain")


def reads_choices(path: str) -> None:
    failures = 0
    for name in CHOICES:
        try:
            found, _ = choices.read_questions((path,), name, on_bad_record="skip")
        except InputError:
            failures += 1
            continue
        assert all(0 <= each.answer < len(each.options) and len(each.identity) == 2 for each in found)
        assert len(choices.choose(found, 1, 0)) == len({each.category for each in found})
    if failures == len(CHOICES):
        raise InputError("no format has such records")


def reads_annotated(folder) -> None:
    opened = positions.open_annotated(folder, toy.tokenizer())
    chosen = positions.select_positions(opened, PositionConfig(threshold=0.0), 0)
    assert all(0 <= token < 24 for number in set(chosen.documents.tolist()) for token in opened.documents[number])
    positions.difficulty_splits(opened, PositionConfig(target="next_segment", shortest_target=1))


def record(content: bytes) -> None:
    """What is unpacked is packed to the same bytes, but for the name."""
    made = annotated_record.unpack(content, "here", 5)
    again = annotated_record.pack(made)
    assert again[16 : 16 + 12 * len(made.tokens_T)] == content[16 : 16 + 12 * len(made.tokens_T)]


def rows_of(path) -> None:
    rows = run_rows.read_rows(path)
    assert all(isinstance(row["step"], int) for row in rows) and all(run_rows.flat(row) for row in rows)
    run_rows.flops_spent(path.parent, 1)


def reports(folder) -> None:
    report.write_report([str(folder)], ReportConfig(rollouts=3))
    page = (folder / "report.html").read_bytes()
    assert page.count(b"<script") == 2 and page.decode()


def counts(path) -> None:
    found = patterns.run(str(path), patterns.PatternsRun(from_step=1))
    assert all(0 <= each["low"] <= each["share"] <= each["high"] <= 1 for each in found.values())


def fits(path) -> None:
    assert all(None not in row for row in table.read_rows(path))
    for curve in fit.read_curves(path, FitSettings()):
        assert np.isfinite(curve.cells.compute_N).all() and np.isfinite(curve.cells.positions_N).all()


def cell(path) -> None:
    assert sweep_cell.read_result(path.parent.parent, "cells", "x")["status"] in ("done", "failed")


def claimed(folder, content: bytes) -> None:
    """A damaged claim is held or free, and is never the end."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.0").write_bytes(content)
    taken = claims.take(folder, "a")
    assert taken is None or taken.number == 1
