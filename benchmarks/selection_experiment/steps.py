# SPDX-License-Identifier: Apache-2.0
"""Which vectors a ReMamba keeps, and what that is worth (arXiv 2408.15496, Fig. 3 and Table 5), at 30M parameters.

    python benchmarks/selection_experiment prepare --run RUN --books BOOKS --held-out-books OTHERS
    python benchmarks/selection_experiment all --run RUN --seconds 540    # again and again, until all is done
    python benchmarks/selection_experiment report --run RUN --output benchmarks/results/selection
    python benchmarks/selection_experiment all --small --run RUN    # .2M parameters, facts alone: an hour or two on a CPU
    python benchmarks/selection_experiment all --tiny --run RUN     # whether every step runs: a minute on a CPU

A base is pretrained on books, then taught to answer in plain passes over short prompts (trunk). From there all arms start:
Mamba (SFT), ReMamba, and ReMamba that keeps random, evenly spaced or multiplied vectors, each fine-tuned on the same facts,
lines and instructions in the same order, and evaluated with `remamba eval`. A seed fixes data, draws and their order.

Every step knows in RUN what is done, and stops at --seconds, with exit status 75 and a checkpoint that the same command goes
on from: on a CPU bit for bit. `export` packs folders of RUN into parts of at most 15 MiB, which `import` takes up on another
machine.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from remamba_hf.training.book_tokens import write_json
from remamba_hf.training.recall_data import RecallSampler

from . import parts, report
from .data import BookBatches, Instructions, MixedSampler, PhasedBatches
from .evaluation import START, evaluate
from .line_data import LineSampler
from .preparation import prepare, tokenizer_and_tokens
from .recipe import ARMS, FIVE, RECIPES, Recipe
from .training import NotLearned, OutOfTime, train_arm, train_base, train_trunk

STEPS = ("prepare", "pretrain", "trunk", "finetune", "evaluate", "all", "report", "export", "import")
GOES_ON = 75  # exit status, that of "try again" in sysexits.h
OWN_BOOKS = Path(__file__).resolve().parents[2] / "examples" / "books"


class Experiment:
    """The steps over one run folder.

    Args:
        recipe: must be the one that the folder was begun with.
        deadline: of `time.monotonic`, for what is trained or evaluated.
        workers: processes that make batches.
    """

    def __init__(self, run: Path, recipe: Recipe, deadline: float = math.inf, workers: int = 0) -> None:
        self.run, self.recipe, self.deadline, self.workers = run, recipe, deadline, workers
        self.data = run / "data"
        run.mkdir(parents=True, exist_ok=True)
        written, known = json.loads(json.dumps(recipe.written())), run / "recipe.json"
        if not known.exists():
            write_json(known, written)
        if json.loads(known.read_text()) != written:
            raise ValueError(f"{run} was begun with another recipe: give another --run, or that one's options")

    def pretrain(self) -> None:
        """Books to `base/model`."""
        folder = self.run / "base"
        if not self._finished(folder):
            tokenizer, tokens = tokenizer_and_tokens(self.data)
            train_base(self.recipe, folder, BookBatches(self.recipe, tokens), tokenizer, self.deadline, self.workers)

    def trunk(self) -> None:
        """`base/model` to `trunk/model`."""
        folder = self.run / "trunk"
        if not self._finished(folder):
            tokenizer, tokens = tokenizer_and_tokens(self.data)

            def batches(start: int) -> PhasedBatches:
                return PhasedBatches(self.recipe.trunk, self.sampler(tokens, tokenizer, seed=1000 + start))

            base = self._model("base", "pretrain")
            train_trunk(self.recipe, folder, base, batches, tokenizer, self.deadline, self.workers)

    def finetune(self, arm: str, seed: int) -> None:
        """`trunk/model` to `arms/ARM-SEED/model`."""
        folder = self.run / "arms" / f"{arm}-{seed}"
        if not self._finished(folder):
            tokenizer, tokens = tokenizer_and_tokens(self.data)
            instructions = Instructions.load(self.data / "instructions")
            sampler, trunk = self.sampler(tokens, tokenizer, seed), self._model("trunk", "trunk")
            batches = PhasedBatches(self.recipe.tuning, sampler, instructions, self.recipe.instruction_share)
            train_arm(self.recipe, ARMS[arm], seed, folder, trunk, batches, tokenizer, self.deadline, self.workers)

    def evaluate(self, arm: str, seed: int) -> None:
        """A model's answers to `results/ARM-SEED`."""
        where, step = ("trunk", "trunk") if arm == START else (f"arms/{arm}-{seed}", "finetune")
        results = self.run / "results" / f"{arm}-{seed}"
        if not (results / "done.json").is_file():
            evaluate(self.recipe, self.data, arm, self._model(where, step), results, self.deadline)

    def all(self, arms: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        """Everything behind `prepare`, seed by seed, so that what is finished can be compared."""
        self.pretrain()
        self.trunk()
        self.evaluate(START, 0)
        for seed in seeds:
            for arm in arms:
                self.finetune(arm, seed)
                self.evaluate(arm, seed)

    def sampler(self, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int) -> MixedSampler:
        """Of training: with other seeds than those of the evaluation, which has other books besides."""
        recall = RecallSampler(tokens, tokenizer, seed + 1, self.recipe.digits)
        return MixedSampler(recall, LineSampler(tokenizer, seed + 1), self.recipe.line_share)

    def _finished(self, folder: Path) -> bool:
        return (folder / "training.json").is_file() and (folder / "model").is_dir()

    def _model(self, folder: str, step: str) -> Path:
        if not self._finished(self.run / folder):
            raise FileNotFoundError(f"{self.run / folder} has no finished model: run the step {step} first")
        return self.run / folder / "model"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="selection_experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--run", type=Path, required=True, help="folder of the experiment")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="for a CPU; prepares itself from examples/books")
    size.add_argument("--tiny", action="store_true", help="likewise, and learns nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training and evaluating after so long")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches (a GPU machine: 8)")
    parser.add_argument("--arms", "--arm", nargs="+", choices=[*ARMS, START], default=list(FIVE), help="default: the five")
    parser.add_argument(
        "--seeds", "--seed", nargs="+", type=int, help="default: the recipe's, 0 to 2, of small models 0 and 1"
    )
    parser.add_argument("--steps", help="change the recipe's numbers of steps: pretraining,trunk,tuning")
    data = parser.add_argument_group("prepare")
    data.add_argument("--books", type=Path, help="folder of .txt books to train on")
    data.add_argument(
        "--held-out-books", type=Path, help="folder of .txt books for the evaluation; default: the ends of BOOKS"
    )
    data.add_argument("--exclude", help="leave out books whose text matches this expression")
    data.add_argument("--instructions", type=Path, nargs="+", default=[], help="files or folders of prompts with responses")
    data.add_argument("--questions", type=Path, help="likewise, held out")
    data.add_argument("--longeval", type=Path, help="folder with LongEval's files")
    other = parser.add_argument_group("report, export, import")
    other.add_argument(
        "--output", type=Path, help="report: name of the files, without an ending; export: folder of the parts"
    )
    other.add_argument("--folders", nargs="+", help="export: folders of RUN, such as data, trunk, results")
    other.add_argument("--part-size", type=float, default=15, help="export: MiB of a part, at most (default: 15)")
    other.add_argument("--parts", type=Path, nargs="+", help="import: folders of the parts")
    options = parser.parse_args(words)
    needed = {"report": ("output",), "export": ("output", "folders"), "import": ("parts",)}
    for name in needed.get(options.step, ()):
        if not getattr(options, name):
            parser.error(f"{options.step} needs --{name}")
    if START in options.arms and options.step != "evaluate":
        parser.error(f"{START} can be evaluated only: it is what the trunk left")
    if options.step == "prepare" and not (options.books or options.small or options.tiny):
        parser.error("prepare needs --books")
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """That of the options."""
    recipe = RECIPES["tiny" if options.tiny else "small" if options.small else "full"]
    if options.steps:
        counts = [int(count) for count in options.steps.split(",")]
        if len(counts) != 3 or min(counts) < 1:
            raise ValueError(f"--steps is {options.steps}: give three numbers of at least 1, such as 1200,800,500")
        trainings = zip(("pretraining", "trunk", "tuning"), counts, strict=True)
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), steps=count) for name, count in trainings})
    return recipe


