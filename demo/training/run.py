"""A resumable training run: weights, moving average, optimiser and loss curve in one folder."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAVE_EVERY, LOG_EVERY = 250, 25


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps: Number of steps.
        seed: Of batches and noise.
        lr: Peak learning rate; 200 steps of linear warm-up, then a cosine to 1 % of it.
        decay: Of the exponential moving average of the weights, for each step.
        hold: Share of the steps, in [0, 1), after which the cosine begins.
        batch: Number of images of a step, for trainings that do not choose it themselves.
    """

    steps: int
    seed: int
    lr: float = 1e-3
    decay: float = 0.998
    hold: float = 0.0
    batch: int = 16


class Run:
    """Trains a model. A run on an existing folder resumes where the last one stopped.

    The randomness of a step depends only on ``(seed, step)``, so an interrupted run has the same batches and noise as
    an uninterrupted one.

    Args:
        folder: Folder of ``state.pt``, ``loss.json`` and, at the end, ``loss.png``.
        model: Trained in place.
        average: Receives the exponential moving average of the weights.
        training: Steps, learning rate and seed.
    """

    def __init__(self, folder: Path, model: nn.Module, average: nn.Module, training: Training):
        self.folder, self.model, self.average = folder, model, average
        self.steps, self.seed, self.decay, self.hold = training.steps, training.seed, training.decay, training.hold
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.01, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        folder.mkdir(parents=True, exist_ok=True)
        average.load_state_dict(model.state_dict())
        if (folder / "state.pt").exists():
            self._load()

    def _rate(self, step: int) -> float:
        if step < 200:
            return (step + 1) / 200
        done = max(0.0, min(1.0, step / self.steps) - self.hold) / (1 - self.hold)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.losses = [tuple(row) for row in json.loads((self.folder / "loss.json").read_text()) if row[0] <= self.step]

    def _parts(self) -> dict:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "schedule": self.schedule}

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**state, "step": self.step}, self.folder / "state.tmp")
        (self.folder / "loss.json").write_text(json.dumps(self.losses))
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _follow(self) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            for mean, weight in pairs:
                mean.lerp_(weight, 1 - decay)

    def train(self, loss_of_step: Callable[[int, torch.Generator], torch.Tensor]) -> None:
        """Run the remaining steps; ``loss_of_step(step, generator)`` returns a scalar loss."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        recent: list[float] = []
        with Progress(*columns) as progress:
            task = progress.add_task(self.folder.name, total=self.steps, completed=self.step)
            while self.step < self.steps:
                loss = loss_of_step(self.step, torch.Generator().manual_seed(self.seed * 1_000_003 + self.step))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                self._follow()
                recent.append(loss.item())
                if self.step % LOG_EVERY == 0:
                    self.losses.append((self.step, sum(recent) / len(recent)))
                    recent.clear()
                    progress.update(
                        task, completed=self.step, description=f"{self.folder.name} loss {self.losses[-1][1]:.4f}"
                    )
                    print(time.strftime("%H:%M:%S"), self.folder.name, *self.losses[-1], flush=True)
                if self.step % SAVE_EVERY == 0 or self.step == self.steps or self.stopped:
                    self._save()
                if self.stopped:
                    raise SystemExit(f"stopped after step {self.step}; start again to resume")
        self._draw_losses()

    def _draw_losses(self) -> None:
        figure, axis = plt.subplots(figsize=(4, 3), constrained_layout=True)
        axis.semilogy(*zip(*self.losses, strict=True), linewidth=0.8)
        axis.set(title=self.folder.name, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3, which="both")
        figure.savefig(self.folder / "loss.png", dpi=80)
