"""The page of `search.py --report`: self-contained, escaped, usable by keyboard, in a browser."""

import base64
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import Browser, needs_chromium
from helpers.clips import textured, write_video
from helpers.library import made_up_video
from PIL import Image

from videoindex.facts import MediaFacts
from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.report import (
    _matrix_picture,
    _pooled_similarities,
    write_duplicates,
    write_query,
)
from videoindex.results import Group, Link, Match, TimeSegment
from videoindex.store import FileEntry, IndexStore
from videoindex.text import (
    format_facts,
    format_segment,
    format_span,
    format_time,
    printable,
)

H264 = {"codec": "libx264", "pix_fmt": "yuv420p", "rate": 5}
EVIL = '<script>alert("x")</script> & \'Кино\'\n"映画" %41#?.mp4'  # in a folder, for its slash
NAMES = {  # {what is special about it: its name}
    "clip": EVIL,
    "long": "a-very-long-name-" * 12 + ".mp4",
    "latin1": os.fsdecode(b"caf\xe9.mp4"),
    "unplayable": "lossless.mkv",
    "gone": "gone.mp4",
    "same": "same content.mp4",
}
SEGMENTS = [TimeSegment(2.0, 7.0, 10.0, 15.0, 0.8), TimeSegment(0.0, 2.0, 0.0, 2.0, 0.5)]
VERDICTS = {"clip": "certain", "long": "likely", "latin1": "look yourself", "unplayable": ""}


class Pages:
    """The pages of a query and of a group, of an index of made-up descriptors, in a folder."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(2)
        self.paths = {what: str(folder / "videos" / name) for what, name in NAMES.items()}
        for what, path in self.paths.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            if what == "unplayable":
                write_video(path, textured(0, 20), rate=1)
            elif what != "gone":
                write_video(folder / "made.mp4", textured(len(what), 100), **H264)
                os.replace(folder / "made.mp4", path)  # FFmpeg takes UTF-8 names only

        Image.new("RGB", (7, 5)).save(folder / "still.gif")

        settings = {
            "identity": {"fps": "1"},
            "options": {},
            "calibration": {"threshold": 0.25},
            "index_type": "Flat",
        }
        store = IndexStore.create(folder / "index", 16, settings)
        noise = [rng.integers(0, 255, (90, 160, 3), np.uint8) for _ in range(20)]
        thumbnails = [make_thumbnail(image) for image in noise]
        found = ["clip", "long", "latin1", "unplayable", "gone"]
        with store.writing():
            for i, what in enumerate(found):
                video = made_up_video(rng, num_frames=20)
                video.thumbnails = thumbnails
                store.add_content(f"{i:064}", video, [FileEntry(self.paths[what], 1, 1)])
        index = VideoIndex(folder / "index")
        contents = list(index.store.contents())

        frames = np.array(index.store.frame_descriptors(contents[0]))
        clip = EncodedVideo(self.paths["clip"], "", 20.0, frames, None, thumbnails)
        matches = []
        for i, what in enumerate(found):
            match = Match(
                path=self.paths[what],
                score=0.9 - i / 10,
                similarity=0.5,
                seconds=20.0,
                content=contents[i].id,
                same_content_paths=[self.paths["same"]] if what == "long" else [],
                segments=SEGMENTS[: 1 if i > 1 else 2],
                verdict=VERDICTS.get(what, ""),
                matched_seconds=float(i),
            )
            matches.append(match)
        self.query, self.groups = folder / "query.html", folder / "groups.html"
        write_query(self.query, index, [(clip, matches), (clip, [])])

        files = {content.id: index.store.paths(content.id) for content in contents}
        links = []
        for other, score in ((1, 0.7), (2, 0.6), (4, 0.5)):
            links.append(Link(contents[0].id, contents[other].id, score, SEGMENTS))
        group = Group(files, dict.fromkeys(files, 20.0), links)
        write_duplicates(self.groups, index, [group])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return Pages(tmp_path_factory.mktemp("report"))


def make_thumbnail(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


class Page(HTMLParser):
    """All start tags with their attributes, and the text that is shown."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.shown, self._inside = [], "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        self.shown += " " if tag in ("td", "th") else ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.shown += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(params=["query", "groups"])
