"""The report's page and picture: what they say against own counts, and that nothing in them comes from elsewhere."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.commands import cli
from helpers.oracles import TASKS
from helpers.worlds import write_set
from PIL import Image

from datasets.registry import load_evaluation_set
from retrieval.charts import draw_trade_off
from retrieval.report import summarise

STRANGE = '<script>alert("x")</script>&amp;'


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A small set with an id that is HTML, a table of it, and the pages of two commands."""
    folder, draw = tmp_path_factory.mktemp("report"), np.random.default_rng(3)
    database = [STRANGE, *(f"v{i:02}" for i in range(40))]
    queries = [STRANGE, *database[1:13]]
    labels = {
        query: dict(
            zip(
                ("ND", "DS", "CS", "IS"),
                draw.choice(database[13:], (4, 3), replace=False).tolist(),
                strict=True,
            )
        )
        for query in queries
    }
    write_set(folder, "demo", labels, database)
    table = {}
    for query in queries:
        relevant = {video for some in labels[query].values() for video in some}
        table[query] = {video: float(draw.normal() + 2 * (video in relevant)) for video in database}
    (folder / "table.json").write_text(json.dumps(table))
    result = cli("evaluation.py", "--dataset", "DEMO", "--annotation_dir", folder, "--similarities", folder / "table.json",
                 "--report", folder / "page", "--output", folder / "out.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, labels, table


def page_of(folder):
    return (folder / "page" / "index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The tags of a page with their attributes, and whether they are closed."""

    VOID = {"meta", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag, kind=None):
        return [
            attributes
            for name, attributes in self.found
            if name == tag and kind in (None, attributes.get("class"))
        ]


def ranking(labels, table, query, task):
    relevant = {video for label in TASKS[task] for video in labels[query][label]}
    order = sorted(
        (video for video in table[query] if video != query), key=lambda video: -table[query][video]
    )
    return order, relevant


def ap(order, relevant):
    ranks = [rank for rank, video in enumerate(order, 1) if video in relevant]
    return sum(hits / rank for hits, rank in enumerate(ranks, 1)) / len(relevant)


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(scored):
    text = page_of(scored[0])
    page = Elements(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.found}
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert [path.name for path in (scored[0] / "page").iterdir()] == ["index.html"]


def test_ids_are_shown_as_they_are_and_never_as_markup(scored):
    text = page_of(scored[0])
    assert (
        "<script" not in text and "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;amp;" in text
    )


def test_the_bars_are_the_queries_average_precisions(scored):
    folder, labels, table = scored
    bars = Elements(page_of(folder)).of("rect", "bar")
    assert len(bars) == 3 * len(labels)
    expected = []
    for task in TASKS:
        expected += sorted(
            (ap(*ranking(labels, table, query, task)) for query in labels), reverse=True
        )
    heights = np.array([float(bar["height"]) for bar in bars])
    np.testing.assert_allclose(heights, np.array(expected) * (240 - 10 - 34), atol=0.11)


def test_the_curves_are_the_mean_interpolated_precision(scored):
    folder, labels, table = scored
    lines = Elements(page_of(folder)).of("polyline")
    assert len(lines) == 3
    for line, task in zip(lines, TASKS, strict=True):
        points = np.array(
            [[float(value) for value in pair.split(",")] for pair in line["points"].split()]
        )
        expected = np.zeros(21)
        for query in labels:
            order, relevant = ranking(labels, table, query, task)
            found = np.cumsum([video in relevant for video in order])
            precision, recall = found / np.arange(1, len(order) + 1), found / len(relevant)
            expected += [max(precision[recall >= i / 20 - 1e-9], default=0) for i in range(21)]
        np.testing.assert_allclose(
            points[:, 1], 240 - 34 - expected / len(labels) * (240 - 10 - 34), atol=0.11
        )
        np.testing.assert_allclose(
            points[:, 0], 38 + np.arange(21) / 20 * (360 - 38 - 10), atol=0.11
        )


def test_the_best_and_worst_queries_show_their_first_ranks_with_the_relevant_marked(scored):
    folder, labels, table = scored
    text = page_of(folder)
    aps = {query: ap(*ranking(labels, table, query, "DSVR")) for query in labels}
    ordered = sorted(aps, key=lambda query: -aps[query])
    blocks = re.findall(
        r'<div class="query"><b>(.*?)</b>.*?AP ([\d.]+).*?<ol>(.*?)</ol>', text, re.S
    )
    assert [html.unescape(query) for query, _, _ in blocks] == [*ordered[:5], *ordered[-5:][::-1]]
    for query, value, ranks in blocks:
        query = html.unescape(query)
        order, relevant = ranking(labels, table, query, "DSVR")
        shown = re.findall(r'<li( class="hit")?>(.*?)</li>', ranks)
        assert [html.unescape(video) for _, video in shown] == order[:10]
        assert [bool(hit) for hit, _ in shown] == [video in relevant for video in order[:10]]
        assert value == f"{aps[query]:.4f}"


def test_figures_coverage_and_command_stand_on_the_page(scored):
    folder, _, _ = scored
    text, found = page_of(folder), json.loads((folder / "out.json").read_text())
    for value in found["figures"]["table"][0].values():
        assert f"<td>{value:.4f}</td>" in text
    assert (
        "13 queries and 41 videos" in text
        and "--similarities" in text
        and found["revision"] in text
    )


def test_a_summary_counts_recall_by_what_the_shortlist_holds(scored):
    folder, labels, table = scored
    chosen = load_evaluation_set("DEMO", folder)
    summary = summarise(chosen, chosen.rankings_of(table))
    queries, database = list(labels), chosen.database
    short = np.random.default_rng(0).random((len(queries), len(database))) < 0.3
    shares = []
    for query, row in zip(queries, short, strict=True):
        _, relevant = ranking(labels, table, query, "DSVR")
        shares.append(sum(database[i] in relevant for i in np.flatnonzero(row)) / len(relevant))
    assert summary.recall(queries, database, short) == pytest.approx(np.mean(shares))


def test_the_trade_off_is_drawn_as_a_picture(tmp_path):
    curve = [
        {"row": "TCA_c", "R": 0, "cost": 0.0, "figures": {"DSVR": 0.5}},
        {"row": "first 5", "R": 5, "cost": 0.03, "figures": {"DSVR": 0.6}},
        {"row": "TCA_f", "R": 90, "cost": 1.0, "figures": {"DSVR": 0.8}},
    ]
    draw_trade_off(tmp_path / "curve.png", "DEMO", {"chamfer": curve})
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width >= 1000
        assert len(set(image.convert("L").tobytes())) > 50  # something is on it
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_page_of_two_stages_holds_their_curve(world, tmp_path):
    flags = [
        "--dataset",
        "DEMO",
        "--annotation_dir",
        world.annotations,
        "--feature_path",
        world.test_features,
    ]
    result = cli(
        "evaluation.py", *flags, "--encoder", "mean", "--rerank", 4, 20, "--report", tmp_path
    )
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert (
        text.count("<circle") == 3 and "what re-ranking costs" in text and not Elements(text).open
    )
