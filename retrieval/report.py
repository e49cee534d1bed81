"""What an evaluation looks like: curves and rankings summarised, one self-contained HTML page, the trade-off as a picture.

matplotlib and Jinja2 are imported where they are used: an evaluation without --report or --plot needs neither.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.evaluation_set import precision_recall
from utils import atomic

TEMPLATES = Path(__file__).resolve().parent
COLOURS = [
    "#1f5fa8",
    "#c4501b",
    "#2c7d4f",
    "#8b3f96",
    "#b08a00",
    "#0f8a99",
    "#b3305c",
    "#5b5b5b",
]  # told apart on white
FIRST, SHOWN = 10, 5  # ranks a query, queries at either end
WIDTH, HEIGHT = (
    360,
    240,
)  # of a chart, close to the pixels it is shown at, so that its letters keep their size
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 10, 34  # its margins

WIDE = 8  # figures a set; more of them are printed one a line


class Summary(NamedTuple):
    """One table scored: what the figures hide.

    figures {name: value}; aps {task: {query: AP}}; curves {task: precision (21,) at recall 0, .05, ... 1, mean over queries};
    firsts {query: [(video, whether it is relevant)]}, the first ranks, and relevant {query: ([relevant videos ranked], how many
    there are)}, both for the set's first task.
    """

    figures: dict
    aps: dict
    curves: dict
    firsts: dict
    relevant: dict

    def recall(self, queries, database, short):
        """The share of a query's relevant videos that `short` (Q, N) bool holds, mean over queries; its sides' ids."""
        row, column = ({video: i for i, video in enumerate(side)} for side in (queries, database))
        shares = [
            short[row[query], [column[v] for v in videos]].sum() / count
            for query, (videos, count) in self.relevant.items()
        ]
        return float(np.mean(shares))


def summarise(chosen, rankings):
    """The Summary of what `EvaluationSet.rankings` or `rankings_of` yields."""
    curves, firsts, found, first = (
        {task: [] for task in chosen.TASKS},
        {},
        {},
        next(iter(chosen.TASKS)),
    )

    def watched():
        for query, tasks in rankings:
            for task, (hits, relevant, places) in tasks.items():
                curves[task].append(precision_recall(hits, relevant))
                if task == first:
                    shown = zip(places[:FIRST], hits[:FIRST], strict=True)
                    found[query] = [chosen.database[place] for place in places[hits]], relevant
                    firsts[query] = [(chosen.database[place], bool(hit)) for place, hit in shown]
            yield query, tasks

    aps = chosen.average_precisions(watched())
    curves = {task: np.mean(of, 0) for task, of in curves.items() if of}
    return Summary(chosen.figures(aps), aps, curves, firsts, found)


# --- charts ------------------------------------------------------------------------------------------------------------


def _x(share):
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(value):
    return round(HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM), 1)


def _quarters():
    return [(_y(value), f"{value:g}") for value in (0, 0.25, 0.5, 0.75, 1)]


def line_chart(title, across, series, ticks, scale=lambda x: x, dotted=None):
    """A chart for the template: series {name: [(x, y)]}, y from 0 to 1, and scale(x) too; ticks [(x, text)].

    dotted: the series whose points are marked.
    """
    lines = [
        {
            "name": name,
            "colour": COLOURS[i % len(COLOURS)],
            "dash": ["", "6 3", "2 3"][i // len(COLOURS) % 3],
            "points": [(_x(scale(x)), _y(y)) for x, y in points],
            "dots": name == dotted,
        }
        for i, (name, points) in enumerate(series.items())
    ]
    return {
        "title": title,
        "across": across,
        "lines": lines,
        "x": [(_x(scale(x)), text) for x, text in ticks],
        "y": _quarters(),
    }


def recall_charts(rows):
    """A precision-recall chart a task; rows {row: [Summary]}: the mean over a row's models."""
    recall = np.linspace(0, 1, 21)
    charts = []
    for task in next(iter(rows.values()))[0].curves:
        means = {
            row: np.mean([summary.curves[task] for summary in of], 0) for row, of in rows.items()
        }
        series = {row: list(zip(recall, mean, strict=True)) for row, mean in means.items()}
        charts.append(
            line_chart(task, "recall", series, [(x, f"{x:g}") for x in (0, 0.25, 0.5, 0.75, 1)])
        )
    return charts