def page(pages, request):
    return Page(getattr(pages, request.param))


# --- text ---------------------------------------------------------------------------------------


def test_format_time_and_segment():
    assert [format_time(seconds) for seconds in (0, 4.46, 59.96, 3723.04)] == [
        "0:00.0",
        "0:04.5",
        "1:00.0",
        "1:02:03.0",
    ]
    assert format_segment(SEGMENTS[0]) == "0:02.0–0:07.0 = 0:10.0–0:15.0"


def test_format_span_in_whole_seconds():
    assert format_span(11.8, 31.2) == "0:12–0:31"
    assert format_span(3599.7, 3725) == "1:00:00–1:02:05"
    assert format_span(2.1, 2.4) == "0:02.1–0:02.4"


def test_format_facts():
    facts = MediaFacts(12_345_678, 1920, 1080, "h264", 4_123_000, 62.04, 0.0, sound=2)
    texts = format_facts(facts)
    assert texts.pop("date")[:7] in ("1970-01", "1969-12")
    assert list(texts.values()) == [
        *("12.3 MB", "1920 × 1080", "h264", "4.12 Mbit/s", "1:02.0", "2 sound tracks")
    ]
    assert set(format_facts(MediaFacts()).values()) == {"–"}
    sizes = (0, 999, 1000, 99_960, 999_600, 1.5e12, 2e15)
    shown = [format_facts(MediaFacts(size))["size"] for size in sizes]
    assert shown == ["0 B", "999 B", "1.00 kB", "100 kB", "1.00 MB", "1.50 TB", "2000 TB"]


def test_printable_escapes_and_shortens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printable(tmp_path / "folder" / "a.mp4") == "folder/a.mp4"
    assert printable("/x/new\nline\x1b[0m.mp4") == "/x/new\\nline\\x1b[0m.mp4"
    assert printable("/x/caf\udce9.mp4") == "/x/caf\\xe9.mp4"


# --- the page -----------------------------------------------------------------------------------


def test_page_loads_nothing_and_runs_its_own_script_only(page):
    links = []
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                links.append((tag, attributes[name]))
    assert links
    for tag, link in links:
        # Links to the videos are followed by a click; nothing else leaves the page.
        assert link.startswith(("data:", "#")) or (tag == "a" and link.startswith("file:///"))
    assert not page.all("iframe") and not page.all("video")
    assert "@import" not in page.source and "url(" not in page.source
    first, second = page.all("script")  # the data, which is not run, and the script
    assert first == {"type": "application/json", "id": "data"} and second == {}
    script = re.search("<script>(.*)</script>", page.source, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_page_names_are_text_and_not_markup(page):
    assert "script> & 'Кино'\\n\"映画\" %41#?.mp4" in page.shown
    assert page.all("section")[0]["data-names"].count('/<script>alert("x")</script> & ') == 1
    assert NAMES["long"] in page.shown and "caf\\xe9.mp4" in page.shown
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_links_lead_to_the_files(page):
    links = {link["href"] for link in page.all("a") if link["href"].startswith("file:")}
    encoded = "%3Cscript%3Ealert%28%22x%22%29%3C/script%3E%20%26%20%27"
    assert any(link.endswith("/caf%E9.mp4") for link in links)
    assert any(encoded in link and link.endswith("%20%2541%23%3F.mp4") for link in links)


def test_page_pictures_are_pictures_with_a_text(page):
    signatures = {"jpeg": b"\xff\xd8", "png": b"\x89PNG"}
    for picture in page.all("img") + page.all("image"):
        source = picture.get("src") or picture["href"]
        kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.*)", source).groups()
        assert base64.b64decode(data, validate=True).startswith(signatures[kind])
    assert all("alt" in picture and picture["loading"] == "lazy" for picture in page.all("img"))
    assert all(picture.get("aria-label") for picture in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("image")) > 0


