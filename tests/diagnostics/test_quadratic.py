"""On an exactly quadratic loss every diagnostic equals its closed form."""

import numpy as np
import pytest
import torch
from tests.diagnostics.labs import NAMES, WIDTH, QuadraticLab, random_hessian

from merit import theory
from merit.diagnostics import connectivity, curvature, displacement, gain, gap, perturbation, surface
from merit.diagnostics.alignment import compared, corner_datasets, lifted, null_of
from merit.diagnostics.displacement import Sums, layer_of
from merit.diagnostics.hessian import Hessian
from merit.diagnostics.hessian import _fitting as fitting
from merit.diagnostics.perturbation import flatness_auc
from merit.errors import ResourceError
from merit.hf.inplace import Block, Noise

CHANGES = np.random.default_rng(5).standard_normal((3, WIDTH))
WEIGHTS = [1.0, 2.0, 5.0]


@pytest.fixture
def lab() -> QuadraticLab:
    return QuadraticLab(random_hessian(0), CHANGES, WEIGHTS)


def test_paths_are_parabolas(lab: QuadraticLab) -> None:
    found = connectivity.measure(lab)
    assert found.verdict == "ready"
    assert [path.barrier for path in found.paths] == pytest.approx([0] * 9, abs=1e-5)
    average = np.average(CHANGES, axis=0, weights=WEIGHTS)
    ends = {"base": 0 * average, "merged": average, **{f"branch-{k}": change for k, change in enumerate(CHANGES)}}
    for path in found.paths:
        exact = [lab.loss((1 - a) * ends[path.start] + a * ends[path.end]) for a in found.alphas]
        assert path.losses == pytest.approx(exact, rel=1e-5)
    turned = QuadraticLab(-random_hessian(0), CHANGES, WEIGHTS)
    hills = connectivity.measure(turned)
    for path in hills.paths:
        apart = ends[path.end] - ends[path.start]
        assert path.barrier == pytest.approx(apart @ random_hessian(0) @ apart / 8, rel=1e-4)
        assert path.barrier_ci95 == pytest.approx((path.barrier, path.barrier), rel=1e-3)  # the same for every row
    assert hills.verdict == "not ready"


def test_the_gain_is_predicted_exactly(lab: QuadraticLab) -> None:
    found = gain.measure(lab)
    exact = theory.predicted_gain(CHANGES, lab.hessian, WEIGHTS)
    assert (found.measured, found.predicted, found.predicted_at_base) == pytest.approx((exact,) * 3, rel=1e-4)
    assert found.verdict == "ready"
    assert found.ratio == pytest.approx(1, rel=1e-4)
    assert gain.measure(QuadraticLab(-random_hessian(0), CHANGES, WEIGHTS)).verdict == "not ready"


def test_eigenvalues_and_products_are_those_of_the_matrix(lab: QuadraticLab) -> None:
    found = curvature.measure(lab)
    assert found.ritz_values == pytest.approx(np.linalg.eigvalsh(lab.hessian)[::-1], rel=1e-4, abs=1e-4)
    assert found.verdict == "ready"
    assert found.gradient_norm == pytest.approx(
        np.linalg.norm(lab.hessian @ (lab.start - lab.optima.mean(axis=0))), rel=1e-4
    )
    vector = np.arange(WIDTH, dtype=np.float32)
    for method in ("exact", "difference"):
        hessian = Hessian(lab, lab.hessian_rows, lab.points["branch-0"], method)
        assert hessian.product(vector) == pytest.approx(lab.hessian @ vector, rel=2e-3, abs=2e-3)
        assert hessian.disagreement < 0.02
    assert curvature.measure(QuadraticLab(-random_hessian(1), CHANGES, WEIGHTS)).verdict == "not ready"
    assert torch.equal(lab.model.flat(), torch.as_tensor(lab.start, dtype=torch.float32))


def test_noise_costs_its_quadratic_form(lab: QuadraticLab) -> None:
    found = perturbation.measure(lab)
    zero = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    draws = [
        torch.cat([Noise(seed).change(Block(name, 0, len(t)), t).reshape(-1) for name, t in zero.items()])
        .double()
        .numpy()
        for seed in range(3)
    ]
    curve = next(c for c in found.curves if c.model == "base" and c.noise == "absolute")
    for sigma, rise in zip(curve.sigmas, curve.rises, strict=True):
        exact = np.mean([lab.loss(sigma * draw) - lab.loss(np.zeros(WIDTH)) for draw in draws])
        assert rise == pytest.approx(exact, rel=1e-2, abs=2e-4)
    assert flatness_auc([0.5, 1.0], np.array([0.25, 1.0])) == pytest.approx(0.375)  # trapezoids of x²


def test_the_surface_is_the_quadratic(lab: QuadraticLab) -> None:
    found = surface.measure(lab)
    coefficients = surface.plane(CHANGES @ CHANGES.T)
    axes = coefficients @ CHANGES
    assert axes @ axes.T == pytest.approx(np.eye(2), abs=1e-9)
    for i, y in enumerate(found.ys):
        for j, x in enumerate(found.xs):
            assert found.losses[i][j] == pytest.approx(lab.loss(x * axes[0] + y * axes[1]), rel=1e-4)
    for k, place in enumerate(found.places[1:4]):
        on_plane = place.x * axes[0] + place.y * axes[1]
        assert place.off == pytest.approx(np.linalg.norm(CHANGES[k] - on_plane), abs=1e-3)
    assert surface.in_hull(np.array([0.1, 0.1]), np.array([[0, 0], [1, 0], [0, 1.0]]))
    assert surface.in_hull(np.array([0.7, 0.21]), np.array([[0, 0], [1, 0.3]]))
    assert not surface.in_hull(np.array([0.6, 0.6]), np.array([[0, 0], [1, 0], [0, 1.0]]))


