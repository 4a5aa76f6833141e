"""The report says what the results say, and no more; its PDF has pages for all of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import report

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"


@pytest.fixture
def study(tmp_path):
    """A copy of the reference results without figures, and its summary to change."""
    for folder in ("runs", "evaluations"):
        shutil.copytree(REFERENCE / folder, tmp_path / folder)
    summary = json.loads((REFERENCE / "summary.json").read_text())
    del summary["checksum"]  # tests change it
    return tmp_path, summary


def write(study):
    """Run the command on a study; return the report's words with single spaces between them."""
    folder, summary = study
    (folder / "summary.json").write_text(json.dumps(summary))
    report.main(["--output", str(folder)])
    return " ".join((folder / "report.md").read_text().split())


def words_of(difference, half, p_value, method="exact McNemar test"):
    line = {"a": "plain CNN", "b": "residual CNN", "difference": difference, "p_value": p_value}
    line["interval_95"] = [difference - half, difference + half]
    summary = {"comparisons": [{**line, "different": p_value < 0.05, "method": method}]}
    return " ".join(report.describe_pair(summary, "residual CNN", "plain CNN").split())


def test_only_a_difference_beyond_chance_is_called_one():
    sentence = words_of(-0.018, 0.05, 0.6)
    assert "residual CNN is 1.8 points better than plain CNN" in sentence
    assert "95% interval -3.2 to +6.8, p = 0.6, exact McNemar test" in sentence
    assert "can't tell them apart" in sentence
    sentence = words_of(0.2, 0.05, 0.0001, method="over photos and 3 seeds")
    assert "20.0 points worse" in sentence and "p < 0.001, over photos and 3 seeds)." in sentence
    assert "tell them apart" not in sentence


def test_equal_models_are_as_accurate_and_pairs_not_compared_are_not_mentioned():
    assert "exactly as accurate as plain CNN (95% interval -5.0 to +5.0" in words_of(0, 0.05, 1)
    assert words_of(0, 0, 1).endswith("is exactly as accurate as plain CNN.")
    assert report.describe_pair({"comparisons": []}, "plain CNN", "another") == ""


def test_a_table_of_comparisons_says_what_is_decided():
    line = {"interval_95": [-0.09, -0.01], "p_value": 0.02, "difference": -0.05}
    line["method"] = "exact McNemar test"
    lines = [{**line, "a": "A", "b": "B"}, {**line, "a": "A", "b": "C", "p_value": 0.04}]
    pairs = [("B", "A"), ("A", "C"), ("A", "A")]
    verdict, rows = report.compare_pairs({"comparisons": lines}, pairs, "whether A helps")
    assert verdict == "1 of 2 paired comparisons decides whether A helps: B is better than A."
    assert "| B | A         | +5.0          | +1.0 to +9.0 | 0.02 | exact McNemar test |" in rows
    assert "p < 0.025: 0.05 divided by the number of pairs, so that more than an interval" in rows
    verdict, _ = report.compare_pairs({"comparisons": lines[1:]}, pairs, "whether A helps")
    assert verdict == "1 of 1 paired comparisons decides whether A helps: A is worse than C."
    lines[1]["p_value"] = 0.06
    verdict, _ = report.compare_pairs({"comparisons": lines[1:]}, pairs, "whether A helps")
    assert verdict == "None of 1 paired comparisons decides whether A helps (-5.0 points on test)."
    assert report.compare_pairs({"comparisons": []}, [("A", "C")], "whether A helps") == ("", "")


