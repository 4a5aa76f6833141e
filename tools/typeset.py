"""Set a list of blocks as Markdown or as the A4 pages of a PDF.

A block is a tuple: ("title", text), ("heading", text), ("text", text), ("table", rows, caption),
("figure", path, caption) or ("code", text, caption). The first of a table's rows is its head.
Tables and figures are numbered in order.
"""

import itertools
import os
import textwrap
from pathlib import Path

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import imread
from matplotlib.lines import Line2D

PAGE, MARGIN = (8.27, 11.69), 0.9  # A4, inches
WIDTH, BOTTOM = PAGE[0] - 2 * MARGIN, PAGE[1] - MARGIN
LEADING = 1.4  # line height, in font sizes
MONOSPACE = "DejaVu Sans Mono"


def numbered(blocks):
    """The blocks with "Table n. " and "Figure n. " before the captions."""
    counters = {"table": itertools.count(1), "figure": itertools.count(1)}
    for kind, *content in blocks:
        if kind in counters:
            content[-1] = f"{kind.capitalize()} {next(counters[kind])}. {content[-1]}"
        yield kind, *content


def write_markdown(blocks, file, folder):
    """Write Markdown to an open binary file in `folder`; figures are linked relative to that."""
    lines = []
    for kind, *content in numbered(blocks):
        if kind == "title":
            lines.append(f"# {content[0]}")
        elif kind == "heading":
            lines.append(f"## {content[0]}")
        elif kind == "text":
            lines.append(content[0])
        elif kind == "figure":
            link = Path(os.path.relpath(content[0], folder)).as_posix()
            lines.append(f"![{content[1]}](<{link}>)\n\n*{content[1]}*")
        elif kind == "code":
            lines.append(f"{content[1]}\n\n```python\n{content[0]}\n```")
        else:
            head, *rows = ([str(cell).replace("|", "\\|") for cell in row] for row in content[0])
            table = [head, ["---"] * len(head), *rows]
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in table))
            lines.append(f"*{content[1]}*")
    file.write(("\n\n".join(lines) + "\n").encode())


def text_width(text, size, weight="normal", family="DejaVu Sans"):
    """Width of a line of text, inches."""
    font = get_font(findfont(FontProperties(family=family, weight=weight)))
    font.set_size(size, 72)
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 72


