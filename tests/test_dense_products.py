"""The dense products of the C kernels, by vectors and by the matrix unit where there is one, against float64."""

import copy
import ctypes
import math
import mmap
import sys

import pytest
import torch

from modules import dense_layer, native
from modules.implicit import BackwardSolver
from tests.marks import needs_compiler, needs_tiles
from tests.test_dense_layer import network_and_input, step

pytestmark = needs_compiler

# What is left out of a b, relative to |a b|: nothing but roundings, or what is behind the 16th bit of both.
TOLERANCES = {3: 4e-7, 2: 3.1e-5}
NO_ACCESS = 0  # mprotect's PROT_NONE
WAYS = ["vectors", *[pytest.param(parts, marks=needs_tiles) for parts in TOLERANCES]]


class Factor(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("row_step", ctypes.c_ssize_t), ("depth_step", ctypes.c_ssize_t)]


class Panels(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("panel_step", ctypes.c_ssize_t), ("depth_step", ctypes.c_ssize_t)]


def product(a, b, way, packed=False):
    """a b as the kernels compute it, in the middle of memory that must stay as it is."""
    (rows, depth), columns = a.shape, b.shape[1]
    out = torch.full((rows + 2, columns), 7.0)
    kept = native.pack_rows(b) if packed else b
    panels = Panels(kept.data_ptr(), depth * native.PANEL, native.PANEL) if packed else Panels(b.data_ptr(), native.PANEL, b.stride(0))
    parts = [] if way == "vectors" else [ctypes.c_int(way)]
    call = native.library().tile_product if parts else native.library().vector_product
    sizes = [ctypes.c_ssize_t(size) for size in (rows, depth, columns)]
    done = call(Factor(a.data_ptr(), *a.stride()), panels, ctypes.c_void_p(out[1].data_ptr()), *sizes, *parts)
    assert not parts or done
    assert out[[0, -1]].eq(7).all()
    return out[1:-1]


def assert_equals_float64(a, b, way, **settings):
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    tolerance = TOLERANCES.get(way, 1e-6)
    assert ((product(a, b, way, **settings) - exact).abs() <= tolerance * sizes + 1e-37).all()


# Tiles have 16 rows and a depth of 32, panels 32 columns; more than 1,024 in depth, or many panels, are taken in several parts.
SIZES = [(1, 1, 1), (16, 32, 32), (10, 32, 16), (17, 33, 31), (31, 100, 33), (32, 64, 48), (33, 65, 100), (45, 7, 160), (97, 1025, 37),
         (40, 2100, 70), (20, 600, 700)]


@pytest.mark.parametrize("rows,depth,columns", SIZES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_float64(rows, depth, columns, way, transposed, packed):
    a = torch.randn(depth, rows).t() if transposed else torch.randn(rows, depth)
    b = torch.randn(depth, columns)
    assert_equals_float64(a, b, way, packed=packed)


@pytest.mark.parametrize("way", WAYS)
def test_of_any_strides_and_sizes_of_numbers(way):
    a = (torch.randn(50, 3, 80) * torch.logspace(-18, 18, 50).view(-1, 1, 1))[:, 1, ::2]
    b = torch.randn(40, 90)[:, :70] * torch.logspace(-15, 15, 70)
    assert_equals_float64(a, b, way)
    assert product(torch.zeros(20, 40), b, way).eq(0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, 0x7F800000])
def test_what_is_no_number_or_infinite_is_not_lost(way, bits):
    a, b = torch.rand(20, 40) + 1, torch.rand(40, 50) + 1
    a.view(torch.int32)[3, 5] = bits
    for left, right, rows in ((a, b, slice(3, 4)), (b.t().contiguous(), a.t().contiguous(), slice(None))):
        finite = product(left, right, way).isfinite()
        columns = slice(None) if rows == slice(3, 4) else slice(3, 4)
        assert not finite[rows, columns].any()
        finite[rows, columns] = True
        assert finite.all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [3.39e38, -3.39e38])