def test_page_anchors_exist(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert targets[0] == "results" and set(targets) <= ids
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == 1 and len(page.all("h1")) == 1


def test_page_says_and_marks_where_segments_are(pages):
    page = Page(pages.query)
    marks = [attributes["style"] for attributes in page.all("span") if "style" in attributes]
    assert marks[:4] == [
        "left:10.00%;width:25.00%",
        "left:0.00%;width:10.00%",
        "left:50.00%;width:25.00%",
        "left:0.00%;width:10.00%",
    ]
    line = page.all("line")[0]
    assert [float(line[name]) for name in ("x1", "y1", "x2", "y2")] == [10, 2, 15, 7]
    words = " ".join(page.shown.split())
    assert f"0:02–0:07 of the clip is 0:10–0:15 of {NAMES['long']}" in words
    assert "Nothing found." in words
    assert "look yourself" in words and "2 s match, stills counted once" in words


def test_page_pairs_of_thumbnails_are_of_the_same_moments(pages):
    """Those of the first stretch: 2 to 7 of the clip, 10 to 15 of the other."""
    page = Page(pages.query)
    times = [image["title"] for image in page.all("img")]
    clip, found = times[6:11], times[11:16]  # after the row of the clip itself
    assert clip == [f"0:0{i}.0" for i in range(2, 7)]
    assert found == [f"0:{i}.0" for i in range(10, 15)]


def test_page_shows_facts_of_both_files(pages):
    words = " ".join(Page(pages.query).shown.split())
    size = os.path.getsize(pages.paths["unplayable"]) / 1000
    assert "picture 96 × 64 96 × 64 codec h264 ffv1" in words
    assert f"{size:.1f} kB" in words


def test_page_offers_no_choice_between_a_file_and_one_that_is_gone(pages):
    page = Page(pages.query)
    assert "file is gone" in page.shown
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.source).group(1))
    gone = str(data["files"].index(pages.paths["gone"]))
    latin1 = str(data["files"].index(pages.paths["latin1"]))
    assert not any(box.get("data-file") == gone for box in page.all("input"))
    boxes = [box["data-choice"] for box in page.all("input") if box.get("data-file") == latin1]
    assert boxes == ["keep", "drop"]


