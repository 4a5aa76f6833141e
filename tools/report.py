"""Write a study up: report.md and report.pdf in its folder of results.

    python tools/report.py --output results

Reads summary.json, runs/, evaluations/, figures/ and, if it is there, discussion.md: the author's
words, as text of 1.8 and, after a line "## Part 2", of 2.4. Code is taken from the source. Parts
that were not trained and figures that are missing are left out.
"""

import argparse
import json
import re
import sys
import textwrap
from collections import defaultdict
from inspect import getsource
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
from matplotlib import image, rcParams
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties as Font
from matplotlib.textpath import text_to_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from plot import use_fonts

# What the report says. After [key] follows Markdown that is left out if facts() has nothing under
# that key, and is filled in otherwise. @module.function is its source, see quote().
REPORT = """[run]
# Photo classification with small CNNs and with pre-trained networks

{classes} classes of photos: {train:,} to train, {validation:,} by which epoch, settings and models
are chosen, and {test:,} to test what was chosen. Computed on {machines}.

| model | trained parameters | validation | test | 95% interval | seconds |
|---|---|---|---|---|---|
{models}

*All chosen models, part 1 above, the best of each part first. fc: only the last layer is trained,
last2: the last two convolutions, too. Accuracies are means over the seeds (random starts), seconds
those of a run.*

![Figure: validation and test accuracy of all chosen models.](figures/overview.png)

The interval of an accuracy says where the accuracy on all such photos is likely to lie (Wilson,
1927); it does not count the seeds. Two models are compared on the same photos, by drawing photos
and seeds again 10,000 times (bootstrap, Efron, 1979), and one is called better or worse where the
interval of the difference excludes zero. With one seed that holds for these two runs alone: trained
again from another start, either may end a point or two higher or lower.

{photos}

[scratch]
## Part 1: CNNs from scratch

### 1.1 Architecture

Five blocks of convolution (3 x 3), max pooling, batch norm and ReLU have 32, 64, 128, 256 and 384
channels. Each halves the sides of the picture: what the network gives up in place it wins in
meaning, from edges and colours to parts of what is to be told apart. The average over the places
that are left makes 384 numbers of a photo, which two fully connected layers turn into a score for
each class. Pooling comes before batch norm and ReLU, which then have a quarter of the work. The
residual network has the same layers; its skips go around blocks 2 to 5, see 1.2.

{layers}


### 1.2 How convolution, fully connected layer and skip are made

A convolution is `nn.Conv2d` with a padding of 1, so that it keeps the size of its input; it has no
bias, because the batch norm after it has one. A fully connected layer is `nn.Linear`: each output
is a weighted sum of all inputs and a bias. Softmax is part of the loss. Kernels start from random
numbers scaled so that signals keep their size through ReLUs (He et al., 2015).

@models.PlainCNN.__init__

@models.PlainCNN.block

[residual]
The residual network is the plain one with a skip around every block but the first, and nothing
else: the same layers, the same start. The skip has no parameters: averaging brings the input of a
block to the size of its output, zeros stand for the channels added (option A of He et al., 2016;
averaging, and adding after the ReLU, are choices made here).

@models.ResidualCNN.block

A skip needs depth to pay. Dozens of layers are hard to train even with batch norm: those that
should do little must first learn to pass on what they get. An addition does that for them and
leaves a block only the difference to learn. Five layers train well without one, so no more than a
small difference should be expected here.

[scratch]
### 1.3 Training and accuracy

The loss is the cross-entropy between the softmax of the network's outputs and the class. Label
smoothing takes a little of the target from the class and spreads it over all, so that boundless
certainty doesn't pay.

@engine.make_step from def compute_gradients to def step

Muon (Jordan et al., 2024) makes the step of each matrix and kernel nearly orthogonal, so that all
its directions learn at one pace. AdamW (Loshchilov and Hutter, 2019) takes the output layer, biases
and batch norms, at a tenth of the learning rate. The rate rises in the first epochs and then falls
to zero. The weights kept are those of the epoch with the best validation accuracy.

@engine.build_optimizers from trained =

@engine.make_step from for optimizer in to return Graphed

Accuracy is the share of photos whose highest output is that of their class: the diagonal of the
confusion matrix over its sum. Of each class, precision is the share of photos taken for it that
are of it, recall the share of its photos that were found, and F1 their harmonic mean.

@evaluate.confusion_matrix

@evaluate.metrics from matrix = to rows

Where validation accuracy lies above training accuracy, nothing is wrong. Training photos are
cropped, turned, recoloured and mixed, in each epoch anew, and the weights still change during the
epoch; validation photos are shown as they are, and without dropout. CutMix (Yun et al., 2019)
pastes a square of another photo into each of a batch; such a photo counts as right only for the
class of the one pasted into, even where most of it is another. How many batches are mixed differs
from epoch to epoch, so the training curves jump. Training loss has label smoothing and CutMix in it
and never comes near zero.

The runs take {scratch[config][epochs]} epochs at {scratch[config][image_size]} pixels, with these
settings: label smoothing {scratch[config][label_smoothing]}; Muon's weight decay
{scratch[config][weight_decay]}; crops from {scratch[config][crop_scale]:.0%} of the area; turns of
up to {scratch[config][rotation]:g} degrees; CutMix in {scratch[config][cutmix]:.0%} of the batches;
SAM in the last {scratch[config][sam_share]:.0%} of the epochs (Foret et al., 2021: gradients are
taken at the worst point nearby, which favours flat minima).

### 1.4 Learning rates and batch sizes

With too low a learning rate the last epoch comes before the network has learned what it could; with
too high a one its steps overshoot, and it settles late or never. A smaller batch means more steps
in an epoch, each with a noisier gradient, so the two are tried together. Validation accuracy
decides, on a tie the lower validation loss.

{scratch[curves]}

| network | learning rate | batch size | validation | epoch | choice |
|---|---|---|---|---|---|
{scratch[grid]}

*The grid with the first seed: best validation accuracy of each run, and its epoch.*

On {validation:,} photos neighbours in the table can't be told apart, so the choice is one of
several that would do. A best epoch near the last says that the falling learning rate, not
overfitting, ends the training.

### 1.5 The best of each

The grid is of one seed; these are means over all seeds. The accuracy that was chosen by is a little
too high, since the luckiest of several is chosen; the test accuracy is not.

{scratch[best]}

{scratch_pairs}

[dropout_pairs]
### 1.6 Dropout

Dropout sets each input of a layer to zero with a given probability, in training only, and scales
the others up, so that no feature can rely on another's being there. It stands before both fully
connected layers, where each number describes the whole photo and others can stand in for it. Among
convolutions it would do less: neighbouring pixels tell the same, so a single zero hides nothing,
and a batch norm behind it would see other variances in training than in use.

@models.PlainCNN.forward

{dropout_pairs}

Dropout is a remedy for overfitting. Where distorted and mixed photos already keep a network from
learning its training photos by heart, it has little to win and makes learning slower. It was added
at the settings that were chosen without it.

[scratch]
### 1.7 Confusion matrices

Rows are true classes, columns what the network said, on the test photos, all seeds together. Two
classes are mixed up when either is taken for the other.

{scratch[errors]}
{scratch[confusions]}

### 1.8 Findings

{scratch[finding]}

[finetune]
## Part 2: fine-tuning a pre-trained network

### 2.1 What fine-tuning is, and why the rest stays frozen

Fine-tuning starts from weights that have learned another task, mostly the 1,000 classes of ImageNet
(here: {finetune[config][weights]}). MobileNetV2 (Sandler et al., 2018), MobileNetV3 (Howard et al.,
2019) and ShuffleNetV2 (Ma et al., 2018) were made for mobile devices. Filters that have seen the
million photos of ImageNet know the edges, textures and parts that any photo is made of. So few
photos as here could easily move millions of weights towards what these happen to share, and what
the filters knew would fade. So all but the last layers are frozen: they get no gradient, and their
batch norms stay in eval mode, since running statistics would otherwise drift with every batch,
gradient or not.

@models.build_backbone from model.requires_grad_

@models.Backbone.train

After each run every frozen tensor is compared with what was loaded, bit for bit; one that differed
would end the run with an error. Each photo has {finetune[config][views]} distorted views, used in
turns. What the frozen layers make of them is computed once and kept; an epoch then costs no more
than the layers that are trained.

### 2.2 The two cases

The new last layer has one output for each class. In the case called fc it alone is trained, and the
network can only weigh anew what it sees already. In the other, last2, the last two convolutions are
trained, too, with their batch norms (in MobileNetV2 those from 960 to 320 to 1280 channels): these
filters are the ones most particular to the old classes and can turn to the new ones. That is more
to fit and more to overfit, and it asks for a lower learning rate.

@models.build_backbone from last = to for module

The runs take {finetune[config][epochs]} epochs of AdamW alone at {finetune[config][image_size]}
pixels, with weight decay {finetune[config][weight_decay]}, dropout {finetune[config][dropout]},
label smoothing {finetune[config][label_smoothing]} and crops from
{finetune[config][crop_scale]:.0%} of the area.

Where training accuracy nears 100% and validation accuracy stays, the layers learn their photos by
heart. Training loss has label smoothing and dropout in it, validation loss has not.

![Figure: loss and accuracy of the chosen runs.](figures/curves_transfer.png)

| network | learning rate | batch size | validation | epoch | choice |
|---|---|---|---|---|---|
{finetune[grid]}

*The grid with the first seed: best validation accuracy of each run, and its epoch.*

Best of each case, means over all seeds, and what the convolutions add:

{finetune[best]}

{finetune_pairs}

### 2.3 Confusion matrix

Again on the test photos, all seeds together. The matrix is that of the better of the two.

{finetune[errors]}

![Figure: confusion of {finetune[model][name]}.](figures/confusion_{finetune[model][name]}.png)

### 2.4 Part 1 against part 2

{both_pairs}

{finetune[finding]}
"""
CODE = r"^@((?:models|engine|evaluate|finetune)\.\S+)(?: from (.+?))?(?: to (.+))?$"