def test_the_largest_numbers(way, number):
    a, b = torch.full((16, 8), number), torch.full((8, 4), 1e-10)
    assert torch.allclose(product(a, b, way), a @ b, rtol=TOLERANCES.get(way, 1e-6))


def test_a_product_without_depth_is_zero():
    out, sizes = torch.full((100, 40), 7.0), map(ctypes.c_ssize_t, (100, 0, 40))
    native.library().dense_product(Factor(0, 0, 1), Panels(0, native.PANEL, 40), ctypes.c_void_p(out.data_ptr()), *sizes, ctypes.c_int(3))
    assert out.eq(0).all()


@pytest.mark.parametrize("way", WAYS)
def test_the_number_of_threads_changes_no_bit(way):
    a, b, results = torch.randn(200, 70), torch.randn(70, 90), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(product(a, b, way))
    assert all(torch.equal(results[0], other) for other in results)


@needs_tiles
def test_the_matrix_unit_is_there_for_the_kernels():
    assert native.library().has_tiles()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page of memory as Linux does")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows,depth,columns", [(10, 32, 16), (31, 100, 40), (33, 65, 100)])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_behind_a_matrix_is_read(rows, depth, columns, way, transposed):
    a, b = at_the_end_of_memory(depth, rows).t() if transposed else at_the_end_of_memory(rows, depth), at_the_end_of_memory(depth, columns)
    assert_equals_float64(a, b, way)


def at_the_end_of_memory(*shape):
    """Random numbers, behind the last of which the process may not read."""
    size = 4 * math.prod(shape)
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    numbers = torch.frombuffer(memory, dtype=torch.float32, count=math.prod(shape), offset=pages * mmap.PAGESIZE - size)
    end = ctypes.c_void_p(numbers.data_ptr() + size)
    assert ctypes.CDLL(None, use_errno=True).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
    return numbers.view(shape).normal_()


@needs_tiles
def test_the_parts_of_a_small_integer_are_exact():
    a, b = torch.randint(-255, 256, (40, 60)).float(), torch.randint(-255, 256, (60, 50)).float()
    for parts in TOLERANCES:
        assert torch.equal(product(a, b, parts), a @ b)


@pytest.mark.parametrize("tol,close", [(1e-3, 3e-5), (0.99e-3, 1e-6)])
def test_a_gradient_is_as_exact_as_its_solve_needs(tol, close, monkeypatch):
    """Both passes have the same v, so that only the products after the solve differ."""
    network, x = network_and_input(130, 100, 64)
    network.solver = FirstGuess(tol=tol)
    other = copy.deepcopy(network)
    other.draw_masks = network.draw_masks
    slow, fast = step(network, x, monkeypatch, fast=False)[1], step(other, x, monkeypatch, fast=True)[1]
    for name in ("input.linear.weight", "feedback.w"):
        error = (fast[name] - slow[name]).norm() / slow[name].norm()
        assert 0 < error <= close, name


class FirstGuess(BackwardSolver):
    """v = g, with a tolerance to be read."""

    def __call__(self, vjp, gradient):
        return gradient


@pytest.mark.parametrize("width", [130, 400])
def test_a_rough_solve_reaches_its_tolerance(width):
    network, x = network_and_input(width, 60, 64, g=1.0)
    passed = dense_layer.run(network.input, network.feedback, network.neuron, x, network.draw_masks(x), network.time_steps)
    gradient = torch.randn(passed.rate.shape)
    solver = BackwardSolver()
    v = solver(passed.jacobian, gradient)
    residual = (gradient + passed.jacobian(v) - v).norm() / gradient.norm()
    assert residual <= 1.01e-3 and solver.tally.worst_residual == pytest.approx(residual.item(), rel=0.05)
    assert 2 < solver.tally.iterations < 30
