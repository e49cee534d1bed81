"""visualize.py: the matrices against their definitions, the frames on the margins, the command."""

import warnings

import numpy as np
import pytest
import torch
from helpers.clips import index_of, numbered, write_video
from helpers.commands import cli, refused
from helpers.encoders import untrained_tca
from helpers.feature_files import write_ours, write_packed
from helpers.worlds import C
from PIL import Image

import visualize
from files import save_torch
from model import TCA, Mean
from utils import InputError

ARGUMENTS = dict(feature_size=C, nhead=4, nlayers=2, dim_feedforward=16)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TCA(**ARGUMENTS).eval()


@pytest.fixture(scope="module")
def here(encoder, tmp_path_factory):
    """A folder with features of two videos and two models, and the flags that name them."""
    folder, rng = tmp_path_factory.mktemp("visualize"), np.random.default_rng(0)
    features = {"a/b": rng.normal(size=(5, C)), "one $": rng.normal(size=(1, C))}
    write_packed(folder / "x.hdf5", features)
    tca = {"encoder": "tca", "arguments": ARGUMENTS, "state_dict": encoder.state_dict()}
    save_torch(folder / "model.pth", tca)
    mean = {"encoder": "mean", "arguments": {"feature_size": C}, "state_dict": {}}
    save_torch(folder / "mean.pth", mean)
    return folder


def flags(here, output, model="model.pth"):
    return ["--model_path", here / model, "--feature_path", here / "x.hdf5", "--output", output]


# --- the matrices -------------------------------------------------------------------------------


def test_attention_is_softmax_of_query_times_key(encoder):
    frames = np.random.default_rng(1).normal(size=(6, C)).astype(np.float32)
    weights = visualize.attention(encoder, frames).numpy()
    layer = encoder.transformer_encoder.layers[0].self_attn
    weight, bias = layer.in_proj_weight.detach().numpy(), layer.in_proj_bias.detach().numpy()
    query, key, _ = np.split(frames @ weight.T + bias, 3, axis=1)
    expected = np.zeros((6, 6))
    for q, k in zip(np.split(query, 4, axis=1), np.split(key, 4, axis=1), strict=True):
        scores = np.exp(q @ k.T / np.sqrt(C / 4))
        expected += scores / scores.sum(1, keepdims=True) / 4  # the mean over 4 heads
    assert weights.shape == (2, 6, 6)
    np.testing.assert_allclose(weights[0], expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(2), 1, atol=1e-5)


def test_attention_of_the_second_layer_is_over_outputs_of_the_first(encoder):
    frames = np.random.default_rng(2).normal(size=(6, C)).astype(np.float32)
    with torch.no_grad():
        first = encoder.transformer_encoder.layers[0](torch.from_numpy(frames)[None])[0].numpy()
    one_layer = untrained_tca(0)
    one_layer.transformer_encoder.layers = encoder.transformer_encoder.layers[1:]
    expected = visualize.attention(one_layer, first)[0]
    torch.testing.assert_close(visualize.attention(encoder, frames)[1], expected)


def test_similarities_are_cosines_before_and_after_the_encoder(encoder):
    videos, outputs = [], []
    for seed, T in enumerate((4, 7)):
        frames = np.random.default_rng(seed).normal(size=(T, C)).astype(np.float32)
        videos.append(frames)
        with torch.no_grad():
            out = encoder.transformer_encoder(torch.from_numpy(frames)[None])
        outputs.append(out[0].numpy())
    before, after = visualize.similarities(encoder, *videos)
    assert before.shape == after.shape == (4, 7)
    for matrix, (rows, columns) in ((before, videos), (after, outputs)):
        a, b = rows[2], columns[5]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert float(matrix[2, 5]) == pytest.approx(cosine, abs=1e-5)


def test_attention_needs_an_encoder_that_has_it():
    with pytest.raises(InputError, match="no attention"):
        visualize.attention(Mean(C), np.ones((3, C), np.float32))


# --- the frames on the margins ------------------------------------------------------------------


def frames_beside_the_matrix(figure):
    """What a figure of one matrix shows on its margins.

    Returns two lists, left of the matrix and below it, of (share of the axis, picture); the share
    is that of the picture's middle, from the start of the axis.
    """
    (matrix,) = [axes for axes in figure.axes if axes.axison and axes.images]
    box, left, below = matrix.get_position(), [], []
    for axes in figure.axes:
        if axes.axison:  # the matrix and the colour bar
            continue
        frame, picture = axes.get_position(), np.asarray(axes.images[0].get_array())
        if frame.x1 <= box.x0:
            middle = (frame.y0 + frame.y1) / 2
            left.append(((box.y1 - middle) / box.height, picture))
        else:
            assert frame.y1 <= box.y0
            middle = (frame.x0 + frame.x1) / 2
            below.append(((middle - box.x0) / box.width, picture))
    return left, below


@pytest.mark.parametrize("fps, T, view", [(1, 4, {}), (2, 8, {}), (2, 20, {"view": "288 whole"})])
def test_margins_show_the_frame_of_their_row(here, tmp_path, fps, T, view):
    """The frames of the clip are numbered, 10 a second, and every (10 / fps)-th has a row."""
    every = 10 // fps
    write_video(tmp_path / "clip.mkv", numbered(T * every))
    features = {"clip": np.random.default_rng(0).normal(size=(T, C))}
    write_ours(tmp_path / "x.hdf5", features, fps=str(fps), frames="timestamp", **view)
    command = ["attention", "clip", "--model_path", one_layer(here), "--videos", tmp_path]
    command += ["--feature_path", tmp_path / "x.hdf5", "--output", tmp_path / "x.png"]
    args = visualize.parse_args([str(part) for part in command])
    for margin in frames_beside_the_matrix(args.draw(args)):
        assert len(margin) == min(T, 8)
        for share, picture in margin:
            assert index_of(picture) == int(share * T) * every
            assert picture.shape == ((288, 288, 3) if view else (224, 224, 3))


