"""Pre-processing keeps its promises: which frames, which features, what happens to a broken video, and the PCA."""

import json
import re
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from conftest import cli, one_error, start
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pre-processing")]
import backbones  # noqa: E402
import extract_features as ex  # noqa: E402
import pca  # noqa: E402

from data import FeatureStore, StoreWriter  # noqa: E402
from utils import InputError  # noqa: E402

# --- material --------------------------------------------------------------------------------------------------------


def write_video(path, images, rate=10, times=None, codec="ffv1", pix_fmt="bgr0", source="rgb24", options=None):
    """A lossless video of `images` (h, w, 3) uint8; frame i at times[i] milliseconds, or at a constant rate."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[-2:] if source != "rgb24" else images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, source)
            frame.time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
            frame.pts = times[i] if times else i
            out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))


def numbered(n):
    """n small frames whose colour says their index."""
    return [np.full((32, 48, 3), (i % 256, i // 256, 77), np.uint8) for i in range(n)]


def index_of(image):
    return int(image[112, 112, 0]) + 256 * int(image[112, 112, 1])


def indices(path, **options):
    return [index_of(image) for image in ex.read_frames(ex.Video("v", path), **options)]


def write_audio(path, cover=False):
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        if cover:
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame(64, 64, "yuvj420p")))
            out.mux(picture.encode(None))
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.rate, frame.pts = 44100, i * 1024
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))


def textured(seed, n):
    """n frames of smooth noise that drifts: material in which features differ from frame to frame."""
    base = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return [np.roll(base, i, 1).repeat(8, 0).repeat(8, 1) for i in range(n)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of one to four seconds in a folder and a folder below it."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for i in range(12):
        write_video(folder / ("sub" if i % 2 else ".") / f"clip{i}.mkv", textured(i, 10 * (1 + i % 4)))
    return folder


def extract(*arguments):
    """The script's main in this process, on random weights; its exit status."""
    return ex.main([*map(str, arguments), "--weights", "random"])


def all_rows(path):
    store = FeatureStore(path)
    return {video: np.asarray(store[video], np.float32) for video in store}


# --- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(2, 3)])
def test_row_k_is_the_first_frame_at_or_after_second_k_at_any_constant_rate(tmp_path, rate):
    n = int(7 * rate) + 3
    times = [round(1000 * i / rate) for i in range(n)]  # Matroska counts in milliseconds
    write_video(tmp_path / "v.mkv", numbered(n), rate)
    expected = [next(i for i, t in enumerate(times) if t >= 1000 * k) for k in range(times[-1] // 1000 + 1)]
    assert indices(tmp_path / "v.mkv") == expected


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(2), Fraction(1, 2)])
def test_row_k_is_the_first_frame_at_or_after_its_time_at_a_variable_rate(tmp_path, fps):
    times = [0, 100, 900, 1001, 1300, 1400, 2900, 3000, 3050, 7200, 7300, 8000]  # 3050..7200: a still of four seconds
    write_video(tmp_path / "v.mkv", numbered(len(times)), 10, times)
    expected = []
    for k in range(100):
        late = [i for i, t in enumerate(times) if t >= k * 1000 / fps]
        expected += late[:1]
    assert indices(tmp_path / "v.mkv", fps=fps) == expected


def test_times_count_from_the_first_frame_and_survive_breaks_in_the_clock():
    clock = ex.Clock(Fraction(1, 1000), Fraction(10))
    # starts late, goes on, no timestamp, jumps by an hour, goes on, falls back, goes on
    now = [float(clock(pts)) for pts in (5000, 5500, None, 3_600_000, 3_600_200, 100, 300)]
    assert now == pytest.approx([0, 0.5, 0.6, 0.7, 0.9, 1.0, 1.2])


def test_released_rule_takes_every_rounded_rate_frame_from_the_end_of_the_first_second(tmp_path):
    write_video(tmp_path / "v.mkv", numbered(100), Fraction(30000, 1001))
    assert indices(tmp_path / "v.mkv", rule="released") == [29, 59, 89]
    write_video(tmp_path / "short.mkv", numbered(20), 25)
    with pytest.raises(ValueError, match="too short"):
        indices(tmp_path / "short.mkv", rule="released")
    assert indices(tmp_path / "short.mkv") == [0]


