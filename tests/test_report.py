"""The report's page and pictures: what they show, against own counts."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.commands import call
from helpers.oracles import TASKS, ap_of_hits
from helpers.worlds import write_set
from PIL import Image

import evaluation
from datasets.registry import load_evaluation_set
from retrieval.charts import draw_trade_off
from retrieval.report import save_similarities, summarise

MARKUP_ID = '<script>alert("x")</script>&amp;'  # a video id that is HTML


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(folder, labels, similarities) of a small set, with a page of them in folder/page."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(3)
    database = [MARKUP_ID, *(f"v{i:02}" for i in range(40))]
    queries = [MARKUP_ID, *database[1:13]]
    labels, similarities = {}, {}
    for query in queries:
        videos = rng.choice(database[13:], (4, 3), replace=False).tolist()
        labels[query] = dict(zip(("ND", "DS", "CS", "IS"), videos, strict=True))
        relevant = {video for of_label in videos for video in of_label}
        similarities[query] = {}
        for video in database:
            similarities[query][video] = float(rng.normal() + 2 * (video in relevant))
    write_set(folder, "demo", labels, database)
    (folder / "table.json").write_text(json.dumps(similarities))
    flags = ["--dataset", "DEMO", "--annotation_dir", folder]
    flags += ["--similarities", folder / "table.json", "--report", folder / "page"]
    call(evaluation.main, *flags, "--output", folder / "out.json")
    return folder, labels, similarities


def page_of(folder):
    return (folder / "page" / "index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page, in order, as (tag, {attribute: value}); `open` are not closed."""

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
        """The attributes of every `tag`, of class `kind` if given."""
        found = [attributes for name, attributes in self.found if name == tag]
        if kind is None:
            return found
        return [attributes for attributes in found if attributes.get("class") == kind]


def rank(scored, query, task):
    """The ranked videos of a query, and whether each is relevant in a task."""
    _, labels, similarities = scored
    relevant = {video for label in TASKS[task] for video in labels[query][label]}
    videos = [video for video in similarities[query] if video != query]
    videos.sort(key=lambda video: -similarities[query][video])
    return videos, [video in relevant for video in videos]


def ap_by_loop(scored, query, task):
    _, hits = rank(scored, query, task)
    return ap_of_hits(hits, sum(hits))


# --- the page -----------------------------------------------------------------------------------


def test_page_is_one_well_formed_file_without_links(scored):
    folder = scored[0]
    text = page_of(folder)
    page = Elements(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.found}
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert [path.name for path in (folder / "page").iterdir()] == ["index.html"]


def test_page_shows_ids_as_text(scored):
    text = page_of(scored[0])
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&amp;amp;" in text


def test_page_has_figures_coverage_and_command(scored):
    folder = scored[0]
    text, record = page_of(folder), json.loads((folder / "out.json").read_text())
    for value in record["figures"]["table"][0].values():
        assert f"<td>{value:.4f}</td>" in text
    assert "13 queries and 41 videos" in text
    assert "--similarities" in text and record["revision"] in text


def test_bars_are_average_precisions_of_queries(scored):
    folder, labels, _ = scored
    bars = Elements(page_of(folder)).of("rect", "bar")
    expected = []
    for task in TASKS:
        expected += sorted((ap_by_loop(scored, query, task) for query in labels), reverse=True)
    heights = [float(bar["height"]) for bar in bars]
    full = 240 - 10 - 34  # pixels, of a precision of 1
    np.testing.assert_allclose(heights, full * np.array(expected), atol=0.11)


