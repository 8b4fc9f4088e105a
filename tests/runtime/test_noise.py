"""The oracle is torch itself: the same seeds and the same sequences of shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator

VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1, -1, -7, -(2**63)]


def assert_same_stream(seed: int, shapes: list[tuple[int, ...]]) -> None:
    """Bit for bit where torch runs its AVX2 fill, else within the distance of torch's two ways from each other."""
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    for shape in shapes:
        expected, result = torch.randn(shape, generator=theirs).numpy(), ours.randn(shape)
        assert_same(expected, result)


def assert_same(expected: np.ndarray, result: np.ndarray) -> None:
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    if VECTORISED or expected.size < 16:
        assert result.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(result, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_latents_and_the_noise_of_the_steps_after_them(seed: int) -> None:
    assert_same_stream(seed, [(1, 4, 32, 32)] * 3)


@pytest.mark.parametrize("size", range(50))
def test_every_small_size_and_what_follows_it(size: int) -> None:
    assert_same_stream(size, [(size,), (1,), (size,), (16,)])


@pytest.mark.parametrize("shape", [(3,), (1, 4, 8, 8), (2, 4, 5, 6), (1, 4, 64, 64), (1, 4, 7, 7), (0, 16)])
def test_endless_noise_is_torchs_call_after_call(shape: tuple[int, ...]) -> None:
    generator, result = torch.Generator().manual_seed(6), TorchGenerator(6).endless(shape)
    for _ in range(40):
        assert_same(torch.randn(shape, generator=generator).numpy(), next(result))


def test_a_million_values() -> None:
    assert_same_stream(2, [(16, 4, 128, 128)])


def test_the_spare_value_of_a_pair_waits_through_vectorised_calls() -> None:
    assert_same_stream(3, [(1,), (64,), (17,), (1,), (3,), (0,), (16,), (2,)])


def test_a_scalar_and_empty_shapes() -> None:
    assert_same_stream(4, [(), (), (0,), (3, 0, 5), ()])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=6),
)
def test_any_seed_and_sequence_of_shapes(seed: int, shapes: list[tuple[int, ...]]) -> None:
    assert_same_stream(seed, shapes)


def test_generators_are_independent_and_leave_the_global_one_alone() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first, second = TorchGenerator(9), TorchGenerator(9)
    first.randn((100,))
    assert np.array_equal(second.randn((100,)), TorchGenerator(9).randn((100,)))
    assert np.array_equal(before, np.random.get_state()[1])


def test_the_array_belongs_to_the_caller() -> None:
    generator = TorchGenerator(0)
    first = generator.randn((4, 16))
    copy = first.copy()
    generator.randn((4, 16))
    assert first.flags.writeable
    assert np.array_equal(first, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_these_rounded(dtype: torch.dtype) -> None:
    theirs, ours = torch.Generator().manual_seed(0), TorchGenerator(0)
    for shape in [(1, 4, 32, 32), (2, 4, 8, 8)]:
        half = torch.randn(shape, generator=theirs, dtype=dtype)
        rounded = torch.from_numpy(ours.randn(shape)).to(dtype)
        if VECTORISED:
            assert torch.equal(half, rounded)
        else:
            torch.testing.assert_close(half, rounded)


def test_double_precision_latents_are_others() -> None:
    double = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    assert np.abs(double - TorchGenerator(0).randn((64,))).max() > 1


@pytest.mark.parametrize("seed", [True, False, 1.0, "1", None, np.float64(3), 2**64, -(2**63) - 1, 10**38])
def test_seeds_refused(seed: object) -> None:
    with pytest.raises(SpecError, match=r"^seed: got .*expected an integer from -2\*\*63 to 2\*\*64 - 1") as caught:
        TorchGenerator(seed)  # type: ignore[arg-type]
    assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_torch_refuses_the_same_integers(seed: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [16, [4, 4], (4, -1), (4, 2.0), (True, 4), None, ("4",)])
def test_shapes_refused(shape: object) -> None:
    with pytest.raises(SpecError, match=r"^noise: got shape") as caught:
        TorchGenerator(0).randn(shape)  # type: ignore[arg-type]
    assert repr(shape) in str(caught.value)
