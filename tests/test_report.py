"""The report says what the numbers say, and no more."""

import pytest

import summary
from tools import typeset


def study(difference, p_value):
    half = 0.05
    return {"comparisons": [{
        "a": "plain CNN", "b": "residual CNN", "difference": difference,
        "interval_95": [difference - half, difference + half],
        "p_value": p_value, "different": p_value < 0.05,
    }]}  # fmt: skip


def test_a_difference_within_chance_is_not_called_one():
    sentence = summary.describe_pair(study(-0.018, 0.6), "residual CNN", "plain CNN")
    assert "residual CNN is 1.8 points better than plain CNN" in sentence
    assert "95% interval -3.2 to +6.8" in sentence and "can't tell them apart" in sentence


def test_a_difference_beyond_chance_names_the_better_one():
    sentence = summary.describe_pair(study(-0.2, 0.001), "plain CNN", "residual CNN")
    assert "20.0 points worse" in sentence and "residual CNN is the better one" in sentence
    sentence = summary.describe_pair(study(0, 1), "plain CNN", "residual CNN")
    assert "exactly as accurate as" in sentence and "can't tell them apart" in sentence
    assert summary.describe_pair(study(0, 1), "plain CNN", "another") is None


def test_lines_fit_the_page_and_lose_no_word():
    text = "a study of " * 60 + "an" + "x" * 300
    lines = typeset.wrap(text, 3.0, 9)
    assert all(typeset.text_width(line, 9) <= 3.0 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("rows", [3, 120])
def test_a_pdf_has_all_pages_a_table_needs(tmp_path, rows):
    table = [("class", "photos")] + [(f"class {n}", n) for n in range(rows)]
    with open(tmp_path / "r.pdf", "wb") as file:
        typeset.write_pdf([("title", "T"), ("table", table, "Photos.")], file, tmp_path)
    pages = (tmp_path / "r.pdf").read_bytes().count(b"/Type /Page ")
    assert pages == (1 if rows == 3 else 3)


def test_markdown_links_figures_from_its_own_folder(tmp_path):
    blocks = [("figure", tmp_path / "figures" / "a b.png", "Curves."), ("table", [("a|b",)], "T.")]
    with open(tmp_path / "r.md", "wb") as file:
        typeset.write_markdown(blocks, file, tmp_path)
    text = (tmp_path / "r.md").read_text()
    assert "![Figure 1. Curves.](<figures/a b.png>)" in text and "a\\|b" in text
