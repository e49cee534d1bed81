"""The charts of an evaluation: drawn as SVG by the report's template, or as a PNG by matplotlib.

A chart for the template is a dictionary of plain values, with all coordinates in pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from files import atomic

COLOURS = [  # easy to tell apart on white
    "#1f5fa8",
    "#c4501b",
    "#2c7d4f",
    "#8b3f96",
    "#b08a00",
    "#0f8a99",
    "#b3305c",
    "#5b5b5b",
]
DASHES = ["", "6 3", "2 3"]  # solid first; the next once all colours are used

# Size and margins of a chart. It is shown at about this size, so its letters keep theirs.
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 10, 34
SIZE = {  # for the template: the chart, and the edges of its axes
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "bottom": HEIGHT - BOTTOM,
}
QUARTERS = (0, 0.25, 0.5, 0.75, 1)


# --- charts of the page -------------------------------------------------------------------------


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    ticks: Sequence[tuple[float, str]],
    scale: Callable[[float], float] = lambda x: x,
    dotted: str | None = None,
) -> dict:
    """A line for each of the series, y from 0 to 1.

    Args:
        series: {name: [(x, y), ...]}
        ticks: [(x, text), ...] below the chart
        scale: maps x to 0..1 across the chart
        dotted: the name of the series whose points are marked
    """
    lines = []
    for i, (name, points) in enumerate(series.items()):
        line = {
            "name": name,
            "colour": COLOURS[i % len(COLOURS)],
            "dash": DASHES[i // len(COLOURS) % len(DASHES)],
            "points": [(_x(scale(x)), _y(y)) for x, y in points],
            "dots": name == dotted,
        }
        lines.append(line)
    return {
        "title": title,
        "across": x_label,
        "lines": lines,
        "x": [(_x(scale(x)), text) for x, text in ticks],
        "y": _y_ticks(),
    }


def recall_charts(curves: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict]:
    """A precision-recall chart for each task, from {task: {row: precision (21,)}}."""
    ticks = [(recall, f"{recall:g}") for recall in QUARTERS]
    charts = []
    for task, rows in curves.items():
        series = {}
        for row, precision in rows.items():
            recall = np.linspace(0, 1, len(precision))
            series[row] = list(zip(recall, precision, strict=True))
        charts.append(line_chart(task, "recall", series, ticks))
    return charts


def trade_off_charts(curves: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """A chart for each curve of `report.trade_off`: the first metric against log cost."""
    charts = []
    for curve in curves.values():
        name = _first_metric(curve)
        points = [(line["cost"], line["figures"][name]) for line in curve if line["cost"]]
        lowest = min(cost for cost, _ in points) * 0.999
        low = math.floor(math.log10(lowest))  # the axis starts at 10 ** low

        series = {"two stages": points}
        for line in curve:
            if line["cost"] in (0, 1):  # one stage only: a level line for comparison
                value = line["figures"][name]
                series[line["row"]] = [(10.0**low, value), (1, value)]

        def scale(cost, low=low):
            return 1 - math.log10(cost) / low

        ticks = [(10.0**power, f"{10.0 ** (power + 2):g} %") for power in range(low, 1)]
        title, x_label = f"{name} against cost", "share of the exhaustive cost"
        charts.append(line_chart(title, x_label, series, ticks, scale, dotted="two stages"))
    return charts


def bar_charts(aps: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """A chart for each task, from {task: {query: AP}}: a bar for each query, best first."""
    charts = []
    for task, by_query in aps.items():
        ordered = sorted(by_query.items(), key=lambda item: -item[1])
        step = (WIDTH - LEFT - RIGHT) / max(len(ordered), 1)  # pixels from bar to bar
        bars = []
        for i, (query, ap) in enumerate(ordered):
            bar = {
                "x": round(LEFT + i * step, 2),
                "y": _y(ap),
                "height": round(_y(0) - _y(ap), 2),
                "query": query,
                "ap": ap,
            }
            bars.append(bar)
        mean = float(np.mean(list(by_query.values()))) if by_query else 0.0
        chart = {
            "title": task,
            "bars": bars,
            "width": round(step * (0.8 if step > 3 else 1), 2),  # no gaps between thin bars
            "y": _y_ticks(),
            "mean": mean,
            "mean_y": _y(mean),
        }
        charts.append(chart)
    return charts


def _x(share):
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(value):
    return round(HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM), 1)


def _y_ticks():
    return [(_y(value), f"{value:g}") for value in QUARTERS]


def _first_metric(curve):
    return next(iter(curve[0]["figures"]))


# --- the trade-off as a picture -----------------------------------------------------------------


def draw_trade_off(path: str | Path, dataset: str, curves: Mapping[str, Sequence[Mapping]]) -> None:
    """Write the curves of `report.trade_off` as a PNG: the first metric against cost."""
    from matplotlib.figure import Figure  # here: most evaluations draw nothing

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="share of the exhaustive frame-level cost (%)")
    for colour, (metric, curve) in zip(COLOURS, curves.items(), strict=False):
        name = _first_metric(curve)
        drawn = [line for line in curve if line["cost"]]
        x = [100 * line["cost"] for line in drawn]
        y = [line["figures"][name] for line in drawn]
        axes.plot(x, y, "o-", color=colour, label=f"first R by {metric}")
        for line in drawn[:-1]:
            axes.annotate(
                f"R = {line['R']}",
                (100 * line["cost"], line["figures"][name]),
                xytext=(6, -12),
                textcoords="offset points",
                color=colour,
                fontsize=8,
            )
        for line in (curve[0], curve[-1]):  # no frames, and all of them
            axes.axhline(line["figures"][name], ls="--", lw=0.8, color=colour)
            axes.annotate(
                line["row"],
                (1, line["figures"][name]),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=colour,
                fontsize=8,
            )
        axes.set_ylabel(name)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{dataset}: two-stage search")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