def quote(match):
    """Source of a function without its docstring, for a match of CODE: all of it, or from a line
    that begins with one text to before one that begins with another."""
    begin, end = re.escape(match[2] or ""), re.escape(match[3] or "\0")
    source = re.sub(r'\n\s+"""(?s:.*?)"""', "", getsource(resolve_name(match[1])), count=1)
    code = re.search(rf"^ *{begin}(?s:.*?)(?=^ *{end}|\Z)", source, re.MULTILINE)[0]
    return f"```python\n# {match[1]}\n{textwrap.dedent(code).strip()}\n```"


MODEL = """| {label} | {trained_parameters:,} | {validation_accuracy:.1%} | {test_accuracy:.1%} \
| {test_interval_95[0]:.1%} to {test_interval_95[1]:.1%} | {seconds:.0f} |
"""
GRID = """| {model[name]} | {config[learning_rate]:g} | {config[batch_size]} \
| {best[validation_accuracy]:.1%} | {best[epoch]} | {chosen} |
"""
FAILED = """| {model[name]} | {config[learning_rate]:g} | {config[batch_size]} | failed | | |
"""
BEST = """- {label}: learning rate {run[config][learning_rate]:g}, batch size \
{run[config][batch_size]}; validation {validation_accuracy:.1%}, test {test_accuracy:.1%} \
(95% {test_interval_95[0]:.1%} to {test_interval_95[1]:.1%}).
"""
PAIR = """- {a} against {b}: {0:+.1f} points (95% {1:+.1f} to {2:+.1f}): {word}.
"""
FINDING = """By validation {label} is the best of this part. With seed {run[config][seed]} its best
epoch was {run[best][epoch]} of {run[config][epochs]}: it was right on
{run[best][train_accuracy]:.1%} of the training photos, as they were distorted, and on
{run[best][validation_accuracy]:.1%} of the validation photos. On test photos it is right on
{test_accuracy:.1%} (95% {test_interval_95[0]:.1%} to {test_interval_95[1]:.1%})."""
FIGURE = "\n\n![Figure: {0} of {network}.](figures/{0}_{network}.png)"


