"""Settings of the published models that a state dict does not contain (Rombach et al. 2022, arXiv:2112.10752).

Rows are those of the repository CompVis/latent-diffusion (``models/*/config.yaml``, ``configs/latent-diffusion``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ldm_export.originals.unet_shape import UNetShape
from ldm_runtime.model import Defaults

__all__ = ["PUBLISHED", "STABLE_DIFFUSION_XL", "Heads", "Published", "published_as"]


@dataclass(frozen=True)
class Heads:
    """Attention heads: their number, or the channels of each; one of them is None.

    ``new_order`` is the option use_new_attention_order of the yaml.
    """

    number: int | None = None
    channels: int | None = None
    new_order: bool = False

    def of(self, width: int) -> int:
        """Number of heads of an attention with ``width`` channels."""
        return self.number if self.number is not None else width // (self.channels or width)

    def divides(self, width: int) -> bool:
        """True if an attention of ``width`` channels can have these heads."""
        heads = self.of(width)
        return heads >= 1 and width % heads == 0 and (self.channels is None or width % self.channels == 0)


@dataclass(frozen=True)
class Published:
    """A published model: the sizes by which it is recognised, and its settings.

    Attributes:
        name: Name in the repository.
        kind: Kind; see ``condition_shape.kind_of``.
        width, multiples, attention: Base width, multiples of it by level, downsampling factors with attention.
        heads: Attention heads.
        image_size: Height and width of the latents.
        scale_factor: Scale factor of the latents; the checkpoint's own buffer takes precedence.
        betas: linear_start and linear_end.
        defaults: Steps, eta and guidance scale of the paper or the repository's examples.
        use_ema: True if the model uses the EMA weights, if there are any.
        context: Channels of the cross-attention's context, if it distinguishes the model from others with the same
            UNet.
        prediction_type: What the UNet predicts, if it distinguishes the model from another with the same tensors.
    """

    name: str
    kind: str
    width: int
    multiples: tuple[int, ...]
    attention: tuple[int, ...]
    heads: Heads
    image_size: int
    scale_factor: float
    betas: tuple[float, float]
    defaults: Defaults
    use_ema: bool = True
    context: int | None = None
    prediction_type: str | None = None


_TEXT, _CLASS = "text_to_image", "class_conditional"
PUBLISHED: tuple[Published, ...] = (
    Published(
        *("txt2img-f8-large", _TEXT, 320, (1, 2, 4, 4), (1, 2, 4), Heads(8), 32, 0.18215, (0.00085, 0.012)),
        Defaults(50, 0.0, 5.0),
        use_ema=False,
    ),
    Published(
        *("stable-diffusion-v1", "stable_diffusion", 320, (1, 2, 4, 4), (1, 2, 4), Heads(8), 64, 0.18215),
        *((0.00085, 0.012), Defaults(50, 0.0, 7.5)),
        context=768,
    ),
    Published(
        *(
            "stable-diffusion-v2-base",
            "stable_diffusion",
            320,
            (1, 2, 4, 4),
            (1, 2, 4),
            Heads(channels=64),
            64,
            0.18215,
        ),
        *((0.00085, 0.012), Defaults(50, 0.0, 7.5)),
        context=1024,
        prediction_type="epsilon",
    ),
    Published(
        *("stable-diffusion-v2", "stable_diffusion", 320, (1, 2, 4, 4), (1, 2, 4), Heads(channels=64), 96, 0.18215),
        *((0.00085, 0.012), Defaults(50, 0.0, 7.5)),
        context=1024,
        prediction_type="v_prediction",
    ),
    Published(
        *("text2img256", _TEXT, 192, (1, 2, 3, 5), (2, 4, 8), Heads(channels=32), 64, 1.0, (0.0015, 0.0195)),
        Defaults(100, 0.0, 1.0),
    ),
    Published(
        *("cin256-v2", _CLASS, 192, (1, 2, 3, 5), (2, 4, 8), Heads(1), 64, 1.0, (0.0015, 0.0195)),
        Defaults(20, 0.0, 3.0),
        use_ema=False,
    ),
    Published(
        *("cin256", _CLASS, 256, (1, 2, 4), (1, 2, 4), Heads(channels=32), 32, 1.0, (0.0015, 0.0195)),
        Defaults(200, 1.0, 1.0),
    ),
    Published(
        *("celeba256", "unconditional", 224, (1, 2, 3, 4), (2, 4, 8), Heads(channels=32), 64, 1.0, (0.0015, 0.0195)),
        Defaults(200, 0.0, 1.0),
    ),
    Published(
        *("lsun_churches256", "unconditional", 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), Heads(8), 32, 1.0),
        *((0.0015, 0.0155), Defaults(400, 0.0, 1.0)),
    ),
    Published(
        *("bsr_sr", "super_resolution", 160, (1, 2, 2, 4), (8,), Heads(channels=32), 64, 1.0, (0.0015, 0.0155)),
        Defaults(100, 1.0, 1.0),
    ),
    Published(
        *("inpainting_big", "inpainting", 256, (1, 2, 3, 4), (2, 4, 8), Heads(8), 64, 1.0, (0.0015, 0.0205)),
        Defaults(50, 0.0, 1.0),
    ),
    Published(
        *("semantic_synthesis", "semantic_synthesis", 128, (1, 4, 8), (), Heads(8), 64, 1.0, (0.0015, 0.0205)),
        Defaults(200, 1.0, 1.0),
    ),
    Published(
        *("layout2img", "layout_to_image", 128, (1, 2, 3, 4), (2, 4, 8), Heads(channels=32), 64, 1.0, (0.0015, 0.0205)),
        Defaults(200, 0.0, 1.0),
    ),
)


STABLE_DIFFUSION_XL = Published(
    *("stable-diffusion-xl", "stable_diffusion_xl", 320, (1, 2, 4), (2, 4), Heads(channels=64), 128, 0.13025),
    *((0.00085, 0.012), Defaults(50, 0.0, 5.0)),
    context=2048,
)
"""Settings of all models of this kind, whatever their sizes are."""


def published_as(kind: str, unet: UNetShape, prediction_type: str) -> Published | None:
    """The published model with these sizes and this prediction; None if there is none."""
    if kind == STABLE_DIFFUSION_XL.kind:
        return STABLE_DIFFUSION_XL
    sizes = (kind, unet.model_channels, unet.multiples, unet.attention_resolutions)
    for row in PUBLISHED:
        if row.prediction_type not in (None, prediction_type):
            continue
        if row.context in (None, unet.context_width) and sizes == (row.kind, row.width, row.multiples, row.attention):
            return row
    return None
