"""A bundle: the folder with a model's graphs, tokenizer and manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_runtime.atomic_files import sha256, written_beside
from ldm_runtime.bundle_layout import MANIFEST, QUALITY_REPORT, weights_file
from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import read_object
from ldm_runtime.linked_files import stays_inside
from ldm_runtime.manifest import FileFact, Manifest
from ldm_runtime.manifest_reader import read_manifest
from ldm_runtime.model import DECODER, UNET
from ldm_runtime.onnx_external import external_locations
from ldm_runtime.quality import QualityRecord
from ldm_runtime.verified_file import VerifiedFile, verify

__all__ = ["Bundle", "file_facts"]

MAX_QUALITY_REPORT = 2**20
"""Maximum size in bytes of the file with measured settings."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest
    _weights: dict[str, VerifiedFile] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Checked files of external weights. They are cached because graphs share them and they are large."""

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest; other files are checked when they are opened.

        Raises:
            ManifestError: no bundle, damaged, or made for another version.
        """
        path = Path(folder)
        return cls(path, read_manifest(path))

    def __repr__(self) -> str:
        """Folder, family, precision and size."""
        size = sum(fact.size for fact in self.manifest.files.values()) / 1e6
        return f"<Bundle {str(self.folder)!r}: {self.manifest.family}, {self.precision}, {size:.1f} MB>"

    @property
    def precision(self) -> str:
        """The precision the bundle was built for, if every component has a graph of it; otherwise "fp32"."""
        requested = self.manifest.request.get("precision")
        components = [self.manifest.components[name] for name in (UNET, DECODER)]
        known = isinstance(requested, str) and all(requested in component.graphs for component in components)
        return str(requested) if known else "fp32"

    def file(self, name: str) -> Path:
        """The path of one file, whose location, size and digest have been checked; errors as ``verified``."""
        return self.verified(name).path

    def verified(self, name: str) -> VerifiedFile:
        """Check the location, size and digest of one file and record its identity.

        Code that opens the file afterwards calls ``unchanged`` with the result, which detects that the bundle was
        replaced.

        Raises:
            ManifestError: not in the manifest, missing, outside the folder, or not the bytes that were built.
        """
        fact, path = self.manifest.files.get(name), self.folder / name
        if fact is None:
            raise ManifestError(f"{self.folder / MANIFEST}: lists no file {name!r}; rebuild the bundle")
        try:
            if not path.is_file():
                raise ManifestError(f"{path}: missing, but the manifest lists it; copy the whole bundle or rebuild it")
            if not stays_inside(path, self.folder):
                raise ManifestError(f"{path}: a link that leaves the bundle; do not use this bundle")
            return verify(path, fact.sha256, fact.size)
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror}); copy the file again or rebuild") from None

    def graph(self, component: str, precision: str, variant: str = "") -> Path:
        """The path of a component's checked ONNX graph; arguments and errors as ``verified_graph``."""
        return self.verified_graph(component, precision, variant).path

    def verified_graph(self, component: str, precision: str, variant: str = "") -> VerifiedFile:
        """The checked ONNX graph of a component; its external weights, if any, are checked too.

        ``variant`` names an engine; its own variant of the graph is returned if the bundle has one. A variant may read
        the weights of the portable graph.

        Raises:
            ManifestError: no graph of that precision, or a file of it is not what was built.
        """
        part = self.manifest.components[component]
        name = part.graph(precision, variant)
        if name is None:
            raise ManifestError(
                f"{self.folder}: component {component} has no {precision} graph, only "
                f"{', '.join(part.graphs) or 'none'}; build it with `ldm-export build --precision {precision}`"
            )
        graph = self.verified(name)
        weights = dict.fromkeys([weights_file(name), *self._external(name)])
        files = [file for file in weights if file in self.manifest.files]
        return replace(graph, beside=tuple(map(self._verified_weights, files)))

    def _verified_weights(self, name: str) -> VerifiedFile:
        """Check a weights file as ``verified`` does; compute its digest again only if the file has changed since."""
        with suppress(KeyError, ManifestError):
            self._weights[name].check()
            return self._weights[name]
        self._weights[name] = self.verified(name)
        return self._weights[name]

    def _external(self, name: str) -> list[str]:
        """External data files of a checked graph. The engine opens them itself, so the manifest must list them."""
        files = []
        for location in sorted(external_locations(self.folder / name)):
            file = str(PurePosixPath(name).parent / location)
            if file not in self.manifest.files or not location:
                raise ManifestError(
                    f"{self.folder / name}: refers to {location!r:.80}, which the manifest does not list, so its "
                    "digest cannot be checked; do not use this bundle"
                )
            files.append(file)
        return files

    def check(self, progress: Callable[[str], None] = lambda name: None) -> None:
        """Check every file the manifest lists, and that graphs refer to no other files.

        Raises:
            ManifestError: as ``file``.
        """
        for name in self.manifest.files:
            progress(name)
            self.file(name)
        for part in self.manifest.components.values():
            for graphs in (part.graphs, *part.variants.values()):
                for graph in graphs.values():
                    self._external(graph)

    def quality(self) -> QualityRecord:
        """The settings that ``ldm-export bench --quality --save`` has measured.

        Raises:
            ManifestError: None are stored, or the file is damaged.

        Examples:
            >>> fastest = bundle.quality().fastest(min_psnr=35)
            >>> pipe = LatentDiffusionPipeline.from_bundle(bundle, precision=fastest.setting.precision)
            >>> pipe("a red circle", **fastest.setting.options)
        """
        if QUALITY_REPORT not in self.manifest.files:
            command = f"ldm-export bench {self.folder} --quality --save"
            raise ManifestError(f"{self.folder}: has no measured settings; measure them with `{command}`")
        path = self.file(QUALITY_REPORT)
        return QualityRecord.from_json(str(path), read_object(path, MAX_QUALITY_REPORT))

    def with_quality(self, record: QualityRecord) -> Bundle:
        """Write measured settings into the bundle, in place of earlier ones; errors as ``with_measured``."""
        text = json.dumps(record.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        return self.with_measured({}, {QUALITY_REPORT: text.encode()})

    def with_measured(self, measured: dict[str, Any], reports: dict[str, bytes]) -> Bundle:
        """Write report files and measured figures into the bundle. The bundle stays valid at every moment.

        Reports that will be replaced are removed from the manifest first, and the new manifest is written last.

        Args:
            measured: merged into the manifest's ``measured``; numbers must be finite.
            reports: relative path → content.

        Raises:
            OSError: The disk is full or cannot be written; the bundle is unchanged.
        """
        facts = {name: FileFact(hashlib.sha256(text).hexdigest(), len(text)) for name, text in reports.items()}
        files, figures = {**self.manifest.files, **facts}, {**self.manifest.measured, **measured}
        manifest = replace(self.manifest, files=files, measured=figures)
        path, text = self.folder / MANIFEST, manifest.to_json().encode()
        kept = {name: fact for name, fact in self.manifest.files.items() if facts.get(name, fact) == fact}
        without = {path: replace(self.manifest, files=kept).to_json().encode()} if kept != self.manifest.files else {}
        contents = {**{self.folder / name: content for name, content in reports.items()}, path: text}
        with written_beside(without, "without") as first, written_beside(contents) as parts:
            for changed, part in (*first.items(), *parts.items()):
                part.replace(changed)
        return replace(self, manifest=manifest)


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, FileFact]:
    """Digest and size of files under ``folder``, by relative path."""
    return {name: FileFact(sha256(folder / name), (folder / name).stat().st_size) for name in names}
