"""The edits of the demo's copies: a registry of FFmpeg filters with graded parameters, and the rendering of a clip.

An edit is one entry of `EDITS`. Its filters are FFmpeg's own, run through PyAV; expressions such as `iw` keep them independent
of the picture size, so that any edit may follow any other. Drawing parameters (`draw`) and applying them (`apply`) are apart:
a plan is plain data, and the same plan gives the same picture.
"""

import math
import random
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FPS = 12  # of film.mp4
SIZE = (456, 256)  # of film.mp4, width and height
TICKS = 1200 * FPS  # time base while editing: fine enough for a changed speed
CAPTIONS = [
    "wait for it...",
    "WATCH TILL THE END",
    "part 2",
    "so funny",
    "best scene ever",
    "follow for more",
    "he did WHAT?!",
]
COLOURS = ["black", "white", "0x202840", "0x803020", "0xd0c090"]


@dataclass(frozen=True)
class Edit:
    """filters: FFmpeg filters holding {parameter}; grows: parameter -> (mildest, heaviest), scaled by strength in 0..1;
    free: parameter -> (low, high) or a list to choose from; picture: draws what an `overlay` filter lays on the frame."""

    family: str
    filters: tuple
    grows: dict = field(default_factory=dict)
    free: dict = field(default_factory=dict)
    weight: float = 1.0
    picture: object = None


def _text(width, height, text, ink, paper):
    """A strip of `width` x `height` with `text` centred on it."""
    strip = Image.new("RGBA", (max(2, width), max(2, height)), paper)
    font = ImageFont.load_default(max(8, int(height * 0.6)))
    ImageDraw.Draw(strip).text(
        (width / 2, height / 2),
        text,
        fill=ink,
        font=font,
        anchor="mm",
        stroke_width=1,
        stroke_fill="black",
    )
    return strip


def caption(width, height, p):
    return _text(
        int(width * p["wide"]),
        int(height * p["high"]),
        p["text"],
        p["ink"],
        (0, 0, 0, int(255 * p["opaque"])),
    )


def logo(width, height, p):
    """A round badge with two letters, as a channel burns it into a corner."""
    side = max(8, int(min(width, height) * p["side"]))
    badge = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, side - 1, side - 1), fill=(*p["colour"], int(255 * p["opaque"])))
    draw.text(
        (side / 2, side / 2),
        p["text"],
        fill="white",
        font=ImageFont.load_default(side * 0.45),
        anchor="mm",
    )
    return badge


