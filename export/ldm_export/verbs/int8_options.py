"""Options of int8 shared by ``build`` and ``calibrate``, the calibration settings, and the table of the report."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.options import lines, real_number, whole_number
from ldm_runtime.errors import SpecError

if TYPE_CHECKING:
    from ldm_calibration.model import ImageRequest
    from ldm_calibration.settings import CalibrationSettings
    from ldm_export.demo import Model

__all__ = ["add_int8_arguments", "default_requests", "given_options", "inputs_of", "settings_of", "show"]

OBSERVED, TRIALS, GRADED_TRIALS = 16, 16, 100
"""Maximum number of observed images, and numbers of trial images without and with grading, which needs more."""
OPTIONS = (
    "prompts",
    "inputs",
    "min_psnr",
    "max_accuracy_loss",
    "calibration_steps",
    "sensitivity",
    "trials",
    "trial_steps",
)


def add_int8_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options."""
    int8 = verb.add_argument_group("int8")
    int8.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with one prompt per line (models conditioned on text; the demo model has its own)",
    )
    int8.add_argument(
        "--inputs",
        type=Path,
        metavar="FOLDER",
        help="folder of images (with NAME_mask.png for inpainting), class images, layouts, or a labels.txt",
    )
    int8.add_argument("--min-psnr", type=real_number, metavar="DB", help="minimum mean PSNR against fp32 (default 35)")
    int8.add_argument(
        "--max-accuracy-loss",
        type=real_number,
        metavar="SHARE",
        help="maximum loss of prompt accuracy (demo model)",
    )
    int8.add_argument(
        "--calibration-steps",
        type=whole_number,
        metavar="N",
        help="denoising steps of the observed images (default 20)",
    )
    int8.add_argument(
        "--sensitivity",
        choices=("latents", "results"),
        help="rank layers by their effect on the final latents (default), or on their own results, which is faster",
    )
    int8.add_argument(
        "--trials",
        type=whole_number,
        metavar="N",
        help="number of trial images that check the budget (default 16, graded 100)",
    )
    int8.add_argument(
        "--trial-steps",
        type=whole_number,
        metavar="N",
        help="denoising steps of the trial images (default: the model's)",
    )


def given_options(args: argparse.Namespace) -> list[str]:
    """Names of the int8 options that are given on the command line."""
    return [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(args, name) is not None]


def default_requests(
    conditioning: Collection[str], model: Model, observed: int, trials: int, classes: int = 0
) -> tuple[tuple[ImageRequest, ...], tuple[ImageRequest, ...]] | None:
    """Return default requests for observation and for trial images; None if the user must give prompts or inputs.

    Args:
        conditioning: Kinds of the model's conditioning; empty for an unconditional model.
        model: The bundle or the checkpoint folder; None for random weights. The demo model has its own prompts.
        observed, trials: Numbers of requests.
        classes: Number of classes of a model conditioned on labels; requests are distributed over them.
    """
    from ldm_export.demo import calibration_prompts

    if not conditioning:
        return ({},) * observed, ({},) * trials
    if "label" in conditioning and classes:
        return _spread_labels(classes, observed), _spread_labels(classes, trials)
    if "text" not in conditioning:
        return None
    prompts = calibration_prompts(model, observed, trials)
    if prompts is None:
        return None
    first, second = (tuple({"prompts": prompt} for prompt in part) for part in prompts)
    return first, second