def describe_errors(row):
    """The pairs of classes most mixed up, the best and the worst one, as an item of a list."""
    matrix, classes = row["matrix"], row["run"]["data"]["classes"]
    names = [re.sub(r"([\\`*_\[\]<>|$~#])", r"\\\1", name) for name in classes]
    mixed = np.triu(matrix + matrix.T, 1)
    most = zip(*np.unravel_index(np.argsort(-mixed, axis=None)[:3], mixed.shape), strict=True)
    pairs = [f"{names[a]} and {names[b]} ({mixed[a, b]})" for a, b in most if mixed[a, b]]
    f1 = 2 * np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
    best, worst = (f"{names[place]} (F1 {f1[place]:.2f})" for place in (f1.argmax(), f1.argmin()))
    mixed_up = ", ".join(pairs) or "none"
    return f"- {row['label']}: most mixed up are {mixed_up}; best is {best}, worst {worst}.\n"


def grid_lines(runs, marks):
    """The runs of one part with its lowest seed and, unless all have it, without --dropout."""
    runs = [run for run in runs if "-dropout" not in run["name"]] or runs
    first, text = min(run["config"]["seed"] for run in runs), ""
    for run in runs:
        if run["config"]["seed"] == first:
            line = GRID if run["best"] else FAILED
            text += line.format(**run, chosen=marks.get(run["name"], ""))
    return text


