# SPDX-License-Identifier: Apache-2.0
"""What fixes the experiment: sizes, lengths, steps, arms. A run folder holds the recipe that it was begun with."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from remamba_hf.training.recall_data import RecallLevel
from remamba_hf.training.recall_losses import LossWeights


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
        selection: which positions are kept (`selection` of the configuration); None: one pass, as a plain Mamba reads.
        evidence: whether scores are told where the evidence is, beside the answer's loss.
    """

    selection: str | None
    evidence: bool = True


ARMS = {
    "sft": Arm(None),
    "remamba": Arm("score"),
    "random": Arm("random"),
    "stride": Arm("stride"),
    "multiplicative": Arm("multiplicative"),
    # Not among the five: the same as "remamba" with scores that learn from the answer alone, as the paper's do.
    "remamba-answer-only": Arm("score", evidence=False),
}
FIVE = ("sft", "remamba", "random", "stride", "multiplicative")


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Attributes:
        share: of the steps.
        level: prompts and draws; of echoes the lengths of the pieces alone.
        form: what is to be told from a text. "asked": numbers, in answers to questions. "restated": numbers, behind what
            says whose they are, in another order ("Elinor Marsh is 48213"): to tell them apart is learned from it. "echo":
            all of it, a piece of a book that is said twice: copying is learned from it soonest.
    """

    share: float
    level: RecallLevel
    form: Literal["asked", "restated", "echo"] = "asked"


@dataclass(frozen=True)
class Training:
    """One training: as many steps of as many tokens.

    Attributes:
        phases: in turn; steps open them, not success: a run that was cut off, and one on another machine, read the same.
            None for pretraining.
        must_match: share of right answers without which a training is given up where the first phase that asks ends.
    """

    steps: int
    tokens_per_batch: int
    learning_rate: float
    warmup_steps: int
    phases: tuple[Phase, ...] = ()
    must_match: float = 0.0

    def ends(self) -> list[int]:
        """For every phase the step at which the next one begins."""
        return [round(end) for end in np.cumsum([phase.share for phase in self.phases]) * self.steps]

    def first_asked_end(self) -> int:
        """The step at which the first phase that asks ends."""
        return next(end for end, phase in zip(self.ends(), self.phases, strict=True) if phase.form == "asked")

    def phase(self, step: int) -> int:
        """The number of a step's phase."""
        return min(int(np.searchsorted(self.ends(), step, side="right")), len(self.phases) - 1)


@dataclass(frozen=True)
class Evaluation:
    """What a model is asked. compression: pairs (p, rho), each of which every compressing model is evaluated with."""

    lengths: tuple[int, ...]
    samples: int
    compression: tuple[tuple[float, float], ...]
    distractors: int
    question_length: int
    question_samples: int
    windows: int
    counted: int
    batch_size: int
    batch_tokens: int


@dataclass(frozen=True)
class Recipe:
    """The whole experiment.

    Attributes:
        max_tokens: of book text.
        book_lengths: of the rows of pretraining, one after another for equal numbers of steps.
        trunk: learns in plain passes to copy from short prompts.
        instruction_share: of the batches of fine-tuning, where there are instructions.
        line_share: of the other batches that are lines; the rest are planted facts. Likewise in the trunk.
        weights: of the losses; those of the compressor count for arms that compress.
        seeds: of fine-tuning: of data, draws, and their order.
    """

    hidden_size: int
    layers: int
    vocab_size: int
    max_tokens: int
    digits: int
    initializer_range: float
    pretraining: Training
    book_lengths: tuple[int, ...]
    trunk: Training
    tuning: Training
    instruction_share: float
    line_share: float
    evaluation: Evaluation
    weights: LossWeights = LossWeights()  # noqa: RUF009 - frozen
    logging_steps: int = 10
    save_steps: int = 1_000  # a multiple of logging_steps
    seeds: tuple[int, ...] = (0, 1, 2)

    def written(self) -> dict[str, Any]:
        return asdict(self)