@pytest.mark.parametrize(
    "matrix, turns",
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)],
)
def test_a_clip_rotated_by_metadata_equals_the_upright_one(tmp_path, matrix, turns):
    """The track header's matrix (ISO 14496-12) carries (x, y) to (a x + c y, b x + d y), y downward."""
    small = np.random.default_rng(0).uniform(0, 1, (1, 1, 5, 7)).astype(np.float32)
    luma = (F.interpolate(torch.from_numpy(small), (256, 384), mode="bicubic")[0, 0].numpy() * 200 + 20).astype(np.uint8)

    def write(path, luma):
        frames = [np.stack([luma, np.full_like(luma, 100), np.full_like(luma, 150)])] * 3
        write_video(path, frames, 10, None, "libx264", "yuv444p", "yuv444p", {"qp": "0"})

    write(tmp_path / "lying.mp4", luma)
    write(tmp_path / "upright.mp4", np.ascontiguousarray(np.rot90(luma, turns)))
    data = bytearray((tmp_path / "lying.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at)[0] == 1 << 16
    a, b, c, d = (int(value * (1 << 16)) for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "lying.mp4").write_bytes(data)
    lying, upright = (next(ex.read_frames(ex.Video("v", tmp_path / f"{name}.mp4"))) for name in ("lying", "upright"))
    assert np.abs(lying.astype(int) - upright).max() <= 1


def test_frames_are_the_centre_of_a_bicubic_resize_to_256(tmp_path):
    from PIL import Image

    image = load_sample_image("china.jpg")  # 427 x 640
    write_video(tmp_path / "v.mkv", [image])
    ours = next(ex.read_frames(ex.Video("v", tmp_path / "v.mkv")))
    pillow = np.asarray(Image.fromarray(image).resize((383, 256), Image.BICUBIC))[16:240, 79:303]
    assert np.abs(ours.astype(int) - pillow).mean() < 1  # two programs' bicubic; a shift by one pixel gives 9


def test_a_file_cut_short_gives_the_frames_it_still_has(tmp_path):
    write_video(tmp_path / "whole.mkv", [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(80)])
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    video = ex.Video("v", tmp_path / "cut.mkv")
    assert 3 <= len(list(ex.read_frames(video))) <= 5 and 3.5 < video.seconds < 4.5


# --- which videos ----------------------------------------------------------------------------------------------------


def test_folder_list_and_pattern_find_the_same_videos(tmp_path):
    (tmp_path / "v" / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.c.MKV", "notes.txt", ".hidden.mp4"):
        (tmp_path / "v" / name).touch()
    (tmp_path / "list.tsv").write_text("a\tv/a.mp4\n\nsub/b.c\tv/sub/b.c.MKV\n")
    folder = ex.find_videos(str(tmp_path / "v"))
    assert folder == {"a": tmp_path / "v/a.mp4", "sub/b.c": tmp_path / "v/sub/b.c.MKV"}
    assert ex.find_videos(str(tmp_path / "list.tsv")) == folder
    assert ex.find_videos(f"{tmp_path}/v/{{id}}.mp4") == {"a": tmp_path / "v/a.mp4"}
    (tmp_path / "v/a.avi").touch()
    with pytest.raises(InputError, match="share the id 'a'"):
        ex.find_videos(str(tmp_path / "v"))
    (tmp_path / "bad.tsv").write_text("a\tv/a.mp4\nno tab here\n")
    with pytest.raises(InputError, match="line 2"):
        ex.find_videos(str(tmp_path / "bad.tsv"))


# --- backbones -------------------------------------------------------------------------------------------------------


def test_lite0_with_its_published_weights_recognises_photographs():
    model = backbones.EfficientNetLite0().eval()
    model.load_state_dict(torch.load(backbones._lite0_weights(), weights_only=True), strict=True)
    backbones.use_same_padding(model)
    spec = backbones.BACKBONES["efficientnet_lite0"]()
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):  # ImageNet's palace and daisy
        image = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None].float()  # (1, 3, 427, 640)
        image = F.interpolate(image, (256, 384), mode="bicubic", antialias=True)[:, :, 16:240, 80:304]
        with torch.inference_mode():
            assert model((image - spec.mean[0]) / spec.std[0]).argmax() == label


def test_lite0_is_given_the_input_it_was_trained_on():
    """On photographs the stem's outputs vary as its batch norm recorded in training; ImageNet's deviations give 6 times it."""
    state, spec = torch.load(backbones._lite0_weights(), weights_only=True), backbones.BACKBONES["efficientnet_lite0"]()
    images = torch.tensor(np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")])).permute(0, 3, 1, 2)
    x = (images - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    measured, recorded = F.conv2d(x, state["_conv_stem.weight"], stride=2).var((0, 2, 3)), state["_bn0.running_var"]
    alive = recorded > 1e-3  # a few filters of the stem are dead
    assert 0.5 < (measured / recorded)[alive].median() < 2


@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_in_the_kernel_equals_padding_the_map(kernel):
    """TensorFlow's rule: in all max(k - stride, 0) on an even size, the smaller half before."""
    conv = torch.nn.Conv2d(6, 6, kernel, 2, kernel // 2, groups=6, bias=False)
    x = torch.randn(2, 6, 14, 14)
    before, after = (kernel - 2) // 2, (kernel - 2) - (kernel - 2) // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, stride=2, groups=6)
    assert torch.allclose(backbones.use_same_padding(conv)(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_folding_batch_norm_changes_nothing(tmp_path, name):
    spec = backbones.BACKBONES[name]()
    model = spec.classifier()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not the trivial ones
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.7), (module.weight.data, 0.7)):
                tensor.uniform_(low, low + 0.5, generator=generator)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = backbones.build(name, tmp_path / "w.pth")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    seen = {}
    model = spec.finish(model.eval())
    for stage in spec.stages:
        model.get_submodule(stage).register_forward_hook(lambda m, i, out, stage=stage: seen.update({stage: out}))
    with torch.inference_mode():
        model((frames.float() - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None])
    for stage, ours in zip(spec.stages, backbone(frames), strict=True):
        assert (ours - seen[stage]).abs().max() <= 1e-4 * seen[stage].abs().max()


def test_stages_have_the_papers_and_our_widths():
    assert sum(backbones.build("efficientnet_lite0", "random").channels) == 1752
    assert backbones.build("resnet50", "random").channels == [256, 512, 1024, 2048]
    assert backbones.build("resnet18", "random", ["layer2", "layer3"]).channels == [128, 256]


def test_bfloat16_stays_near_float32():
    frames = torch.from_numpy(np.stack([load_sample_image("china.jpg")[100:324, 200:424]])).permute(0, 3, 1, 2)
    full, half = (backbones.build("efficientnet_lite0", amp=amp)(frames) for amp in (None, "bfloat16"))
    for x, y in zip(full, half, strict=True):
        assert y.dtype == torch.float32 and F.cosine_similarity(ex.imac(x), ex.imac(y)).min() > 0.99


@pytest.mark.parametrize(
    "name, weights, stages, message",
    [
        ("resnet51", None, None, "unknown backbone"),
        ("resnet18", "random", None, "needs --stages.*layer1"),
        ("resnet18", "random", ["layer9"], "layer9"),
        ("resnet50", "nowhere.pth", None, "not there"),
    ],
)
def test_a_wrong_backbone_is_an_input_error(name, weights, stages, message):
    with pytest.raises(InputError, match=message):
        backbones.build(name, weights, stages)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="do not fit resnet50"):
        backbones.build("resnet50", tmp_path / "w.pth")


def test_torchvision_operators_are_declared_only_beside_a_cpu_build_that_cannot_load_them(monkeypatch, tmp_path):
    (tmp_path / "_C.so").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: spec)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, None)

    def fails(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", fails)
    assert backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert not backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", fails)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, "12.8")
        assert not backbones._extension_is_missing()
        monkeypatch.setattr(torch.version, kind, None)


def test_torchvision_imports_and_nothing_is_declared_where_it_need_not_be():
    code = """
import sys; sys.path[:0] = [{root!r}, {pre!r}]
import backbones
missing = backbones._extension_is_missing()
assert backbones.import_torchvision().models.resnet18
assert len(backbones._declared) == missing
""".format(root=str(ROOT), pre=str(ROOT / "pre-processing"))
    code += "backbones.import_torchvision(); assert len(backbones._declared) == missing"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


# --- pooling ---------------------------------------------------------------------------------------------------------


def l2(x):
    return x / np.sqrt((x * x).sum())


def imac_by_loops(x):  # (c, h, w) -> (c,)
    c, h, w = x.shape
    out = np.full(c, -np.inf)
    for i in range(h):
        for j in range(w):
            out = np.maximum(out, l2(x[:, i, j]))
    return l2(out)


def l3_imac_by_loops(x, p):
    c, h, w = x.shape
    k, total = int(1.5 * p), np.zeros(c)
    for top in range(0, h - k + 1, p):
        for left in range(0, w - k + 1, p):
            region = np.full(c, -np.inf)
            for i in range(top, top + k):
                for j in range(left, left + k):
                    region = np.maximum(region, l2(x[:, i, j]))
            total += l2(region)
    return l2(total)


@pytest.mark.parametrize("size, p", [((7, 7), 2), ((14, 14), 4), ((28, 28), 8), ((8, 14), 2), ((3, 3), 1), ((1, 1), 1)])
def test_imac_and_l3_imac_equal_plain_loops(size, p):
    x = np.random.default_rng(0).normal(size=(2, 5, *size)) + 0.3
    for pool, loops in ((ex.imac, imac_by_loops), (ex.l3_imac, lambda m: l3_imac_by_loops(m, p))):
        ours = pool(torch.from_numpy(x)).numpy()
        assert np.allclose(ours, [loops(m) for m in x], atol=1e-10)


def test_mac_spoc_and_gem_equal_their_definitions():
    x = np.random.default_rng(0).uniform(0.1, 1, (2, 5, 4, 6))
    flat = x.reshape(2, 5, 24)
    for name, pooled in (("mac", flat.max(2)), ("spoc", flat.mean(2)), ("gem", (flat**3).mean(2) ** (1 / 3))):
        assert np.allclose(ex.POOLINGS[name](torch.from_numpy(x)), [l2(row) for row in pooled], atol=1e-10)


# --- extraction ------------------------------------------------------------------------------------------------------


def test_a_broken_video_is_named_counted_and_skipped(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "good.mkv", textured(0, 25))
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (folder / "empty.mp4").touch()
    write_audio(folder / "sound.mp4")
    write_audio(folder / "cover.mp4", cover=True)
    done = cli("pre-processing/extract_features.py", folder, "--output", tmp_path / "f.hdf5")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "5 videos: 1 in" in done.stderr and "4 failed" in done.stderr
    assert all(f"skipped {name}: " in done.stderr for name in ("noise", "empty", "sound", "cover"))
    assert {video: len(rows) for video, rows in all_rows(tmp_path / "f.hdf5").items()} == {"good": 3}
    report = json.loads((tmp_path / "f.json").read_text())["videos"]
    assert report["good"] | {"path": ""} == {
        "path": "", "status": "ok", "frames": 3, "seconds": 2.5, "corrupt_packets": 0, "reason": "",
    }  # fmt: skip
    assert all("no video stream" in report[name]["reason"] for name in ("sound", "cover"))
    assert all("Invalid data" in report[name]["reason"] and not report[name]["frames"] for name in ("noise", "empty"))


def test_when_every_video_fails_no_store_is_written(tmp_path):
    (tmp_path / "list.tsv").write_text("a\tnowhere.mp4\nb\tlist.tsv\n")
    assert extract(tmp_path / "list.tsv", "--output", tmp_path / "f.hdf5") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"list.tsv", "f.json"}
    report = json.loads((tmp_path / "f.json").read_text())["videos"]
    assert "No such file" in report["a"]["reason"] and report["b"]["status"] == "failed"


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3)])
def test_batches_across_videos_give_what_one_video_at_a_time_gives(tmp_path, clips, dtype, tolerance):
    together, apart = tmp_path / "together.hdf5", tmp_path / "apart.hdf5"
    assert extract(clips, "--output", together, "--dtype", dtype, "--batch_sz", 64) == 0
    assert extract(clips, "--output", apart, "--dtype", dtype, "--batch_sz", 1, "--workers", 1) == 0
    together, apart = all_rows(together), all_rows(apart)
    assert {video: len(rows) for video, rows in together.items()} == {
        f"{'sub/' if i % 2 else ''}clip{i}": 1 + i % 4 for i in range(12)
    }
    assert all(np.abs(together[video] - apart[video]).max() <= tolerance for video in apart)
    assert np.abs(apart["sub/clip3"][0] - apart["sub/clip3"][1]).max() > 10 * tolerance  # the rows do differ


