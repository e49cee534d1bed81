"""Calibration: thresholds, recall, localisation and the radius, against loops and by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import refused

from datasets.demo import edits, plan
from model import TCA, load_encoder
from videoindex import calibrate
from videoindex.calibration_data import DemoPart, SingleEditCopies, single_edit_clip
from videoindex.pipeline import CALIBRATION, SHIPPED
from videoindex.store import Content


def segment(film, video, edit_names=()):
    return {"film": list(film), "video": list(video), "edits": [[name, {}] for name in edit_names]}


def facts(role, source, *segments, edit_names=()):
    return {
        "role": role,
        "source": source,
        "edits": [[name, {}] for name in edit_names],
        "segments": list(segments),
    }


FACTS = {
    "q": facts("query", "", segment((100, 110), (0, 10))),
    "whole": facts("copy", "q", segment((100, 110), (0, 10)), edit_names=["mirror"]),
    "short": facts("copy", "q", segment((103, 110), (0, 7)), edit_names=["caption", "crop"]),
    "inside": facts("excerpt", "q", segment((0, 3), (0, 3)), segment((104, 108), (3, 7), ["hue"])),
    "touching": facts("window", "", segment((109, 115), (0, 6))),
    "other": facts("window", "", segment((300, 306), (0, 6))),
}
LABELS = {"q": {"ND": ["whole", "short"], "DS": ["inside"], "CS": [], "IS": ["touching"]}}


@pytest.fixture
def part():
    """A part of the demo with one query, its copies, and two other videos."""
    part = DemoPart.__new__(DemoPart)
    part.facts, part.labels = FACTS, LABELS
    part.set = SimpleNamespace(queries=["q"], database=list(FACTS))
    part.index = SimpleNamespace(fps=1)
    return part


TABLE = np.array([[1.0, 0.9, 0.3, 0.8, 0.2, 0.1]])  # scores of "q" with the videos of FACTS


# --- what is measured on ------------------------------------------------------------------------


def test_true_segments_follow_from_how_a_copy_was_made(part):
    part.facts = {
        "q": facts("query", "", segment((100, 110), (0, 10))),
        # The second segment plays twice as fast.
        "v": facts("copy", "q", segment((0, 4), (0, 2)), segment((104, 120), (2, 10))),
    }
    assert part.true_segments("q", "v") == [(4.0, 10.0, 2.0, 5.0)]


def test_labelled_scores(part):
    """The query itself is left out; a pair that shares less than 2 s of film is named."""
    scores, labels = part.labelled_scores(TABLE)
    assert scores.tolist() == TABLE[0, 1:].tolist()
    assert labels.tolist() == ["ND", "ND", "DS", "film", ""]


def test_recall_by_kind(part):
    rows = calibrate.recall_by_kind(part, TABLE, threshold=0.5)
    assert rows == {
        "copies": [1, 2],
        "excerpts": [1, 1],
        "mirrored": [1, 1],
        "bordered": [0, 0],
        "captioned": [0, 1],
        "re-coloured": [1, 1],
        "cropped": [0, 1],
        "speed-changed": [0, 0],
        "trimmed": [0, 1],  # "short" shows 7 of 10 s
    }


def test_single_edit_clip_has_one_edit_of_its_kind():
    for kind, names in calibrate.EDIT_KINDS.items():
        clip = single_edit_clip("test_q00", kind, 250, 260)
        ((name, _),) = clip.edits
        assert name in names and clip.pieces == (plan.Piece(250, 260),)
        assert clip == single_edit_clip("test_q00", kind, 250, 260), "drawn from the names alone"
    clip = single_edit_clip("test_q00", "trimmed", 250, 260)
    (piece,) = clip.pieces
    assert not clip.edits and 250 <= piece.start < piece.end <= 260
    assert 5 <= piece.end - piece.start <= 8 + 1 / edits.FPS


def test_true_segment_of_a_single_edit():
    copies = SingleEditCopies.__new__(SingleEditCopies)
    # The query shows the film at half speed.
    copies.test = SimpleNamespace(facts={"q": facts("query", "", segment((100, 110), (0, 20)))})
    clip = plan.Clip(
        id="q speed-changed",
        part="test",
        role="copy",
        source="q",
        grade=1,
        pieces=(plan.Piece(102, 108),),
        edits=(["faster", {"factor": 1.5}],),
        encoding={},
    )
    assert copies.true_segment("q", clip) == pytest.approx([4, 16, 0, 4])


# --- what is measured ---------------------------------------------------------------------------


def test_lowest_threshold_keeps_the_precision():
    rng = np.random.default_rng(11)
    scores = rng.uniform(size=400)
    is_right = rng.uniform(size=400) < scores**0.2
    threshold = calibrate.lowest_threshold(scores, is_right, 0.95)
    allowed = [s for s in scores if is_right[scores >= s].mean() >= 0.95]
    assert threshold == min(allowed) and (scores >= threshold).sum() > 10
    assert calibrate.lowest_threshold(scores, np.zeros(400, bool)) == float("inf")


def test_localisation_errors_of_known_shifts(part):
    """Frames 2 to 9 of the query are shown at 1 to 8 in one video, and not at all in the other."""
    frames = np.eye(30, dtype=np.float32)
    part.facts = {
        "q": facts("query", "", segment((100, 112), (0, 12))),
        "shifted": facts("copy", "q", segment((103, 110), (1, 8))),
        "lost": facts("copy", "q", segment((100, 110), (0, 10))),
    }
    part.set = SimpleNamespace(queries=["q"], database=list(part.facts))
    part.frames = {"q": frames[:12], "lost": frames[20:30]}
    part.frames["shifted"] = np.concatenate([frames[15:16], frames[2:10], frames[16:17]])
    table = np.array([[1.0, 0.9, 0.8]])
    options = {"min_similarity": 0.5}
    errors, missing = calibrate.localisation_errors(part, table, 0.5, options)
    # Found: query 2 to 10, video 1 to 9. True: query 3 to 10, video 1 to 8.
    assert errors.tolist() == [[1, 0, 0, 1]] and missing == 1
    assert calibrate.localisation(part, table, 0.5, options) == {
        "videos": 1,
        "without_stretch": 1,
        "median_seconds": {
            "query start": 1.0,
            "query end": 0.0,
            "video start": 0.0,
            "video end": 1.0,
        },
        "median_seconds_all_ends": 0.5,
        "within_1_second": 1.0,
    }
    errors, missing = calibrate.localisation_errors(part, table, 0.85, options)
    assert len(errors) == 1 and missing == 0, "a copy below the threshold does not count"


def test_choose_align_options_takes_the_lowest_error(part):
    """The lowest value above the .3 that strangers have: it finds the segment's true ends."""
    rng = np.random.default_rng(4)
    signal = np.eye(40, dtype=np.float32)[:10]
    part.facts = {
        "q": facts("query", "", segment((100, 110), (0, 10))),
        "v": facts("copy", "q", segment((103, 107), (3, 7))),
    }
    part.set = SimpleNamespace(queries=["q"], database=["q", "v"])
    copy = 0.3 * signal  # elsewhere the frames are a little alike
    copy[3:7] = 0.6 * signal[3:7]
    part.frames = {"q": signal, "v": copy + 1e-3 * rng.normal(size=copy.shape)}
    chosen = calibrate.choose_align_options(part, np.array([[1.0, 1.0]]), threshold=0.5)
    assert chosen == {"min_similarity": 0.35}