# The paper draws p from .1 to .3: four planted facts of five would lie behind the window, where all arms read alike.
# rho ends in the paper's range, .05 to .2, and begins where nothing is lost: vectors have to be read before being chosen.
SPAN = (0.1, 0.9)
FULL = Recipe(
    # 30M parameters, which in bfloat16 are four parts of 15 MiB.
    hidden_size=512,
    layers=14,
    vocab_size=12_288,
    max_tokens=20_000_000,
    digits=5,
    initializer_range=0.03,
    pretraining=Training(600, 65_536, 1.5e-3, 100),
    book_lengths=(1024, 1024, 2048, 2048, 4096, 4096, 8192),
    # Questions alone teach copying and not whose number it is, as far as 2,400 steps show: with several numbers in a text
    # answers stayed as good as chance. Restated facts taught it, to one that could copy, within 300 steps, and questions
    # were then answered in 75.
    trunk=Training(
        2_200,
        16_384,
        1e-3,
        50,
        (
            Phase(0.18, RecallLevel((16, 24, 32)), "echo"),
            Phase(0.2, RecallLevel((112, 128), questions=4), "restated"),
            Phase(0.1, RecallLevel((192,), questions=8), "restated"),
            Phase(0.08, RecallLevel((256,), questions=6)),
            Phase(0.1, RecallLevel((512,), questions=12)),
            Phase(0.14, RecallLevel((512, 1024), questions=4, distractors=6)),
            Phase(0.2, RecallLevel((1024, 2048), questions=4, distractors=6)),
        ),
        must_match=0.5,
    ),
    tuning=Training(
        800,
        16_384,
        7e-4,
        50,
        (
            Phase(0.1, RecallLevel((256, 512), distractors=2)),
            Phase(0.25, RecallLevel((256, 512), distractors=2, two_stage=1.0, span=SPAN, ratio=(0.5, 1.0))),
            Phase(0.25, RecallLevel((512, 1024), distractors=3, two_stage=1.0, span=SPAN, ratio=(0.15, 0.6))),
            Phase(0.2, RecallLevel((1024, 2048), distractors=4, two_stage=1.0, span=SPAN, ratio=(0.05, 0.3))),
            Phase(0.2, RecallLevel((2048, 4096), distractors=4, two_stage=1.0, span=SPAN, ratio=(0.05, 0.2))),
        ),
    ),
    instruction_share=0.2,
    line_share=0.45,
    evaluation=Evaluation(
        lengths=(2048, 4096, 6144, 9216),
        samples=100,
        compression=((0.25, 0.05), (0.75, 0.05)),
        distractors=4,
        question_length=6144,
        question_samples=60,
        windows=4,
        counted=512,
        batch_size=20,
        batch_tokens=196_608,
    ),
)
# What two cores can do in an hour: facts alone, of two digits, in short prompts.
SHORT = (0.3, 0.95)
SMALL = Recipe(
    hidden_size=64,
    layers=2,
    vocab_size=1_024,
    max_tokens=2_000_000,
    digits=2,
    initializer_range=0.1,
    pretraining=Training(60, 3_072, 3e-3, 20),
    book_lengths=(128,),
    trunk=Training(
        900,
        3_072,
        3e-3,
        50,
        (Phase(0.4, RecallLevel((72,))), Phase(0.3, RecallLevel((80, 96))), Phase(0.3, RecallLevel((112, 144)))),
    ),
    tuning=Training(
        360,
        3_072,
        2e-3,
        20,
        (
            Phase(0.1, RecallLevel((96, 128))),
            Phase(0.25, RecallLevel((128, 192), two_stage=1.0, span=SHORT, ratio=(0.5, 1.0), min_kept=16)),
            Phase(0.25, RecallLevel((128, 256), two_stage=1.0, span=SHORT, ratio=(0.2, 0.6), min_kept=16)),
            Phase(0.4, RecallLevel((256, 384), two_stage=1.0, span=SHORT, ratio=(0.1, 0.4), min_kept=16)),
        ),
    ),
    instruction_share=0.0,
    line_share=0.0,
    evaluation=Evaluation(
        lengths=(256, 512, 1024, 2048, 4096),  # trained on up to 384
        samples=100,
        compression=((0.75, 0.1),),
        distractors=0,
        question_length=512,
        question_samples=0,
        windows=8,
        counted=64,
        batch_size=25,
        batch_tokens=12_800,
    ),
    weights=LossWeights(language=0.1),
    seeds=(0, 1),
)
TINY = Recipe(
    hidden_size=32,
    layers=2,
    vocab_size=512,
    max_tokens=200_000,
    digits=2,
    initializer_range=0.1,
    pretraining=Training(20, 1_024, 3e-3, 5),
    book_lengths=(128, 256),
    trunk=Training(20, 768, 3e-3, 5, (Phase(0.5, RecallLevel((96,))), Phase(0.5, RecallLevel((128,), questions=2)))),
    tuning=Training(
        10,
        768,
        2e-3,
        2,
        (
            Phase(0.4, RecallLevel((128,))),
            Phase(0.6, RecallLevel((192, 256), distractors=1, two_stage=1.0, span=SPAN, ratio=(0.2, 0.8), min_kept=8)),
        ),
    ),
    instruction_share=0.2,
    line_share=0.4,
    evaluation=Evaluation(
        lengths=(256, 512),
        samples=4,
        compression=((0.5, 0.1),),
        distractors=1,
        question_length=256,
        question_samples=2,
        windows=2,
        counted=32,
        batch_size=4,
        batch_tokens=4_096,
    ),
    logging_steps=5,
    seeds=(0, 1),
)
RECIPES = {"full": FULL, "small": SMALL, "tiny": TINY}
