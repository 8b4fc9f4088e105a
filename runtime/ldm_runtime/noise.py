"""The random numbers of torch on the CPU, without torch: a seed gives the same noise, and so the same image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import integer, shown

__all__ = ["TorchGenerator"]

F32 = NDArray[np.float32]

BLOCK = 16  # values that torch's vectorised fill makes at once: 8 pairs
AT_ONCE = 8192
"""Number of values computed at once, so that intermediate results fit into the CPU's caches."""
LOG: tuple[float, ...]  # of log1p on [√½ - 1, √2 - 1]
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1)
LOG += (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
LN2 = (-2.12194440e-4, 0.693359375)  # low and high part
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # three parts, to subtract


class TorchGenerator:
    """The random number stream of ``torch.manual_seed(seed)`` on the CPU, as ``torch.randn`` uses it for float32.

    Successive calls continue the stream, as in torch. Draws of 16 values or more reproduce torch's vectorised
    Box-Muller transform on an x86 CPU with AVX2 bit for bit (without AVX2, torch itself differs by up to 2.3e-6);
    smaller draws use torch's double precision algorithm. For sizes that are multiples of 16, like those of latents,
    torch's float16 and bfloat16 noise is this noise rounded. torch's float64 noise is drawn differently and is not
    supported.

    Source: ATen/native/cpu/DistributionTemplates.h (normal_fill), avx_mathfun.h, ATen/core/DistributionsHelper.h.

    Args:
        seed: -2**63 .. 2**64 - 1, as in torch; the Mersenne Twister uses its low 32 bits.

    Raises:
        SpecError: ``seed`` is not an integer, is a boolean, or is out of range.
    """

    def __init__(self, seed: int) -> None:
        try:
            self.seed = integer("seed", seed, -(2**63), 2**64 - 1)
        except SpecError:
            raise SpecError(f"seed: got {shown(seed)}, expected an integer from -2**63 to 2**64 - 1") from None
        self._twister = np.random.RandomState(self.seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the second value of the last double precision pair

    def randn(self, shape: tuple[int, ...]) -> F32:
        """Standard normal noise, float32 of ``shape``, equal to ``torch.randn(shape)`` at this position of the stream.

        Raises:
            SpecError: ``shape`` is not a tuple of integers >= 0.
        """
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise SpecError(f"noise: got shape {shape!r}, expected a tuple of integers >= 0")
        size = math.prod(shape)
        if size < BLOCK:
            return np.array([self._one() for _ in range(size)], np.float32).reshape(shape)
        uniform = self._uniform(size)
        noise = np.empty(size, np.float32)
        whole = size - size % BLOCK
        noise[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # torch redraws the last 16 values, replacing some
            noise[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return noise.reshape(shape)

    def endless(self, shape: tuple[int, ...]) -> Iterator[F32]:
        """Yield ``randn(shape)`` endlessly. Small shapes are drawn several at a time, which is up to six times as fast.

        Nothing else may draw from the stream meanwhile.
        """
        yield self.randn(shape)
        size = math.prod(shape)
        count = max(1, AT_ONCE // size) if size and size % BLOCK == 0 else 1  # other sizes skip values of the stream
        while True:
            yield from self.randn((count, *shape))

    def _draw(self, size: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size, dtype=np.uint32)

    def _uniform(self, size: int) -> F32:
        """Uniform values in [0, 1), multiples of 2**-24, from one draw each."""
        return (self._draw(size) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        draws = [int(draw) for draw in self._draw(4)]
        u1, u2 = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (draws[:2], draws[2:]))
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)


def _box_muller(uniform: F32) -> F32:
    """Convert blocks of 16 uniform values, 8 radii and 8 angles, to 16 normal values, 8 cosines and 8 sines."""
    pairs = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(_log(1 - pairs[:, 0]) * -2)
    sin, cos = _sincos(pairs[:, 1] * np.float32(2 * math.pi))
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1)


def _fma(x: F32, y: ArrayLike, z: ArrayLike) -> F32:
    """x·y + z in float32 with one rounding, as the CPU's fused multiply-add."""
    exact = x.astype(np.float64) * np.asarray(y, np.float32)
    return (exact + np.asarray(z, np.float32)).astype(np.float32)


def _polynomial(x: F32, coefficients: tuple[float, ...]) -> F32:
    value = _fma(x, coefficients[0], coefficients[1])
    for coefficient in coefficients[2:]:
        value = _fma(value, x, coefficient)
    return value


def _log(x: F32) -> F32:
    """Cephes logf of positive x, in the order of operations of avx_mathfun.h."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < np.float32(math.sqrt(0.5))
    power = (exponent - small).astype(np.float32)
    x = np.where(small, mantissa - 1 + mantissa, mantissa - 1)
    square = x * x
    series = _fma(_polynomial(x, LOG) * x, square, power * np.float32(LN2[0]))
    return _fma(power, LN2[1], x + _fma(square, -0.5, series))


def _sincos(x: F32) -> tuple[F32, F32]:
    """Cephes sinf and cosf of x in [0, 2π], in the order of operations of avx_mathfun.h."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    for part in QUARTER_PI:
        x = _fma(octant.astype(np.float32), part, x)
    square = x * x
    cos = _fma(_polynomial(square, COS) * square, square, square * np.float32(-0.5)) + 1
    sin = _fma(_polynomial(square, SIN) * square, x, x)
    swap = (octant & 2) != 0
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    return np.where(octant & 4, -sin, sin), np.where((octant + 2) & 4, -cos, cos)