def test_curves_are_mean_interpolated_precision(scored):
    folder, labels, _ = scored
    lines = Elements(page_of(folder)).of("polyline")
    for line, task in zip(lines, TASKS, strict=True):
        expected = np.zeros(21)
        for query in labels:
            _, hits = rank(scored, query, task)
            found = np.cumsum(hits)
            precision, recall = found / np.arange(1, len(hits) + 1), found / sum(hits)
            for i in range(21):
                expected[i] += max(precision[recall >= i / 20 - 1e-9], default=0)
        expected /= len(labels)
        points = [pair.split(",") for pair in line["points"].split()]
        x, y = np.array(points, float).T
        np.testing.assert_allclose(x, 38 + np.arange(21) / 20 * (360 - 38 - 10), atol=0.11)
        np.testing.assert_allclose(y, 240 - 34 - expected * (240 - 10 - 34), atol=0.11)


def test_best_and_worst_queries_show_their_first_ranks(scored):
    folder, labels, _ = scored
    aps = {query: ap_by_loop(scored, query, "DSVR") for query in labels}
    ordered = sorted(aps, key=lambda query: -aps[query])
    block = r'<div class="query"><b>(.*?)</b>.*?AP ([\d.]+).*?<ol>(.*?)</ol>'
    blocks = re.findall(block, page_of(folder), re.S)
    shown = [html.unescape(query) for query, _, _ in blocks]
    assert shown == [*ordered[:5], *ordered[-5:][::-1]]
    for query, (_, value, ranks) in zip(shown, blocks, strict=True):
        assert value == f"{aps[query]:.4f}"
        videos, hits = rank(scored, query, "DSVR")
        items = re.findall(r'<li( class="hit")?>(.*?)</li>', ranks)
        assert [html.unescape(video) for _, video in items] == videos[:10]
        assert [bool(mark) for mark, _ in items] == hits[:10]


def test_page_of_two_stages_has_their_curve(world, tmp_path):
    flags = ["--dataset", "DEMO", "--annotation_dir", world.annotations]
    flags += ["--feature_path", world.test_features, "--encoder", "mean", "--device", "cpu"]
    call(evaluation.main, *flags, "--rerank", 4, 20, "--report", tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not Elements(text).open
    assert "what re-ranking costs" in text
    assert text.count("<circle") == 3  # R = 4, 20, and all


# --- its parts ----------------------------------------------------------------------------------


def test_summary_recall_counts_relevant_videos_in_the_shortlist(scored):
    folder, labels, similarities = scored
    evaluation_set = load_evaluation_set("DEMO", folder)
    summary = summarise(evaluation_set, evaluation_set.rankings_of(similarities))
    queries, database = list(labels), evaluation_set.database
    short = np.random.default_rng(0).random((len(queries), len(database))) < 0.3
    shares = []
    for query, row in zip(queries, short, strict=True):
        videos, hits = rank(scored, query, "DSVR")
        relevant = {video for video, hit in zip(videos, hits, strict=True) if hit}
        listed = {database[j] for j in np.flatnonzero(row)}
        shares.append(len(relevant & listed) / len(relevant))
    recall = summary.recall(queries, database, short)
    assert recall == pytest.approx(np.mean(shares))


def test_saved_similarities_are_json_of_six_digits(tmp_path):
    table = np.array([[0.123456789, -2.0], [1e-9, 3.0]], np.float32)
    save_similarities(tmp_path / "s.json", ["q", "é"], ["a", '"b"'], table)
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "q": {"a": 0.123457, '"b"': -2.0},
        "é": {"a": 1e-9, '"b"': 3.0},
    }


def test_trade_off_is_drawn_as_a_picture(tmp_path):
    curve = [
        {"row": "TCA_c", "R": 0, "cost": 0.0, "figures": {"DSVR": 0.5}},
        {"row": "first 5", "R": 5, "cost": 0.03, "figures": {"DSVR": 0.6}},
        {"row": "TCA_f", "R": 90, "cost": 1.0, "figures": {"DSVR": 0.8}},
    ]
    draw_trade_off(tmp_path / "curve.png", "DEMO", {"chamfer": curve})
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width >= 1000
        assert len(set(image.convert("L").tobytes())) > 50  # it is not empty
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
