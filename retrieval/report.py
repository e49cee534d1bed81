"""The results of an evaluation as text, as JSON, and as one self-contained HTML page.

Results are {row: [RowScore, one for each model]}. A row is an encoder with a measure, and has
several models if the seeds of one setting are scored together.

Jinja2 and matplotlib are imported by the functions that need them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.detection import Detection
from datasets.evaluation_set import EvaluationSet, missing_note, precision_recall
from files import atomic
from retrieval.charts import SIZE, bar_charts, recall_charts, trade_off_charts

TEMPLATES = Path(__file__).resolve().parent
MAX_COLUMNS = 8  # a set with more metrics than this is printed with a line for each
FIRST_RANKS = 10  # shown of a query
EXTREMES = 5  # queries shown at either end, best and worst


# --- results ------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """One table of similarities, scored.

    metrics: {name: value}
    aps: {task: {query: AP}}
    curves: {task: precision (21,) at recall 0, .05, ..., 1, mean over queries}
    first_ranks: {query: [(video, whether it is relevant)]}, of the set's first task
    relevant: {query: ([relevant videos that are ranked], how many there are)}, of the same task
    """

    metrics: dict
    aps: dict
    curves: dict
    first_ranks: dict
    relevant: dict

    def recall(
        self, queries: Sequence[str], database: Sequence[str], in_shortlist: np.ndarray
    ) -> float:
        """The share of a query's relevant videos in its shortlist, mean over queries.

        Args:
            queries, database: the ids of the rows and columns of `in_shortlist`
            in_shortlist: (Q, N) bool
        """
        row = {query: i for i, query in enumerate(queries)}
        column = {video: j for j, video in enumerate(database)}
        shares = []
        for query, (videos, count) in self.relevant.items():
            columns = [column[video] for video in videos]
            shares.append(in_shortlist[row[query], columns].sum() / count)
        return float(np.mean(shares))


class RerankStage(NamedTuple):
    """The second stage of a row of two-stage search.

    The ranking by video descriptors alone is the first point of the trade-off curve: metric None,
    R = 0, cost 0.

    metric: the frame-level metric; None without a second stage
    R: how many videos of each query are compared by frames
    cost: the share of all pairs of frames that this takes
    recall: the share of a query's relevant videos among its first R, mean over queries, which
        bounds what re-ranking can reach; None if all videos or none are compared by frames
    """

    metric: str | None
    R: int
    cost: float
    recall: float | None = None


class RowScore(NamedTuple):
    """What one model scored in one row.

    seconds: time spent comparing, without encoding
    model: the path of the model; None without one
    setting: rows of one setting belong to one trade-off
    """

    summary: Summary
    seconds: float | None = None
    stage: RerankStage | None = None
    model: str | None = None
    setting: str = ""


def summarise_tasks(
    evaluation_set: EvaluationSet,
    rank: Callable[[EvaluationSet], Iterable],
    tasks: Sequence[str] = ("retrieval",),
) -> Summary:
    """Score a table of similarities by the metrics of `tasks`, "retrieval" and "detection".

    Detection comes with the set's hard split, if it has one, as in S2VS: the metrics of both tasks
    again, under names that end in _hard.

    rank: gives what the `rankings` or `rankings_of` of a set yields
    """
    summary = summarise(evaluation_set, rank(evaluation_set), tasks)
    hard = hard_split(evaluation_set, tasks)
    if hard:
        for name, value in summarise(hard, rank(hard), tasks).metrics.items():
            summary.metrics[f"{name}_hard"] = value
    return summary


def hard_split(evaluation_set: EvaluationSet, tasks: Sequence[str]) -> EvaluationSet | None:
    """The hard split of a set, if `tasks` ask for it and there is one."""
    return evaluation_set.hard if "detection" in tasks else None


def summarise(
    evaluation_set: EvaluationSet, rankings: Iterable, tasks: Sequence[str] = ("retrieval",)
) -> Summary:
    """Score what `EvaluationSet.rankings` or `rankings_of` yields."""
    first_task = next(iter(evaluation_set.TASKS))
    curves = {task: [] for task in evaluation_set.TASKS}
    first_ranks, relevant = {}, {}
    detection = Detection(evaluation_set)

    def observed():
        """The same rankings. They are too large to keep, so the shown part is copied here."""
        for query, by_task in rankings:
            if "detection" in tasks:
                detection.add(query, by_task)
            for task, ranking in by_task.items():
                if not ranking.num_relevant:
                    continue
                curves[task].append(precision_recall(ranking.hits, ranking.num_relevant))
                if task == first_task:
                    relevant[query] = _found(evaluation_set, ranking), ranking.num_relevant
                    first_ranks[query] = _first_ranks(evaluation_set, ranking)
            yield query, by_task

    aps = evaluation_set.average_precisions(observed())
    means = {task: np.mean(per_query, 0) for task, per_query in curves.items() if per_query}
    metrics = evaluation_set.metrics(aps) if "retrieval" in tasks else {}
    if "detection" in tasks:
        metrics |= detection.metrics()
    return Summary(metrics, aps, means, first_ranks, relevant)


def _found(evaluation_set, ranking):
    return [evaluation_set.database[i] for i in ranking.positions[ranking.hits]]


def _first_ranks(evaluation_set, ranking):
    first = zip(ranking.positions[:FIRST_RANKS], ranking.hits[:FIRST_RANKS], strict=True)
    return [(evaluation_set.database[i], bool(hit)) for i, hit in first]


def trade_off(results: Mapping[str, Sequence[RowScore]]) -> dict[str, list[dict]]:
    """The cost and the metrics of two-stage search, for each frame-level metric.

    Returns:
        {metric: lines by ascending cost}; {"metric (setting)": lines} if models of several settings
        are scored. A line has row, R, and the means over models of cost, recall (see `RerankStage`)
        and figures {name: value}. Its share is its first figure divided by that of the exhaustive
        row, None if that row was not computed.
    """
    staged = {}  # {setting: {row: its models}}
    for row, per_model in results.items():
        if per_model[0].stage:
            staged.setdefault(per_model[0].setting, {})[row] = per_model
    curves = {}
    for setting, rows in staged.items():
        metrics = dict.fromkeys(per_model[0].stage.metric for per_model in rows.values())
        for metric in metrics:
            if metric is not None:
                name = metric if len(staged) == 1 else f"{metric} ({setting})"
                curves[name] = _trade_off_lines(rows, metric)
    return curves


def _trade_off_lines(rows, metric):
    lines = []
    for row, per_model in rows.items():
        if per_model[0].stage.metric in (metric, None):
            lines.append(_trade_off_line(row, per_model))
    lines.sort(key=lambda line: (line["cost"], line["R"]))
    name = next(iter(lines[0]["figures"]))
    exhaustive = lines[-1]["figures"][name] if lines[-1]["cost"] == 1 else None
    for line in lines:
        line["share"] = exhaustive and line["figures"][name] / exhaustive
    return lines


def _trade_off_line(row, per_model):
    stages = [result.stage for result in per_model]
    recall = None
    if stages[0].recall is not None:
        recall = float(np.mean([stage.recall for stage in stages]))
    figures = {}
    for name in per_model[0].summary.metrics:
        figures[name] = float(np.mean([result.summary.metrics[name] for result in per_model]))
    return {
        "row": row,
        "R": stages[0].R,
        "cost": float(np.mean([stage.cost for stage in stages])),
        "recall": recall,
        "figures": figures,
    }


# --- text ---------------------------------------------------------------------------------------


def coverage_of(
    evaluation_set: EvaluationSet, available: Iterable[str], tasks: Sequence[str]
) -> dict:
    """`EvaluationSet.coverage`, with the queries that the hard split skips, if it is scored."""
    coverage = evaluation_set.coverage(available)
    hard = hard_split(evaluation_set, tasks)
    if hard:
        for task, count in hard.coverage(available)["queries_without_relevant"].items():
            coverage["queries_without_relevant"][f"{task}_hard"] = count
    return coverage


def coverage_line(dataset: str, evaluation_set: EvaluationSet, coverage: Mapping) -> str:
    """How many queries and videos are scored, how many are missing, and by which annotation."""
    return (
        f"{dataset}: {coverage['queries']} queries ({coverage['queries_missing']} missing),"
        f" {coverage['videos']} videos ({coverage['videos_missing']} missing);"
        f" {evaluation_set.source}"
    )


def coverage_notes(coverage: Mapping) -> list[str]:
    """Lines that belong beside the metrics if much is missing, or queries are skipped."""
    notes = [missing_note(coverage)] if missing_note(coverage) else []
    counts = coverage["queries_without_relevant"]
    skipped = [f"{task} {count}" for task, count in counts.items() if count]
    if skipped:
        notes.append(
            f"queries skipped because no relevant video has features: {', '.join(skipped)}"
        )
    return notes


def unlisted_notes(unlisted: Mapping[str, int]) -> list[str]:
    """A line on what a similarity file does not list, of what was searched."""
    parts = []
    if unlisted["queries"]:
        parts.append(f"{unlisted['queries']} queries have no row")
    if unlisted["videos"]:
        parts.append(f"{unlisted['videos']} videos are in no row")
    if not parts:
        return []
    return [f"not found: {' and '.join(parts)}; that counts as missed (--searched leaves ids out)"]


def table_lines(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """The lines of a table of {row: [{name: value}, one for each model]}.

    There is a line for each row and a column for each metric; or the reverse, for sets with more
    than MAX_COLUMNS metrics, such as EVVE with its events.
    """
    names = list(next(iter(metrics.values()))[0])
    cells = [["", *names]]
    for row, per_model in metrics.items():
        values = [format_mean_std([one[name] for one in per_model]) for name in names]
        cells.append([row, *values])
    if len(names) > MAX_COLUMNS:
        cells = list(zip(*cells, strict=True))
    return align_columns(cells)


def trade_off_lines(curve: Sequence[Mapping]) -> list[str]:
    """The lines of one of `trade_off`'s curves as a table."""
    names = list(curve[0]["figures"])[:MAX_COLUMNS]
    cells = [["two stages", "first R", "cost", "recall", *names, f"of exhaustive {names[0]}"]]
    for line in curve:
        recall = "" if line["recall"] is None else f"{line['recall']:.1%}"
        share = "" if line["share"] is None else f"{line['share']:.1%}"
        values = [format_mean_std([line["figures"][name]]) for name in names]
        row = [line["row"], str(line["R"]), f"{line['cost']:.2%}", recall, *values, share]
        cells.append(row)
    return align_columns(cells)