def _spread_labels(classes: int, count: int) -> tuple[ImageRequest, ...]:
    return tuple({"labels": index * classes // count} for index in range(count))


def settings_of(
    args: argparse.Namespace, conditioning: Collection[str], model: Model = None, classes: int = 0
) -> CalibrationSettings:
    """Create the calibration settings from the options.

    Args:
        args: Parsed options.
        conditioning: Kinds of the model's conditioning, e.g. ("text",).
        model, classes: See ``default_requests``.

    Raises:
        SpecError: The model needs prompts or inputs and there are none, or takes none and some are given, or a number
            is out of range.
    """
    from ldm_calibration.inputs import INPUTS
    from ldm_calibration.settings import CalibrationSettings

    default_trials = TRIALS if args.max_accuracy_loss is None else GRADED_TRIALS
    trials = default_trials if args.trials is None else args.trials
    if not 1 <= trials <= 1000:
        raise SpecError(f"--trials: got {trials}, expected 1..1000")
    if args.prompts is not None:
        if "text" not in conditioning:
            takes = f"takes {', '.join(conditioning)}" if conditioning else "has no conditioning"
            raise SpecError(f"--prompts: got {args.prompts}, but this model {takes}; leave --prompts out")
        requests: tuple[ImageRequest, ...] = tuple({"prompts": line} for line in lines(args.prompts))
        observed, trial_requests = requests[:OBSERVED], requests[:trials]
    elif args.inputs is not None:
        requests = inputs_of(args.inputs, conditioning)
        observed, trial_requests = requests[:OBSERVED], requests[:trials]
    elif defaults := default_requests(conditioning, model, OBSERVED, trials, classes):
        observed, trial_requests = defaults
    elif "text" not in conditioning:
        files = "; ".join(INPUTS[kind] for kind in conditioning if kind in INPUTS)
        raise SpecError(f"--inputs: int8 is calibrated on real inputs, got none; give a folder of {files}")
    else:
        raise SpecError("--prompts: int8 is calibrated on real prompts, got none; give a text file of them, one a line")
    bounded = args.min_psnr is not None or args.max_accuracy_loss is not None
    return CalibrationSettings(
        requests=observed,
        trial_requests=trial_requests,
        steps=20 if args.calibration_steps is None else args.calibration_steps,
        trial_steps=args.trial_steps,
        sensitivity=args.sensitivity or "latents",
        min_psnr=args.min_psnr if bounded else 35.0,
        max_accuracy_loss=args.max_accuracy_loss,
    )


def inputs_of(folder: Path, conditioning: Collection[str]) -> tuple[ImageRequest, ...]:
    """Read the requests from a folder of inputs.

    Raises:
        SpecError: The model takes none, or the folder cannot be used.
    """
    from ldm_calibration.inputs import INPUTS, read_inputs

    kinds = [kind for kind in conditioning if kind in INPUTS]
    if not kinds:
        takes = "text, give --prompts" if conditioning else "nothing, leave it out"
        raise SpecError(f"--inputs: got {folder}, but this model takes {takes}")
    return read_inputs(folder, kinds[0])


def show(report: dict[str, Any], screen: Screen) -> None:
    """Print the figures of an int8 report as a table, and its warnings."""
    summary, speed, budget = report["summary"], report["speed"], report["budget"]
    worst = "all images equal" if summary["psnr_worst"] is None else f"{summary['psnr_worst']:.1f} dB worst"
    rows = [
        ["budget", f"{'met' if budget['met'] else 'not met'}: {budget['verdict']}"],
        ["PSNR against fp32", f"{summary['psnr_mean']:.1f} dB mean, {worst}"],
        ["SSIM against fp32", f"{summary['ssim_mean']:.4f} mean, {summary['ssim_worst']:.4f} worst"],
    ]
    if summary["correct_int8"] is not None:
        rows.append(["prompt accuracy", f"{summary['correct_int8']:.1%}, fp32 {summary['correct_fp32']:.1%}"])
    for name, part in report["components"].items():
        state = f"{part['int8_share']:.1%} of its work in int8" if part["quantized"] else f"fp32: {part['why']}"
        rows.append([name, f"{state}, {human_bytes(part['bytes_int8'])} of {human_bytes(part['bytes_fp32'])}"])
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in speed["unet_ms"].items())
    rows.append([f"UNet on {speed['backend']}", f"{speed['ratio']:.2f} times as fast as fp32 ({times})"])
    screen.table("int8", ["", ""], rows)
    for warning in report["warnings"]:
        screen.note(f"warning: {warning}")
