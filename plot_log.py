"""Draw the curves of training runs to a PNG, without a server.

    python plot_log.py runs/tca-0 runs/tca-1 --output curves.png

One colour a run; panels of loss, similarities, gradient weight on the hardest 1 % of the bank, and held-out figures, as far
as the logs have them (watch.py says what they mean).
"""

import json
from pathlib import Path

from utils import InputError, Parser, atomic, existing, run

PANELS = {  # title: {figure of a log line: line style}
    "loss": {"loss": "-"},
    "similarity": {"positive": "-", "hardest_negative": "--", "negative": ":"},
    "gradient weight on the hardest 1 %": {"hardest_share": "-"},
    "held-out mAP": None,  # whatever the set calls its figures
}


def read_log(path):
    """The objects of a run's log.jsonl; `path` is the run's folder or the file. A last line cut short by a kill is left out."""
    path = existing(path, "run")
    path = existing(path / "log.jsonl", "log") if path.is_dir() else path
    lines = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                lines.append({"step": line["step"], **line})
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is no log of train.py ({error}); name a run's folder") from None
    if not lines:
        raise InputError(f"{str(path)!r} has no line yet; wait for the run's first --print-freq steps")
    return lines


def series(lines):
    """{panel: {figure: (steps, values)}} of a log's lines, without what is null everywhere."""
    found = {title: {} for title in PANELS}
    for line in lines:
        values = {title: {name: line.get(name) for name in names} for title, names in PANELS.items() if names}
        values["held-out mAP"] = line.get("held_out", {})
        for title, figures in values.items():
            for name, value in figures.items():
                if value is not None:
                    steps, numbers = found[title].setdefault(name, ([], []))
                    steps.append(line["step"])
                    numbers.append(value)
    return found


def draw(runs):
    """runs {name: series} -> a matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    titles = [title for title in PANELS if any(found[title] for found in runs.values())]
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        styles = PANELS[title] or {}
        for number, (name, found) in enumerate(runs.items()):
            for place, (label, (steps, values)) in enumerate(found[title].items()):
                style = styles.get(label, ("-", "--", ":", "-.")[place % 4])
                shown = f"{name}: {label}" if len(found[title]) > 1 else name
                axes.plot(steps, values, style, color=f"C{number}", label=shown, linewidth=1.2)
        axes.set(title=title, xlabel="optimiser step")
        axes.legend(fontsize="x-small")
    return figure


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (--model_path of train.py), or its log.jsonl")
    parser.add_argument("--output", required=True, help="PNG file to write")
    args = parser.parse_args()
    if Path(args.output).suffix.lower() != ".png":
        raise InputError(f"--output {args.output!r}: a PNG is written; name a file that ends in .png")
    figure = draw({name: series(read_log(name)) for name in dict.fromkeys(args.runs)})
    with atomic(args.output) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"{args.output}: {len(args.runs)} run{'s' if len(args.runs) > 1 else ''}")


if __name__ == "__main__":
    run(main)