def test_rows_are_the_pooled_stages_of_the_frames(tmp_path):
    images = textured(3, 25)
    write_video(tmp_path / "v.mkv", images)
    (tmp_path / "list.tsv").write_text("v\tv.mkv\n")
    extract(tmp_path / "list.tsv", "--output", tmp_path / "f.hdf5", "--dtype", "float32", "--pooling", "l3_imac")
    backbone = backbones.build("efficientnet_lite0", "random")
    for k, row in enumerate(all_rows(tmp_path / "f.hdf5")["v"]):
        image = ex.prepare(av.VideoFrame.from_ndarray(images[10 * k], "rgb24"))
        stages = backbone(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        parts = [l3_imac_by_loops(m[0].double().numpy(), int(m.shape[2] * 2 / 7)) for m in stages]
        assert np.allclose(row, np.concatenate(parts), atol=1e-4)


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(16):
        write_video(folder / f"{i:02}.mkv", textured(i, 40))
    arguments = ["--output", tmp_path / "f.hdf5", "--weights", "random", "--batch_sz", "1", "--workers", "1"]
    process = start("pre-processing/extract_features.py", folder, *arguments)
    journal, deadline = tmp_path / "f.hdf5.part.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / "f.hdf5").exists()
    done = cli("pre-processing/extract_features.py", folder, *arguments)
    assert done.returncode == 0 and re.search(r"going on: ([3-9]|1[0-5]) of 16 videos", done.stderr)
    assert extract(folder, "--output", tmp_path / "unbroken.hdf5") == 0
    broken, unbroken = all_rows(tmp_path / "f.hdf5"), all_rows(tmp_path / "unbroken.hdf5")
    assert list(broken) == list(unbroken) and len(broken) == 16
    assert all(np.abs(broken[video] - unbroken[video]).max() <= 1e-3 for video in unbroken)
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "f.hdf5", "f.json", "unbroken.hdf5", "unbroken.json"}


