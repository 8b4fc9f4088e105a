"""A copy of a bundle whose UNet is split elsewhere for feature caching; only its own graphs are written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ldm_export.bundle.shallow_stages import with_shallow_unet
from ldm_export.bundle.stages import link_files
from ldm_export.bundle.variant_stages import write_cpu_variant
from ldm_export.graph.component_split import graph_spec
from ldm_export.graph.passes.deep_features import expose_deep_features, possible_layers, shallow_unet
from ldm_runtime.bundle import Bundle, file_facts
from ldm_runtime.bundle_layout import CPU_VARIANT, MANIFEST, PORTABLE_PRECISION, graph_file, weights_file
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import Component
from ldm_runtime.model import SHALLOW_UNET, UNET
from ldm_runtime.specs import Axis

__all__ = ["layers_of", "split_bundle"]


def layers_of(bundle: Bundle) -> int:
    """Return the maximum number of layers of a bundle's shallow UNet.

    Raises:
        ManifestError: The bundle has no fp32 graph of the UNet, or it is damaged.
        BuildError: The UNet has no layers with skip connections at the size of its result.
    """
    if not (most := possible_layers(ir.load(bundle.graph(UNET, PORTABLE_PRECISION)))):
        raise BuildError(f"{bundle.folder}: the UNet has no last layers with skip connections; features are not cached")
    return most


def split_bundle(bundle: Bundle, layers: int, folder: Path) -> Bundle:
    """Write a bundle with fp32 graphs of the UNet and of the shallow UNet; all other files are links.

    Args:
        bundle: The bundle.
        layers: Layers of the shallow UNet.
        folder: An empty folder on the same disk.

    Raises:
        ManifestError: A file of the bundle is damaged.
        BuildError: The UNet has fewer layers that can be split off.
        OSError: The copy cannot be written.
    """
    manifest = bundle.manifest
    graphs = {name: graph_file(name, PORTABLE_PRECISION) for name in (UNET, SHALLOW_UNET)}
    variants = {name: graph_file(name, PORTABLE_PRECISION, CPU_VARIANT) for name in graphs}
    kept = [name for name in manifest.files if not name.startswith(f"{UNET}/") or name == weights_file(graphs[UNET])]
    files = link_files(kept, folder, bundle)
    model = ir.load(bundle.graph(UNET, PORTABLE_PRECISION))
    expose_deep_features(model, layers)
    (folder / UNET).mkdir(exist_ok=True)
    ir.save(model, folder / graphs[UNET])
    ir.save(shallow_unet(model), folder / graphs[SHALLOW_UNET])
    if written := write_cpu_variant(folder / graphs[UNET], folder / variants[UNET]):
        ir.save(shallow_unet(ir.load(folder / variants[UNET])), folder / variants[SHALLOW_UNET])
    spec = manifest.components[UNET].spec
    axes = {dim.name: dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, Axis)}
    unet = graph_spec(folder / graphs[UNET], UNET, spec.runs, axes)
    others = {name: part for name, part in manifest.model.components.items() if name != SHALLOW_UNET}
    described = with_shallow_unet(replace(manifest.model, components={**others, UNET: unet}), folder).components
    components = {name: manifest.components[name] for name in others}
    for name, graph in graphs.items():
        own = {CPU_VARIANT: {PORTABLE_PRECISION: variants[name]}} if written else {}
        components[name] = Component(described[name], {PORTABLE_PRECISION: graph}, variants=own)
    facts = file_facts(folder, [*graphs.values(), *(variants.values() if written else ())])
    split = replace(
        manifest,
        components={name: components[name] for name in described},
        files={**files, **facts},
        stages={},
        request={**manifest.request, "precision": PORTABLE_PRECISION},
    )
    (folder / MANIFEST).write_text(split.to_json())
    return Bundle.open(folder)