def test_the_surface_shows_the_average_and_not_another_merged_model(lab: QuadraticLab) -> None:
    lab.points["merged"] = [(3.0, lab.directions["branch-0"])]  # merge.scale, or another operator
    found = surface.measure(lab)
    average = np.average(CHANGES, axis=0, weights=WEIGHTS)
    coefficients = surface.plane(CHANGES @ CHANGES.T)
    assert found.places[-1].model == "average"
    assert (found.places[-1].x, found.places[-1].y) == pytest.approx(coefficients @ CHANGES @ average, rel=1e-4)
    assert found.model_losses[-1] == pytest.approx(lab.loss(average), rel=1e-5)


def test_products_that_do_not_fit_after_all_become_differences(
    lab: QuadraticLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, graphs = torch.autograd.grad, []

    def short_of_memory(*given, **more):  # in the second backward pass
        if graphs and not more.get("create_graph"):
            graphs.clear()
            raise torch.OutOfMemoryError("out of memory")
        graphs.extend([1] if more.get("create_graph") else [])
        return grad(*given, **more)

    monkeypatch.setattr(torch.autograd, "grad", short_of_memory)
    vector = np.arange(WIDTH, dtype=np.float32)
    hessian = Hessian(lab, lab.hessian_rows)
    assert hessian.method == "exact"
    assert hessian.product(vector) == pytest.approx(lab.hessian @ vector, rel=2e-3, abs=2e-3)
    assert hessian.method == "difference"
    assert curvature.measure(lab).method == "difference"
    assert gain.measure(lab).method == "difference"
    with pytest.raises(ResourceError, match="exact Hessian product"):
        Hessian(lab, lab.hessian_rows, method="exact").product(vector)
    assert torch.equal(lab.model.flat(), torch.as_tensor(lab.start, dtype=torch.float32))


def test_a_gpus_own_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, method in ((10**6, "difference"), (10**15, "exact")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**15))
        assert fitting(10**6, torch.device("cuda")) == method


def test_displacements_and_their_identity(lab: QuadraticLab) -> None:
    found = displacement.measure(lab)
    average = np.average(CHANGES, axis=0, weights=WEIGHTS)
    every = np.vstack([CHANGES, average])
    assert found.norms == pytest.approx(np.linalg.norm(every, axis=1), rel=1e-6)
    unit = every / np.linalg.norm(every, axis=1, keepdims=True)
    assert np.array(found.cosines) == pytest.approx(unit @ unit.T, abs=1e-6)
    total, mean, spread = theory.spread_identity(CHANGES, WEIGHTS)
    assert (found.weighted_square, found.average_square, found.spread) == pytest.approx((total, mean, spread), rel=1e-6)
    assert found.identity_error < 1e-10
    assert found.contraction == pytest.approx(np.sqrt(total / mean), rel=1e-6)
    assert [layer.layer for layer in found.layers] == ["layer 0", "norm"]
    assert found.verdict == "not ready"
    assert layer_of("model.visual.blocks.3.attn.qkv.weight") == "vision layer 3"


def test_the_identity_holds_to_ten_digits_over_many_blocks() -> None:
    rng = np.random.default_rng(1)
    sums = Sums(np.array([0.2, 0.3, 0.5]), 3)
    for size in (1000, 7, 40_000):
        sums.add(1e-3 * rng.standard_normal((3, size)), rng.standard_normal(size))
    weighted = sums.weights @ np.diag(sums.gram)[:3]
    assert abs(weighted - sums.gram[-1, -1] - sums.spread) < 1e-10 * weighted


def test_the_gap_is_between_training_and_held_out_rows(lab: QuadraticLab) -> None:
    lab.__dict__["test"] = type(lab.train)(lab.hessian, lab.optima + 0.5, 20.0)
    found = gap.measure(lab)
    merged = np.average(CHANGES, axis=0, weights=WEIGHTS)
    exact = lab.loss(merged - 0.5) - lab.loss(merged)
    line = next(line for line in found.lines if line.model == "merged")
    assert line.gap == pytest.approx(exact, abs=1e-4)
    branches = np.average([lab.loss(change - 0.5) for change in CHANGES], weights=WEIGHTS) - lab.loss(merged - 0.5)
    assert found.gain_over_branches == pytest.approx(branches, rel=1e-4)
    assert found.train_over_joint is None


def test_axes_along_the_curvature_are_found() -> None:
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))[0]
    signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
    gradients = signs @ (np.array([[3.0], [1.0]]) * basis[:2])
    axes = lifted(gradients, centred=True)
    found = compared("centred", axes, basis[:3], null_of(3, 3, 10_000, 0))
    assert np.array(found.cosines) == pytest.approx(np.eye(2, 3), abs=1e-8)
    assert found.angles == pytest.approx((0, 0), abs=1e-5)
    assert found.largest == pytest.approx(1)
    names = ["a", "b", "c", "d", "e"]
    scores = np.array([(2, 1), (1, -1), (-1, 3), (-1, -1), (0.5, 0.5)])
    assert corner_datasets(names, scores) == ["a", "b", "c", "d"]


def test_chance_alignments_are_those_of_drawn_vectors() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.standard_normal((3000, 2, 50))
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    largest = np.abs(drawn[:, :, :4]).max(axis=(1, 2))
    assert null_of(2, 4, 50, 0) == pytest.approx((largest.mean(), largest.std()), rel=0.05)