def wrap(text, width, size, weight="normal"):
    """Lines of `text` that are at most `width` inches wide; a longer word is cut."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while text_width(word, size, weight) > width:
                cut = next(n for n in range(len(word), 0, -1)
                           if n == 1 or text_width(word[:n], size, weight) <= width)  # fmt: skip
                lines, line, word = [*lines, *([line] if line else []), word[:cut]], "", word[cut:]
            longer = f"{line} {word}" if line else word
            if text_width(longer, size, weight) <= width:
                line = longer
            else:
                lines, line = [*lines, line], word
        lines.append(line)
    return lines


class Pages:
    """A cursor that moves down A4 pages; what does not fit starts the next page."""

    def __init__(self, pdf):
        self.pdf, self.figure, self.number, self.y = pdf, None, 0, BOTTOM

    def room(self, height):
        """Make sure that `height` inches are left, on a new page if need be."""
        if self.figure is None or (self.y + height > BOTTOM and self.y > MARGIN):
            self.finish()
            self.figure, self.y = Figure(figsize=PAGE), MARGIN
            self.number += 1
            self.write(str(self.number), PAGE[0] / 2, PAGE[1] - MARGIN / 2, 8, ha="center")

    def finish(self):
        if self.figure is not None:
            self.pdf.savefig(self.figure)

    def write(self, text, x, y, size, **style):
        self.figure.text(x / PAGE[0], 1 - y / PAGE[1], text, fontsize=size, va="baseline",
                         parse_math=False, **style)  # fmt: skip

    def lines(self, lines, size, after=0.08, keep=0.0, **style):
        """Lines of text one under the other; `keep` inches of what follows stay with the first."""
        height = size * LEADING / 72
        self.room(min(2, len(lines)) * height + keep)
        for line in lines:
            self.room(height)
            self.y += height
            self.write(line, MARGIN, self.y - 0.3 * height, size, **style)
        self.y += after

    def table(self, rows, size=7.5, pad=0.12):
        """A table over the width of the text, its cells wrapped; the head repeats on each page."""
        rows = [[str(cell) for cell in row] for row in rows]
        natural = [max(text_width(cell, size, "bold") for cell in column) + pad
                   for column in zip(*rows, strict=True)]  # fmt: skip
        widths = list(natural)
        while sum(widths) > WIDTH + 1e-9:  # the widest columns give way
            widest = max(widths)
            widths = [0.95 * w if w == widest else w for w in widths]
        height = size * LEADING / 72

        def draw(row, weight):
            cells = [wrap(cell, width - pad + 1e-6, size, weight)
                     for cell, width in zip(row, widths, strict=True)]  # fmt: skip
            tall = max(map(len, cells)) * height + 0.05
            if self.y + tall > BOTTOM and weight == "normal":
                self.room(tall)
                draw(rows[0], "bold")
            x = MARGIN
            for cell, width in zip(cells, widths, strict=True):
                for number, line in enumerate(cell):
                    self.write(line, x, self.y + (number + 0.75) * height, size, weight=weight)
                x += width
            self.y += tall
            y = 1 - (self.y - 0.03) / PAGE[1]
            span = [MARGIN / PAGE[0], (MARGIN + sum(widths)) / PAGE[0]]
            color, thick = ("black", 0.8) if weight == "bold" else ("#CCCCCC", 0.4)
            self.figure.add_artist(Line2D(span, [y, y], color=color, linewidth=thick))

        self.room(3 * height + 0.2)
        draw(rows[0], "bold")
        for row in rows[1:]:
            draw(row, "normal")
        self.y += 0.05

    def picture(self, path, caption):
        """A PNG over the width of the text, or smaller if it is tall, with its caption below."""
        pixels, lines = imread(path), wrap(caption, WIDTH, 8)
        ratio = pixels.shape[0] / pixels.shape[1]
        width = min(WIDTH, 6 / ratio)
        self.room(width * ratio + len(lines) * 8 * LEADING / 72 + 0.2)
        left = (PAGE[0] - width) / 2
        box = [left / PAGE[0], 1 - (self.y + width * ratio) / PAGE[1],
               width / PAGE[0], width * ratio / PAGE[1]]  # fmt: skip
        axes = self.figure.add_axes(box)
        axes.imshow(pixels, aspect="auto", interpolation="lanczos")
        axes.axis("off")
        self.y += width * ratio + 0.05
        self.lines(lines, 8, after=0.2, style="italic")


def write_pdf(blocks, file, _folder):
    """Write the blocks as a PDF to an open binary file."""
    blocks = list(numbered(blocks))
    with PdfPages(file, metadata={"Title": blocks[0][1], "CreationDate": None}) as pdf:
        pages = Pages(pdf)
        for kind, *content in blocks:
            if kind == "title":
                pages.lines(wrap(content[0], WIDTH, 18, "bold"), 18, after=0.2, weight="bold")
            elif kind == "heading":
                pages.y += 0.12
                lines = wrap(content[0], WIDTH, 13, "bold")
                pages.lines(lines, 13, after=0.06, keep=0.8, weight="bold")
            elif kind == "text":
                pages.lines(wrap(content[0], WIDTH, 9.5), 9.5)
            elif kind == "figure":
                pages.picture(*content)
            elif kind == "code":
                pages.lines(wrap(content[1], WIDTH, 9.5), 9.5, after=0.02, keep=0.5)
                lines = itertools.chain.from_iterable(
                    textwrap.wrap(line, 105, subsequent_indent=" " * 8, drop_whitespace=False)
                    or [""]
                    for line in content[0].split("\n")
                )
                pages.lines(list(lines), 7, after=0.12, family=MONOSPACE, color="#222222")
            else:
                pages.table(content[0])
                pages.lines(wrap(content[1], WIDTH, 8), 8, after=0.15, style="italic")
        pages.finish()