def card(width, height, p):
    """A picture in the picture: a gradient with a disc and a line of text, covering a corner."""
    wide, high = max(8, int(width * p["side"])), max(8, int(height * p["side"]))
    ramp = Image.linear_gradient("L").resize((wide, high))
    picture = Image.merge(
        "RGB", [ramp.point(lambda v, c=c: (v + c) // 2) for c in p["colour"]]
    ).convert("RGBA")
    draw = ImageDraw.Draw(picture)
    draw.ellipse(
        (wide * 0.36, high * 0.12, wide * 0.64, high * 0.12 + wide * 0.28),
        fill=(*p["colour"][::-1], 255),
    )
    draw.text(
        (wide / 2, high * 0.82),
        p["text"],
        fill="white",
        font=ImageFont.load_default(max(7, high * 0.14)),
        anchor="mm",
    )
    return picture


PAINTS = [(200, 40, 40), (30, 90, 200), (240, 180, 20), (20, 150, 90), (120, 40, 160)]
PLACE = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
LAY = "overlay=x=(W-w)*{x}:y=(H-h)*{y}"

EDITS = {
    # the picture's geometry
    "mirror": Edit("mirror", ("hflip",), weight=2.5),
    "crop": Edit(
        "crop",
        ("crop=iw*{keep}:ih*{keep}:(iw-ow)*{x}:(ih-oh)*{y}",),
        {"keep": (0.9, 0.5)},
        PLACE,
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
        {"colour": COLOURS},
    ),
    "pillarbox": Edit(
        "border",
        ("pad=iw/{keep}:ih:(ow-iw)/2:0:{colour}",),
        {"keep": (0.88, 0.6)},
        {"colour": COLOURS},
    ),
    "inset": Edit(
        "border",
        ("pad=iw/{keep}:ih/{keep}:(ow-iw)*{x}:(oh-ih)*{y}:{colour}",),
        {"keep": (0.9, 0.6)},
        {**PLACE, "colour": COLOURS},
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
        (LAY,),
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
        (LAY,),
        {"side": (0.14, 0.38)},
        {**PLACE, "text": ["TV", "BB", "HD", "Go"], "colour": PAINTS, "opaque": (0.5, 1.0)},
        1.0,
        logo,
    ),
    "card": Edit(
        "logo",
        (LAY,),
        {"side": (0.25, 0.5)},
        {
            "x": [0.03, 0.97],
            "y": [0.03, 0.97],
            "text": ["LIVE", "reaction", "subscribe"],
            "colour": PAINTS,
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

# grade: (number of edits, strength) as ranges; a copy's encoding takes a strength from the same range
GRADES = {
    1: ((1, 1), (0.0, 0.35)),
    2: ((2, 2), (0.1, 0.5)),
    3: ((3, 3), (0.15, 0.65)),
    4: ((4, 5), (0.2, 0.8)),
}
CODECS = {  # name: (container, encoder, its options, bits per picture element and frame at the mildest and the heaviest)
    # superfast leaves out x264's macroblock tree, whose result changes from run to run at some picture sizes
    "h264": ("mp4", "libx264", {"preset": "superfast", "threads": "1"}, (0.25, 0.04)),
    "hevc": (
        "mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": "pools=none:frame-threads=1:log-level=none"},
        (0.2, 0.05),
    ),
    "vp8": (
        "webm",
        "libvpx",
        {"deadline": "realtime", "cpu-used": "8", "threads": "1"},
        (0.25, 0.07),
    ),
    "mpeg4": ("avi", "mpeg4", {}, (0.4, 0.1)),
    "mpeg2": ("mkv", "mpeg2video", {}, (0.5, 0.18)),
    "flv": ("avi", "flv", {}, (0.4, 0.12)),
    "wmv": ("avi", "wmv2", {}, (0.4, 0.12)),
}


def between(low_high, strength, digits=3):
    low, high = low_high
    return round(low + strength * (high - low), digits)


def draw(rng: random.Random, grade: int, leave_out=()) -> list:
    """Edits of a grade: [[name, parameters]], one of a family at most; some of grade 4 are cropped twice."""
    (least, most), strength = GRADES[grade]
    count, chosen, families = rng.randint(least, most), [], set(leave_out)
    while len(chosen) < count:
        names = [name for name, edit in EDITS.items() if edit.family not in families]
        name = rng.choices(names, [EDITS[name].weight for name in names])[0]
        edit = EDITS[name]
        parameters = {
            key: between(span, rng.uniform(*strength)) for key, span in edit.grows.items()
        }
        for key, span in edit.free.items():
            parameters[key] = (
                rng.choice(span) if isinstance(span, list) else round(rng.uniform(*span), 3)
            )
        chosen.append([name, parameters])
        families.add(edit.family)
    if grade == 4 and "crop" in families and "aspect" not in families and rng.random() < 0.5:
        chosen.append(
            [
                "crop",
                {
                    "keep": round(rng.uniform(0.7, 0.85), 3),
                    "x": round(rng.random(), 3),
                    "y": round(rng.random(), 3),
                },
            ]
        )
    return chosen


def draw_encoding(rng: random.Random, grade: int) -> dict:
    """Codec, height in lines, frames a second, bits per picture element and frame."""
    strength = GRADES[grade][1]
    codec = rng.choices(list(CODECS), [8, 1, 2, 3, 1, 1, 1])[0]
    height = int(between((256, 120), rng.uniform(*strength), 0)) // 2 * 2
    rate = (
        25 if codec == "mpeg2" else rng.choice([12, 12, 12, 10, 8, 15])
    )  # MPEG-2 knows only a few rates
    return {
        "codec": codec,
        "height": height,
        "rate": rate,
        "bits": between(CODECS[codec][3], rng.uniform(*strength)),
    }


def speed(edits) -> float:
    """By how much these edits shorten a video: 1.25 plays 10 s of film in 8."""
    return math.prod(
        parameters["factor"] for name, parameters in edits if name in ("faster", "slower")
    )


# --- frames ----------------------------------------------------------------------------------------------------------


def film_frames(film, start, end, ticks=0):
    """Frames of `film` in [start, end) seconds, time-stamped from `ticks` on."""
    first, last = round(start * FPS), round(end * FPS)
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.time * FPS)
            if number >= last:
                return
            if number >= first:
                frame.pts, frame.time_base = (
                    ticks + (number - first) * (TICKS // FPS),
                    Fraction(1, TICKS),
                )
                yield frame


def through(filters, frames, picture=None):
    """Frames through a chain of FFmpeg filters; `picture(width, height)` gives what an overlay lays over them."""
    graph = source = sink = None  # PyAV's filters do not keep their graph alive: hold it here
    for frame in frames:
        if graph is None:
            graph, source, sink = _link(filters, frame, picture)
        source.push(frame)
        yield from _drain(sink)
    if graph is not None:
        source.push(None)
        yield from _drain(sink)


def _link(filters, frame, picture):
    graph = av.filter.Graph()
    graph.threads = 1  # the processes share the cores already

    def buffer(like):
        return graph.add_buffer(
            width=like.width, height=like.height, format=like.format, time_base=like.time_base
        )

    source = last = buffer(frame)
    for text in filters:
        name, _, arguments = text.partition("=")
        node = graph.add(name, arguments)
        last.link_to(node)
        last = node
    if picture is not None:  # the chain is a single overlay
        drawn = av.VideoFrame.from_ndarray(
            np.array(picture(frame.width, frame.height)), format="rgba"
        )
        drawn.pts, drawn.time_base = 0, frame.time_base
        above = buffer(drawn)
        above.link_to(last, 0, 1)
    sink = graph.add("buffersink")
    last.link_to(sink)
    graph.configure()
    if picture is not None:
        above.push(drawn)
        above.push(None)  # an overlay repeats its last picture
    return graph, source, sink


def _drain(sink):
    while True:
        try:
            yield sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def apply(edit, frames):
    """One planned edit, [name, parameters], on a stream of frames."""
    name, parameters = edit
    filters = [text.format(**parameters) for text in EDITS[name].filters]
    if EDITS[name].picture is None:
        return through(filters, frames)
    return through(
        filters, frames, lambda width, height: EDITS[name].picture(width, height, parameters)
    )


def clip_frames(clip, film):
    """The edited frames of a clip: its pieces one after the other, brought to the film's size, then the clip's own edits."""

    def joined():
        ticks = 0
        for piece in clip.pieces:
            frames = film_frames(film, piece.start, piece.end, ticks)
            for edit in piece.edits:
                frames = apply(edit, frames)
            yield from (
                through(["scale={}:{}".format(*SIZE), "setsar=1", "format=yuv420p"], frames)
                if piece.edits
                else frames
            )
            ticks += round((piece.end - piece.start) * FPS) * (TICKS // FPS)

    frames = joined()
    for edit in clip.edits:
        frames = apply(edit, frames)
    return frames


def render(clip, film, path):
    """Write a clip to `path` in the codec, size and frame rate of its plan."""
    encoding = clip.encoding
    container, encoder, options, _ = CODECS[encoding["codec"]]
    final = [
        "scale=-2:{height}".format(**encoding),
        "fps={rate}:start_time=0".format(**encoding),
        "setsar=1",
        "format=yuv420p",
    ]
    kind = {"mkv": "matroska"}.get(container, container)
    with av.open(str(path), "w", format=kind) as output:
        stream = None
        for frame in through(final, clip_frames(clip, film)):
            if stream is None:
                stream = output.add_stream(encoder, rate=encoding["rate"], options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
                stream.bit_rate = int(
                    encoding["bits"] * frame.width * frame.height * encoding["rate"]
                )
                stream.codec_context.thread_count = 1
            frame.pict_type = 0
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
