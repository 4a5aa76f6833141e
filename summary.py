"""Choose the best runs by validation accuracy, compare them, and write results/summary.json.

    python summary.py --output results

Needs the JSON files only. Test accuracies appear once evaluate.py has measured them.
"""

import itertools
import math
from pathlib import Path

import runs


def mcnemar(first, second):
    """Exact McNemar test on the same photos: (difference, interval_95, p_value).

    first, second: lists of bool, whether each photo was classified right. difference: accuracy of
    `first` minus that of `second`; p_value: two-sided, binomial. McNemar, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 1947.
    The interval is Clopper and Pearson's (Biometrika 1934) for the share of gains among the photos
    that only one of them got right: it excludes zero exactly where p_value < 0.05.
    """
    total = len(first)
    gains = sum(a and not b for a, b in zip(first, second, strict=True))
    losses = sum(b and not a for a, b in zip(first, second, strict=True))
    apart = gains + losses
    tail = sum(math.comb(apart, k) for k in range(min(gains, losses) + 1)) / 2**apart
    high, low = largest_share(gains, apart), 1 - largest_share(losses, apart)
    interval = [(2 * share - 1) * apart / total for share in (low, high)]
    return (gains - losses) / total, interval, min(1.0, 2 * tail)


def largest_share(count, total):
    """The share for which `count` or fewer of `total` have a probability of 2.5%, by bisection."""
    if count == total:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        share, probability = (low + high) / 2, 0.0
        for k in range(count + 1):
            ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
            probability += math.exp(ways + k * math.log(share) + (total - k) * math.log(1 - share))
        low, high = (share, high) if probability > 0.025 else (low, share)
    return share


def entry(run, chosen):
    """One line of a table in summary.json."""
    config = run["config"]
    line = {"run": run["name"], "model": run["model"]["name"]}
    keys = ("learning_rate", "batch_size", "dropout", "seed", "unfreeze_convolutions")
    line |= {key: config[key] for key in keys if key in config}
    line |= {**run["best"], "seconds": run["seconds"], "chosen": chosen}
    return line


def has_setting(run, setting):
    return (run["config"]["learning_rate"], run["config"]["batch_size"]) == setting


def largest_group(members, vary):
    """The runs that differ in nothing but `vary`; if there are several such groups the largest,
    of equal ones that with the most epochs."""
    groups = {}
    for run in members:
        key = runs.settings(run["config"], vary), run["data"]["fingerprint"]
        groups.setdefault(key, []).append(run)
    return max(groups.values(), key=lambda g: (len(g), g[0]["config"]["epochs"]), default=[])


def overview_row(label, members, output):
    """One chosen model over its seeds: accuracies with intervals, gap, cost."""
    photos = sum(members[0]["data"]["counts"]["validation"].values())
    validation = mean([run["best"]["validation_accuracy"] for run in members])
    row = {"label": label, "kind": members[0]["kind"], "runs": [run["name"] for run in members]}
    row |= {"validation_accuracy": validation, "validation_spread": spread(
        [run["best"]["validation_accuracy"] for run in members])}  # fmt: skip
    row["validation_interval_95"] = list(runs.wilson_interval(validation, photos))
    row |= {"test_accuracy": None, "test_spread": None, "test_interval_95": None, "gap": None}
    tests = [read_evaluation(output, run["name"]) for run in members]
    if all(tests):
        test = mean([result["accuracy"] for result in tests])
        row |= {"test_accuracy": test, "test_spread": spread([t["accuracy"] for t in tests])}
        row["test_interval_95"] = list(runs.wilson_interval(test, len(tests[0]["predictions"])))
        row["gap"] = validation - test
    row |= {key: members[0]["model"][key] for key in ("parameters", "trainable_parameters")}
    row["seconds"] = mean([run["seconds"] for run in members])
    return row


def mean(values):
    return sum(values) / len(values)


def spread(values):
    """Standard deviation over seeds; None for a single seed."""
    center = mean(values)
    if len(values) < 2:
        return None
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def read_evaluation(output, name, split="test"):
    """The content of an evaluation's JSON, or None if it has not been made."""
    path = Path(output, "evaluations", f"{name}.{split}.json")
    return runs.read_json(path, "accuracy", "predictions") if path.exists() else None


def compare(rows, output):
    """Paired tests between all rows that have been evaluated on test, on their first seeds."""
    right = {}
    for row in rows:
        if row["test_accuracy"] is not None:
            predictions = read_evaluation(output, row["runs"][0])["predictions"]
            right[row["label"]] = {p["file"]: p["label"] == p["predicted"] for p in predictions}
    comparisons = []
    for a, b in itertools.combinations(right, 2):
        files = sorted(right[a].keys() & right[b].keys())
        if not files:
            continue
        pair = [[right[label][file] for file in files] for label in (a, b)]
        difference, interval, p_value = mcnemar(*pair)
        line = {"a": a, "b": b, "difference": difference, "interval_95": interval}
        comparisons.append(line | {"p_value": p_value, "different": p_value < 0.05})
    return comparisons