def run_step(options: argparse.Namespace, experiment: Experiment) -> None:
    arms, seeds = tuple(options.arms), tuple(options.seeds or experiment.recipe.seeds)
    if options.step == "prepare" or (options.step == "all" and (options.small or options.tiny)):
        record = prepare(
            experiment.recipe,
            experiment.data,
            options.books or OWN_BOOKS,
            options.held_out_books,
            options.exclude,
            options.instructions,
            options.questions,
            options.longeval,
        )
        print(json.dumps(record))
    if options.step in ("pretrain", "trunk"):
        getattr(experiment, options.step)()
    if options.step in ("finetune", "evaluate"):
        for seed in seeds:
            for arm in arms:
                getattr(experiment, options.step)(arm, seed)
    if options.step == "all":
        experiment.all(arms, seeds)
    if options.step == "report":
        print("\n".join(map(str, report.write(experiment.recipe, experiment.run, options.output))))


def main(words: list[str] | None = None) -> None:
    options = parse_arguments(words)
    began = time.monotonic()
    if options.step == "export":
        files = parts.export(options.run, options.folders, options.output, options.part_size)
        print(f"{len(files)} parts in {options.output}")
        return
    if options.step == "import":
        print(f"{options.run}: {', '.join(parts.import_parts(options.run, options.parts))}")
        return
    experiment = Experiment(options.run, recipe_of(options), began + options.seconds, options.workers)
    try:
        run_step(options, experiment)
    except OutOfTime as stop:
        print(f"stopped after {time.monotonic() - began:.0f} s ({stop}): the same command goes on", file=sys.stderr)
        sys.exit(GOES_ON)
    except NotLearned as error:
        sys.exit(f"selection_experiment {options.step}: {error}")
    print(f"{options.step}: done after {time.monotonic() - began:.0f} s")
