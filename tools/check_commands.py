"""Check training commands, one a line on standard input, without running them.

bash run_all.sh --list | python tools/check_commands.py      prints runs, GPUs, processors
... | grep -v best-of-grid | python tools/check_commands.py --unfinished      runs to train
"""

import shlex
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, cpu_count, read_runs

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


def refuse_another_study(commands):
    """Exit with one line if the folder of results holds as many runs of a network with others.

    evaluate.py takes the larger of two groups of runs that differ in more than a grid varies for
    the study and leaves the other out: better to hear it before days of training.
    """

    def group(config):
        network = [config.get(key) for key in ("model", "backbone", "unfreeze_convolutions")]
        return tuple(network), tuple(sorted(engine.settings(config, engine.PLURAL_FLAGS).items()))

    planned, stored = Counter(), Counter()
    for arguments in commands:
        planned.update(group(vars(run)) for run in engine.combinations(arguments))
    for output in {arguments.output for arguments in commands}:
        stored.update(group(run["config"]) for run in read_runs(output).values())
    for (network, settings), count in stored.items():
        for (own, wanted), number in planned.items():
            other = [key for key, value in wanted if (key, value) not in settings]
            own_count = max(number, stored[own, wanted])
            if own == network and other and count >= own_count and "train_photos" not in other:
                flags = ", ".join(other).replace("_", "-")
                raise SystemExit(
                    f"{commands[0].output} holds {count} runs with other {flags}: a study of its "
                    "own, so give another OUT."
                )


def main():
    parser = Parser(__doc__)
    parser.add_argument("--unfinished", action="store_true", help="count runs that are to train")
    only_unfinished, commands = parser.parse_args().unfinished, []
    for line in filter(str.strip, sys.stdin):
        _python, script, *flags = shlex.split(line)
        sys.argv[0] = script  # what argparse calls the program
        commands.append(SCRIPTS[script].build_parser().parse_args(flags))
    if only_unfinished:
        print(sum(count_unfinished(arguments) for arguments in commands))
    else:
        refuse_another_study(commands)
        runs = sum(len(engine.combinations(arguments)) for arguments in commands)
        print(runs, torch.cuda.device_count(), cpu_count())


if __name__ == "__main__":
    main()
