"""Rotations: conventions, exact special cases, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posemap_fast.geometry import (
    matrix_from_quaternion,
    nearest_rotation,
    quaternion_from_matrix,
    rotation_angle_deg,
    slerp,
    so3_exp,
    so3_log,
)

EYE = torch.eye(3, dtype=torch.float64)


def random_rotations(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return matrix_from_quaternion(torch.randn(n, 4, generator=generator, dtype=torch.float64))


def test_convention_quaternion_is_w_first_and_rotates_x_into_y():
    half = math.sqrt(0.5)
    about_z = matrix_from_quaternion(torch.tensor([half, 0, 0, half], dtype=torch.float64))
    x, y = EYE[0], EYE[1]
    assert torch.allclose(about_z @ x, y)  # 90 deg about +z, right-handed: x -> y
    assert not torch.allclose(about_z @ x, -y)  # the transposed matrix would give -y
    x_last = matrix_from_quaternion(torch.tensor([0, 0, half, half], dtype=torch.float64))
    assert not torch.allclose(x_last, about_z)  # what (x, y, z, w) order would have meant


def test_convention_so3_exp_of_z_axis_turns_counter_clockwise():
    turned = so3_exp(torch.tensor([0, 0, math.pi / 2], dtype=torch.float64)) @ EYE[0]
    assert torch.allclose(turned, EYE[1])
    assert not torch.allclose(turned, -EYE[1])


def test_convention_quaternion_sign_is_positive_w():
    quaternion = quaternion_from_matrix(matrix_from_quaternion(torch.tensor([-0.5, 0.5, -0.5, 0.5]).double()))
    assert torch.allclose(quaternion, torch.tensor([0.5, -0.5, 0.5, -0.5]).double())  # same rotation, w > 0


def test_quaternion_round_trip_includes_half_turns():
    rotations = torch.cat([random_rotations(200, 0), EYE[None], torch.diag_embed(2 * EYE - 1)])  # and 180 deg turns
    assert torch.allclose(matrix_from_quaternion(quaternion_from_matrix(rotations)), rotations, atol=1e-12)


def test_scaled_quaternion_is_normalised():
    quaternion = torch.tensor([[0.3, -0.2, 0.9, 0.1]]).double()
    assert torch.allclose(matrix_from_quaternion(1.045 * quaternion), matrix_from_quaternion(quaternion))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 9.9e-5, 1.01e-4, 0.1, 3.0, math.pi - 1e-6, math.pi])
def test_log_inverts_exp_up_to_a_half_turn(angle):
    axis = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8]).double(), dim=0)
    vector = angle * axis
    found = so3_log(so3_exp(vector))
    assert min((found - vector).norm(), (found + vector).norm() if angle == math.pi else 1.0) < 1e-8


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.7, 2.9])
def test_exp_and_log_gradients_match_finite_differences(scale):
    vector = (scale * torch.tensor([[0.3, -0.5, 0.8]]).double()).requires_grad_()
    assert torch.autograd.gradcheck(so3_exp, vector)
    assert torch.autograd.gradcheck(lambda v: so3_log(so3_exp(v)), vector)


def test_nearest_rotation_keeps_rotations_and_removes_scale():
    rotations = random_rotations(50, 1)
    assert torch.allclose(nearest_rotation(3.7 * rotations), rotations, atol=1e-12)


def test_nearest_rotation_of_a_reflection_has_determinant_plus_one():
    reflections = random_rotations(20, 2) @ torch.diag(torch.tensor([1.0, 0.7, -0.4]).double())
    found = nearest_rotation(reflections)
    assert torch.allclose(torch.linalg.det(found), torch.ones(20).double())
    u, _, vt = torch.linalg.svd(reflections)
    assert (torch.linalg.det(u @ vt) < 0).all()  # U V^T alone, without the correction, is no rotation


def test_nearest_rotation_is_the_nearest_of_many():
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    best = (nearest_rotation(matrix) - matrix).norm()
    assert best <= (random_rotations(5000, 4) - matrix).flatten(1).norm(dim=1).min()


@pytest.mark.parametrize("kind", ["random", "reflection", "near_rotation"])
def test_nearest_rotation_gradient_matches_finite_differences(kind):
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(6, 3, 3, generator=generator, dtype=torch.float64)
    if kind == "reflection":
        matrix = random_rotations(6, 6) @ torch.diag(torch.tensor([2.0, 1.3, -0.5]).double())
    if kind == "near_rotation":
        matrix = random_rotations(6, 7) + 1e-3 * matrix
    assert torch.autograd.gradcheck(nearest_rotation, matrix.requires_grad_())


def test_nearest_rotation_gradient_is_exact_at_equal_singular_values():
    matrix = random_rotations(4, 8).requires_grad_()  # all three singular values are 1
    assert torch.autograd.gradcheck(nearest_rotation, matrix)
    plain = random_rotations(1, 8).requires_grad_()
    u, _, vt = torch.linalg.svd(plain)
    weights = torch.arange(9.0).double().reshape(3, 3)
    ((u @ vt) * weights).sum().backward()
    grad_plain = plain.grad
    assert grad_plain is not None
    assert not torch.isfinite(grad_plain).all() or grad_plain.abs().max() > 1e6  # autograd through the SVD breaks


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 0.0])), -torch.eye(3)])
def test_nearest_rotation_gradient_is_finite_where_the_rotation_is_not_unique(matrix):
    matrix = matrix.clone().requires_grad_()
    (nearest_rotation(matrix) * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert torch.isfinite(matrix.grad).all()


@given(st.floats(0, 180), st.integers(0, 1000))
@example(180.0, 123)
@settings(max_examples=60, deadline=None)
def test_rotation_angle_is_measured_to_float64_accuracy(angle_deg, seed):
    start = random_rotations(1, seed)[0]
    axis = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5]).double(), dim=0)
    turned = start @ so3_exp(axis * math.radians(angle_deg))
    assert float(rotation_angle_deg(start, turned)) == pytest.approx(angle_deg, abs=1e-6)


def test_rotation_angle_of_nan_is_nan():
    assert math.isnan(float(rotation_angle_deg(EYE, EYE * float("nan"))))


def test_slerp_moves_at_constant_speed_between_its_ends():
    a, b = random_rotations(2, 9)
    total = rotation_angle_deg(a, b)
    u = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    path = slerp(a.expand(4, 3, 3), b.expand(4, 3, 3), u)
    assert torch.allclose(rotation_angle_deg(a.expand(4, 3, 3), path), u * total, atol=1e-9)
    assert torch.allclose(path[-1], b, atol=1e-12)
