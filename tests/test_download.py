"""datasets/download.py keeps the pinned bytes or nothing, whatever the folder or server gives."""

import hashlib
import http.server
import re
import shutil
import signal
import threading
import time

import pytest
from helpers.commands import cli, one_error, refused, start

from datasets import download
from datasets.registry import load_evaluation_set
from utils import InputError

SCRIPT = "datasets/download.py"
CONTENT = b"what was pinned" * 50_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PINNED = download.Source("some/where", "0" * 40, "data/pinned.bin", SHA256)
LOCATION = "/some/where/" + "0" * 40 + "/data/pinned.bin"


class AnswerHandler(http.server.BaseHTTPRequestHandler):
    """Serves server.answers: {path: (content, how many of its bytes are sent)}.

    If that number is None, half is sent, and then nothing until server.resume is set.
    """

    def do_GET(self):
        if self.path not in self.server.answers:
            return self.send_error(404)
        content, sent = self.server.answers[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2 if sent is None else sent])
        self.wfile.flush()
        self.server.answered.set()
        if sent is None:
            self.server.resume.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AnswerHandler)
    server.answers = {}
    server.answered, server.resume = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.resume.set()
    server.shutdown()
    thread.join()
    server.server_close()


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run(*arguments):
    download.main([str(argument) for argument in arguments])


# --- one file -----------------------------------------------------------------------------------


def test_fetch_from_folder_and_from_server(tmp_path, server):
    (tmp_path / "copy.bin").write_bytes(CONTENT)
    server.answers[LOCATION] = (CONTENT, len(CONTENT))
    download.fetch(PINNED, tmp_path / "a" / "pinned.bin", tmp_path / "copy.bin")
    download.fetch(PINNED, tmp_path / "b" / "pinned.bin", server.url + LOCATION)
    assert (tmp_path / "a" / "pinned.bin").read_bytes() == CONTENT
    assert (tmp_path / "b" / "pinned.bin").read_bytes() == CONTENT
    assert files_under(tmp_path) == ["a/pinned.bin", "b/pinned.bin", "copy.bin"]


WRONG = {
    "a changed byte": (CONTENT[:-1] + b"?", len(CONTENT)),
    "a byte too many": (CONTENT + b"\n", len(CONTENT) + 1),
    "a byte too few": (CONTENT, len(CONTENT) - 1),
    "half of it": (CONTENT, len(CONTENT) // 2),
    "none of it": (CONTENT, 0),
    "an empty file": (b"", 0),
    "another page": (b"<html>moved</html>", 18),
}


@pytest.mark.parametrize("content, sent", WRONG.values(), ids=WRONG)
def test_fetch_of_wrong_bytes_keeps_nothing(tmp_path, server, content, sent):
    server.answers[LOCATION] = (content, sent)
    (tmp_path / "copy.bin").write_bytes(content[:sent])
    target = tmp_path / "new" / "pinned.bin"
    for location in (server.url + LOCATION, tmp_path / "copy.bin"):
        with pytest.raises(InputError, match="pinned.bin from .* is not the pinned file"):
            download.fetch(PINNED, target, location)
    assert files_under(tmp_path) == ["copy.bin"]
    target.write_bytes(b"an older file")
    with pytest.raises(InputError):
        download.fetch(PINNED, target, server.url + LOCATION)
    assert target.read_bytes() == b"an older file"
    assert files_under(tmp_path) == ["copy.bin", "new/pinned.bin"]


def test_fetch_of_an_absent_file_or_server_is_refused(tmp_path, server):
    target = tmp_path / "pinned.bin"
    url = re.escape(server.url + LOCATION)
    with pytest.raises(InputError, match=f"{url}.*404.*--from"):
        download.fetch(PINNED, target, server.url + LOCATION)
    closed = "http://127.0.0.1:9"
    with pytest.raises(InputError, match="pinned.bin cannot be fetched.*127.0.0.1:9.*--from"):
        download.fetch(PINNED, target, closed + LOCATION)
    with pytest.raises(InputError, match="absent.bin"):
        download.fetch(PINNED, target, tmp_path / "absent.bin")
    assert files_under(tmp_path) == []


def test_fetch_from_a_silent_server_times_out(tmp_path, server, monkeypatch):
    server.answers[LOCATION] = (CONTENT, None)
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match="cannot be fetched.*timed out"):
        download.fetch(PINNED, tmp_path / "pinned.bin", server.url + LOCATION)
    assert files_under(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_download_leaves_no_file_and_the_next_one_cleans_up(tmp_path, server, how):
    """The command is stopped in the middle of a file. What SIGKILL leaves, the next run removes."""
    source = download.FILES["vcdb.pickle"]
    path = f"/{source.repository}/{source.revision}/{source.path}"
    server.answers[path] = (CONTENT * 2, None)
    flags = ["--only", "vcdb.pickle", "--mirror", server.url, "--annotation_dir", tmp_path]
    process = start(SCRIPT, *flags)
    assert server.answered.wait(60)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.iterdir()):  # the first bytes
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert "vcdb.pickle" not in files_under(tmp_path)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip().splitlines()[-1] == "interrupted"
        assert files_under(tmp_path) == []
    server.resume.set()
    server.answers[path] = (CONTENT, len(CONTENT))
    assert "vcdb.pickle from" in refused(download.main, *flags)  # not the pinned bytes
    assert files_under(tmp_path) == []


