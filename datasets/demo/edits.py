"""The edits of the demo's copies: FFmpeg filters with graded parameters; rendering a clip.

An edit is an entry of `EDITS`. Its filters are FFmpeg's own, run through PyAV. Their expressions
(such as `iw`) do not depend on the picture's size, so any edit may follow any other.

Drawing edits at random (`draw_edits`) and applying them (`apply_edit`) are separate: a plan is
plain data, and the same plan gives the same pictures.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FILM = Path(__file__).resolve().parent / "film.mp4"
FPS = 12  # of the film
SIZE = (456, 256)  # of the film, width and height
TICKS = 1200 * FPS  # a second in the time base of editing: fine enough for a changed speed

CAPTIONS = [
    "wait for it...",
    "WATCH TILL THE END",
    "part 2",
    "so funny",
    "best scene ever",
    "follow for more",
    "he did WHAT?!",
]
BORDER_COLOURS = ["black", "white", "0x202840", "0x803020", "0xd0c090"]
LOGO_COLOURS = [(200, 40, 40), (30, 90, 200), (240, 180, 20), (20, 150, 90), (120, 40, 160)]
POSITION = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
OVERLAY = "overlay=x=(W-w)*{x}:y=(H-h)*{y}"


@dataclass(frozen=True)
class Edit:
    """A way to edit a video.

    family: a clip has at most one edit of a family
    filters: FFmpeg filters with {parameter}s
    graded: {parameter: (mildest, heaviest)}, chosen between the two by the strength, 0 to 1
    free: {parameter: (low, high), or a list to choose from}, chosen regardless of the strength
    weight: how often it is drawn, relative to others
    picture: (width, height, parameters) -> the picture that an `overlay` filter lays on the frames
    """

    family: str
    filters: tuple[str, ...]
    graded: dict[str, tuple[float, float]] = field(default_factory=dict)
    free: dict[str, tuple[float, float] | list] = field(default_factory=dict)
    weight: float = 1.0
    picture: Callable[[int, int, dict], Image.Image] | None = None


# --- pictures laid on the frames ----------------------------------------------------------------


def caption(width, height, parameters):
    """A strip with a line of text centred on it."""
    w, h = int(width * parameters["wide"]), int(height * parameters["high"])
    paper = (0, 0, 0, int(255 * parameters["opaque"]))
    strip = Image.new("RGBA", (max(2, w), max(2, h)), paper)
    ImageDraw.Draw(strip).text(
        (w / 2, h / 2),
        parameters["text"],
        fill=parameters["ink"],
        font=ImageFont.load_default(max(8, int(h * 0.6))),
        anchor="mm",
        stroke_width=1,
        stroke_fill="black",
    )
    return strip


def logo(width, height, parameters):
    """A round badge with two letters, as a TV channel shows it in a corner."""
    side = max(8, int(min(width, height) * parameters["side"]))
    badge = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    canvas = ImageDraw.Draw(badge)
    colour = (*parameters["colour"], int(255 * parameters["opaque"]))
    canvas.ellipse((0, 0, side - 1, side - 1), fill=colour)
    canvas.text(
        (side / 2, side / 2),
        parameters["text"],
        fill="white",
        font=ImageFont.load_default(side * 0.45),
        anchor="mm",
    )
    return badge


def card(width, height, parameters):
    """A picture in the picture: a gradient with a disc and a line of text."""
    w, h = max(8, int(width * parameters["side"])), max(8, int(height * parameters["side"]))
    gradient = Image.linear_gradient("L").resize((w, h))
    bands = [gradient.point(lambda v, c=c: (v + c) // 2) for c in parameters["colour"]]
    picture = Image.merge("RGB", bands).convert("RGBA")
    canvas = ImageDraw.Draw(picture)
    disc = (w * 0.36, h * 0.12, w * 0.64, h * 0.12 + w * 0.28)
    canvas.ellipse(disc, fill=(*parameters["colour"][::-1], 255))
    canvas.text(
        (w / 2, h * 0.82),
        parameters["text"],
        fill="white",
        font=ImageFont.load_default(max(7, h * 0.14)),
        anchor="mm",
    )
    return picture


# --- the registry -------------------------------------------------------------------------------

EDITS = {
    # the picture's geometry
    "mirror": Edit("mirror", ("hflip",), weight=2.5),
    "crop": Edit(
        "crop",
        ("crop=iw*{keep}:ih*{keep}:(iw-ow)*{x}:(ih-oh)*{y}",),
        {"keep": (0.9, 0.5)},
        POSITION,
        2.5,
    ),
    "crop_centre": Edit("crop", ("crop=iw*{keep}:ih*{keep}",), {"keep": (0.9, 0.5)}),
    "crop_tall": Edit(
        "aspect",
        ("crop='min(iw,ih*{aspect})':ih:(iw-ow)*{x}:0",),
        {"aspect": (1.4, 0.7)},
        {"x": (0.1, 0.9)},
    ),
    "stretch": Edit("aspect", ("scale=2*trunc(iw*{factor}/2):ih",), {"factor": (0.85, 0.55)}),
    "rotate": Edit(
        "turn", ("rotate='{sign}*{degrees}*PI/180'",), {"degrees": (3, 16)}, {"sign": [-1, 1]}
    ),
    "turn": Edit("turn", ("transpose={way}",), {}, {"way": [1, 2]}, 0.4),
    "shear": Edit(
        "turn",
        ("shear=shx={sign}*{slant}:fillcolor=black",),
        {"slant": (0.06, 0.3)},
        {"sign": [-1, 1]},
        0.5,
    ),
    "lens": Edit(
        "turn",
        ("lenscorrection=k1={sign}*{bend}:k2=0",),
        {"bend": (0.08, 0.4)},
        {"sign": [-1, 1]},
        0.5,
    ),
    "letterbox": Edit(
        "border",
        ("pad=iw:ih/{keep}:0:(oh-ih)/2:{colour}",),
        {"keep": (0.88, 0.6)},
        {"colour": BORDER_COLOURS},
    ),
    "pillarbox": Edit(
        "border",
        ("pad=iw/{keep}:ih:(ow-iw)/2:0:{colour}",),
        {"keep": (0.88, 0.6)},
        {"colour": BORDER_COLOURS},
    ),
    "inset": Edit(
        "border",
        ("pad=iw/{keep}:ih/{keep}:(ow-iw)*{x}:(oh-ih)*{y}:{colour}",),
        {"keep": (0.9, 0.6)},
        {**POSITION, "colour": BORDER_COLOURS},
    ),
    # colour
    "hue": Edit("colour", ("hue=h={sign}*{degrees}",), {"degrees": (15, 90)}, {"sign": [-1, 1]}),
    "saturation": Edit("colour", ("hue=s={amount}",), {"amount": (1.4, 2.6)}, weight=0.6),
    "grey": Edit("colour", ("hue=s=0",), weight=0.8),
    "sepia": Edit(
        "colour", ("colorchannelmixer=.39:.77:.19:0:.35:.69:.17:0:.27:.53:.13",), weight=0.6
    ),
    "balance": Edit(
        "colour",
        ("colorchannelmixer=rr=1+{sign}*{tint}:bb=1-{sign}*{tint}",),
        {"tint": (0.15, 0.6)},
        {"sign": [-1, 1]},
    ),
    "negate": Edit("colour", ("negate",), weight=0.15),
    "gamma_up": Edit("light", ("lutyuv=y=gammaval({gamma})",), {"gamma": (0.8, 0.4)}),
    "gamma_down": Edit("light", ("lutyuv=y=gammaval({gamma})",), {"gamma": (1.3, 2.0)}),
    "contrast": Edit(
        "light", ("curves=all='0/0 {knee}/{dark} 1/1'",), {"knee": (0.45, 0.6), "dark": (0.4, 0.25)}
    ),
    "fade_out": Edit(
        "light",
        ("curves=all='0/{floor} 1/{ceiling}'",),
        {"floor": (0.1, 0.4), "ceiling": (0.95, 0.75)},
    ),
    "flicker": Edit(
        "light",
        ("hue=b='{swing}*sin(2*PI*t*{rate})'",),
        {"swing": (0.6, 2.2)},
        {"rate": (0.3, 1.5)},
        weight=0.6,
    ),
    "vignette": Edit("vignette", ("vignette=angle={angle}",), {"angle": (0.5, 0.95)}),
    # detail
    "blur": Edit("detail", ("gblur=sigma={sigma}",), {"sigma": (1.0, 4.0)}),
    "noise": Edit("detail", ("noise=alls={amount}:allf=t",), {"amount": (10, 40)}),
    "sharpen": Edit("detail", ("unsharp=5:5:{amount}",), {"amount": (1.0, 3.5)}, weight=0.5),
    "pixels": Edit(
        "detail",
        (
            "scale=2*trunc(iw*{factor}/2):2*trunc(ih*{factor}/2)",
            "scale=2*trunc(iw/{factor}/2):2*trunc(ih/{factor}/2):flags=neighbor",
        ),
        {"factor": (0.5, 0.2)},
    ),
    # what is laid over it
    "caption": Edit(
        "caption",
        (OVERLAY,),
        {"high": (0.12, 0.24), "wide": (0.7, 1.0)},
        {
            "x": [0.5],
            "y": [0.0, 0.5, 0.85, 0.97],
            "text": CAPTIONS,
            "ink": ["white", "yellow", "cyan"],
            "opaque": [0.0, 0.6, 1.0],
        },
        1.5,
        caption,
    ),
    "logo": Edit(
        "logo",
        (OVERLAY,),
        {"side": (0.14, 0.38)},
        {
            **POSITION,
            "text": ["TV", "BB", "HD", "Go"],
            "colour": LOGO_COLOURS,
            "opaque": (0.5, 1.0),
        },
        1.0,
        logo,
    ),
    "card": Edit(
        "logo",
        (OVERLAY,),
        {"side": (0.25, 0.5)},
        {
            "x": [0.03, 0.97],
            "y": [0.03, 0.97],
            "text": ["LIVE", "reaction", "subscribe"],
            "colour": LOGO_COLOURS,
        },
        0.8,
        card,
    ),
    # time
    "faster": Edit("time", ("setpts=PTS/{factor}",), {"factor": (1.1, 1.7)}),
    "slower": Edit("time", ("setpts=PTS/{factor}",), {"factor": (0.92, 0.6)}),
    "stutter": Edit(
        "time",
        ("select='gt(random({seed}),{drop})'",),
        {"drop": (0.2, 0.7)},
        {"seed": list(range(100))},
    ),
}

# {grade: (number of edits, strength)}, both as ranges. The encoding takes a strength from the same
# range.
GRADES = {
    1: ((1, 1), (0.0, 0.35)),
    2: ((2, 2), (0.1, 0.5)),
    3: ((3, 3), (0.15, 0.65)),
    4: ((4, 5), (0.2, 0.8)),
}
# {name: (container, encoder, its options, bits for a pixel of a frame at the mildest and heaviest)}
CODECS = {
    # superfast leaves out x264's macroblock tree, which varies from run to run at some sizes
    "h264": ("mp4", "libx264", {"preset": "superfast", "threads": "1"}, (0.25, 0.04)),
    "hevc": (
        "mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": "pools=none:frame-threads=1:log-level=none"},
        (0.2, 0.05),
    ),
    # With a positive cpu-used, libvpx measures how busy the machine is and skips work accordingly.
    # -4 fixes the speed that it has on an idle machine, so that a busy one gives the same pixels.
    "vp8": (
        "webm",
        "libvpx",
        {"deadline": "realtime", "cpu-used": "-4", "threads": "1"},
        (0.25, 0.07),
    ),
    "mpeg4": ("avi", "mpeg4", {}, (0.4, 0.1)),
    "mpeg2": ("mkv", "mpeg2video", {}, (0.5, 0.18)),
    "flv": ("avi", "flv", {}, (0.4, 0.12)),
    "wmv": ("avi", "wmv2", {}, (0.4, 0.12)),
}
CODEC_WEIGHTS = [8, 1, 2, 3, 1, 1, 1]  # how often each is drawn


# --- drawing edits ------------------------------------------------------------------------------


def interpolate(ends: tuple[float, float], strength: float, digits: int | None = 3) -> float:
    """The value at `strength` (0 to 1) between two ends, rounded."""
    mildest, heaviest = ends
    return round(mildest + strength * (heaviest - mildest), digits)


def draw_parameters(
    rng: random.Random, name: str, strengths: tuple[float, float]
) -> dict[str, Any]:
    """Parameters of an edit; each graded one has a strength of its own in this range."""
    parameters = {}
    for key, ends in EDITS[name].graded.items():
        parameters[key] = interpolate(ends, rng.uniform(*strengths))
    for key, values in EDITS[name].free.items():
        if isinstance(values, list):
            parameters[key] = rng.choice(values)
        else:
            parameters[key] = round(rng.uniform(*values), 3)
    return parameters


def draw_edits(rng: random.Random, grade: int, leave_out: Collection[str] = ()) -> list:
    """Edits of a grade: [[name, parameters]], at most one of a family.

    Some clips of grade 4 are cropped twice.

    Args:
        leave_out: families to draw nothing from.
    """
    (fewest, most), strengths = GRADES[grade]
    count = rng.randint(fewest, most)
    chosen, families = [], set(leave_out)
    while len(chosen) < count:
        names = [name for name, edit in EDITS.items() if edit.family not in families]
        weights = [EDITS[name].weight for name in names]
        name = rng.choices(names, weights)[0]
        chosen.append([name, draw_parameters(rng, name, strengths)])
        families.add(EDITS[name].family)
    if grade == 4 and "crop" in families and "aspect" not in families and rng.random() < 0.5:
        second_crop = {
            "keep": round(rng.uniform(0.7, 0.85), 3),
            "x": round(rng.random(), 3),
            "y": round(rng.random(), 3),
        }
        chosen.append(["crop", second_crop])
    return chosen


def draw_encoding(rng: random.Random, grade: int) -> dict[str, Any]:
    """How a clip is encoded: codec, height in lines, frames a second, bits a pixel of a frame."""
    _, strengths = GRADES[grade]
    codec = rng.choices(list(CODECS), CODEC_WEIGHTS)[0]
    height = int(interpolate((256, 120), rng.uniform(*strengths), 0)) // 2 * 2  # even
    if codec == "mpeg2":
        rate = 25  # MPEG-2 allows few rates
    else:
        rate = rng.choice([12, 12, 12, 10, 8, 15])
    bits = interpolate(CODECS[codec][3], rng.uniform(*strengths))
    return {"codec": codec, "height": height, "rate": rate, "bits": bits}


def speed_factor(edits: Iterable) -> float:
    """How much these edits [[name, parameters]] speed a video up: 1.25 shows 10 s of film in 8."""
    return math.prod(
        parameters["factor"] for name, parameters in edits if name in ("faster", "slower")
    )


# --- frames -------------------------------------------------------------------------------------


def film_frames(
    film: str | Path, start: float, end: float, ticks: int = 0
) -> Iterator[av.VideoFrame]:
    """The frames of `film` from `start` to `end` (seconds), with timestamps from `ticks` on."""
    first, last = round(start * FPS), round(end * FPS)
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.time * FPS)
            if number >= last:
                return
            if number >= first:
                frame.pts = ticks + (number - first) * (TICKS // FPS)
                frame.time_base = Fraction(1, TICKS)
                yield frame


def filter_frames(
    filters: Iterable[str],
    frames: Iterable[av.VideoFrame],
    picture: Callable[[int, int], Image.Image] | None = None,
) -> Iterator[av.VideoFrame]:
    """Send frames through a chain of FFmpeg filters.

    Args:
        picture: (width, height) -> what an overlay lays on the frames. The chain is then that
            overlay alone.
    """
    graph = source = sink = None  # PyAV's filters do not keep their graph alive, this name does
    for frame in frames:
        if graph is None:  # the size is known by the first frame
            graph, source, sink = _build_graph(filters, frame, picture)
        source.push(frame)
        yield from _drain(sink)
    if graph is not None:
        source.push(None)
        yield from _drain(sink)


def _build_graph(filters, frame, picture):
    graph = av.filter.Graph()
    graph.threads = 1  # the processes share the cores already

    def add_buffer(like):
        return graph.add_buffer(
            width=like.width, height=like.height, format=like.format, time_base=like.time_base
        )

    source = last = add_buffer(frame)
    for text in filters:
        name, _, arguments = text.partition("=")
        node = graph.add(name, arguments)
        last.link_to(node)
        last = node
    if picture is not None:
        pixels = np.array(picture(frame.width, frame.height))
        overlay = av.VideoFrame.from_ndarray(pixels, format="rgba")
        overlay.pts, overlay.time_base = 0, frame.time_base
        overlay_source = add_buffer(overlay)
        overlay_source.link_to(last, 0, 1)
    sink = graph.add("buffersink")
    last.link_to(sink)
    graph.configure()
    if picture is not None:
        overlay_source.push(overlay)
        overlay_source.push(None)  # the filter repeats the last picture
    return graph, source, sink


def _drain(sink):
    while True:
        try:
            yield sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def apply_edit(edit: list, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Apply an edit of a plan, [name, parameters], to frames."""
    name, parameters = edit
    draw_picture = EDITS[name].picture
    filters = [text.format(**parameters) for text in EDITS[name].filters]
    if draw_picture is None:
        return filter_frames(filters, frames)
    return filter_frames(filters, frames, lambda w, h: draw_picture(w, h, parameters))


