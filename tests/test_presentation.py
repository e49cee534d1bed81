"""Frames are what a player shows: which stream, from when to when, which shape, which way up.

The oracle is what was painted. Each property is stated by the container or the codec of a file that
was made for it.
"""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from helpers.clips import index_of, numbered, turn, write_video
from helpers.presentation import change_h264, crop_matroska, edit_mp4, write_tracks
from PIL import Image

from features.decoding import Decoder, Video, read_frames
from features.presentation import FrameTransform
from features.views import View

H264 = {"codec": "libx264", "pix_fmt": "yuv444p", "options": {"qp": "1", "bf": "0"}}
CORNERS = {
    (-1, -1): (220, 30, 30),
    (1, -1): (30, 200, 30),
    (-1, 1): (40, 40, 220),
    (1, 1): (0,) * 3,
}


def painted(height=256, width=256, colours=CORNERS):
    """A frame in four colours, (x, y) from (-1, -1) at the top left to (1, 1)."""
    image = np.zeros((height, width, 3), np.uint8)
    for (x, y), colour in colours.items():
        rows = slice(height // 2) if y < 0 else slice(height // 2, None)
        columns = slice(width // 2) if x < 0 else slice(width // 2, None)
        image[rows, columns] = colour
    return image


def corners_of(image):
    """The colours in the middle of the four quarters of a row's frame."""
    return {(x, y): image[112 + 56 * y, 112 + 56 * x] for x, y in CORNERS}


def assert_corners(image, expected, tolerance=12):
    for corner, colour in corners_of(image).items():
        assert np.abs(colour.astype(int) - expected[corner]).max() <= tolerance, corner


def first_row(path, **options):
    return next(read_frames(Video("v", path), **options))


def rows_of(path, **options):
    """(the index of each row's frame, seconds)"""
    video = Video("v", path)
    return [index_of(image) for image in read_frames(video, **options)], video.seconds


# --- from when to when ---------------------------------------------------------------------------

SLIDES = {
    "mkv": ("ffv1", "bgr0"),
    "mov": ("png", "rgb24"),
    "flv": ("flashsv", "bgr24"),
    "wmv": ("mjpeg", "yuvj444p"),
    "gif": ("gif", "rgb8"),
}


def write_slides(path, n, codec, pix_fmt):
    """n frames, black and white in turn, that are shown for 20 seconds each."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pix_fmt
        packets = []
        for i in range(n):
            image = np.full((32, 48, 3), 255 * (i % 2), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts = i
            packets += stream.encode(frame)
        for i, packet in enumerate(packets + stream.encode(None)):
            packet.time_base = Fraction(1, 1000)
            packet.pts = packet.dts = 20_000 * i
            packet.duration = 20_000
            out.mux(packet)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("suffix", SLIDES)
def test_slide_with_one_stored_frame_is_held_to_its_end(tmp_path, suffix, n):
    path = tmp_path / f"v.{suffix}"
    write_slides(path, n, *SLIDES[suffix])
    video = Video("v", path)
    shown = [int(image[112, 112, 0] > 127) for image in read_frames(video)]
    assert shown == [i % 2 for i in range(n) for _ in range(20)]
    assert video.seconds == pytest.approx(20 * n, abs=0.01)


@pytest.mark.parametrize("suffix", ["flv", "wmv"])
def test_slide_of_a_file_cut_short_is_not_held(tmp_path, suffix):
    """Else a film that is cut in its first minute would stand still for two hours."""
    path = tmp_path / f"v.{suffix}"
    write_slides(path, 4, *SLIDES[suffix])
    data = path.read_bytes()
    for share in (0.7, 0.9, 0.99):
        path.write_bytes(data[: int(share * len(data))])
        assert len(rows_of(path)[0]) in (1, 20, 21, 40, 41, 60, 61)


def test_picture_is_held_while_there_is_sound(tmp_path):
    for seconds, expected in ((7.5, 8), (1.9, 1)):  # a tail of up to a second adds nothing
        path = tmp_path / f"{seconds}.mp4"
        write_tracks(path, [(numbered(10), 0, "png", "rgb24", None)], (0, seconds))
        assert rows_of(path)[0] == ([0] + [9] * 9)[:expected]


def test_time_starts_with_the_sound(tmp_path):
    write_tracks(tmp_path / "v.mkv", [(numbered(30), 2.5, "ffv1", "bgr0", None)], (0, 5))
    assert rows_of(tmp_path / "v.mkv")[0] == [0, 0, 0, 5, 15, 25]
    assert rows_of(tmp_path / "v.mkv", rule="first_after")[0] == [0, 10, 20]
    write_tracks(tmp_path / "late.mkv", [(numbered(30), 0, "ffv1", "bgr0", None)], (1.3, 1))
    assert rows_of(tmp_path / "late.mkv")[0] == [0, 10, 20]


@pytest.mark.parametrize("first", [-700, 0, 90_000])
def test_time_starts_with_the_first_frame_without_sound(tmp_path, first):
    times = [first + 100 * i for i in range(25)]
    write_video(tmp_path / "v.nut", numbered(25), 10, times)
    assert rows_of(tmp_path / "v.nut")[0] == [0, 10, 20]


def test_edit_list_says_where_the_film_starts_and_ends(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(60), codec="png", pix_fmt="rgb24")
    edit_mp4(tmp_path / "v.mp4", 1.5, 2.5)
    assert rows_of(tmp_path / "v.mp4") == ([15, 25, 35], 2.5)


def test_b_frames_of_avi_which_has_no_display_times(tmp_path):
    images = [np.full((64, 64, 3), 2 * i, np.uint8) for i in range(100)]
    write_video(tmp_path / "v.avi", images, 10, codec="libx264", pix_fmt="yuv420p")
    video = Video("v", tmp_path / "v.avi")
    shown = [image.mean() / 2 for image in read_frames(video)]
    # FFmpeg needs a few frames to see that the timestamps are wrong.
    assert len(shown) == 10 and np.abs(np.array(shown) - range(0, 100, 10)).max() < 4
    assert video.seconds == pytest.approx(10, abs=0.3)


# --- which stream --------------------------------------------------------------------------------


def test_stream_with_the_default_flag_is_shown(tmp_path):
    other, film = numbered(30)[::-1], numbered(30)
    tracks = [(other, 0, "ffv1", "bgr0", 0), (film, 0, "ffv1", "bgr0", Disposition.default)]
    write_tracks(tmp_path / "v.mkv", tracks)
    assert rows_of(tmp_path / "v.mkv")[0] == [0, 10, 20]


@pytest.mark.parametrize("suffix, codec", [("mov", "png"), ("mp4", "libx264"), ("avi", "ffv1")])
def test_small_pictures_before_the_film_are_not_shown(tmp_path, suffix, codec):
    film = [image.repeat(4, 0).repeat(4, 1) for image in numbered(30)]
    pix_fmt = {"png": "rgb24", "libx264": "yuv444p", "ffv1": "bgr0"}[codec]
    thumbnails = [np.full((32, 48, 3), 200, np.uint8)] * 30
    tracks = [(thumbnails, 0, "mjpeg", "yuvj444p", None), (film, 0, codec, pix_fmt, None)]
    write_tracks(tmp_path / f"v.{suffix}", tracks)
    shown = [int(image[112, 112, 0]) for image in read_frames(Video("v", tmp_path / f"v.{suffix}"))]
    assert np.abs(np.array(shown) - [0, 10, 20]).max() <= 3


def test_large_cover_beside_the_film_is_not_shown(tmp_path):
    cover = [np.full((480, 640, 3), 200, np.uint8)]
    flags = Disposition.attached_pic
    tracks = [(cover, 0, "mjpeg", "yuvj444p", flags), (numbered(30), 0, "png", "rgb24", None)]
    write_tracks(tmp_path / "v.mp4", tracks)
    with av.open(str(tmp_path / "v.mp4")) as file:
        assert any(stream.disposition & flags for stream in file.streams.video)
    assert rows_of(tmp_path / "v.mp4")[0] == [0, 10, 20]


def test_track_of_a_single_picture_is_not_shown(tmp_path):
    poster = [np.full((480, 640, 3), 200, np.uint8)]
    tracks = [(poster, 0, "png", "rgb24", None), (numbered(30), 0, "png", "rgb24", None)]
    write_tracks(tmp_path / "v.mov", tracks)
    assert rows_of(tmp_path / "v.mov")[0] == [0, 10, 20]


# --- shape ---------------------------------------------------------------------------------------


def write_stripe(path, codec, pix_fmt, aspect):
    """720 x 576, white from 60 % of its width on, with this pixel aspect."""
    image = np.zeros((576, 720, 3), np.uint8)
    image[:, 432:] = 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 720, 576, pix_fmt
        stream.codec_context.sample_aspect_ratio = aspect
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def assert_stripe(path, aspect):
    """White begins at 60 % of the width that is shown, of which 224 pixels are the row's."""
    width = 720 * aspect / 576 * 256
    row = first_row(path)[112, :, 0].astype(int)
    assert abs(int((row > 127).argmax()) - (0.6 * width - (width - 224) / 2)) <= 1


@pytest.mark.parametrize("aspect", [Fraction(16, 15), Fraction(64, 45)])
@pytest.mark.parametrize(
    "name, codec",
    [("v.mpg", "mpeg2video"), ("v.mp4", "libx264"), ("v.mkv", "mpeg4"), ("v.mov", "png")],
)
def test_pixels_that_are_not_square(tmp_path, name, codec, aspect):
    pix_fmt = "rgb24" if codec == "png" else "yuv420p"
    write_stripe(tmp_path / name, codec, pix_fmt, aspect)
    assert_stripe(tmp_path / name, aspect)


def test_pixel_aspect_of_the_container_before_that_of_the_codec(tmp_path):
    write_stripe(tmp_path / "v.mp4", "libx264", "yuv420p", Fraction(16, 15))
    data = (tmp_path / "v.mp4").read_bytes()
    stated = [struct.pack(">4sII", b"pasp", *aspect) for aspect in ((16, 15), (64, 45))]
    assert stated[0] in data
    (tmp_path / "v.mp4").write_bytes(data.replace(*stated))
    assert_stripe(tmp_path / "v.mp4", Fraction(64, 45))
    change_h264(tmp_path / "v.mp4", tmp_path / "v.ts", "sample_aspect_ratio=8/9")
    assert_stripe(tmp_path / "v.ts", Fraction(8, 9))


def test_pixel_aspect_that_changes_on_the_way(tmp_path):
    both = b""
    for aspect in (Fraction(64, 45), Fraction(16, 15)):
        write_stripe(tmp_path / "part.mpg", "mpeg2video", "yuv420p", aspect)
        both += (tmp_path / "part.mpg").read_bytes()
    (tmp_path / "v.mpg").write_bytes(both)
    edges = []
    for image in read_frames(Video("v", tmp_path / "v.mpg"), Fraction(25)):
        edges.append(int((image[112, :, 0] > 127).argmax()))
    # The edge is 10 % of the width right of the middle.
    assert abs(edges[0] - (112 + 0.1 * 455)) <= 1 and abs(edges[-1] - (112 + 0.1 * 341)) <= 1


def test_long_line_of_flat_pixels_is_bounded(tmp_path):
    """A pixel aspect of 1000 would make 128,000 pixels of a width of 128."""
    with av.open(str(tmp_path / "v.mov"), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "rgb24"
        stream.codec_context.sample_aspect_ratio = Fraction(1000)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(painted(128, 128), "rgb24")))
        out.mux(stream.encode(None))
    assert first_row(tmp_path / "v.mov").shape == (224, 224, 3)


def test_what_the_container_crops_is_not_shown(tmp_path):
    image = np.full((64, 96, 3), 255, np.uint8)
    image[8:-4, 16:-20] = painted(52, 60)
    write_video(tmp_path / "v.mkv", [image] * 2)
    crop_matroska(tmp_path / "v.mkv", 8, 4, 16, 20)
    row = first_row(tmp_path / "v.mkv")
    assert_corners(row, CORNERS)
    assert row.min(2).max() < 120  # nothing white is left


@pytest.mark.parametrize("left", [2, 16, 32])
def test_what_the_codec_crops_is_not_shown(tmp_path, left):
    """At the left, too, where decoders round to what suits the machine's vectors."""
    image = np.full((256, 320, 3), 255, np.uint8)
    image[16:-16, left : left + 224] = painted(224, 224)
    write_video(tmp_path / "all.mp4", [image] * 2, **H264)
    right = 320 - 224 - left
    changes = f"crop_top=16:crop_bottom=16:crop_left={left}:crop_right={right}"
    change_h264(tmp_path / "all.mp4", tmp_path / "v.ts", changes)
    row = first_row(tmp_path / "v.ts")
    assert_corners(row, CORNERS)
    assert row.min(2).max() < 120


# --- which way up --------------------------------------------------------------------------------

UPRIGHT = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
UPRIGHT += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def as_shown(matrix):
    """Where the painted corners are shown: (x, y) at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    return {(a * x + c * y, b * x + d * y): colour for (x, y), colour in CORNERS.items()}


@pytest.mark.parametrize("matrix", UPRIGHT)
def test_turned_and_mirrored_by_the_container(tmp_path, matrix):
    write_video(tmp_path / "v.mp4", [painted(256, 320)] * 2, **H264)
    turn(tmp_path / "v.mp4", matrix)
    assert_corners(first_row(tmp_path / "v.mp4"), as_shown(matrix))


@pytest.mark.parametrize(
    "flip, matrix",
    [("", (0, -1, 1, 0)), (":flip=horizontal", (0, 1, 1, 0)), (":flip=vertical", (0, -1, -1, 0))],
)
def test_turned_by_the_codec(tmp_path, flip, matrix):
    """H.264's display orientation: mirrored first, then turned anticlockwise (H.264 D.2.27).

    Mirrored, (x, y) is at (-x, y) or (x, -y); turned anticlockwise, (x, y) is at (y, -x).
    """
    write_video(tmp_path / "plain.mp4", [painted()] * 2, **H264)
    changes = f"display_orientation=insert:rotate=90{flip}"
    change_h264(tmp_path / "plain.mp4", tmp_path / "v.ts", changes)
    assert_corners(first_row(tmp_path / "v.ts"), as_shown(matrix))


EXIF = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1)}
EXIF |= {5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}


@pytest.mark.parametrize("orientation", EXIF)
def test_turned_by_exif(tmp_path, orientation):
    """The eight orientations of EXIF (tag 274), in a stream of JPEGs."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(painted(256, 320)).save(file, "JPEG", quality=95, exif=exif)
    (tmp_path / "v.mjpeg").write_bytes(file.getvalue() * 3)
    assert_corners(first_row(tmp_path / "v.mjpeg"), as_shown(EXIF[orientation]))


def test_turned_by_an_odd_angle(tmp_path):
    image = np.zeros((256, 256, 3), np.uint8)
    image[124:132, 128:] = 255  # a hand that points to three o'clock
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "rgb24"
        stream.set_display_rotation(30)  # anticlockwise
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    y, x = np.argwhere(first_row(tmp_path / "v.mp4")[:, :, 0] > 127).mean(0) - 112
    assert np.degrees(np.arctan2(-y, x)) == pytest.approx(30, abs=1)


# --- colours -------------------------------------------------------------------------------------

MATRICES = {"bt709": (1, 0.2126, 0.0722), "bt601": (6, 0.299, 0.114), "bt2020": (9, 0.2627, 0.0593)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_by_the_stated_matrix_and_range(tmp_path, matrix, full):
    colour = np.array([200, 30, 60])
    number, red, blue = MATRICES[matrix]
    r, g, b = colour / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    planes = [255 * y, 128 + 255 * u, 128 + 255 * v]
    if not full:
        planes = [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
    planes = np.stack([np.full((64, 96), round(value), np.uint8) for value in planes])
    with av.open(str(tmp_path / "v.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        stream.codec_context.colorspace = number
        stream.codec_context.color_range = 2 if full else 1
        out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv444p")))
        out.mux(stream.encode(None))
    assert np.abs(first_row(tmp_path / "v.mkv").astype(int) - colour).max() <= 3


def test_transparent_parts_are_black(tmp_path):
    image = np.full((64, 96, 4), 200, np.uint8)
    image[:, :48, 3], image[:, 48:, 3] = 0, 128
    write_video(
        tmp_path / "v.mov", [image], codec="png", pix_fmt="rgba", source="rgba", size=(96, 64)
    )
    row = first_row(tmp_path / "v.mov")
    assert row[112, 30].max() == 0 and np.abs(row[112, 194].astype(int) - 100).max() <= 1


# --- which picture -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (90, 90), (1, 4096), (4096, 1)])
def test_whole_frame_is_squeezed_into_the_square(shape):
    """The corners of what is painted stay in the corners, whatever the shape."""
    view = View(96, whole=True)
    frame = av.VideoFrame.from_ndarray(painted(*shape), "rgb24")
    image = FrameTransform(view=view)(frame, Fraction(4, 3))
    assert image.shape == (96, 96, 3)
    for (x, y), colour in CORNERS.items():
        if shape[0] == 1 and y < 0 or shape[1] == 1 and x < 0:
            continue  # a line has one half only
        found = image[47 + 40 * y, 47 + 40 * x].astype(int)
        assert np.abs(found - colour).max() <= 2


def test_whole_frame_is_turned_upright(tmp_path):
    write_video(tmp_path / "v.mp4", [painted(64, 128)] * 10, **H264)
    lying = first_row(tmp_path / "v.mp4", view=View(96, whole=True))
    turn(tmp_path / "v.mp4", (0, 1, -1, 0))  # a quarter turn to the right
    upright = first_row(tmp_path / "v.mp4", view=View(96, whole=True))
    assert np.array_equal(upright, np.rot90(lying, -1))


@pytest.mark.parametrize("view", [View(), View(32, whole=True), View(1024, whole=True)])
def test_decoder_process_gives_the_frames_of_its_view(tmp_path, view):
    write_video(tmp_path / "v.mkv", numbered(20))
    decoder, video = Decoder(view=view), Video("v", tmp_path / "v.mkv")
    frames = list(decoder.frames(video))
    decoder.close()
    assert video.reason == "" and np.array_equal(frames, list(read_frames(video, view=view)))
    assert np.shape(frames) == (2, view.size, view.size, 3)


@pytest.mark.parametrize("view", [View(), View(96, whole=True)])
@pytest.mark.parametrize(
    "shape, pixel_aspect, turned, expected",
    [
        ((64, 128), Fraction(1), False, (160, 80)),
        ((64, 128), Fraction(1), True, (80, 160)),
        ((96, 48), Fraction(3, 1), False, (160, 107)),
        ((16, 320), Fraction(1), False, (160, 20)),
    ],
)
def test_thumbnail_is_the_whole_picture_as_shown(
    tmp_path, view, shape, pixel_aspect, turned, expected
):
    """Whatever the backbone sees: the sides that its centre lacks, and no square."""
    frame = av.VideoFrame.from_ndarray(painted(*shape), "rgb24")
    transform = FrameTransform(view=view, thumbnail_size=160)
    transform(frame, pixel_aspect)
    if turned:
        write_video(tmp_path / "v.mp4", [painted(*shape)] * 10, **H264)
        turn(tmp_path / "v.mp4", (0, 1, -1, 0))  # a quarter turn to the right
        video = Video("v", tmp_path / "v.mp4")
        next(read_frames(video, view=view, thumbnail_size=160))
        transform.thumbnail = video.thumbnails[0]
    image = Image.open(io.BytesIO(transform.thumbnail))
    assert image.format == "JPEG" and image.size == expected
    if shape == (16, 320):
        return  # the ends of a ribbon are cut off
    pixels = np.asarray(image).astype(int)
    for (x, y), colour in CORNERS.items():
        if turned:
            x, y = -y, x
        found = pixels[int((0.5 + 0.4 * y) * expected[1]), int((0.5 + 0.4 * x) * expected[0])]
        assert np.abs(found - colour).max() <= 40  # JPEG halves the colours' resolution


def test_decoder_process_gives_a_thumbnail_for_each_frame(tmp_path):
    write_video(tmp_path / "v.mkv", numbered(50))
    decoder, video = Decoder(thumbnail_size=48), Video("v", tmp_path / "v.mkv")
    frames = list(decoder.frames(video))
    decoder.close()
    expected = Video("v", tmp_path / "v.mkv")
    assert np.array_equal(frames, list(read_frames(expected, thumbnail_size=48)))
    assert video.thumbnails == expected.thumbnails and len(frames) == len(video.thumbnails) == 5
    reds = [Image.open(io.BytesIO(jpeg)).getpixel((24, 16))[0] for jpeg in video.thumbnails]
    assert reds == pytest.approx([0, 10, 20, 30, 40], abs=3)


def test_view_is_stored_as_a_text():
    for view in (View(), View(288, whole=True), View(32)):
        assert View.parse(str(view)) == view
    assert str(View()) == "224 centre" and View().short_side == 256
    for text in ("288", "288 whole ", "16 whole", "9999 centre", "-288 whole", ""):
        with pytest.raises(ValueError, match="is not a view"):
            View.parse(text)
