"""The options of int8, which ``build`` and ``calibrate`` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_export.screen import Screen, human_bytes
from ldm_export.verbs.options import lines
from ldm_runtime.errors import SpecError

if TYPE_CHECKING:
    from ldm_calibration.settings import Settings
    from ldm_export.demo import Model

PROMPTS, TRIALS, GRADED = 16, 16, 100
"""Maximum number of observed trajectories, and numbers of trial images: more if their prompts are graded."""
OPTIONS = ("prompts", "min_psnr", "max_accuracy_loss", "calibration_steps", "sensitivity", "trials", "trial_steps")


def add_int8_arguments(verb: argparse.ArgumentParser) -> None:
    """The options, all of which have defaults for the demo model."""
    int8 = verb.add_argument_group("int8")
    int8.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to calibrate or measure ranges with, one a line (the demo model has its own)",
    )
    int8.add_argument("--min-psnr", type=float, metavar="DB", help="least mean PSNR against fp32 (default 35)")
    int8.add_argument(
        "--max-accuracy-loss", type=float, metavar="SHARE", help="maximum loss of prompt accuracy (demo model only)"
    )
    int8.add_argument(
        "--calibration-steps", type=int, metavar="N", help="denoising steps that are observed (default 20)"
    )
    int8.add_argument(
        "--sensitivity",
        choices=("latents", "results"),
        help="rank layers by the final latents, or by their own results",
    )
    int8.add_argument("--trials", type=int, metavar="N", help="pictures the budget is kept on (default 16)")
    int8.add_argument("--trial-steps", type=int, metavar="N", help="denoising steps of these (default 50)")


def given(args: argparse.Namespace) -> list[str]:
    """Which of the options were given, as they are spelled."""
    return [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(args, name) is not None]


def settings_of(args: argparse.Namespace, model: Model) -> Settings:
    """The calibration's settings.

    Args:
        args: parsed.
        model: what is calibrated. The demo model has prompts of its own: held-out ones to try on, others to calibrate
            with.

    Raises:
        SpecError: no prompts for a model other than the demo model, or a number out of range.
    """
    from ldm_calibration.settings import Settings
    from ldm_export.demo import calibration_prompts

    trials = args.trials if args.trials is not None else (TRIALS if args.max_accuracy_loss is None else GRADED)
    if not 1 <= trials <= 1000:
        raise SpecError(f"--trials: got {trials}, expected 1..1000")
    if args.prompts is not None:
        held = tuple(lines(args.prompts))
        prompts, tried = held[:PROMPTS], held[:trials]
    elif own := calibration_prompts(model, PROMPTS, trials):
        prompts, tried = own
    else:
        raise SpecError("--prompts: int8 is calibrated on real prompts, got none; give a text file of them, one a line")
    bounded = args.min_psnr is not None or args.max_accuracy_loss is not None
    return Settings(
        prompts=prompts,
        trial_prompts=tried,
        steps=20 if args.calibration_steps is None else args.calibration_steps,
        trial_steps=50 if args.trial_steps is None else args.trial_steps,
        sensitivity=args.sensitivity or "latents",
        min_psnr=args.min_psnr if bounded else 35.0,
        max_accuracy_loss=args.max_accuracy_loss,
    )


def show(report: dict[str, Any], screen: Screen) -> None:
    """The report's figures as a table."""
    summary, speed = report["summary"], report["speed"]
    rows = [
        ["PSNR against fp32", f"{summary['psnr_mean']:.1f} dB mean, {summary['psnr_worst'] or 99:.1f} dB worst"],
        ["SSIM", f"{summary['ssim_mean']:.4f} mean, {summary['ssim_worst']:.4f} worst"],
    ]
    if summary["correct_fp32"] is not None:
        rows.append(["prompt accuracy", f"{summary['correct_int8']:.1%}, fp32 {summary['correct_fp32']:.1%}"])
    for name, part in report["components"].items():
        state = f"{part['int8_share']:.1%} of its work in int8" if part["quantized"] else f"fp32: {part['why']}"
        rows.append([name, f"{state}, {human_bytes(part['bytes_int8'])} of {human_bytes(part['bytes_fp32'])}"])
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in speed["unet_ms"].items())
    rows.append([f"UNet on {speed['backend']}", f"{speed['ratio']:.2f} times as fast as fp32 ({times})"])
    screen.table("int8", ["", ""], rows)
