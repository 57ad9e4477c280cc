"""What a quickstart found: results.json, a table, plots and three thoughts.

In: evaluations of the base, of the base forced to think with care, of RPT and of both controls. Out: figures by split.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from rpt_jax.corpus import arithmetic
from rpt_jax.corpus.tokenizer import Tokenizer
from rpt_jax.study import plots
from rpt_jax.study.evaluate import Evaluation


def right_steps(
    evaluation: Evaluation, exam: Sequence[arithmetic.Problem], tokenizer: Tokenizer
) -> dict[str, float | None]:
    """By family and for all: of the right answers, the share with exactly the right steps; None where none is right."""
    exact: dict[str, list[bool]] = {}
    for row in evaluation.splits["answers"]:
        if evaluation.sampled.rewards_NG[row, 0] == 1:
            problem = exam[int(evaluation.positions.documents[row])]
            thought = tokenizer.bytes_of(evaluation.sampled.responses[row][0]).partition(b"</think>")[0]
            exact.setdefault(problem.family, []).append(thought == problem.thought.encode())
    everything = [is_exact for found in exact.values() for is_exact in found]
    by_family = {family: float(np.mean(found)) for family, found in sorted(exact.items())}
    return by_family | {"all": float(np.mean(everything)) if everything else None}


def collect_results(
    evaluations: dict[str, Evaluation], exam: Sequence[arithmetic.Problem], tokenizer: Tokenizer
) -> dict:
    """What results.json holds: the main table by split, and what stands beside it."""
    summaries = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    base, rpt = summaries["base"], summaries["rpt"]

    def table(split: str) -> dict:
        return {
            "argmax_base": base[split]["argmax"],
            "argmax_after": rpt[split]["argmax"],
            "reasoning_before": base[split]["reasoning"],
            "reasoning_after": rpt[split]["reasoning"],
            "greedy_before": base[split]["greedy"],
            "greedy_after": rpt[split]["greedy"],
            "forced_careful_base": summaries["careful"][split]["reasoning"],
            "control_next_token": {mode: summaries["next_token"][split][mode] for mode in ("argmax", "reasoning")},
            "control_sft": {mode: summaries["sft"][split][mode] for mode in ("argmax", "reasoning")},
            "positions": base[split]["positions"],
            "standard_error": rpt[split]["standard_error"],
        }

    return {
        "hard": table("hard"),
        "medium": table("medium"),
        "parts_of_hard": {split: table(split) for split in base if split not in ("hard", "medium")},
        "format_rate": {"before": base["hard"]["format_rate"], "after": rpt["hard"]["format_rate"]},
        "response_length": {"before": base["hard"]["response_length"], "after": rpt["hard"]["response_length"]},
        "right_steps_given_right": right_steps(evaluations["rpt"], exam, tokenizer),
        "right_steps_given_right_before": right_steps(evaluations["base"], exam, tokenizer),
    }


ROWS = (  # (heading, key of a split's table, mode)
    ("base, arg-max", "argmax_base", None),
    ("base, reasoning", "reasoning_before", None),
    ("base, greedy reasoning", "greedy_before", None),
    ("base, forced to be careful", "forced_careful_base", None),
    ("[bold]RPT, reasoning[/]", "reasoning_after", None),
    ("RPT, greedy reasoning", "greedy_after", None),
    ("RPT, arg-max", "argmax_after", None),
    ("next-token control, arg-max", "control_next_token", "argmax"),
    ("next-token control, reasoning", "control_next_token", "reasoning"),
    ("SFT control, arg-max", "control_sft", "argmax"),
    ("SFT control, box without thought", "control_sft", "reasoning"),
)
COLUMNS = ("hard", "medium", "chain", "permuted", "total", "untraced", "order_sensitive")


def show_table(results: dict, say: Callable) -> None:
    """Accuracy in per cent, a row for each way to predict, a column for each split."""
    splits = {"hard": results["hard"], "medium": results["medium"]} | results["parts_of_hard"]
    columns = [name for name in COLUMNS if name in splits]
    table = Table(title="Next-token accuracy on held-out positions, %", caption=caption(results))
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(f"{name.replace('_', ' ')}\n{splits[name]['positions']}", justify="right")
    for heading, key, mode in ROWS:
        values = [splits[name][key] if mode is None else splits[name][key][mode] for name in columns]
        table.add_row(heading, *(f"{100 * value:.1f}" for value in values))
    say(table)


def caption(results: dict) -> str:
    exact = results["right_steps_given_right"]["all"]
    return (
        f"format rate {100 * results['format_rate']['before']:.0f} % -> {100 * results['format_rate']['after']:.0f} %; "
        f"right answers with exactly the right steps {'-' if exact is None else f'{100 * exact:.0f} %'}; "
        f"standard error on hard {100 * results['hard']['standard_error']:.1f}; {results['seconds']['total']:.0f} s"
    )


def show_thoughts(
    evaluations: dict[str, Evaluation], exam: Sequence[arithmetic.Problem], tokenizer: Tokenizer, say: Callable
) -> None:
    """One held-out text of each family: what the base thinks of it, and what the trained policy does."""
    base, rpt = evaluations["base"], evaluations["rpt"]
    for family in (family for family in reversed(arithmetic.FAMILIES) if family in rpt.splits):
        row = max(rpt.splits[family], key=lambda row: exam[int(rpt.positions.documents[row])].steps)
        problem = exam[int(rpt.positions.documents[row])]
        say(f"\n[bold]{problem.context}[/] ___   ({family}, {problem.steps} steps; what follows is '{problem.answer}')")
        for name, evaluation in (("base", base), ("RPT ", rpt)):
            response = tokenizer.bytes_of(evaluation.sampled.responses[row][0]).decode()
            verdict = "right" if evaluation.sampled.rewards_NG[row, 0] == 1 else "wrong"
            say(f"  {name} <think>{response}   {verdict}", markup=False, highlight=False)


def write_plots(folder: Path, results: dict, rows: Sequence[dict]) -> None:
    """plots/learning_curve.png and plots/before_after.png."""
    (folder / "plots").mkdir(exist_ok=True)
    plots.learning_curve(rows, folder / "plots" / "learning_curve.png", title="RPT on generated texts")
    hard = results["hard"]

    def bar(accuracy: float) -> tuple[float, float]:
        return accuracy, (accuracy * (1 - accuracy) / hard["positions"]) ** 0.5

    bars = {
        "base": {"arg-max": bar(hard["argmax_base"]), "reasoning": bar(hard["reasoning_before"])},
        "base, made\ncareful": {"reasoning": bar(hard["forced_careful_base"])},
        "RPT": {"arg-max": bar(hard["argmax_after"]), "reasoning": bar(hard["reasoning_after"])},
    }
    for heading, key in (("next-token\ncontrol", "control_next_token"), ("SFT\ncontrol", "control_sft")):
        bars[heading] = {"arg-max": bar(hard[key]["argmax"]), "reasoning": bar(hard[key]["reasoning"])}
    note = f"{hard['positions']} held-out positions above 1.5 nats; controls spend the FLOPs of RPT"
    path = folder / "plots" / "before_after.png"
    plots.before_after(bars, path, title="Next-token accuracy on hard tokens", note=note)