def part_facts(rows, runs, discussion):
    """What REPORT says of one part; rows: its chosen models, see facts(); runs: all of it."""
    rising = sorted(rows, key=lambda row: row["validation_accuracy"])
    # Of each network from scratch; of fine-tuning, of each case.
    best_of = {row["network"].split("-")[-1]: row["label"] for row in rising}
    shown, best = [row for row in rows if row["label"] in best_of.values()], rising[-1]
    return {
        **best["run"],
        "curves": "".join(FIGURE.format("curves", **row) for row in shown),
        "grid": grid_lines(runs, {n: "chosen" for row in rows for n in row["runs"].values()}),
        "best": "".join(BEST.format(**row) for row in shown),
        "errors": "".join(map(describe_errors, shown)),
        "confusions": "".join(FIGURE.format("confusion", **row) for row in shown),
        "finding": discussion.strip() or FINDING.format(**best),
    }


def facts(output):
    """What REPORT is filled with, by key; what there is nothing to say of is not there or empty."""
    if not (output / "summary.json").is_file():
        raise SystemExit(f"{output} has no summary.json: run evaluate.py --chosen first")
    summary, runs = json.loads((output / "summary.json").read_text()), engine.read_runs(output)
    found, rows = defaultdict(str), {row["label"]: row for row in summary["models"]}
    rising = sorted(rows.values(), key=lambda row: (row["kind"], row["validation_accuracy"]))
    for row in reversed(rising):
        files = [output / "evaluations" / f"{name}.test.json" for name in row["runs"].values()]
        tests = [json.loads(file.read_text()) for file in files]
        row["matrix"] = sum(np.array(test["confusion_matrix"]) for test in tests)
        row["run"] = found["run"] = runs[min(row["runs"].values())]
        found["models"] += MODEL.format(**row)
        found[row["network"]] = True
    found |= {split: sum(counts) for split, counts in found["run"]["data"]["counts"].items()}
    found["test"], found["classes"] = len(tests[0]["predictions"]), len(tests[0]["classes"])
    found["machines"] = ", ".join(sorted({run["environment"]["device"] for run in runs.values()}))
    for path in output.glob("*.txt"):  # layers.txt, photos.txt: what stands in them first
        found[path.stem] = "```\n" + path.read_text("utf-8").strip().split("\n\n")[0] + "\n```"
    for pair in summary["comparisons"]:
        a, b = rows[pair["a"]], rows[pair["b"]]
        topic = "dropout" if a["network"] == b["network"] else a["kind"]
        if a["kind"] != b["kind"]:
            topic = "both"
        points = [100 * share for share in (pair["difference"], *pair["interval_95"])]
        word = "better" if points[1] > 0 else "worse" if points[2] < 0 else "can't be told apart"
        found[f"{topic}_pairs"] += PAIR.format(*points, **pair, word=word)
    file = output / "discussion.md"
    said = file.read_text("utf-8") if file.is_file() else ""
    said = [*re.split(r"^## Part 2.*$", said, maxsplit=1, flags=re.MULTILINE), ""]
    for kind, text in zip(("scratch", "finetune"), said, strict=False):
        own = [row for row in rows.values() if row["kind"] == kind]
        found[kind] = own and part_facts(own, [r for r in runs.values() if r["kind"] == kind], text)
    return found


