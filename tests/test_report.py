"""The report says what the folder of results says, for any classes and networks."""

import json
import re
from pathlib import Path

import pytest

import engine
from tools import report

STUDY = """{
"run": {"config": {"learning_rate": 0.02, "batch_size": 64, "seed": 0, "epochs": 9, "cutmix": 0,
  "image_size": 32, "weight_decay": 0, "dropout": 0.2, "label_smoothing": 0, "crop_scale": 1,
  "rotation": 0, "sam_share": 0, "weights": "none", "views": 4},
  "environment": {"device": "cpu"},
  "data": {"classes": ["a|b", "$c$ _d_", "北京烤鸭"], "counts": {"train": [9], "validation": [5]}}},
"best": {"epoch": 7, "train_accuracy": 0.5, "validation_accuracy": 0.625},
"test": {"classes": [1, 2, 3], "confusion_matrix": [[3, 2, 0], [0, 4, 1], [0, 0, 5]],
  "predictions": [{}]},
"row": {"validation_accuracy": 0.625, "trained_parameters": 1234, "seconds": 61.0,
  "test_accuracy": 0.8, "test_interval_95": [0.55, 0.93]},
"pair": {"difference": 0.014, "interval_95": [-0.018, 0.046], "seeds": 1}}"""
SAID = r"""| plain | 1,234 | 62.5% | 80.0% | 55.0% to 93.0% | 61 |
| plain | 0.02 | 64 | 62.5% | 7 | chosen |
| plain | 0.02 | 64 | failed | | |
residual against plain: +1.4 points (95% -1.8 to +4.6): can't be told apart.
most mixed up are a\|b and \$c\$ \_d\_ (2), \$c\$ \_d\_ and 北京烤鸭 (1); best is
self.fc1 = nn.Linear(
return y + F.pad(
loss = F.cross_entropy(
torch.optim.AdamW(
np.diag(matrix)
F.relu(self.fc1(self.dropout(x)))
model.requires_grad_(False)
last = nn.Linear("""


def make_report(*labels):
    """report.md on results/ with a model for each label, and a run of each that failed."""
    study, rows = json.loads(STUDY), []
    for label in labels:
        row = {"label": label, "network": label.split(",")[0], "runs": {"0": f"{label}-seed0"}}
        row["kind"] = "finetune" if "-fc" in label else "scratch"
        for name, best in ((f"{label}-seed0", study["best"]), (f"{label}-seed0x", None)):
            run = {"name": name, "kind": row["kind"], "model": {"name": row["network"]}}
            engine.write_json(f"results/runs/{name}.json", study["run"] | run | {"best": best})
        engine.write_json(f"results/evaluations/{label}-seed0.test.json", study["test"])
        rows.append(study["row"] | row)
    pairs = [study["pair"] | {"a": label, "b": labels[0]} for label in labels[1:]]
    engine.write_json("results/summary.json", {"models": rows, "comparisons": pairs})
    return report.write_markdown(Path("results"))


def test_every_point_of_the_assignment_has_its_code_and_numbers():
    text = make_report("plain", "residual", "plain, dropout 0.2", "mobilenet_v2-fc")
    points = "1.1 1.2 1.3 1.4 1.5 1.6 1.7 1.8 2.1 2.2 2.3 2.4"
    assert " ".join(re.findall(r"^### (\S+) ", text, re.MULTILINE)) == points
    assert all(line in text for line in SAID.splitlines())
    source = "".join(p.read_text("utf-8") for p in Path(report.__file__).parents[1].glob("*.py"))
    code = "".join(re.findall(r"^```python\n((?s:.*?))```$", text, re.MULTILINE))
    assert all(line in source for line in re.sub(r"^# .*", "", code, flags=re.M).splitlines())
    report.main([])
    assert Path("results/report.pdf").read_bytes().count(b"/Type /Page") > 4


def test_the_authors_words_are_taken_and_no_study_is_one_line():
    with pytest.raises(SystemExit, match="run evaluate.py --chosen first$"):
        report.main([])
    Path("results").mkdir()
    Path("results/discussion.md").write_text("One {x}.\n\n## Part 2\n\nTwo.\n", "utf-8")
    text = make_report("plain", "mobilenet_v2-fc")
    assert re.search(r"### 1.8 .*\n\nOne \{x\}.\n\n## Part 2: [^~]*### 2.4 [^~]*\n\nTwo.\n$", text)
