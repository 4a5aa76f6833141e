"""The figures: drawn from made-up results, complete, never a traceback for a bad folder."""

import json
import math
import random
from pathlib import Path

import plot

CLASSES = ["apple_pie", "hot_dog", "ice_cream", "sushi"]


def write_results(output: Path, classes=CLASSES, photos=25, epochs=12, seeds=1) -> None:
    """A whole study as the training scripts leave it: grid, dropout, fine-tuning, evaluations."""
    draw, total = random.Random(0), photos * len(classes)
    summary = {"grid": [], "dropout": [], "transfer": [], "models": [], "choices": {}}

    def write(path, content):
        path = output / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def add(stage, name, model, top, rate, batch=64, dropout=0, chosen=False, unfreeze=None):
        """One run that climbs to accuracy `top`; returns its entry in the summary."""
        history = []
        for epoch in range(1, epochs + 1):
            climb = 1 - math.exp(-3 * epoch / epochs)
            train, validation = 1.15 * top * climb, top * climb + draw.uniform(-0.03, 0.03)
            history.append(
                {
                    "epoch": epoch,
                    "learning_rate": rate,
                    "train_accuracy": min(1, max(0, train)),
                    "train_loss": None if top < 0.1 and epoch > 5 else 2.5 * (1 - train * 0.8),
                    "validation_accuracy": round(min(1, max(0, validation)) * total) / total,
                    "validation_loss": 40 if top < 0.1 else 2.6 * (1 - validation * 0.8),
                    "seconds": 2,
                }
            )
        best = max(history, key=lambda row: row["validation_accuracy"])
        shared = {key: best[key] for key in ("epoch", "validation_accuracy", "validation_loss")}
        counts = {split: dict.fromkeys(classes, photos) for split in ("validation", "test")}
        run = {"name": name, "history": history, "best": shared}
        write(f"runs/{name}.json", run | {"data": {"classes": classes, "counts": counts}})
        entry = {"run": name, "model": model, "learning_rate": rate, "batch_size": batch}
        entry |= {"dropout": dropout, "seed": 0, "chosen": chosen, "seconds": 60, **shared}
        if unfreeze is not None:
            entry["unfreeze_convolutions"] = unfreeze
        summary[stage].append(entry)
        return entry

    def evaluate(name, accuracy):
        matrix, predictions = [[0] * len(classes) for _ in classes], []
        for label, class_name in enumerate(classes):
            for number in range(photos):
                right = draw.random() < accuracy
                guess = label if right else draw.randrange(len(classes))
                matrix[label][guess] += 1
                row = {"file": f"{class_name}/{number}.jpg", "label": label, "predicted": guess}
                predictions.append(row | {"probability": draw.uniform(0.4, 1)})
        accuracy = sum(matrix[i][i] for i in range(len(classes))) / total
        interval = list(plot.wilson_interval(accuracy, total))
        evaluation = {"name": name, "split": "test", "accuracy": accuracy, "interval_95": interval}
        evaluation |= {"confusion_matrix": matrix, "classes": classes, "predictions": predictions}
        write(f"evaluations/{name}.test.json", evaluation)
        return accuracy, interval

    def choose(label, entries, parameters, trainable):
        accuracy = sum(entry["validation_accuracy"] for entry in entries) / len(entries)
        test, interval = [evaluate(entry["run"], accuracy - 0.03) for entry in entries][0]
        model = {"label": label, "runs": [entry["run"] for entry in entries]}
        model |= {"validation_accuracy": accuracy, "test_accuracy": test, "parameters": parameters}
        model["validation_interval_95"] = list(plot.wilson_interval(accuracy, total))
        model |= {"test_interval_95": interval, "trainable_parameters": trainable}
        summary["models"].append(model)

    for model, top in (("plain", 0.55), ("residual", 0.61)):
        for rate, factor in ((0.0003, 0.8), (0.001, 1), (0.03, 0.1)):
            for batch in (32, 128):
                chosen = (rate, batch) == (0.001, 32)
                names = [f"{model}-{rate}-{batch}-s{s}" for s in range(seeds if chosen else 1)]
                setting = {"rate": rate, "batch": batch, "chosen": chosen}
                entries = [add("grid", name, model, top * factor, **setting) for name in names]
                if chosen:
                    choose(f"{model} CNN", entries, 1_250_000, 1_250_000)
                    summary["dropout"] += entries
        for dropout in (0.3, 0.5):
            add("dropout", f"{model}-d{dropout}", model, top - dropout / 5, 0.001, 32, dropout)
    for model, top in (("mobilenet_v2", 0.85), ("mobilenet_v3_small", 0.8), ("shufflenet", 0.78)):
        for unfreeze in (0, 2):
            for rate in (0.001, 0.01):
                chosen = rate == 0.001
                name, setting = f"{model}-u{unfreeze}-{rate}", {"rate": rate, "chosen": chosen}
                reached = top + unfreeze / 40 - rate
                entry = add("transfer", name, model, reached, unfreeze=unfreeze, **setting)
                if chosen:
                    choose(plot.setting_name(entry).replace("\n", ", "), [entry], 2_237_963, 14_091)
    write("summary.json", summary)
