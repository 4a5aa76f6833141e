"""Check training commands, one a line, without running them; print how many runs, GPUs, processors.

bash run_all.sh --list | python tools/check_commands.py
"""

import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cpu_count

import torch

import engine
import finetune
import train_scratch

SCRIPTS = {"train_scratch.py": train_scratch, "finetune.py": finetune}


def main():
    runs = 0
    for line in sys.stdin:
        _python, script, *flags = shlex.split(line)
        sys.argv[0] = script  # what argparse calls the program
        arguments = SCRIPTS[script].build_parser().parse_args(flags)
        runs += math.prod(len(getattr(arguments, flag)) for flag in engine.PLURAL_FLAGS)
    print(runs, torch.cuda.device_count(), cpu_count())


if __name__ == "__main__":
    main()