def test_view_that_is_not_one_is_refused(here, tmp_path):
    write_video(tmp_path / "clip.mkv", numbered(10))
    write_ours(tmp_path / "x.hdf5", {"clip": np.ones((1, C))}, view="everything")
    command = ["attention", "clip", "--model_path", one_layer(here), "--videos", tmp_path]
    command += ["--feature_path", tmp_path / "x.hdf5", "--output", tmp_path / "x.png"]
    assert "x.hdf5': 'everything' is not a view" in refused(visualize.main, *command)


@pytest.mark.parametrize("rule, mention", [("timestamp", "a.mp4"), ("nonsense", "nonsense")])
def test_video_that_cannot_be_shown_is_named(here, tmp_path, rule, mention):
    (tmp_path / "a.mp4").write_bytes(b"garbage" * 100)
    write_ours(tmp_path / "x.hdf5", {"a": np.ones((2, C))}, frames=rule)
    command = ["attention", "a", "--model_path", one_layer(here), "--videos", tmp_path]
    command += ["--feature_path", tmp_path / "x.hdf5", "--output", tmp_path / "x.png"]
    assert mention in refused(visualize.main, *command)


def one_layer(folder):
    """A model file with one layer, whose picture has one matrix."""
    arguments = dict(feature_size=C, nhead=4, nlayers=1, dim_feedforward=64)
    state = {"encoder": "tca", "arguments": arguments, "state_dict": untrained_tca(0).state_dict()}
    save_torch(folder / "one_layer.pth", state)
    return folder / "one_layer.pth"


# --- the command --------------------------------------------------------------------------------


def colours_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(np.unique(np.asarray(image.convert("L"))))


@pytest.mark.slow
def test_similarity_command_writes_a_picture(here, tmp_path):
    output = tmp_path / "x.png"
    result = cli("visualize.py", "similarity", "a/b", "one $", *flags(here, output))
    assert result.returncode == 0, result.stderr
    assert colours_of(output) > 20


def test_attention_command_draws_a_panel_for_each_layer(here, tmp_path):
    visualize.main([str(part) for part in ["attention", "a/b", *flags(here, tmp_path / "2.png")]])
    command = ["attention", "a/b", "--model_path", one_layer(here), "--feature_path"]
    command += [here / "x.hdf5", "--output", tmp_path / "1.png"]
    visualize.main([str(part) for part in command])
    widths = []
    for name in ("1.png", "2.png"):
        with Image.open(tmp_path / name) as image:
            widths.append(image.width)
    panel = visualize.SIDE * visualize.DPI
    assert panel < widths[1] - widths[0] < 1.2 * panel


@pytest.mark.parametrize("video", ["-0P0jxlzMSQ", "--x", "-f-", "-hOCqFdkdXI"])
def test_id_may_begin_with_a_dash(here, tmp_path, video):
    """Before the options and after them."""
    rows = np.random.default_rng(0).normal(size=(5, C))
    features = write_packed(tmp_path / "dash.hdf5", {video: rows, "other": rows})
    more = ["-mp", str(here / "model.pth"), "-fp", str(features), "--output"]
    visualize.main(["attention", video, *more, str(tmp_path / "1.png")])
    visualize.main(["similarity", *more, str(tmp_path / "2.png"), "other", video])
    assert colours_of(tmp_path / "1.png") > 20 < colours_of(tmp_path / "2.png")


def test_id_in_a_script_that_the_font_lacks_is_drawn_without_warnings(here, tmp_path):
    features = write_packed(tmp_path / "x.hdf5", {"電影": np.ones((5, C))})
    command = ["attention", "電影", "-mp", here / "model.pth", "-fp", features, "--output"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visualize.main([str(part) for part in [*command, tmp_path / "x.png"]])
    assert colours_of(tmp_path / "x.png") > 1


def test_curves_command_draws_logs(tmp_path):
    (tmp_path / "run").mkdir()
    lines = [f'{{"step": {step}, "epoch": 0, "loss": {9 - step}}}\n' for step in range(1, 9)]
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines))
    visualize.main(["curves", str(tmp_path / "run"), "--output", str(tmp_path / "x.png")])
    assert colours_of(tmp_path / "x.png") > 10


def test_refusals_are_one_line_and_write_nothing(here, tmp_path):
    output = tmp_path / "x.png"
    cases = [
        (["attention", "one $", *flags(here, output, "mean.pth")], "no attention"),
        (["attention", "gone", *flags(here, output)], "'gone'"),
        (["similarity", "a/b", "gone", *flags(here, output)], "'gone'"),
        (["attention", "a/b", *flags(here, output, "absent.pth")], "absent.pth"),
        (["attention", "a/b", *flags(here, output), "--videos", here], "--videos"),
        (["attention", "a/b", *flags(here, tmp_path / "x.jpg")], "x.jpg"),
        (["curves", tmp_path / "absent", "--output", output], "absent"),
        (["attention", "a/b", "--vidoes", here, *flags(here, output)], "--vidoes"),
        ([], "--help"),
    ]
    for command, mention in cases:
        assert mention in refused(visualize.main, *command)
    assert not list(tmp_path.iterdir())
