"""The videos of an input: a folder, a list file or a pattern; and which shard does which."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from untrusted import read_text
from utils import InputError, digest, require_path

# Certainly video. Others than these and NON_VIDEO_SUFFIXES are judged by how they begin: .ts may be
# a transport stream or TypeScript.
VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .amv .apng .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2t "
    ".m2ts .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mxf .nut .ogm .ogv .qt "
    ".rmvb .vob .webm .wmv .wtv .y4m".split()
)
NON_VIDEO_SUFFIXES = frozenset(
    # pictures, also such as FFmpeg would show for a moment
    ".ai .arw .avif .bmp .cr2 .cr3 .cur .dds .dng .dpx .emf .eps .exr .hdr .heic .heif .icns .ico "
    ".j2k .jfif .jp2 .jpe .jpeg .jpg .jxl .nef .orf .pbm .pcx .pgm .png .pnm .ppm .psd .raf .ras "
    ".rw2 .sgi .svg .tga .tif .tiff .webp .wmf .xbm .xcf .xpm "
    # sound
    ".aac .ac3 .aif .aiff .alac .amr .ape .caf .dts .flac .m4a .m4b .mid .midi .mka .mp2 .mp3 .mpa "
    ".oga .opus .wav .weba .wma .wv "
    # subtitles, playlists, and what downloaders and cameras leave beside a video
    ".ass .chat .cue .description .dfxp .idx .info .lrc .m3u .m3u8 .mpd .nfo .pls .sbv .smi "
    ".srt .ssa .sub .sup .thm .ttml .url .vtt .webloc .xmp .xspf .aae "
    # text, some of which FFmpeg would draw, and code
    ".ans .asc .bat .c .cfg .conf .cpp .css .csv .diz .h .htm .html .ice .ini .ipynb .java .js "
    ".json .jsonl .log .md .pem .py .pyc .rst .sh .sql .tex .toml .tsv .txt .xml .yaml .yml "
    # documents, archives, programs, data
    ".7z .bak .bz2 .db .deb .dll .dmg .doc .docx .epub .exe .gz .h5 .hdf5 .iso .jar "
    ".lz4 .mdb .mobi .npy .npz .numbers .odp .ods .odt .pages .parquet .pdf .pickle .pkl .ppt "
    ".pptx .pth .pt .rar .rpm .rtf .so .sqlite .tar .tgz .torrent .ttf .xls .xlsx .xz .zip .zst "
    # unfinished
    ".aria2 .crdownload .download .part .partial .tmp .ytdl".split()
)
# How files begin that are not video.
NON_VIDEO_STARTS = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"8BPS", b"\0\0\1\0"),  # pictures
    *(b"ID3", b"fLaC", b"MThd"),  # sound
    *(b"%PDF", b"%!PS", b"{\\rtf", b"\xd0\xcf\x11\xe0"),  # documents
    *(b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"),  # archives
    *(b"\x28\xb5\x2f\xfd", b"\x7fELF", b"SQLite format 3", b"\x89HDF", b"\x93NUMPY"),
)
PICTURE_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis", b"crx ")


def find_videos(source: str, what: str = "input") -> dict[str, Path]:
    """{id: path} of the videos of a folder, a list file, or a pattern that holds `{id}`.

    `what` names the source in errors.

    Raises:
        InputError: if there is none, if two share an id, and for an id that is not UTF-8.
    """
    if "{id}" in source:
        pairs = _from_pattern(source)
    elif Path(source).is_dir():
        pairs = _from_folder(Path(source))
    else:
        pairs = _from_list(require_path(source, what), what)
    videos = {}
    for video, path in pairs:
        if video != video.encode(errors="replace").decode():
            raise InputError(
                f"the id {video!r} of {str(path)!r} is not UTF-8, so it cannot be an id; "
                "rename the file"
            )
        if video in videos:
            raise InputError(
                f"{str(videos[video])!r} and {str(path)!r} share the id {video!r}; "
                "rename one, or give a list file"
            )
        videos[video] = path
    if not videos:
        raise InputError(
            f"{what} {source!r} holds no video; give a folder of videos, a list file "
            "or a pattern with {id}"
        )
    return videos


def may_be_video(path: str | os.PathLike) -> bool:
    """Whether a file of a folder is worth trying: by its suffix, else by how it begins."""
    suffix = Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix in NON_VIDEO_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    try:
        if not os.path.isfile(path):
            return True  # reading a pipe would wait; whoever takes it says what it is
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return True  # decoding it gives the reason
    return not _is_text(start) and not _starts_otherwise(start)


def _starts_otherwise(start):
    """Whether a file that begins so is a picture, sound, an archive, or the like."""
    if start[4:8] == b"ftyp":
        return start[8:12] in PICTURE_BRANDS
    if start[:4] == b"OggS":
        return b"theora" not in start
    if start[:4] == b"RIFF":
        return start[8:12] in (b"WEBP", b"WAVE")
    return start.startswith(NON_VIDEO_STARTS) or start[257:262] == b"ustar"


def _is_text(start):
    """Whether a file begins with a line's worth of text; a few letters may be anything."""
    try:
        text = start[:-3].decode("utf-8-sig")  # without a last character that is cut
    except UnicodeDecodeError as error:
        if error.start < len(start) - 6:
            return False
        text = start[: error.start].decode("utf-8-sig")
    printable = sum(character.isprintable() or character in "\t\n\r\f" for character in text)
    return len(text) >= 60 and printable == len(text)


def _from_folder(folder) -> Iterator[tuple[str, Path]]:
    """All files that may be videos, but hidden ones; an id is the path without suffix.

    Links are followed, but not into a folder that they lie in.
    """
    for top, folders, files in os.walk(folder, followlinks=True):
        top = Path(top)
        above = [parent for parent in top.parents if parent.is_relative_to(folder)]
        if any(top.samefile(parent) for parent in above):
            folders.clear()  # a link back up: os.walk would never end
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        by_id = {}
        for path in sorted(top / name for name in files if not name.startswith(".")):
            if path.is_file() and may_be_video(path):
                by_id.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(
                    path
                )
        for video, paths in by_id.items():
            for path in _certain_videos(paths):
                yield video, path


def _certain_videos(paths):
    """Of files that share an id, those that are video by their suffix; all if none is."""
    certain = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    return certain or paths


def _from_list(path, what) -> Iterator[tuple[str, Path]]:
    """Lines `id <tab> path`; paths are relative to the list."""
    advice = "give a list of `id <tab> path`; for one video give its folder"
    lines = read_text(path, what, advice).split("\n")  # a name may hold other separators
    for number, line in enumerate(lines, 1):
        video, tab, file = (part.strip(" \t") for part in line.partition("\t"))
        if not (video or file):
            continue
        if not (video and file):
            raise InputError(
                f"{str(path)!r} line {number}: expected `id <tab> path`, found {line[:80]!r}"
            )
        yield video, path.parent / file


def _from_pattern(pattern) -> Iterator[tuple[str, Path]]:
    """What a pattern such as VIDEOS/{id}/video.mp4 matches."""
    before, after = pattern.split("{id}", 1)
    if "{id}" in after:
        raise InputError(f"pattern {pattern!r} holds {{id}} more than once; once is enough")
    for path in sorted(glob.glob(glob.escape(before) + "*" + glob.escape(after))):
        yield path[len(before) : len(path) - len(after)], Path(path)


def shard_of(video: str, n: int) -> int:
    """Which of n shards a video belongs to: by its id alone, so it stays when others come or go."""
    return int(digest(video), 16) % n
