"""The page of `search.py --report`: whole, escaped, readable by keyboard, and looked at in a browser where there is one."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from videoindex.index import Group, Link, Match, Place, VideoIndex
from videoindex.pipeline import EncodedVideo, thumbnail
from videoindex.report import _picture, write_duplicates, write_query
from videoindex.store import Store

EVIL = '/videos/<script>alert("x")</script> & \'Кино\'\n"映画".mp4'
OTHERS = ["/videos/" + "a-very-long-name-" * 12 + ".mp4", "/videos/plain.mp4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small index of made-up descriptors, with a query and a group written as pages."""
    folder, draw = tmp_path_factory.mktemp("report"), np.random.default_rng(2)
    store = Store.create(
        folder / "index",
        16,
        {
            "identity": {"fps": "1"},
            "options": {},
            "calibration": {"threshold": 0.25},
            "index_type": "Flat",
        },
    )
    images = [thumbnail(draw.integers(0, 255, (224, 224, 3), np.uint8)) for _ in range(20)]
    with store.writing():
        for i, path in enumerate([EVIL, *OTHERS]):
            frames = draw.normal(size=(20, 16))
            frames = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float16)
            made = SimpleNamespace(
                frames=frames, pieces=frames[:1].astype(np.float32), thumbnails=images, seconds=20.0
            )
            store.put(f"{i:064}", made, [(path, 1, 1)])
    index = VideoIndex(folder / "index")
    rows = list(index.store.rows())
    places = [Place(2.0, 7.0, 10.0, 15.0, 0.8), Place(0.0, 2.0, 0.0, 2.0, 0.5)]
    clip = EncodedVideo(EVIL, "", 20.0, np.array(index.store.frames(rows[0])), None, images)
    matches = [
        Match(path, 0.9 - i / 10, 0.5, 20.0, rows[i]["id"], [EVIL] if i else [], places[: 2 - i])
        for i, path in enumerate([EVIL, *OTHERS])
    ]
    write_query(folder / "query.html", index, [(clip, matches), (clip, [])])
    files = {row["id"]: index.store.paths(row["id"]) for row in rows}
    group = Group(
        files, dict.fromkeys(files, 20.0), [Link(rows[0]["id"], rows[1]["id"], 0.7, places)]
    )
    write_duplicates(folder / "groups.html", index, [group])
    return SimpleNamespace(folder=folder, index=index)


class Page(HTMLParser):
    """All start tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(params=["query", "groups"])
def page(world, request):
    return Page(world.folder / f"{request.param}.html")


def test_nothing_is_fetched_from_anywhere(page):
    links = [
        a[name]
        for _, a in page.tags
        for name in ("src", "href", "srcset", "data", "action")
        if name in a
    ]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert (
        not page.all("script")
        and not page.all("iframe")
        and "@import" not in page.text
        and "url(" not in page.text
    )


def test_names_are_text_and_not_markup(page):
    assert not page.all("script")
    assert '<script>alert("x")</script> & \'Кино\'\\n"映画".mp4' in page.text
    assert all(name in page.text for name in OTHERS)


def test_every_picture_is_a_picture_with_a_text_for_who_cannot_see_it(page):
    pictures = page.all("img") + page.all("image")
    for picture in pictures:
        kind, data = re.fullmatch(
            r"data:image/(jpeg|png);base64,(.*)", picture.get("src") or picture["href"]
        ).groups()
        assert base64.b64decode(data, validate=True).startswith(
            {"jpeg": b"\xff\xd8", "png": b"\x89PNG"}[kind]
        )
    assert all("alt" in picture for picture in page.all("img"))
    assert all(picture.get("aria-label") for picture in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("image")) > 0


def test_a_keyboard_reaches_the_results_and_every_strip_of_frames(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    jumps = [attributes["href"][1:] for attributes in page.all("a")]
    assert jumps[0] == "results" and set(jumps) <= ids
    assert (
        page.all("html")[0]["lang"] == "en"
        and len(page.all("main")) == 1
        and len(page.all("h1")) == 1
    )
    strips = [attributes for _, attributes in page.tags if attributes.get("class") == "shots"]
    assert strips and all(strip["tabindex"] == "0" and strip["aria-label"] for strip in strips)


def test_stretches_are_marked_where_they_are(world):
    page = Page(world.folder / "query.html")
    bars = [
        attributes["style"]
        for tag, attributes in page.tags
        if tag == "span" and "style" in attributes
    ]
    assert bars[:4] == [
        "left:10.00%;width:25.00%",
        "left:0.00%;width:10.00%",
        "left:50.00%;width:25.00%",
        "left:0.00%;width:10.00%",
    ]
    line = page.all("line")[0]
    assert [float(line[name]) for name in ("x1", "y1", "x2", "y2")] == [10, 2, 15, 7]
    assert (
        "0:02.0–0:07.0 = 0:10.0–0:15.0" in page.text
        and "no single stretch" in page.text
        and "Nothing found." in page.text
    )


def test_the_picture_of_a_matrix_is_small_and_keeps_its_highest_values(tmp_path):
    import io

    from PIL import Image

    matrix = np.zeros((3000, 5), np.float32)
    matrix[1234, 3] = 1
    image = Image.open(io.BytesIO(base64.b64decode(_picture(matrix).partition(",")[2]))).convert(
        "RGB"
    )
    pixels = np.asarray(image).astype(int).sum(2)
    assert image.size == (5, 240)
    assert [tuple(place) for place in np.argwhere(pixels == pixels.min())] == [
        (1234 * 240 // 3000, 3)
    ]


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed (apt-get install chromium)"
)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["query", "groups"])
def test_a_browser_shows_it_without_error_and_without_sideways_scrolling(
    world, tmp_path, name, width
):
    """In a frame of the page's width: a headless window is never narrower than 500 pixels."""
    probe = """<script>addEventListener("load", () => parent.postMessage([innerWidth,
      document.documentElement.scrollWidth <= innerWidth,
      [...document.images].every(i => i.complete && i.naturalWidth)].join(), "*"))</script></body>"""
    inner, outer = tmp_path / "inner.html", tmp_path / "outer.html"
    inner.write_text(
        (world.folder / f"{name}.html").read_text(encoding="utf-8").replace("</body>", probe),
        encoding="utf-8",
    )
    outer.write_text(
        f"<title></title><script>onmessage = e => document.title = e.data</script><iframe src=inner.html frameborder=0"
        f" style='width:{width}px;height:900px'></iframe>"
    )
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [
        *browser,
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        outer.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search("<title>(.*?)</title>", result.stdout).group(1) == f"{width},true,true"
    assert "CONSOLE" not in result.stderr