def test_matrix_picture_is_small_and_keeps_the_highest_values():
    class Index:
        """One whose frame similarities are these."""

        def frame_similarities(self, frames, content):
            return matrix[frames]

    matrix = np.zeros((3000, 2000), np.float32)
    matrix[1234, 777] = 1
    content = made_up_video(np.random.default_rng(0))
    content.num_frames = 2000
    table = _pooled_similarities(Index(), np.arange(3000), content, 240)
    png = base64.b64decode(_matrix_picture(table).partition(",")[2])
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.size == (240, 240)
    brightness = np.asarray(image).astype(int).sum(2)
    darkest = np.argwhere(brightness == brightness.min())
    # Part k of 240 begins at the whole frame at or before k / 240 of the video.
    starts = [[n * k // 240 for k in range(240)] for n in (3000, 2000)]
    expected = tuple(
        sum(start <= i for start in own) - 1 for own, i in zip(starts, (1234, 777), strict=True)
    )
    assert [tuple(cell) for cell in darkest] == [expected]


@pytest.mark.slow
def test_page_of_a_thousand_matches_stays_small(pages, tmp_path):
    write_thousand(pages, tmp_path / "many.html")
    assert (tmp_path / "many.html").stat().st_size < 60e6  # noise takes twice what pictures take


def write_thousand(pages, path):
    """A page of 1,000 matches, of the contents that there are."""
    index = VideoIndex(pages.folder / "index")
    contents = list(index.store.contents())
    frames = np.array(index.store.frame_descriptors(contents[0]))
    thumbnails = index.store.thumbnails(contents[0], range(20))
    clip = EncodedVideo(pages.paths["clip"], "", 20.0, frames, None, thumbnails)
    matches = []
    for i in range(1000):
        match = Match(
            path=f"/library/{i}.mp4",
            score=1 - i / 1000,
            similarity=0.5,
            seconds=20.0,
            content=contents[i % len(contents)].id,
            segments=SEGMENTS,
        )
        matches.append(match)
    write_query(path, index, [(clip, matches)])


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    browser = Browser(folder)
    browser("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.downloads = folder
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """A browser; at the end, there must be no error, and nothing of the network."""
    chromium.errors.clear()
    chromium.requests.clear()
    yield chromium
    chromium.js("localStorage.clear()")
    assert chromium.errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in chromium.requests)


def in_a_browser(test):
    return pytest.mark.slow(needs_chromium(test))


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["query", "groups"])
def test_page_fits_the_window(pages, browser, name, width, dark):
    """No scrolling sideways; on a phone, a match is at most a screenful, also while it plays."""
    browser.open(getattr(pages, name), width, 844, dark)
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    assert browser.js("document.querySelectorAll('.pair').length") >= 3
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    for _ in range(3):
        browser.press("ArrowRight")
        browser.press(" ")
        browser.wait_for("!document.querySelector('.current .stage').hidden")
        assert browser.js("document.querySelector('.current').offsetHeight") <= 844
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        top = "document.querySelector('.current').getBoundingClientRect().top"
        tools = browser.js("document.querySelector('.tools').getBoundingClientRect().bottom")
        assert tools <= browser.js(top) < 844


PLAYERS = "[...document.querySelectorAll('.current .stage video')]"


@in_a_browser
def test_space_plays_both_from_the_matching_second(pages, browser):
    browser.open(pages.query)
    browser.press("ArrowRight")
    browser.press("ArrowRight")  # the long name
    browser.press(" ")
    browser.wait_for(f"{PLAYERS}.every(v => !v.paused && v.videoWidth == 96)")
    first, second = browser.js(f"{PLAYERS}.map(v => v.currentTime)")
    assert 2 <= first < 7 and 10 <= second < 15 and second - first == pytest.approx(8, abs=0.3)
    browser.press(" ")
    assert browser.js(f"{PLAYERS}.map(v => v.paused)") == [True, True]

    browser.press("ArrowRight")  # the name that is not UTF-8
    browser.press(" ")
    browser.wait_for(f"{PLAYERS}.length == 2 && {PLAYERS}.every(v => !v.paused)")
    assert browser.js("document.querySelectorAll('video').length") == 2


@in_a_browser
def test_what_the_browser_cannot_play_is_said(pages, browser):
    browser.open(pages.query)
    browser.js("document.querySelectorAll('.pair')[3].querySelector('.play').click()")
    line = "document.querySelector('.current .stage p')"
    browser.wait_for(f"{line} !== null")
    assert "cannot play lossless.mkv" in browser.js(f"{line}.textContent")
    browser.wait_for(f"{PLAYERS}.length == 1 && !{PLAYERS}[0].paused")


@in_a_browser
def test_a_picture_is_shown_beside_the_video(pages, browser):
    browser.open(pages.groups)
    browser.js(
        "document.querySelectorAll('.pair thead a')[0].href ="
        f" {json.dumps((pages.folder / 'still.gif').as_uri())}"
    )
    browser.press("ArrowRight")
    browser.press(" ")
    browser.wait_for("document.querySelector('.current .stage img')?.naturalWidth == 7")
    browser.wait_for(f"{PLAYERS}.length == 1 && !{PLAYERS}[0].paused")
    assert browser.js(f"{PLAYERS}[0].currentTime") >= 10


@in_a_browser
def test_choices_are_saved_as_a_file_and_kept_between_visits(pages, browser):
    browser.open(pages.query)
    paths, saved = pages.paths, browser.downloads / "choices.json"
    for _ in range(2):
        browser.press("ArrowRight")
    browser.press("d")
    browser.press("k", shift=True)
    browser.press("n")
    browser.press("ArrowRight")
    browser.press("k")
    browser.press("k")  # and not
    browser.press("d")
    browser.press("k")  # instead
    expected = {
        "keep": [paths["clip"], paths["latin1"]],
        "drop": [paths["long"]],
        "not_a_match": [[paths["clip"], paths["long"]]],
    }
    assert save_choices(browser, saved) == expected
    browser.open(pages.query)
    assert save_choices(browser, saved) == expected
    browser.open(pages.groups)  # it shows the same files
    assert save_choices(browser, saved) == expected
    browser.js("document.getElementById('clear').click()")
    assert save_choices(browser, saved) == {"keep": [], "drop": [], "not_a_match": []}


def save_choices(browser, path):
    path.unlink(missing_ok=True)
    browser.press("s")
    for _ in range(200):
        if path.exists() and path.stat().st_size:
            break
        browser.js("new Promise(resolve => setTimeout(resolve, 50))")
    text = path.read_text(encoding="utf-8")
    path.unlink()
    return json.loads(text)


@in_a_browser
def test_dropping_both_is_warned_of(pages, browser):
    browser.open(pages.groups)
    browser.press("ArrowRight")
    warning = "document.querySelector('.current .warning').hidden"
    browser.press("d")
    assert browser.js(warning)
    browser.press("d", shift=True)
    assert not browser.js(warning)

    warning = "document.querySelector('h2 .warning').hidden"
    boxes = "[...document.querySelectorAll('.members [data-choice=drop]:not(:checked)')]"
    assert browser.js(f"{boxes}.length") == 2 and browser.js(warning)
    browser.js(f"{boxes}.forEach(box => box.click())")
    assert not browser.js(warning)


SHOWN = "[...document.querySelectorAll('.pair')].filter(p => p.checkVisibility())"
SCORES = f"{SHOWN}.map(p => p.dataset.score)"


def set_filter(browser, id_, value):
    browser.js(
        f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input',"
        " {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true})) })"
        f"(document.getElementById('{id_}'))"
    )


@in_a_browser
def test_filter_and_sort(pages, browser):
    browser.open(pages.query)
    everything = ["0.9000", "0.8000", "0.7000", "0.6000", "0.5000"]
    assert browser.js(SCORES) == everything
    set_filter(browser, "score", "0.65")
    assert browser.js(SCORES) == everything[:3]
    assert "3 of 5 matches" in browser.js("document.querySelector('.counts').textContent")
    set_filter(browser, "verdict", "likely")
    assert browser.js(SCORES) == ["0.8000"]
    set_filter(browser, "verdict", "")
    set_filter(browser, "score", "")
    set_filter(browser, "name", "CAF")
    assert browser.js(SCORES) == ["0.7000"]
    set_filter(browser, "name", "")
    set_filter(browser, "sort", "seconds")
    assert browser.js(SCORES) == everything[::-1]
    set_filter(browser, "sort", "")
    assert browser.js(SCORES) == everything
    browser.press("/")  # and keys are letters there
    browser.press("d")
    assert browser.js("document.getElementById('name').value") == "d"


@in_a_browser
def test_a_thousand_matches_in_a_browser(pages, browser, tmp_path):
    """Cards out of sight are not laid out."""
    write_thousand(pages, tmp_path / "many.html")
    browser.open(tmp_path / "many.html", 390, 844)
    assert browser.js("document.querySelectorAll('.pair').length") == 1000
    laid_out = "i => i.checkVisibility({contentVisibilityAuto: true})"
    assert 0 < browser.js(f"[...document.images].filter({laid_out}).length") < 100
    browser.press("ArrowLeft")  # to the last
    top = "document.querySelector('.current').getBoundingClientRect().top"
    browser.wait_for(f"{top} > 0 && {top} < 844")
    assert browser.js("document.querySelector('.current').dataset.score") == "0.0010"


@in_a_browser
def test_page_can_be_read_without_its_script(pages, browser):
    browser("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages.query)
    browser("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.js("document.querySelector('.tools').checkVisibility()") is False
    assert browser.js(f"{SHOWN}.length") == 5
    assert browser.js("document.images[0].naturalWidth") == 160