def trade_off_charts(curves):
    """A chart a frame-level metric of `evaluation.trade_off`'s curves, its first figure against a logarithm of the cost."""
    charts = []
    for curve in curves.values():
        name = next(iter(curve[0]["figures"]))
        points = [(line["cost"], line["figures"][name]) for line in curve if line["cost"]]
        low = math.floor(math.log10(min(cost for cost, _ in points) * 0.999))
        series = {"two stages": points} | {
            line["row"]: [(10.0**low, line["figures"][name]), (1, line["figures"][name])]
            for line in curve
            if line["cost"] in (0, 1)
        }
        ticks = [(10.0**power, f"{10.0 ** (power + 2):g} %") for power in range(low, 1)]
        across = "share of the exhaustive cost"
        charts.append(
            line_chart(
                f"{name} against cost",
                across,
                series,
                ticks,
                lambda x, low=low: 1 - math.log10(x) / low,
                "two stages",
            )
        )
    return charts


def bar_charts(aps):
    """A chart a task of {task: {query: AP}}: a bar a query, best first."""
    charts = []
    for task, values in aps.items():
        ordered = sorted(values.items(), key=lambda item: -item[1])
        step = (WIDTH - LEFT - RIGHT) / max(len(ordered), 1)
        bars = [
            {
                "x": round(LEFT + i * step, 2),
                "y": _y(value),
                "height": round(_y(0) - _y(value), 2),
                "query": query,
                "ap": value,
            }
            for i, (query, value) in enumerate(ordered)
        ]
        mean = float(np.mean(list(values.values()))) if values else 0.0
        charts.append({"title": task, "bars": bars, "width": round(step * (0.8 if step > 3 else 1), 2), "y": _quarters(),
                       "mean": mean, "mean_y": _y(mean)})  # fmt: skip
    return charts


# --- the page ----------------------------------------------------------------------------------------------------------


def write_report(folder, found, rows, notes):
    """`folder`/index.html, one file that needs no network.

    found: what `evaluation.py --output` writes; rows {row: [Summary]}, one a model; notes: lines that belong to the figures.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    first = next(iter(next(iter(rows.values()))[0].figures))
    best = max(rows, key=lambda row: np.mean([summary.figures[first] for summary in rows[row]]))
    aps, curves = _mean_aps(rows[best]), found.get("trade_off", {})
    between = {
        line["row"]
        for curve in curves.values()
        for line in curve
        if curve[-1]["cost"] == 1 and 0 < line["cost"] < 1
    }
    page = environment.get_template("report.html").render(
        found=found,
        notes=notes,
        figures=_cells(found["figures"]),
        recall=recall_charts({row: of for row, of in rows.items() if row not in between}),
        trade_off=curves,
        trade_off_charts=trade_off_charts(curves),
        best=best,
        task=next(iter(aps)),
        aps=aps,
        bars=bar_charts(aps),
        extremes=_extremes(aps, rows[best][0].firsts),
        size={
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "bottom": HEIGHT - BOTTOM,
        },
    )
    with atomic(Path(folder) / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _cells(figures):
    """{row: {figure: (mean, sample standard deviation or None)}}."""
    return {
        row: {
            name: (
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else None,
            )
            for name in of[0]
            for values in [[one[name] for one in of]]
        }
        for row, of in figures.items()
    }


def _mean_aps(summaries):
    """{task: {query: AP}}, the mean over models."""
    return {
        task: {
            query: float(np.mean([summary.aps[task][query] for summary in summaries]))
            for query in values
        }
        for task, values in summaries[0].aps.items()
    }


def _extremes(aps, firsts):
    """[(heading, [(query, AP, first ranks)])] of the best and the worst queries of the first task."""
    ordered = sorted(next(iter(aps.values())).items(), key=lambda item: -item[1])
    worst = ordered[max(len(ordered) - SHOWN, SHOWN) :][::-1]
    return [
        (heading, [(query, ap, firsts[query]) for query, ap in some])
        for heading, some in (("Best queries", ordered[:SHOWN]), ("Worst queries", worst))
        if some
    ]


def draw_trade_off(path, dataset, curves):
    """A PNG of `evaluation.trade_off`'s curves: the first figure against the share of the exhaustive cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="share of the exhaustive frame-level cost (%)")
    for colour, (metric, curve) in zip(COLOURS, curves.items(), strict=False):
        name = next(iter(curve[0]["figures"]))
        points = [
            (100 * line["cost"], line["figures"][name], line["R"]) for line in curve if line["cost"]
        ]
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            "o-",
            color=colour,
            label=f"first R by {metric}",
        )
        for x, y, R in points[:-1]:
            axes.annotate(
                f"R = {R}",
                (x, y),
                textcoords="offset points",
                xytext=(6, -12),
                color=colour,
                fontsize=8,
            )
        for line in (curve[0], curve[-1]):
            axes.axhline(line["figures"][name], ls="--", lw=0.8, color=colour)
            axes.annotate(line["row"], (1, line["figures"][name]), xycoords=("axes fraction", "data"), fontsize=8,
                          ha="right", va="bottom", xytext=(-4, 2), textcoords="offset points", color=colour)  # fmt: skip
        axes.set_ylabel(name)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{dataset}: two-stage search")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def table_lines(figures):
    """The lines of a table of {row: [{figure: value}, ...]}, one dict a model; several print as mean ± sample deviation.

    A row a measure and a column a figure; the other way round where there are more than WIDE figures, as with EVVE's events.
    """
    names = list(next(iter(figures.values()))[0])
    cells = [["", *names]]
    cells += [
        [row, *(cell([one[name] for one in values]) for name in names)]
        for row, values in figures.items()
    ]
    return aligned(
        [list(line) for line in zip(*cells, strict=True)] if len(names) > WIDE else cells
    )