def test_reference_study_keeps_its_numbers(study):
    text = write(study)
    assert (study[0] / "report.pdf").read_bytes().startswith(b"%PDF")
    for claim in (
        "2,271 photos of 11 classes",
        "Best fine-tuned on validation: mobilenet_v2 (last 2 convolutions + FC), 81.8% ± 1.0 "
        "(next: mobilenet_v2 (FC only), 81.1% ± 0.6). On test: 82.5%",
        "means are by learning rate 64.9% (0.01), 64.9% (0.02), 65.5% (0.04) and by batch size",
        "from seed to seed, the chosen setting varies by 0.8 points (standard deviation over 3",
        "An accuracy near 65% on 275 photos has a 95% interval of ±5.6 points",
        "Chosen: learning rate 0.01, batch 32. As accurate: learning rate 0.02, batch 32; the "
        "lower validation loss decided. Its validation loss",
        "At equal settings residual is on average 0.1 points above plain on validation (-1.8 to",
        "in 6 pairs of runs",
        "Weight decay is 0.3, for AdamW's part 0.01; biases and batch norm have none.",
        "None of 4 paired comparisons decides whether dropout helps (-5.5 to +0.4 points on test).",
        "Training accuracy is not above validation accuracy, and validation loss ends within 5%",
        "models with several seeds takes photos and seeds as samples",
        "Five layers may be few enough to learn without.",
        "1 of 2 paired comparisons decides whether the best backbone is better than another: "
        "mobilenet_v2 (last 2 convolutions + FC) is better than mobilenet_v3_small (last 2",
        "None of 3 paired comparisons decides whether training more than the last layer helps (",
        "A pair counts as decided if p < 0.025: 0.05 divided by the number of pairs, so",
        "each with its batch norm",
        "MobileNetV3's classifier has two layers; the first one stays frozen.",
        "mobilenet_v2 (last 2 convolutions + FC) is right on 100.0% of the training photos and on "
        "78.8% of the validation photos (mean of 3 seeds), its validation loss 13% above its",
        "The last layer alone gets 95% (mobilenet_v2), 88% (mobilenet_v3_small) and 91% "
        "(shufflenet_v2_x1_0) of the training photos right: what the convolutions add may go",
        "Batch size was not tuned.",
        "+9.3 to +10.9 points to networks from scratch (from the two smallest numbers of photos",
        "+9.8 to +13.8, from the two largest +5.0 to +6.3) and +2.2 to +4.3 points to networks",
        "Of the fresh seeds alone the gap is 2.0 (plain CNN) and 4.0 (residual CNN) points.",
        "The last step adds no photo to 3 of the 11 classes, which have no more",
        "Most often plain CNN mixes up apple_pie and omelette",
        "182 mistakes (plain CNN, 3 seeds together) between classes with unequal numbers of "
        "photos to train 75 take the rarer class for the more frequent one: half would be no bias, "
        "and chance alone may be as far from it. Its loss makes up for rare classes.",
        "By F1 french_fries is recognised best (95%), apple_pie worst (65%).",
        "The recall of mobilenet_v2 (last 2 convolutions + FC) minus that of plain CNN is +9 "
        "points in cheesecake, +32 in hamburger",
        "91 runs, shared features counted in each, add up to 31 minutes",
        "def confusion_matrix(labels, predicted, classes)",
    ):
        assert claim in text
    for absent in ("Runs that failed", "![", "compares two runs"):
        assert absent not in text


def test_a_choice_at_the_edge_of_the_grid_is_warned_of_unless_an_inner_rate_is_as_good(study):
    _, summary = study
    text = write(study)
    assert "est learning rate tried" not in text and text.count("As accurate") == 2
    lines = {line["run"]: line for line in summary["grid"]}
    lines["residual-lr0.01-bs32-seed0"]["validation_accuracy"] += 0.01  # no tie any more
    for rate in ("0.02", "0.04"):  # as if these two had not been tried
        del lines[f"plain-lr{rate}-bs64-seed0"]
    del lines["plain-lr0.01-bs32-seed0"], lines["plain-lr0.04-bs32-seed0"]
    summary["grid"] = list(lines.values())
    text = write(study)
    assert "batch 32. That is the lowest learning rate tried: a lower one may do better." in text
    assert "batch 32. That is the highest learning rate tried: a higher one may do better." in text
    assert "As accurate" not in text


def test_what_dropout_and_two_convolutions_lack_is_said_only_where_the_numbers_show_it(study):
    folder, summary = study
    for line in summary["comparisons"]:  # as if both the skip and the convolutions helped
        pair = line["a"], line["b"]
        if pair == ("plain CNN", "residual CNN") or ("FC only" in pair[0] and "last 2" in pair[1]):
            line.update(different=True, difference=-0.05)
    path = folder / "runs" / "plain-lr0.02-bs32-seed0.json"
    run = json.loads(path.read_text())
    del run["checksum"]
    run["history"][-1]["train_accuracy"] = 0.99
    path.write_text(json.dumps(run))
    text = write(study)
    for absent in ("no sign of what dropout prevents", "may be few enough", "the convolutions add"):
        assert absent not in text


