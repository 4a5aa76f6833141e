"""Check training commands, one a line, without running them.

bash run_all.sh --list | python tools/check_commands.py                 runs, GPUs, processors
... | grep -v best-of-grid | python tools/check_commands.py --unfinished    runs not yet finished
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cpu_count, read_runs

import torch

import engine
import finetune
import train_scratch

SCRIPTS = {"train_scratch.py": train_scratch, "finetune.py": finetune}


def count_unfinished(arguments):
    """How many runs of one command are not in its folder of results."""
    stored = read_runs(arguments.output).values()
    finished = [engine.settings(run["config"]) for run in stored]
    return sum(engine.settings(vars(run)) not in finished for run in engine.combinations(arguments))


def main():
    only_unfinished, commands = sys.argv[1:] == ["--unfinished"], []
    for line in sys.stdin:
        _python, script, *flags = shlex.split(line)
        sys.argv[0] = script  # what argparse calls the program
        commands.append(SCRIPTS[script].build_parser().parse_args(flags))
    if only_unfinished:
        print(sum(count_unfinished(arguments) for arguments in commands))
    else:
        runs = sum(len(engine.combinations(arguments)) for arguments in commands)
        print(runs, torch.cuda.device_count(), cpu_count())


if __name__ == "__main__":
    main()