def test_frames_in_memory_follow_the_batch_not_the_video(tmp_path, monkeypatch):
    write_video(tmp_path / "long.mkv", numbered(300))
    lock, alive, history = threading.Lock(), 0, []

    def count(change):
        nonlocal alive
        with lock:
            alive += change
            history.append(alive)

    def prepare(frame, original=ex.prepare):
        count(1)
        return original(frame)

    def features(frames):
        time.sleep(0.01)
        count(-len(frames))
        return np.array([[index_of(frame)] for frame in frames])

    monkeypatch.setattr(ex, "prepare", prepare)
    options = ex.parse([str(tmp_path), "--output", "f.hdf5", "--fps", "10", "--batch_sz", "2"])
    options.streams = 2
    (video,) = ex.extract([ex.Video("v", tmp_path / "long.mkv")], features, options)
    assert np.concatenate(video.rows).tolist() == list(range(300))
    assert max(history) <= 2 * 2 + 2 * (2 + 2) + 1  # the queue, batches under way and being cut, one in a decoder's hand


def test_an_error_of_ours_in_a_decoder_stops_the_run(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mkv", numbered(3))
    monkeypatch.setattr(ex, "prepare", lambda frame: frame.no_such_thing)
    options = ex.parse([str(tmp_path), "--output", "f.hdf5"])
    with pytest.raises(AttributeError):
        list(ex.extract([ex.Video("v", tmp_path / "v.mkv")], None, options))


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("extract_features.py", ["nowhere", "--output", "f.hdf5"], "'nowhere' is not there"),
        ("extract_features.py", ["hollow", "--output", "f.hdf5"], "holds no video"),
        ("extract_features.py", ["videos", "--output", "f.hdf5", "--backbone", "resnet51"], "unknown backbone 'resnet51'"),
        ("extract_features.py", ["videos", "--output", "f.hdf5", "--pca", "narrow.npz"], "width 1752.*width 4"),
        ("pca.py", ["apply", "small.hdf5", "--pca", "narrow.npz", "--output", "f.hdf5"], "width 6.*width 4"),
        ("pca.py", ["apply", "small.hdf5", "--pca", "small.hdf5", "--output", "f.hdf5"], "not a .npz"),
        ("pca.py", ["fit", "small.hdf5", "--components", "7", "--output", "f.npz"], "in 6 directions only"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(tmp_path, monkeypatch, script, arguments, message):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mkv", numbered(3))
    write_store(tmp_path / "small.hdf5", np.random.default_rng(0).normal(size=(40, 6)))
    np.savez(tmp_path / "narrow.npz", mean=np.zeros(4), components=np.eye(4)[:2], variance=np.ones(2), whiten=True)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr("conftest.ROOT", tmp_path)  # where the script runs
    assert re.search(message, one_error(cli(ROOT / "pre-processing" / script, *arguments)))
    assert set(tmp_path.iterdir()) == before


# --- pca -------------------------------------------------------------------------------------------------------------


def write_store(path, *videos):
    with StoreWriter(path, "float32", {"kind": "test"}) as writer:
        for i, rows in enumerate(videos):
            writer.add(f"v{i}", rows)


@pytest.fixture
def features(tmp_path):
    """300 rows of 12 correlated channels in a store of three videos; returns its path and the rows."""
    generator = np.random.default_rng(5)
    x = (generator.normal(size=(300, 12)) @ generator.normal(size=(12, 12)) + 3).astype(np.float32)
    write_store(tmp_path / "x.hdf5", x[:100], x[100:130], x[130:])
    return tmp_path / "x.hdf5", x


@pytest.mark.parametrize("whiten", [True, False])
def test_pca_equals_scikit_learn(tmp_path, features, whiten):
    path, x = features
    fit = ["fit", str(path), "--components", "5", "--frames_per_video", "1000", "--output", str(tmp_path / "p.npz")]
    pca.main(fit if whiten else [*fit, "--no_whiten"])
    pca.main(["apply", str(path), "--pca", str(tmp_path / "p.npz"), "--output", str(tmp_path / "y.hdf5"), "--dtype", "float32"])
    store = FeatureStore(tmp_path / "y.hdf5")
    ours = np.concatenate([store[f"v{i}"] for i in range(3)])
    expected = PCA(5, whiten=whiten, svd_solver="full").fit_transform(x.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(ours - expected).max() < 1e-4
    assert store.meta["kind"] == "test" and store.meta["pca"].startswith("p.npz")


def test_pca_of_chunks_equals_pca_of_the_whole(features, monkeypatch):
    _, x = features
    monkeypatch.setattr(pca, "_draw", lambda *_: (x[i : i + 7].astype(np.float64) for i in range(0, 300, 7)))
    mean, components, variance, n = pca.fit([], 12)
    reference = PCA(12, svd_solver="full").fit(x.astype(np.float64))
    assert n == 300 and np.allclose(mean, reference.mean_)
    assert np.allclose(variance, reference.explained_variance_) and np.allclose(components, reference.components_, atol=1e-6)


def test_pca_draws_so_many_frames_of_each_video_and_the_same_for_a_seed(features):
    store = FeatureStore(features[0])
    first, again, other = (pca.fit([store], 3, 10, seed) for seed in (0, 0, 1))
    assert first[3] == 30 and np.array_equal(first[1], again[1]) and not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("transposed, ascending", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("width", [12, 8])
def test_the_released_codes_parameters_load_either_way_round(tmp_path, features, transposed, ascending, width):
    _, x = features
    mu = x.mean(0).astype(np.float64)
    lams, vectors = np.linalg.eigh(np.cov(x.astype(np.float64).T))
    lams, u = lams[::-1][:width], vectors.T[::-1][:width]
    expected = (x @ u.T - u @ mu) / np.sqrt(lams)
    expected = expected[:, :6] / np.linalg.norm(expected[:, :6], axis=1, keepdims=True)
    order = slice(None, None, -1) if ascending else slice(None)
    lams, u = lams[order], u[order]
    np.savez(tmp_path / "r.npz", U=u.T if transposed else u, lams=lams, mu=mu, Utmu=u @ mu)
    assert np.abs(pca.load(tmp_path / "r.npz", 6)(x) - expected).max() < 1e-4


def test_extraction_with_a_pca_equals_extraction_then_pca(tmp_path, clips):
    plain, after, within = (tmp_path / name for name in ("plain.hdf5", "after.hdf5", "within.hdf5"))
    extract(clips, "--output", plain, "--dtype", "float32", "--stages", "_blocks.4")
    pca.main(["fit", str(plain), "--components", "8", "--output", str(tmp_path / "p.npz"), "--no_whiten"])
    pca.main(["apply", str(plain), "--pca", str(tmp_path / "p.npz"), "--output", str(after), "--components", "4"])
    extract(clips, "--output", within, "--stages", "_blocks.4", "--pca", tmp_path / "p.npz", "--components", 4)
    after, within = all_rows(after), all_rows(within)
    assert FeatureStore(tmp_path / "within.hdf5").channels == 4
    assert all(np.abs(after[video] - within[video]).max() < 2e-3 for video in after)