def aligned(cells):
    """Lines of a table [[text]], its first column to the left and the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for name, *line in cells:
        lines.append(
            "  ".join(
                [
                    f"{name:{first}}",
                    *(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)),
                ]
            )
        )
    return lines


def cell(values):
    """The mean of a figure's values, with their sample standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def trade_off(summaries, stages):
    """What two stages cost and reach: {frame-level metric: [{row, R, cost, recall, share, figures}]}, by cost.

    summaries {row: [Summary]}, stages {row: [Stage]}, one a model, of which these are means. cost: share of the exhaustive
    row's pairs of frames; recall: as a Stage's; share: of the exhaustive row's first figure, None where there is no such row.
    """
    curves = {}
    for metric in dict.fromkeys(of[0].metric for of in stages.values() if of[0].metric):
        rows = [row for row, of in stages.items() if of[0].metric in (metric, None)]
        lines = [_trade_off_line(row, summaries[row], stages[row]) for row in rows]
        lines.sort(key=lambda line: (line["cost"], line["R"]))
        first = next(iter(lines[0]["figures"]))
        whole = lines[-1]["figures"][first] if lines[-1]["cost"] == 1 else None
        curves[metric] = [
            line | {"share": whole and line["figures"][first] / whole} for line in lines
        ]
    return curves


def _trade_off_line(row, summaries, stages):
    R, cost = stages[0].R, float(np.mean([stage.cost for stage in stages]))
    recall = (
        None if stages[0].recall is None else float(np.mean([stage.recall for stage in stages]))
    )
    names = summaries[0].figures
    figures = {
        name: float(np.mean([summary.figures[name] for summary in summaries])) for name in names
    }
    return {"row": row, "R": R, "cost": cost, "recall": recall, "figures": figures}


def trade_off_lines(curve):
    """The lines of one of `trade_off`'s curves as a table."""
    names = list(curve[0]["figures"])[:WIDE]
    cells = [["two stages", "first R", "cost", "recall", *names, f"of exhaustive {names[0]}"]]
    for line in curve:
        recall, share = (
            "" if line[key] is None else f"{line[key]:.1%}" for key in ("recall", "share")
        )
        figures = [cell([line["figures"][name]]) for name in names]
        cells.append([line["row"], str(line["R"]), f"{line['cost']:.2%}", recall, *figures, share])
    return aligned(cells)