def write_markdown(output):
    """The report as a string, without figures that are not there."""
    found, text = facts(output), ""
    for key, template in re.findall(r"(?ms)^\[(\w+)\]\n(.*?)(?=^\[\w+\]\n|\Z)", REPORT):
        text += template.format_map(found) if found[key] else ""

    def with_caption(match):
        return f"{match[0]}\n\n*{match[1]}*" if (output / match[2]).is_file() else ""

    text = re.sub(r"^!\[(.*)\]\((.*)\)$", with_caption, text, flags=re.MULTILINE)
    text = re.sub(CODE, quote, text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


# ---------------------------------------------------------------------------------------------
# The PDF. All lengths are points.

# Half a point for each dot: figures of 9 inches at 110 dots an inch are as wide as the text.
PAGE, MARGIN, LEFT, WIDTH = (595.0, 842.0), 48.0, 48 / 595, 499.0


def plain(text):
    """Markdown without its signs for headings, emphasis, code and escapes."""
    return re.sub(r"\\([\W_])|^#+ |`|\*+(?=\S)|(?<=\S)\*+", r"\1", " ".join(text.split()))


def wrap(text, font):
    """Lines of at most WIDTH; very long words and Chinese break anywhere."""
    lines, left, size_of = [], 0.0, text_to_path.get_text_width_height_descent
    for word in re.findall(r"[\u2e80-\uffff]\s*|[^\s\u2e80-\uffff]{1,40}\s*", text):
        width = size_of(word.rstrip(), font, ismath=False)[0]
        if width > left:
            lines, left = [*lines, ""], WIDTH
        lines[-1] += word
        left -= width + 0.32 * font.get_size()  # of a space
    return lines


def align(block):
    """The lines of a Markdown table, with columns that are aligned in a font of one width."""
    rows = [[*map(plain, re.split(r"(?<!\\)\|", line)[1:-1])] for line in block.splitlines()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=False)]
    rows[1:2] = [["-" * width for width in widths]]
    return ["  ".join(map(str.ljust, row, widths)) for row in rows]


def typeset(block):
    """(lines, font, room needed for how it begins) of a block of Markdown other than a picture."""
    if block.startswith(("|", "```")):
        lines = align(block) if block[0] == "|" else block.splitlines()[1:-1]
        family = ["DejaVu Sans Mono", *rcParams["font.family"]]
        size = min(7.2, WIDTH / 0.61 / max(1, *map(len, lines)))
        return lines, Font(family=family, size=size), min(300, 9.8 * len(lines) + 30)
    level = len(re.match("#*", block)[0])
    size, weight, room = (17 - 2 * level, "bold", 200 - 40 * level) if level else (9, None, 25)
    items = re.split(r"\n(?=[-*] |\d+\. )", block)
    font = Font(size=size, weight=weight, style="italic" if re.match(r"\*\w", block) else None)
    return [line for item in items for line in wrap(plain(item), font)], font, room


class Pages:
    """A4 pages, filled from top to bottom with blocks of Markdown; pictures may wait for the next.

    A picture is a block together with its caption.
    """

    def __init__(self, folder):
        self.folder, self.figures, self.waiting, self.y = folder, [], [], 0.0

    def turn(self):
        """Begin a page, with what has been waiting for one."""
        self.figures.append(Figure(figsize=(PAGE[0] / 72, PAGE[1] / 72), layout="none"))
        self.figures[-1].text(0.5, 25 / PAGE[1], len(self.figures), size=8, ha="center")
        waiting, self.waiting, self.y = self.waiting, [], PAGE[1] - MARGIN
        for block in waiting:
            self.add_picture(block)

    def write(self, block):
        lines, font, room = typeset(block)
        height = 1.35 * font.get_size()
        for line in lines:
            while self.y - max(room, height) < MARGIN:
                self.turn()
            self.y, room = self.y - height, 0
            self.figures[-1].text(LEFT, self.y / PAGE[1], line, font=font, parse_math=False)
        self.y -= 7

    def add_picture(self, block):
        pixels = image.imread(self.folder / re.search(r"\((.*)\)", block)[1])
        rows, columns = pixels.shape[:2]
        height = rows * min(0.5, WIDTH / columns, (PAGE[1] - 3 * MARGIN) / rows)
        if self.y - height - 30 < MARGIN:
            return self.waiting.append(block)
        self.y -= height
        axes = self.figures[-1].add_axes((LEFT, self.y / PAGE[1], 1 - 2 * LEFT, height / PAGE[1]))
        axes.imshow(pixels, interpolation="none")
        axes.axis("off")
        self.write(block.split("\n\n")[1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="results", help="folder of results (results)")
    output = Path(parser.parse_args(argv).output)
    text = write_markdown(output)
    use_fonts(text.split())
    pages = Pages(output)
    for block in re.findall(r"^```(?s:.*?)^```$|^!.*\n\n\*.*|^#.*|(?:^(?!```).+\n?)+", text, re.M):
        pages.add_picture(block) if re.match(r"!.*\n\n", block) else pages.write(block.strip())
    while pages.waiting:
        pages.turn()

    def write_pdf(path):
        with PdfPages(path, metadata={"CreationDate": None}) as pdf:
            for figure in pages.figures:
                pdf.savefig(figure)

    engine.write_file(output / "report.md", lambda path: path.write_text(text, "utf-8"))
    engine.write_file(output / "report.pdf", write_pdf)
    print(f"{output}/report.md, {output}/report.pdf")


if __name__ == "__main__":
    main()
