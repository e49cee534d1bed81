"""Rankings that end early, as result files do: on every official set, by formulas.

A perfect list of k videos has precision 1 at each of its ranks. So its AP is min(k, R) / R, R the
number of videos to find, by either definition of AP. The query is in none of these lists, unless
the set ranks it.
"""

import json
import pickle

import pytest
from helpers.commands import call, refused
from helpers.feature_files import folder_contents, write_released
from helpers.oracles import TASKS, mean

from evaluation import main


def read_pickle(path):
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def fivr_lists(folder, queries, database):
    """{metric: {query: [R videos]}}, R counting the query where it is in its own list."""
    labels = json.loads((folder / "fivr_annotation.json").read_text())
    lists = {}
    for task, of_task in TASKS.items():
        lists[task] = {}
        for query in queries:
            videos = {video for label in of_task for video in labels[query].get(label, [])}
            lists[task][query] = sorted(videos & database)
    return lists


def lists_of(name, folder):
    """{metric: {query: the videos to find}} of an official set; None for a positive without id."""
    if name == "FIVR-5K":
        small = read_pickle(folder / "fivr.pickle")["5k"]
        return fivr_lists(folder, small["queries"], set(small["database"]))
    if name == "FIVR-200K":
        labels = json.loads((folder / "fivr_annotation.json").read_text())
        return fivr_lists(
            folder, labels, set((folder / "fivr_youtube_ids.txt").read_text().split())
        )
    if name == "CC_WEB_VIDEO":
        data = read_pickle(folder / "cc_web_video.pickle")
        names = {number: video for video, number in data["index"].items()}
        lists = {"cc_web": {}, "cc_web_c": {}}
        for query, labels, excluded in zip(
            data["queries"], data["ground_truth"], data["excluded"], strict=True
        ):
            positive = [number for number, label in labels.items() if label in "ESLMV"]
            lists["cc_web"][query] = [names.get(number) for number in positive]
            kept = [number for number in positive if number not in excluded]
            lists["cc_web_c"][query] = [names.get(number) for number in kept]
        return lists
    if name == "EVVE":
        data = read_pickle(folder / "evve.pickle")
        positives = {}
        for queries, of_event, _ in data["annotation"].values():
            positives.update(dict.fromkeys(queries, sorted(of_event)))
        return {"mAP": positives}
    partners = {}
    for pair in read_pickle(folder / "vcdb.pickle")["video_pairs"]:
        first, second = pair["videos"]
        partners.setdefault(first, set()).add(second)
        partners.setdefault(second, set()).add(first)
    return {"mAP": {query: sorted(videos - {query}) for query, videos in partners.items()}}


def perfect_lists(lists, k):
    """{query: {video: similarity}}, the first k videos that can be listed."""
    table = {}
    for query, videos in lists.items():
        listed = [video for video in videos if video not in (None, query)][:k]
        table[query] = {video: 1 - rank / 1000 for rank, video in enumerate(listed)}
    return table


def mean_of_perfect(lists, table):
    """The mean over queries of min(k, R) / R."""
    return mean([len(table[query]) / len(videos) for query, videos in lists.items() if videos])


def score(name, annotations, folder, table, *flags):
    """(what is printed, the record) of evaluation.py on a table."""
    (folder / "table.json").write_text(json.dumps(table))
    command = ["--dataset", name, "--annotation_dir", annotations, "--device", "cpu"]
    command += ["--similarities", folder / "table.json", "--output", folder / "out.json"]
    printed = call(main, *command, *flags).stdout
    return printed, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", ["FIVR-5K", "FIVR-200K", "CC_WEB_VIDEO", "EVVE", "VCDB"])
@pytest.mark.parametrize("k", [1, 10])
def test_perfect_list_of_k_videos_on_official_sets(annotations, tmp_path, name, k):
    for metric, lists in lists_of(name, annotations).items():
        table = perfect_lists(lists, k)
        printed, record = score(name, annotations, tmp_path, table)
        (figures,) = record["figures"]["table"]
        assert figures[metric] == pytest.approx(mean_of_perfect(lists, table), abs=1e-12)
        if (name, metric, k) == ("FIVR-5K", "DSVR", 10):
            assert f"{figures[metric]:.3f}" == "0.640"
        assert f"{len(lists)} queries (0 missing)" in printed
        assert record["coverage"]["videos_missing"] == 0
        assert record["searched"] == "the whole set"


