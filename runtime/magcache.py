"""MagCache's published tables and the skip lists that follow from them for any schedule (Ma et al. 2025).

A table holds the ratios of the transformer's residual between neighbouring steps, measured by its authors on one prompt
(Zehong-Ma/MagCache, MagCache4Wan2.2, conditional branch). The rule looks at nothing else, so it yields a fixed list.
For other schedules the ratios are accumulated over sigma, within one expert, and read again at the new sigmas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.schedule import Schedule, make_schedule
from wan22.caching import computed_steps
from wan22.errors import UserError
from wan22.specs import CUSTOM, SPECS, ModelSpec


@dataclass(frozen=True)
class Table:
    """Ratios of steps 1 to N-1 of the official schedule of a model; the entry at the expert switch is not used."""

    model: str
    threshold: float  # accumulated deviation of the product of the ratios from 1
    max_consecutive: int
    retention: tuple[float, ...]  # by expert: the share of its steps that are computed first
    ratios: tuple[float, ...]


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


_T2V = Table("t2v-a14b", 0.06, 2, (0.4, 0.4), _ratios("""
1.00124 .99822 .99696 .99703 .9966 .99602 .99578 .99484 .99633 .99659 .99534 .99584 .99681 .99563 .9944 .99594 .99466
.99453 .99389 .99391 .99354 .99283 .99268 .99057 .99125 .65523 .98808 .98765 .9851 .98311 .9805 .97776 .97278 .96731
.95857 .94385 .92118 .88108 .80263"""))  # fmt: skip
_I2V = Table("i2v-a14b", 0.06, 2, (1.0, 0.1), _ratios("""
.99191 .99356 .99326 .99251 .99393 .9943 .99276 .99389 .99274 .99316 .99379 .99268 .99222 .99175 .91076 .98931 .99087
.98852 .98895 .98806 .9871 .98613 .98434 .983 .98185 .98131 .9783 .97619 .97264 .97088 .96568 .96045 .95322 .94579
.93297 .91699 .89174 .8541 .79823"""))  # fmt: skip
_TI2V_TEXT = Table("ti2v-5b", 0.06, 2, (0.2,), _ratios("""
.99505 .99441 .99558 .99499 .99534 .99468 .99463 .9946 .99408 .9945 .99409 .99403 .99382 .99349 .99377 .9933 .99303
.99217 .992 .99201 .99133 .99112 .99155 .98958 .98959 .98838 .98826 .9883 .98711 .98562 .98511 .98414 .98284 .98104
.97981 .97849 .97557 .97398 .97171 .96917 .96511 .96263 .95839 .95483 .94942 .9468 .94583 .94843
.96949"""))  # fmt: skip
_TI2V_IMAGE = Table("ti2v-5b", 0.06, 2, (0.2,), _ratios("""
.99512 .99559 .99595 .99512 .99546 .99543 .99496 .99504 .99444 .99481 .99435 .9943 .99411 .99373 .99413 .99363 .99335
.99244 .99229 .99239 .99163 .99149 .99191 .9898 .9899 .98849 .98846 .98861 .9874 .98588 .98539 .98444 .9831 .98119
.98001 .97862 .97555 .97392 .97152 .96871 .96435 .96129 .95639 .95176 .94446 .93972 .93575 .93537
.96655"""))  # fmt: skip


def magcache_steps(spec: ModelSpec, schedule: Schedule, *, has_image: bool) -> tuple[int, ...]:
    """The steps of ``schedule`` that MagCache's rule skips, without those that every cache computes.

    ``spec`` names the model and determines the expert of every step; small twins take the table of their original.

    Raises:
        UserError: there is no table for the model.
    """
    table = _table(spec, has_image)
    experts = [spec.expert_at(t, step) for step, t in enumerate(schedule.timesteps.tolist())]
    ratios = _at(schedule, experts, table)
    kept = computed_steps(experts) | _retained(experts, dict(zip(spec.experts, table.retention, strict=True)))
    skipped, product, error, in_a_row = [], 1.0, 0.0, 0
    for step in range(1, len(experts)):
        if step in kept:  # the published rule carries its sums over these steps
            continue
        product *= ratios[step]
        error += abs(1 - product)
        in_a_row += 1
        if error < table.threshold and in_a_row <= table.max_consecutive:
            skipped.append(step)
        else:
            product, error, in_a_row = 1.0, 0.0, 0
    return tuple(skipped)


def _table(spec: ModelSpec, has_image: bool) -> Table:
    for table in (_T2V, _I2V, _TI2V_IMAGE if has_image else _TI2V_TEXT):
        if spec.name.startswith(table.model) and not spec.name.endswith(CUSTOM):
            return table
    expected = "a published model or a twin of one, for which MagCache has a table"
    raise UserError(f"--skip-steps magcache for {spec.name}", expected, "list the steps, or use --cache easy")


def _at(schedule: Schedule, experts: Sequence[str], table: Table) -> list[float]:
    """The ratio of every step of ``schedule`` to the step before it; 1 at the first step of an expert."""
    original = SPECS[table.model]
    sampling = original.sampling
    measured = make_schedule("unipc", sampling.steps, sampling.shift)
    of_expert = [original.expert_at(t) for t in measured.timesteps.tolist()]
    ratios = [1.0] * len(experts)
    for name in original.experts:
        steps = [step for step, expert in enumerate(of_expert) if expert == name]
        logs = [0.0, *np.cumsum(np.log([table.ratios[step - 1] for step in steps[1:]]))]
        rising = np.array(steps)[::-1]  # numpy interpolates between rising places
        at = np.interp(schedule.sigmas[:-1], measured.sigmas[rising], logs[::-1])
        for step in range(1, len(experts)):
            if experts[step] == experts[step - 1] == name:
                ratios[step] = float(np.exp(at[step] - at[step - 1]))
    return ratios


def _retained(experts: Sequence[str], shares: dict[str, float]) -> set[int]:
    """The steps that the recipe computes at the start of every expert; its bound counts only for the second."""
    kept = set()
    for name, share in shares.items():
        steps = [step for step, expert in enumerate(experts) if expert == name]
        end = steps[0] + share * len(steps) if steps else 0.0
        kept |= {step for step in steps if step < end or (step == end and steps[0] > 0)}
    return kept