def align_columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of texts: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        for text, width in zip(others, widths[1:], strict=True):
            line.append(text.rjust(width))
        lines.append("  ".join(line))
    return lines


def format_mean_std(values: Sequence[float]) -> str:
    """The mean, with the sample standard deviation if there are several values."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


# --- files --------------------------------------------------------------------------------------


def save_similarities(
    path: str | Path, queries: Sequence[str], database: Sequence[str], table: np.ndarray
) -> None:
    """Write {query: {video: similarity}} as JSON, one query at a time."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, (query, row) in enumerate(zip(queries, table, strict=True)):
            rounded = (float(f"{value:.6g}") for value in row)
            by_video = json.dumps(dict(zip(database, rounded, strict=True)))
            file.write("{" if i == 0 else ",\n")
            file.write(f"{json.dumps(query)}: {by_video}")
        file.write("}\n")


def write_report(
    folder: str | Path,
    record: Mapping,
    results: Mapping[str, Sequence[RowScore]],
    notes: Sequence[str],
) -> None:
    """Write FOLDER/index.html, one file that needs no network.

    Args:
        record: what `evaluation.py --output` writes
        notes: lines shown beside the metrics
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = _best_row(results)
    aps = _mean_aps(results[best])
    curves = record.get("trade_off", {})
    page = environment.get_template("report.html").render(
        record=record,
        notes=notes,
        metrics=_means_and_deviations(record["figures"]),
        recall=recall_charts(_mean_curves(results, skip=_between_the_stages(curves))),
        trade_off=curves,
        trade_off_charts=trade_off_charts(curves),
        best=best,
        task=next(iter(aps)),
        aps=aps,
        bars=bar_charts(aps),
        extremes=_extremes(aps, results[best][0].summary.first_ranks),
        max_columns=MAX_COLUMNS,
        size=SIZE,
    )
    with atomic(Path(folder) / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _best_row(results):
    """The row with the highest first metric, mean over its models."""

    def first_metric(row):
        values = [next(iter(result.summary.metrics.values())) for result in results[row]]
        return np.mean(values)

    return max(results, key=first_metric)


def _mean_aps(per_model):
    """{task: {query: AP}}, the mean over the models of a row."""
    means = {}
    for task, queries in per_model[0].summary.aps.items():
        means[task] = {}
        for query in queries:
            values = [result.summary.aps[task][query] for result in per_model]
            means[task][query] = float(np.mean(values))
    return means


def _mean_curves(results, skip):
    """{task: {row: precision (21,)}}, the mean over the models of each row."""
    means = {}
    for row, per_model in results.items():
        if row in skip:
            continue
        for task in per_model[0].summary.curves:
            curves = [result.summary.curves[task] for result in per_model]
            means.setdefault(task, {})[row] = np.mean(curves, 0)
    return means


def _between_the_stages(curves):
    """The rows of two-stage search whose curves lie between two others of the page."""
    between = set()
    for curve in curves.values():
        if curve[-1]["cost"] == 1:  # the exhaustive row is there
            between.update(line["row"] for line in curve if 0 < line["cost"] < 1)
    return between


def _means_and_deviations(figures):
    """{row: {name: (mean, sample standard deviation or None)}}."""
    cells = {}
    for row, per_model in figures.items():
        cells[row] = {}
        for name in per_model[0]:
            values = [one[name] for one in per_model]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells[row][name] = float(np.mean(values)), deviation
    return cells


def _extremes(aps, first_ranks):
    """[(heading, [(query, AP, first ranks)])] of the best and worst queries of the first task."""
    ordered = sorted(next(iter(aps.values())).items(), key=lambda item: -item[1])
    best = ordered[:EXTREMES]
    worst = ordered[max(len(ordered) - EXTREMES, EXTREMES) :][::-1]  # none twice
    sections = []
    for heading, queries in (("Best queries", best), ("Worst queries", worst)):
        if queries:
            shown = [(query, ap, first_ranks[query]) for query, ap in queries]
            sections.append((heading, shown))
    return sections