def test_choose_radius_keeps_99_percent_of_the_found_copies(part):
    rng = np.random.default_rng(5)
    database = [f"v{i}" for i in range(40)]
    part.set = SimpleNamespace(queries=["v0", "v1"], database=database)
    windows = {video: rng.normal(size=(rng.integers(1, 4), 8)) for video in database}
    part.contents = {
        video: Content(i, "", 1.0, 1, 0, 1, 0, b"", 0, 0) for i, video in enumerate(database)
    }
    store = SimpleNamespace(window_descriptors=lambda content: windows[f"v{content.id}"])
    part.index = SimpleNamespace(store=store)
    nearest = []
    for query in ("v0", "v1"):
        for video in database:
            if video != query:
                best = max(float(a @ b) for a in windows[query] for b in windows[video])
                nearest.append(best)
    found = rng.uniform(size=len(nearest)) < 0.6
    radius, share = calibrate.choose_radius(part, found)
    kept = [value for value, is_found in zip(nearest, found, strict=True) if is_found]
    assert radius == pytest.approx(np.percentile(kept, 1))
    assert share == pytest.approx(sum(value >= radius for value in nearest) / len(nearest))


# --- the command --------------------------------------------------------------------------------


def test_pack_halves_the_large_arrays(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {
        "components": rng.normal(size=(4, 8)),
        "mean": rng.normal(size=8),
        "variance": rng.uniform(1e-9, 1e9, size=4),
        "whiten": np.array(True),
    }
    np.savez(tmp_path / "pca.npz", **arrays)
    sizes = {"feature_size": 8, "nhead": 2, "dim_feedforward": 16}
    encoder = TCA(**sizes)
    model = {"encoder": "tca", "arguments": sizes, "state_dict": encoder.state_dict()}
    (tmp_path / "run").mkdir()
    torch.save(model, tmp_path / "run" / "model.pth")
    output = tmp_path / "packed"
    arguments = ["--pca", tmp_path / "pca.npz", "--model_path", tmp_path / "run"]
    calibrate.main(["pack", *map(str, arguments), "--output", str(output)])

    with np.load(output / "pca.npz") as packed:
        dtypes = {name: str(packed[name].dtype) for name in packed.files}
        assert dtypes == {
            "components": "float16",
            "mean": "float32",
            "variance": "float32",
            "whiten": "bool",
        }
        for name, array in arrays.items():
            assert packed[name] == pytest.approx(array, rel=1e-3, abs=1e-3)
    saved = torch.load(output / "model.pth", weights_only=True)
    for name, value in encoder.state_dict().items():
        assert saved["state_dict"][name].dtype == torch.float16
        assert torch.equal(saved["state_dict"][name], value.half())
    assert load_encoder(output)[0] == "tca"

    torch.save(encoder.state_dict(), tmp_path / "bare.pth")
    arguments[-1] = tmp_path / "bare.pth"
    message = refused(calibrate.main, "pack", *arguments, "--output", output)
    assert "is not a model.pth of train.py" in message


def test_print_entry_shows_the_shipped_calibration(capsys):
    """Every row of calibration.json, with its share."""
    entries = json.loads((SHIPPED / CALIBRATION).read_text())
    calibrate.print_entry("tca", entries["tca"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tca, tn, mAP: DSVR 0.")
    found, of = entries["tca"]["recall_by_kind"]["mirrored"]
    assert f"  mirrored               {found} of  {of}  {found / of:.1%}" in lines
    assert any(line.startswith("  mirrored only ") for line in lines)