@pytest.mark.parametrize(
    ("matrix", "verdict"),
    [
        ([[10, 20], [0, 30]], "20 mistakes (A) {}20 {} a bias to the more frequent ones."),
        ([[30, 0], [20, 10]], "20 mistakes (A) {}0 {} a bias to the rarer ones."),
        ([[20, 10], [8, 22]], "18 mistakes (A) {}10 {} half would be no bias, and chance alone"),
    ],
)
def test_a_bias_to_frequent_or_rare_classes_is_told_from_chance(matrix, verdict):
    counts = {split: {"a": 10, "b": 90} for split in ("train", "validation")}
    config = {"logit_adjustment": 1.0}
    run = {"config": config, "data": {"classes": ["a", "b"], "counts": counts}}
    text = " ".join(report.towards_frequent(np.array(matrix), 1, run, "A").split())
    between = "between classes with unequal numbers of photos to train "
    assert verdict.format(between, "take the rarer class for the more frequent one:") in text
    assert "does not make up" in text  # the shares are the same, so nothing was shifted
    counts["validation"] = {"a": 50, "b": 50}
    assert "makes up for" in report.towards_frequent(np.array(matrix), 1, run, "A")


def test_notes_of_the_author_stand_in_the_report(study):
    (study[0] / "notes.md").write_text("Photos are mine.\n\nWeights are a friend's.\n")
    assert "Photos are mine. Weights are a friend's. ## The photos" in write(study)


def test_runs_of_no_part_in_the_study_are_not_counted_or_described(study):
    folder, _ = study
    other = json.loads((folder / "runs" / "plain-lr0.01-bs32-seed0.json").read_text())
    del other["checksum"]
    other["data"]["counts"]["train"]["pizza"], other["name"] = 9999, "a"
    (folder / "runs" / "a.json").write_text(json.dumps(other))
    text = write(study)
    assert (
        "2,271 photos" in text
        and "91 runs, shared features counted in each, add up to 31 minutes" in text
    )


def test_what_has_nothing_to_say_is_not_said_and_failures_are(study):
    _, summary = study
    grid = [line for line in summary["grid"] if line["run"].startswith("plain-lr0.04")][:2]
    grid[0]["validation_accuracy"] = None
    grid[0]["epoch"] = None
    summary["failed"] = [{"run": grid[0]["run"], "reason": "the loss is not finite"}]
    summary["models"] = [row for row in summary["models"] if row["label"] == "plain CNN"]
    summary.update(grid=grid, dropout=[], transfer=[], comparisons=[])
    del summary["choices"]["residual"]
    text = write(study)
    assert "plain network reaches 66.5% on validation, the best epoch of each setting;" in text
    assert "| plain-lr0.04-bs32-seed0 | the loss is not finite |" in text
    nowhere = ["## Dropout", "Fine-tuning", "pairs of", "one run each", "The residual network"]
    nowhere += ["As accurate", "Batch size was not tuned"]
    for absent in (*nowhere, "The two networks have"):
        assert absent not in text


def test_a_study_with_one_seed_says_what_its_paired_tests_hold_for(study):
    for row in study[1]["models"]:
        row.update(seeds=[0], fresh_seeds=[], validation_spread=None, test_spread=None)
    text = write(study)
    assert "with one seed compares two runs: what it decides holds for other test photos" in text
    assert "±" not in text.split("## Part 1")[0].split("## The photos")[0]


def test_lists_in_the_notes_stay_lists(study):
    (study[0] / "notes.md").write_text("Sources:\n\n1. mine\n2. hers\n\n* a\n* b\n")
    write(study)
    assert "1. mine\n2. hers\n\n* a\n* b\n" in (study[0] / "report.md").read_text()


def test_a_grid_of_which_no_run_has_ended_is_said(study):
    for line in study[1]["grid"]:
        if line["model"] == "plain":
            line["validation_accuracy"] = None
    assert "No run of the grid of the plain network has come to its end." in write(study)


@pytest.mark.parametrize("count", [3, 150])
def test_pages_have_room_for_a_long_table_and_a_tall_figure(tmp_path, count):
    Image.new("RGB", (100, 300)).save(tmp_path / "a b.png")
    rows = [(f"a|{number}", number) for number in range(count)]
    blocks = ["# Title", *report.table(("class", "photos"), rows, "Photos.").split("\n\n")]
    assert "| a\\|1" in blocks[1]
    with open(tmp_path / "r.pdf", "wb") as file:
        report.set_pages([*blocks, "![Tall.](<a b.png>)"], tmp_path, file)
    pages = (tmp_path / "r.pdf").read_bytes().count(b"/Type /Page ")
    assert pages == (1 if count == 3 else 3)


def test_folder_without_a_summary_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="evaluate.py --chosen"):
        report.main(["--output", str(tmp_path)])
