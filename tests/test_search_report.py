"""The page of `search.py --report`: self-contained, escaped, usable by keyboard, in a browser."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.library import made_up_video
from PIL import Image

from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.report import (
    _matrix_picture,
    format_segment,
    format_time,
    printable,
    write_duplicates,
    write_query,
)
from videoindex.results import Group, Link, Match, TimeSegment
from videoindex.store import FileEntry, IndexStore

EVIL = '/videos/<script>alert("x")</script> & \'Кино\'\n"映画".mp4'
OTHERS = ["/videos/" + "a-very-long-name-" * 12 + ".mp4", "/videos/plain.mp4"]
SEGMENTS = [TimeSegment(2.0, 7.0, 10.0, 15.0, 0.8), TimeSegment(0.0, 2.0, 0.0, 2.0, 0.5)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of a query and of a group, of an index of made-up descriptors, in a folder."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(2)
    settings = {
        "identity": {"fps": "1"},
        "options": {},
        "calibration": {"threshold": 0.25},
        "index_type": "Flat",
    }
    store = IndexStore.create(folder / "index", 16, settings)
    noise = [rng.integers(0, 255, (90, 160, 3), np.uint8) for _ in range(20)]
    thumbnails = [make_thumbnail(image) for image in noise]
    with store.writing():
        for i, path in enumerate([EVIL, *OTHERS]):
            video = made_up_video(rng, num_frames=20)
            video.thumbnails = thumbnails
            store.add_content(f"{i:064}", video, [FileEntry(path, 1, 1)])
    index = VideoIndex(folder / "index")
    contents = list(index.store.contents())

    frames = np.array(index.store.frame_descriptors(contents[0]))
    clip = EncodedVideo(EVIL, "", 20.0, frames, None, thumbnails)
    matches = []
    for i, path in enumerate([EVIL, *OTHERS]):
        match = Match(
            path=path,
            score=0.9 - i / 10,
            similarity=0.5,
            seconds=20.0,
            content=contents[i].id,
            same_content_paths=[EVIL] if i else [],
            segments=SEGMENTS[: 2 - i],
        )
        matches.append(match)
    write_query(folder / "query.html", index, [(clip, matches), (clip, [])])

    files = {content.id: index.store.paths(content.id) for content in contents}
    link = Link(contents[0].id, contents[1].id, 0.7, SEGMENTS)
    group = Group(files, dict.fromkeys(files, 20.0), [link])
    write_duplicates(folder / "groups.html", index, [group])
    return folder


def make_thumbnail(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


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
def page(pages, request):
    return Page(pages / f"{request.param}.html")


# --- text ---------------------------------------------------------------------------------------


def test_format_time_and_segment():
    assert [format_time(seconds) for seconds in (0, 4.46, 59.96, 3723.04)] == [
        "0:00.0",
        "0:04.5",
        "1:00.0",
        "1:02:03.0",
    ]
    assert format_segment(SEGMENTS[0]) == "0:02.0–0:07.0 = 0:10.0–0:15.0"


def test_printable_escapes_and_shortens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printable(tmp_path / "folder" / "a.mp4") == "folder/a.mp4"
    assert printable("/x/new\nline\x1b[0m.mp4") == "/x/new\\nline\\x1b[0m.mp4"
    assert printable("/x/caf\udce9.mp4") == "/x/caf\\xe9.mp4"


# --- the page -----------------------------------------------------------------------------------


def test_page_fetches_nothing(page):
    links = []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                links.append(attributes[name])
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not page.all("script") and not page.all("iframe")
    assert "@import" not in page.text and "url(" not in page.text


def test_page_names_are_text_and_not_markup(page):
    assert not page.all("script")
    assert '<script>alert("x")</script> & \'Кино\'\\n"映画".mp4' in page.text
    assert all(name in page.text for name in OTHERS)


def test_page_pictures_are_pictures_with_a_text(page):
    signatures = {"jpeg": b"\xff\xd8", "png": b"\x89PNG"}
    for picture in page.all("img") + page.all("image"):
        source = picture.get("src") or picture["href"]
        kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.*)", source).groups()
        assert base64.b64decode(data, validate=True).startswith(signatures[kind])
    assert all("alt" in picture for picture in page.all("img"))
    assert all(picture.get("aria-label") for picture in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("image")) > 0


def test_page_keyboard_reaches_results_and_thumbnails(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [attributes["href"][1:] for attributes in page.all("a")]
    assert targets[0] == "results" and set(targets) <= ids
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == 1 and len(page.all("h1")) == 1
    strips = [attributes for _, attributes in page.tags if attributes.get("class") == "shots"]
    assert strips and all(strip["tabindex"] == "0" and strip["aria-label"] for strip in strips)


def test_page_marks_segments_where_they_are(pages):
    page = Page(pages / "query.html")
    marks = [attributes["style"] for attributes in page.all("span") if "style" in attributes]
    assert marks[:4] == [
        "left:10.00%;width:25.00%",
        "left:0.00%;width:10.00%",
        "left:50.00%;width:25.00%",
        "left:0.00%;width:10.00%",
    ]
    line = page.all("line")[0]
    assert [float(line[name]) for name in ("x1", "y1", "x2", "y2")] == [10, 2, 15, 7]
    assert "0:02.0–0:07.0 = 0:10.0–0:15.0" in page.text
    assert "no single stretch" in page.text and "Nothing found." in page.text


def test_matrix_picture_is_small_and_keeps_the_highest_values():
    matrix = np.zeros((3000, 5), np.float32)
    matrix[1234, 3] = 1
    png = base64.b64decode(_matrix_picture(matrix).partition(",")[2])
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.size == (5, 240)
    brightness = np.asarray(image).astype(int).sum(2)
    darkest = np.argwhere(brightness == brightness.min())
    assert [tuple(cell) for cell in darkest] == [(1234 * 240 // 3000, 3)]


# In the page under test: tells the outer page its width, whether it is as wide as its contents, and
# whether all pictures were loaded.
PROBE = """<script>addEventListener("load", () => parent.postMessage([innerWidth,
  document.documentElement.scrollWidth <= innerWidth,
  [...document.images].every(i => i.complete && i.naturalWidth)].join(), "*"))</script></body>"""
# A headless window is never narrower than 500 pixels, so the page is shown in a frame.
FRAME = """<title></title><script>onmessage = e => document.title = e.data</script>
<iframe src=inner.html frameborder=0 style='width:{width}px;height:900px'></iframe>"""


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed (apt-get install chromium)"
)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["query", "groups"])
def test_page_in_a_browser(pages, tmp_path, name, width):
    """It is shown without an error, and without scrolling sideways."""
    inner, outer = tmp_path / "inner.html", tmp_path / "outer.html"
    text = (pages / f"{name}.html").read_text(encoding="utf-8")
    inner.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    outer.write_text(FRAME.format(width=width))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        outer.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search("<title>(.*?)</title>", result.stdout).group(1) == f"{width},true,true"
    assert "CONSOLE" not in result.stderr