def test_absent_row_counts_as_an_empty_one_on_official_sets(annotations, tmp_path):
    """CC_WEB_VIDEO's queries are in its database, so the row of one lists all the others."""
    lists = lists_of("CC_WEB_VIDEO", annotations)["cc_web"]
    first, *others = lists
    table = {first: perfect_lists(lists, 1000)[first] | dict.fromkeys(others, -1.0)}
    for rows in (table, table | {query: {} for query in others}):
        printed, record = score("CC_WEB_VIDEO", annotations, tmp_path, rows)
        found = len([video for video in lists[first] if video != first])
        expected = found / len(lists[first]) / 24
        assert record["figures"]["table"][0]["cc_web"] == pytest.approx(expected, abs=1e-12)
        assert "24 queries (0 missing), 13115 videos (0 missing)" in printed
        assert record["unlisted"]["queries"] == len(others) * (rows is table)


def test_searched_names_what_a_system_could_find(world, tmp_path):
    """The videos without features are left out, as from a feature file that lacks them."""
    part = world.test
    gone = {*list(part.labels)[:2], *part.database[1::7]}
    searched = [video for video in part.database if video not in gone]
    (tmp_path / "ids.txt").write_text("\n".join([*searched, "not of the set"]) + "\n")
    table, expected = {}, []
    for query, labels in part.labels.items():
        relevant = [video for label in ("ND", "DS") for video in labels[label]]
        relevant = [video for video in relevant if video in searched]
        if query in searched:
            table[query] = {video: 1.0 for video in relevant[:1]}
            expected += [len(relevant[:1]) / len(relevant)] if relevant else []
    flags = ["--searched", tmp_path / "ids.txt"]
    printed, record = score("DEMO", world.annotations, tmp_path, table, *flags)
    assert record["figures"]["table"][0]["DSVR"] == pytest.approx(mean(expected))
    missing = [query for query in part.labels if query not in searched]
    assert f"{10 - len(missing)} queries ({len(missing)} missing)" in printed
    assert f"{len(searched)} videos ({80 - len(searched)} missing)" in printed
    _, whole = score("DEMO", world.annotations, tmp_path, table)
    assert whole["figures"]["table"][0]["DSVR"] < record["figures"]["table"][0]["DSVR"]
    assert whole["unlisted"]["queries"] == len(missing)


def test_searched_list_that_does_not_fit_is_refused(world, tmp_path):
    command = ["--dataset", "DEMO", "--annotation_dir", world.annotations, "--device", "cpu"]
    query, video = list(world.test.labels)[0], world.test.database[5]
    (tmp_path / "table.json").write_text(json.dumps({query: {video: 1.0}}))
    before = folder_contents(tmp_path)
    output = ["--similarities", tmp_path / "table.json", "--output", tmp_path / "out.json"]
    for ids, mention in (("", "empty"), (query, repr(video)), (video, repr(query))):
        (tmp_path / "ids.txt").write_text(f"{ids}\n")
        message = refused(main, *command, *output, "--searched", tmp_path / "ids.txt")
        assert mention in message and "--searched" in message
    assert folder_contents(tmp_path).keys() == before.keys() | {"ids.txt"}


def test_saved_similarities_of_some_features_are_scored_again(world, tmp_path):
    """The file has the ids with features; --searched names them."""
    part, gone = world.test, {*list(world.test.labels)[:2], *world.test.database[1::7]}
    features = {video: rows for video, rows in part.features.items() if video not in gone}
    command = ["--dataset", "DEMO", "--annotation_dir", world.annotations, "--device", "cpu"]
    command += ["--feature_path", write_released(tmp_path / "some.hdf5", features)]
    command += ["--encoder", "mean", "--save_similarities", tmp_path / "table.json"]
    result = call(main, *command, "--output", tmp_path / "first.json")
    assert "--searched" in result.stderr
    first = json.loads((tmp_path / "first.json").read_text())
    (tmp_path / "ids.txt").write_text("\n".join(features))
    table = json.loads((tmp_path / "table.json").read_text())
    flags = ["--searched", tmp_path / "ids.txt"]
    _, again = score("DEMO", world.annotations, tmp_path, table, *flags)
    assert again["figures"]["table"] == first["figures"]["mean, untrained"]
    assert again["coverage"] == first["coverage"]
