"""Where to split the UNet for feature caching: seconds against image quality for each number of shallow layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm_export.bench.speed_quality import CACHE_EVERY, measure_quality
from ldm_export.bundle.split_bundle import layers_of, split_bundle
from ldm_export.requests import RequestFields
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting

if TYPE_CHECKING:
    from ldm_calibration.settings import Grade

__all__ = ["SplitLevel", "best_level", "measure_split_levels", "split_facts"]


@dataclass(frozen=True)
class SplitLevel:
    """A number of shallow layers and what was measured with it.

    Attributes:
        layers: Layers of the last up block that a step with cached features computes.
        record: Settings with each ``cache_every``; the first is the reference, without caching.
    """

    layers: int
    record: QualityRecord

    def faster(self, result: QualityResult) -> float:
        """Time of the reference divided by that of a setting."""
        return self.record.reference.seconds / result.seconds


def measure_split_levels(
    bundle: Bundle,
    requests: Sequence[RequestFields],
    open_pipeline: Callable[[Bundle], LatentDiffusionPipeline],
    grade: Grade | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[SplitLevel]:
    """Measure every possible number of shallow layers on the fp32 graphs of a bundle; no checkpoint is needed.

    For each number, a copy of the bundle is split there; its files are links, and it is removed afterwards. The
    settings of one number take turns, image by image, so that each is compared with the reference of the same minutes.

    Args:
        bundle: The bundle, which stays as it is.
        requests: One image each.
        open_pipeline: Opens a copy in fp32; closed at the end.
        grade: Decides which images are correct; None leaves that out.
        on_progress: Called with what runs, the number of images done and of all images.

    Raises:
        LdmError: The UNet cannot be split, or a request cannot be used.
        OSError: The copy cannot be written.
    """
    most = layers_of(bundle)
    levels = list[SplitLevel]()
    for layers in range(1, most + 1):

        def progress(what: str, done: int, total: int, layers: int = layers) -> None:
            on_progress(f"{layers} layers, {what}", (layers - 1) * total + done, most * total)

        levels.append(_measured(bundle, layers, requests, open_pipeline, grade, progress))
    return levels


def _measured(
    bundle: Bundle,
    layers: int,
    requests: Sequence[RequestFields],
    open_pipeline: Callable[[Bundle], LatentDiffusionPipeline],
    grade: Grade | None,
    on_progress: Callable[[str, int, int], None],
) -> SplitLevel:
    steps, parent = bundle.manifest.model.defaults.num_inference_steps, bundle.folder.resolve().parent
    settings = [QualitySetting("fp32", steps, every) for every in CACHE_EVERY]
    with TemporaryDirectory(prefix=f".{bundle.folder.name}-split-", dir=parent) as folder:
        split = split_bundle(bundle, layers, Path(folder))
        record = measure_quality(settings, requests, lambda precision: open_pipeline(split), grade, on_progress)
    return SplitLevel(layers, record)


def best_level(levels: Sequence[SplitLevel], min_psnr: float) -> tuple[SplitLevel, QualityResult]:
    """The number of layers with the fastest caching whose images all have a PSNR, and its setting.

    Args:
        levels: What was measured.
        min_psnr: PSNR in dB.

    Raises:
        SpecError: No caching has this PSNR in every image.
    """
    cached = [(level, one) for level in levels for one in level.record.results if one.setting.cache_every > 1]
    if good := [(level, one) for level, one in cached if one.reaches(min_psnr)]:
        return max(good, key=lambda pair: pair[0].faster(pair[1]))
    level, one = max(cached, key=lambda pair: pair[1].worst)
    raise SpecError(
        f"min-psnr: got {min_psnr:g} dB, but caching has at most {one.worst:.1f} dB in every image, with "
        f"{level.layers} layers and cache_every {one.setting.cache_every}; ask for less"
    )


def split_facts(levels: Sequence[SplitLevel], min_psnr: float, options: dict[str, float]) -> dict[str, Any]:
    """JSON-able figures of all levels and the chosen one, for the manifest; errors as ``best_level``."""
    best, _ = best_level(levels, min_psnr)
    rows = [
        {"layers": level.layers, "faster": level.faster(one), **one.facts()}
        for level in levels
        for one in level.record.results
    ]
    how = {"images": best.record.images, "engine": best.record.engines["fp32"], "options": options}
    return {"layers": best.layers, "min_psnr": min_psnr, **how, "levels": rows}