# --- the table ----------------------------------------------------------------------------------


def test_files_are_pinned_and_sets_name_them():
    for source in download.FILES.values():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repository)
        assert not source.path.startswith("/")
    assert len({source.sha256 for source in download.FILES.values()}) == len(download.FILES)
    for files in download.SETS.values():
        assert set(files) <= set(download.FILES)
    assert download.PUBLIC.startswith("https://")


def test_select_files_takes_sets_and_names_each_file_once():
    assert download.select_files([]) == list(download.FILES)
    names = download.select_files(["EVVE", "FIVR-5K", "evve.pickle"])
    assert names == ["evve.pickle", *download.SETS["FIVR-5K"]]


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, mentions",
    [
        (["--only", "FIVR-6K"], ["FIVR-6K", "FIVR-5K"]),
        (["--from", "absent/folder"], ["absent/folder"]),
        (["--mirror", "ftp://elsewhere"], ["--mirror", "--from"]),
    ],
)
def test_bad_flags_are_refused(flags, mentions, tmp_path):
    message = refused(download.main, *flags, "--annotation_dir", tmp_path)
    assert all(mention in message for mention in mentions)
    assert files_under(tmp_path) == []


def test_command_line_reports_an_error_in_one_line(tmp_path):
    assert "FIVR-6K" in one_error(cli(SCRIPT, "--only", "FIVR-6K"))


def test_correct_files_are_left_alone_and_others_replaced(tmp_path, annotations, capsys):
    target, copy = tmp_path / "filled", tmp_path / "copy"
    flags = ["--only", "EVVE", "CC_WEB_VIDEO", "--annotation_dir", target]
    run(*flags, "--from", annotations)
    assert "evve.pickle: fetched" in capsys.readouterr().out
    assert files_under(target) == ["cc_web_video.pickle", "evve.pickle"]
    assert len(load_evaluation_set("EVVE", target).queries) == 620

    written = (target / "cc_web_video.pickle").stat().st_mtime_ns
    shutil.copytree(target, copy)
    (target / "evve.pickle").write_bytes(b"spoiled")
    run(*flags, "--from", copy)
    out = capsys.readouterr().out
    assert "cc_web_video.pickle: already there" in out
    assert "evve.pickle: replaced" in out
    assert (target / "cc_web_video.pickle").stat().st_mtime_ns == written

    (copy / "evve.pickle").write_bytes((target / "evve.pickle").read_bytes()[:-1])
    (target / "evve.pickle").unlink()
    assert "evve.pickle" in refused(download.main, *flags, "--from", copy)
    assert files_under(target) == ["cc_web_video.pickle"]


def test_all_official_files_come_from_a_server(tmp_path, annotations, server, capsys):
    for name, source in download.FILES.items():
        content = (annotations / name).read_bytes()
        path = f"/{source.repository}/{source.revision}/{source.path}"
        server.answers[path] = (content, len(content))
    run("--mirror", server.url + "/", "--annotation_dir", tmp_path)
    assert files_under(tmp_path) == sorted(download.FILES)
    assert capsys.readouterr().out.count(": fetched") == 12
