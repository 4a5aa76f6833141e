"""The budget: whoever adds a line to a full room takes one out."""

import token
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "data.py": 175,
    "models.py": 185,
    "engine.py": 400,
    "train_scratch.py": 50,
    "finetune.py": 105,
    "evaluate.py": 190,
    "plot.py": 200,
    "run_all.sh": 75,
    "tools/prepare.py": 155,
    "tools/report.py": 195,
    "benchmarks/*.py": 170,
    "tests/*.py": 700,
}
CODE = (token.OP, token.NAME, token.NUMBER, token.STRING)
# From Python 3.12 on an f-string is many tokens; here it is one string as before.
START, END = (getattr(token, name, None) for name in ("FSTRING_START", "FSTRING_END"))
MOST_TOKENS_A_LINE = 13  # denser code is not less code


def count(path):
    """(lines on which a token starts, tokens): a docstring is one, comments are none."""
    if path.suffix == ".sh":
        lines = [line for line in path.read_text().splitlines() if line.strip(" ;")]
        return sum(not line.lstrip().startswith("#") for line in lines), 0
    rows, depth = [], 0
    with tokenize.open(path) as file:
        for entry in tokenize.generate_tokens(file.readline):
            if depth == 0 and entry.type in (*CODE, START):
                rows.append(entry.start[0])
            depth += (entry.type == START) - (entry.type == END)
    return len(set(rows)), len(rows)


def test_every_room_is_within_its_budget():
    full = []
    for room, most in ROOMS.items():
        counted = [count(path) for path in sorted(ROOT.glob(room))]
        lines, tokens = (
            (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
        )
        print(f"{room:20} {lines:4} / {most}  {tokens / max(lines, 1):.1f} tokens a line")
        if lines > most or tokens > MOST_TOKENS_A_LINE * lines:
            full.append(room)
    assert not full