def summarise(output):
    """Build the content of summary.json from the finished runs and evaluations in `output`."""
    every = runs.read_runs(output).values()
    result = {"grid": [], "choices": {}, "dropout": [], "transfer": [], "models": []}
    rows = []
    for model in sorted({run["model"]["name"] for run in every if run["kind"] == "scratch"}):
        vary = ("learning_rate", "batch_size", "dropout", "seed")
        same = [run for run in every if run["model"]["name"] == model]
        members = largest_group(same, vary)
        grid = [run for run in members if run["config"]["dropout"] == 0]
        if not grid:
            continue
        setting = runs.best_setting(grid)
        chosen = [run for run in grid if has_setting(run, setting)]
        result["grid"] += [entry(run, run in chosen) for run in grid]
        result["choices"][model] = [entry(run, True) for run in chosen]
        rows.append(overview_row(f"{model} CNN", chosen, output))
        by_dropout = {}
        for run in members:
            if has_setting(run, setting):
                by_dropout.setdefault(run["config"]["dropout"], []).append(run)
        for dropout, group in sorted(by_dropout.items()):
            result["dropout"] += [entry(run, run in chosen) for run in group]
            if dropout > 0:
                rows.append(overview_row(f"{model} CNN, dropout {dropout:g}", group, output))
    cases = {
        (run["config"]["unfreeze_convolutions"], run["config"]["backbone"])
        for run in every
        if run["kind"] == "finetune"
    }
    for count, backbone in sorted(cases):
        same = [
            run
            for run in every
            if run["config"].get("backbone") == backbone
            and run["config"]["unfreeze_convolutions"] == count
        ]
        group = largest_group(same, ("learning_rate", "batch_size", "seed"))
        setting = runs.best_setting(group)
        chosen = [run for run in group if has_setting(run, setting)]
        result["transfer"] += [entry(run, run in chosen) for run in group]
        case = f"last {count} convolutions + FC" if count else "FC only"
        rows.append(overview_row(f"{backbone}, {case}", chosen, output))
    return result | {"models": rows, "comparisons": compare(rows, output)}


def describe_pair(summary, a, b):
    """A sentence on two chosen models from their paired test; None if there was none."""
    for line in summary["comparisons"]:
        if {line["a"], line["b"]} == {a, b}:
            break
    else:
        return None
    sign = 100 if line["a"] == a else -100
    difference = sign * line["difference"]
    low, high = sorted(sign * bound + 0.0 for bound in line["interval_95"])  # no "-0.0"
    verdict = "so this study can't tell them apart"
    if line["different"]:
        verdict = f"so they differ, and {a if difference > 0 else b} is the better one"
    apart = f"{abs(difference):.1f} points {'better' if difference > 0 else 'worse'} than"
    return (
        f"On the same test photos {a} is {apart if difference else 'exactly as accurate as'} {b} "
        f"(95% interval {low:+.1f} to {high:+.1f}, exact McNemar test p = {line['p_value']:.2g}), "
        f"{verdict}."
    )


def percent(row, split):
    """Accuracy of a row of the summary's `models` on a split, its spread over seeds, interval."""
    if row[f"{split}_accuracy"] is None:
        return "not evaluated"
    low, high = row[f"{split}_interval_95"]
    spread = row[f"{split}_spread"]
    seeds = "" if spread is None else f" ± {100 * spread:.1f}"
    return f"{row[f'{split}_accuracy']:.1%}{seeds} [{low:.1%}, {high:.1%}]"


def main(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    output = parser.parse_args(argv).output
    summary = summarise(output)
    if not summary["models"]:
        raise SystemExit(f"{output}/runs holds no finished run: train one first.")
    runs.write_json(Path(output, "summary.json"), summary)
    width = max(len(row["label"]) for row in summary["models"])
    print(f"{'chosen model':{width}}  {'validation [95%]':30}  {'test [95%]':30}  gap")
    for row in summary["models"]:
        gap = "" if row["gap"] is None else f"{100 * row['gap']:+.1f}"
        validation, test = percent(row, "validation"), percent(row, "test")
        print(f"{row['label']:{width}}  {validation:30}  {test:30}  {gap}")
    tables = summary["grid"] + summary["dropout"] + summary["transfer"]
    left_out = len(list(Path(output, "runs").glob("*.json"))) - len({line["run"] for line in tables})
    if left_out:
        print(f"{left_out} runs with other settings or photos are left out; an --output for each "
              "set of settings keeps them apart")  # fmt: skip


if __name__ == "__main__":
    runs.run_main(main)