def clip_frames(clip: Any, film: str | Path) -> Iterator[av.VideoFrame]:
    """The edited frames of a plan.Clip: its pieces joined, then the edits of the whole clip."""
    frames = _joined_pieces(clip.pieces, film)
    for edit in clip.edits:
        frames = apply_edit(edit, frames)
    return frames


def _joined_pieces(pieces, film):
    """The pieces one after another; those that were edited are brought to the film's size."""
    width, height = SIZE
    to_film_size = [f"scale={width}:{height}", "setsar=1", "format=yuv420p"]
    ticks = 0
    for piece in pieces:
        frames = film_frames(film, piece.start, piece.end, ticks)
        for edit in piece.edits:
            frames = apply_edit(edit, frames)
        if piece.edits:
            frames = filter_frames(to_film_size, frames)
        yield from frames
        ticks += round((piece.end - piece.start) * FPS) * (TICKS // FPS)


def bit_rate(encoding: dict, width: int, height: int) -> int:
    """Bits per second of a planned encoding, from its bits per pixel and frame."""
    # Multiplied from left to right: another order rounds differently, to other pixels.
    return int(encoding["bits"] * width * height * encoding["rate"])


def render(clip: Any, film: str | Path, path: str | Path) -> None:
    """Write a plan.Clip to `path` in the codec, size and frame rate of its plan."""
    write_video(clip_frames(clip, film), clip.encoding, path)


def write_video(frames: Iterable[av.VideoFrame], encoding: dict, path: str | Path) -> None:
    """Write frames to `path` in a codec, size and frame rate as by `draw_encoding`."""
    container, encoder, options, _ = CODECS[encoding["codec"]]
    final_filters = [
        f"scale=-2:{encoding['height']}",
        f"fps={encoding['rate']}:start_time=0",
        "setsar=1",
        "format=yuv420p",
    ]
    file_format = {"mkv": "matroska"}.get(container, container)
    with av.open(str(path), "w", format=file_format) as output:
        stream = None
        for frame in filter_frames(final_filters, frames):
            if stream is None:
                stream = output.add_stream(encoder, rate=encoding["rate"], options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
                stream.bit_rate = bit_rate(encoding, frame.width, frame.height)
                stream.codec_context.thread_count = 1
            frame.pict_type = 0  # the encoder chooses
            output.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("no frame is left of it")
        output.mux(stream.encode(None))
