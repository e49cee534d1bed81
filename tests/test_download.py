"""datasets/download.py: the pinned bytes or nothing, from a folder, from a server, and when either misbehaves."""

import hashlib
import http.server
import os
import re
import shutil
import signal
import threading
import time

import pytest
from helpers.commands import cli, one_error, start

from datasets import download
from datasets.registry import load_evaluation_set
from utils import InputError

SCRIPT = "datasets/download.py"
CONTENT = b"what was pinned" * 50_000
PINNED = download.Source(
    "some/where", "0" * 40, "data/pinned.bin", hashlib.sha256(CONTENT).hexdigest()
)
LOCATION = "/some/where/" + "0" * 40 + "/data/pinned.bin"


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves server.answers: {path: (content, bytes of it that are sent)}; stalls where those are None."""

    def do_GET(self):
        if self.path not in self.server.answers:
            return self.send_error(404)
        content, sent = self.server.answers[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2 if sent is None else sent])
        self.wfile.flush()
        self.server.asked.set()
        if sent is None:
            self.server.go.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.answers, found.asked, found.go = {}, threading.Event(), threading.Event()
    found.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.go.set()
    found.shutdown()
    thread.join()
    found.server_close()


def fetch(target, location):
    download.fetch(PINNED, target, location)


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_pinned_file_comes_from_a_folder_and_from_a_server(tmp_path, server):
    (tmp_path / "copy.bin").write_bytes(CONTENT)
    server.answers[LOCATION] = (CONTENT, len(CONTENT))
    fetch(tmp_path / "a" / "pinned.bin", tmp_path / "copy.bin")
    fetch(tmp_path / "b" / "pinned.bin", server.url + LOCATION)
    assert (
        (tmp_path / "a" / "pinned.bin").read_bytes()
        == (tmp_path / "b" / "pinned.bin").read_bytes()
        == CONTENT
    )
    assert left(tmp_path) == ["a/pinned.bin", "b/pinned.bin", "copy.bin"]


@pytest.mark.parametrize(
    "content, sent",
    [
        (CONTENT[:-1] + b"?", len(CONTENT)),
        (CONTENT + b"\n", len(CONTENT) + 1),
        (CONTENT, len(CONTENT) - 1),
        (CONTENT, len(CONTENT) // 2),
        (CONTENT, 0),
        (b"", 0),
        (b"<html>moved</html>", 18),
    ],
)
def test_wrong_or_cut_bytes_are_refused_and_leave_nothing(tmp_path, server, content, sent):
    server.answers[LOCATION] = (content, sent)
    (tmp_path / "copy.bin").write_bytes(content[:sent])
    for location in (server.url + LOCATION, tmp_path / "copy.bin"):
        with pytest.raises(InputError, match="pinned.bin from .* is not the pinned file"):
            fetch(tmp_path / "new" / "pinned.bin", location)
    assert left(tmp_path) == ["copy.bin"]
    old = tmp_path / "new" / "pinned.bin"
    old.write_bytes(b"an older file")
    with pytest.raises(InputError):
        fetch(old, server.url + LOCATION)
    assert old.read_bytes() == b"an older file" and left(tmp_path) == ["copy.bin", "new/pinned.bin"]


def test_a_server_that_is_not_there_or_has_no_such_file_is_one_error(tmp_path, server):
    with pytest.raises(InputError, match=f"{re.escape(server.url + LOCATION)}.*404.*--from"):
        fetch(tmp_path / "pinned.bin", server.url + LOCATION)
    closed = "http://127.0.0.1:9"
    with pytest.raises(InputError, match="pinned.bin cannot be fetched.*127.0.0.1:9.*--from"):
        fetch(tmp_path / "pinned.bin", closed + LOCATION)
    with pytest.raises(InputError, match="absent.bin"):
        fetch(tmp_path / "pinned.bin", tmp_path / "absent.bin")
    assert left(tmp_path) == []


def test_a_server_that_falls_silent_is_one_error(tmp_path, server, monkeypatch):
    server.answers[LOCATION] = (CONTENT, None)
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match="cannot be fetched.*timed out"):
        fetch(tmp_path / "pinned.bin", server.url + LOCATION)
    assert left(tmp_path) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_leaves_no_file_and_the_next_one_cleans_up(tmp_path, server, how):
    """Stopped in the middle of vcdb.pickle; killed outright, what lies about is taken away by the next run."""
    vcdb = download.FILES["vcdb.pickle"]
    path = f"/{vcdb.repository}/{vcdb.revision}/{vcdb.path}"
    server.answers[path] = (CONTENT * 2, None)
    flags = ["--only", "vcdb.pickle", "--mirror", server.url, "--annotation_dir", tmp_path]
    process = start(SCRIPT, *flags)
    assert server.asked.wait(60)
    while not any(
        path.stat().st_size for path in tmp_path.iterdir()
    ):  # the first bytes are written
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert "vcdb.pickle" not in left(tmp_path)
    if how == signal.SIGINT:
        assert (process.returncode, err.strip().splitlines()[-1], left(tmp_path)) == (
            130,
            "interrupted",
            [],
        )
    server.go.set()
    server.answers[path] = (CONTENT, len(CONTENT))
    with pytest.raises(InputError, match="vcdb.pickle from .* is not the pinned file"):
        download.fetch(vcdb, tmp_path / "vcdb.pickle", server.url + path)
    assert left(tmp_path) == []


def test_the_table_is_whole_and_every_set_names_files_of_it():
    for name, source in download.FILES.items():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256) and re.fullmatch(
            r"[0-9a-f]{40}", source.revision
        ), name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository) and not source.path.startswith(
            "/"
        )
    assert len({source.sha256 for source in download.FILES.values()}) == len(download.FILES) == 8
    assert {file for files in download.SETS.values() for file in files} <= set(download.FILES)
    assert download.chosen([]) == list(download.FILES)
    assert download.chosen(["EVVE", "FIVR-5K", "evve.pickle"]) == [
        "evve.pickle",
        "fivr.pickle",
        "fivr_annotation.json",
    ]
    assert download.PUBLIC.startswith("https://")


def test_bad_flags_are_one_error(tmp_path):
    for flags, mention in (
        (["--only", "FIVR-6K"], "FIVR-6K.*FIVR-5K"),
        (["--from", str(tmp_path / "absent")], "absent"),
        (["--mirror", "ftp://elsewhere"], "--mirror.*--from"),
    ):
        with pytest.raises(InputError, match=mention):
            download.chosen(download.parse(flags).only)


def test_the_command_copies_checks_and_leaves_right_files_alone(tmp_path, annotations):
    target, copy = tmp_path / "filled", tmp_path / "copy"
    flags = ["--only", "EVVE", "CC_WEB_VIDEO", "--annotation_dir", target]
    first = cli(SCRIPT, *flags, "--from", annotations)
    assert first.returncode == 0 and "evve.pickle: fetched" in first.stdout, first.stderr
    assert left(target) == ["cc_web_video.pickle", "evve.pickle"]
    assert len(load_evaluation_set("EVVE", target).queries) == 620
    times = {name: os.stat(target / name).st_mtime_ns for name in left(target)}
    shutil.copytree(target, copy)
    (target / "evve.pickle").write_bytes(b"spoiled")
    again = cli(SCRIPT, *flags, "--from", copy)
    assert (
        "cc_web_video.pickle: already there" in again.stdout
        and "evve.pickle: replaced" in again.stdout
    )
    assert os.stat(target / "cc_web_video.pickle").st_mtime_ns == times["cc_web_video.pickle"]
    (copy / "evve.pickle").write_bytes((target / "evve.pickle").read_bytes()[:-1])
    (target / "evve.pickle").unlink()
    assert "evve.pickle" in one_error(cli(SCRIPT, *flags, "--from", copy))
    assert left(target) == ["cc_web_video.pickle"]


def test_the_whole_of_the_official_files_comes_from_a_server(tmp_path, annotations, server):
    for name, source in download.FILES.items():
        content = (annotations / name).read_bytes()
        server.answers[f"/{source.repository}/{source.revision}/{source.path}"] = (
            content,
            len(content),
        )
    result = cli(SCRIPT, "--mirror", server.url + "/", "--annotation_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert left(tmp_path) == sorted(download.FILES) and result.stdout.count(": fetched") == 8
