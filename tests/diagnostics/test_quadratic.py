"""On an exactly quadratic loss every diagnostic equals its closed form."""

import numpy as np
import pytest
import torch
from scipy.spatial import Delaunay
from tests.diagnostics.labs import NAMES, WIDTH, QuadraticLab, QuadraticRows, random_hessian

from merit import theory
from merit.diagnostics import (
    alignment,
    concentration,
    connectivity,
    curvature,
    displacement,
    embedding,
    gain,
    gap,
    perturbation,
    probe,
    sensitivity,
    surface,
)
from merit.diagnostics.alignment import compared, corner_datasets, lifted, null_of
from merit.diagnostics.displacement import Sums, layer_of
from merit.diagnostics.hessian import Hessian
from merit.diagnostics.hessian import _fitting as fitting
from merit.diagnostics.perturbation import flatness_auc
from merit.errors import CheckpointError, ResourceError
from merit.hf.inplace import Block, Noise
from merit.mixture.calibration import draw

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
    root = np.concatenate(
        [np.full(n, np.sqrt((lab.start[part] ** 2).mean())) for n, part in ((6, slice(6)), (4, slice(6, 10)))]
    )
    places = {"base": np.zeros(WIDTH), "merged": np.average(CHANGES, axis=0, weights=WEIGHTS)}
    assert [(c.model, c.noise) for c in found.curves] == [(m, n) for m in places for n in ("absolute", "relative")]
    for curve in found.curves:
        at, scale = places[curve.model], 1.0 if curve.noise == "absolute" else root
        exact = np.array(
            [[lab.loss(at + s * scale * draw) - lab.loss(at) for s in curve.sigmas] for draw in draws]
        )  # draws × sigmas
        assert curve.rises == pytest.approx(exact.mean(axis=0), rel=1e-2, abs=3e-4)
        assert curve.errors == pytest.approx(exact.std(axis=0, ddof=1) / np.sqrt(3), rel=2e-2, abs=3e-4)
        assert curve.auc == pytest.approx(flatness_auc(curve.sigmas, exact).mean(), rel=1e-2, abs=3e-4)
    judged = found.curves[1].rises[found.curves[1].sigmas.index(0.05)]
    assert found.verdict == ("ready" if judged <= 0.1 else "doubtful" if judged <= 0.5 else "not ready")
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
    assert (found.ridge, found.verdict) == (0, "ready")  # a convex loss has no ridge
    top = lab.optima.mean(axis=0) - lab.start
    beyond = np.stack([2 * top + 0.1 * CHANGES[0], 2 * top - 0.1 * CHANGES[0]])
    turned = QuadraticLab(-4 * lab.hessian, beyond, [1.0, 1.0])  # a hill between the base and both branches
    hill = surface.measure(turned)
    axes = surface.plane(beyond @ beyond.T) @ beyond
    hull = Delaunay([(place.x, place.y) for place in hill.places])
    inside = [(x, y) for y in hill.ys for x in hill.xs if hull.find_simplex((x, y)) >= 0]
    highest = max(turned.loss(x * axes[0] + y * axes[1]) for x, y in inside)
    assert hill.ridge == pytest.approx(highest / max(map(turned.loss, (0 * top, *beyond, 2 * top))) - 1, rel=1e-3)
    assert hill.ridge > 0.01
    assert hill.verdict == ("doubtful" if hill.ridge <= 0.05 else "not ready")
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
    joint = np.linspace(-1, 2, WIDTH)
    more = displacement.measure(QuadraticLab(lab.hessian, CHANGES, WEIGHTS, joint=joint))
    assert more.models[-1] == "joint"
    assert more.joint_ratio == pytest.approx(np.linalg.norm(joint) / np.linalg.norm(average), rel=1e-6)
    assert layer_of("model.visual.blocks.3.attn.qkv.weight") == "vision layer 3"


def test_the_identity_holds_to_ten_digits_over_many_blocks() -> None:
    rng = np.random.default_rng(1)
    sums = Sums(np.array([0.2, 0.3, 0.5]), 3)
    for size in (1000, 7, 40_000):
        sums.add(1e-3 * rng.standard_normal((3, size)), rng.standard_normal(size))
    weighted = sums.weights @ np.diag(sums.gram)[:3]
    assert abs(weighted - sums.gram[-1, -1] - sums.spread) < 1e-10 * weighted


def test_the_gap_is_between_training_and_held_out_rows(lab: QuadraticLab) -> None:
    lab.__dict__["test"] = lab.fixed({"rows": lab.optima + 0.5})
    found = gap.measure(lab)
    merged = np.average(CHANGES, axis=0, weights=WEIGHTS)
    exact = lab.loss(merged - 0.5) - lab.loss(merged)
    line = next(line for line in found.lines if line.model == "merged")
    assert line.gap == pytest.approx(exact, abs=1e-4)
    branches = np.average([lab.loss(change - 0.5) for change in CHANGES], weights=WEIGHTS) - lab.loss(merged - 0.5)
    assert found.gain_over_branches == pytest.approx(branches, rel=1e-4)
    assert found.gain_over_base == pytest.approx(lab.loss(-0.5 * np.ones(WIDTH)) - lab.loss(merged - 0.5), rel=1e-4)
    assert found.train_over_joint is None
    still = QuadraticLab(lab.hessian, 0 * CHANGES, WEIGHTS)
    still.__dict__["test"] = still.train
    assert gap.measure(still).verdict == "doubtful"  # neither better nor worse than the base
    joint = QuadraticLab(lab.hessian, CHANGES, WEIGHTS, joint=2 * CHANGES[0])
    joint.__dict__["test"] = lab.test
    against = gap.measure(joint)
    exact = lab.loss(merged) - lab.loss(2 * CHANGES[0])
    assert against.train_over_joint == pytest.approx(exact, rel=1e-4)
    exact = lab.loss(merged - 0.5) - lab.loss(2 * CHANGES[0] - 0.5)
    assert against.test_over_joint == pytest.approx(exact, rel=1e-4)


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


BASIS = np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))[0].T
EIGENVALUES = np.array([9.0, 7, 5, 3, 2.5, 2, 1.5, 1, 0.8, 0.5])
DIAGONAL = BASIS.T * EIGENVALUES @ BASIS
"""Rows of BASIS are its eigenvectors."""


def lab_of(
    gradients: np.ndarray, groups: object = (), changes: np.ndarray = CHANGES, weights: list[float] = WEIGHTS
) -> QuadraticLab:
    """Datasets with these gradients at the base, in the eigenvectors' coordinates."""
    width = gradients.shape[1]
    return QuadraticLab(DIAGONAL, changes, weights, gradients=gradients @ BASIS[:width], groups=groups)


@pytest.mark.parametrize("degrees", [0, 30, 80])
def test_conflict_axes_turned_out_of_the_leading_space_are_as_far_from_it(degrees: int) -> None:
    """Two axes: one lies along the first eigenvector, the other is turned from the second towards the ninth."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    gradients = np.zeros((4, WIDTH))
    gradients[:, 0] = [4, 4, -4, -4]
    gradients[:, 1] = cos * np.array([2, -2, 2, -2])
    gradients[:, 8] = sin * np.array([2, -2, 2, -2])
    found = alignment.measure(lab_of(gradients))
    assert sorted(found.datasets) == ["0", "1", "2", "3"]
    for variant in found.variants:
        assert np.array(variant.cosines) == pytest.approx(np.array([[1, 0, 0], [0, cos, 0]]), abs=1e-3)
        assert variant.angles == pytest.approx((0, degrees), abs=0.2)
        assert variant.z == pytest.approx((variant.largest - found.null_mean) / found.null_sd)
    z = max(variant.z for variant in found.variants)
    assert found.verdict == ("ready" if z >= 5 else "doubtful" if z >= 3 else "not ready")
    assert found.eigenvectors == 3


def test_datasets_that_are_all_alike_have_one_axis() -> None:
    found = alignment.measure(lab_of(np.array([[0.0, 2.0]] * 4)))
    assert [variant.variant for variant in found.variants] == ["raw"]
    assert np.array(found.variants[0].cosines) == pytest.approx(np.array([[0, 1, 0]]), abs=1e-3)


@pytest.mark.parametrize(("strong", "degrees"), [(0.5, 0), (3.0, 90)])
def test_norms_and_the_angle_between_axes_of_cosines_and_of_raw_gradients(strong: float, degrees: int) -> None:
    """Four datasets along one direction and two along another: cosines count datasets, raw gradients their squared norms."""
    signs = np.array([(1, 0), (1, 0), (-1, 0), (-1, 0), (0, strong), (0, -strong)])
    found = concentration.measure(lab_of(signs.astype(float)))
    assert found.axis_angle == pytest.approx(degrees, abs=1e-3)
    norms = np.array([1, 1, 1, 1, strong, strong])
    assert found.norms == pytest.approx(norms)
    assert (found.mean, found.sd) == pytest.approx((norms.mean(), norms.std(ddof=1)))
    assert found.cv == pytest.approx(norms.std(ddof=1) / norms.mean())
    assert found.max_over_min == pytest.approx(max(strong, 1 / strong))


def test_trimming_takes_outliers_at_both_ends() -> None:
    gradients = np.eye(20, WIDTH) + np.eye(20, WIDTH, -10)
    gradients[[0, 1, 2]] *= np.array([[50.0], [40.0], [0.01]])
    found = concentration.measure(lab_of(gradients))
    assert found.cv_trimmed_5 == pytest.approx(np.std([40, *[1] * 17], ddof=1) / np.mean([40, *[1] * 17]))
    assert found.cv_trimmed_10 == pytest.approx(0, abs=1e-9)
    assert found.verdict == "ready"


def test_gradients_of_samples_are_means_over_nested_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SIZES", (5, 10, 20))
    monkeypatch.setattr(sensitivity, "JUDGED", 10)
    lab = QuadraticLab(DIAGONAL, CHANGES, WEIGHTS)
    rng = np.random.default_rng(4)
    optima = {name: lab.start + rng.standard_normal((count, WIDTH)) for name, count in (("a", 40), ("b", 15))}
    lab.subject.train.update({name: QuadraticRows(rows) for name, rows in optima.items()})  # type: ignore[attr-defined]
    found = sensitivity.measure(lab)
    assert found.datasets == ("a", "b", "rows")
    assert found.largest == (20, 15, 6)
    assert [(item.examples, len(item.cosines)) for item in found.sizes] == [(5, 3), (10, 2)]
    for k, name in enumerate(("a", "b")):
        order = draw(len(optima[name]), 20, 0, name, purpose="diagnose sensitivity")
        small, large = (DIAGONAL @ (lab.start - optima[name][order[:n]].mean(axis=0)) for n in (10, 20))
        exact = small @ large / np.linalg.norm(small) / np.linalg.norm(large)
        assert found.sizes[1].cosines[k] == pytest.approx(exact, rel=1e-5)
    assert found.judged == 10
    mean = found.sizes[1].mean
    assert mean == pytest.approx(np.mean(found.sizes[1].cosines))
    assert found.verdict == ("ready" if mean >= 0.8 else "doubtful" if mean >= 0.6 else "not ready")


def test_a_few_rows_are_too_few_to_compare_samples(lab: QuadraticLab) -> None:
    assert sensitivity.measure(lab).verdict == "doubtful"


def test_a_loss_that_is_not_finite_is_an_error_that_says_so() -> None:
    lab = QuadraticLab(DIAGONAL, np.full((2, WIDTH), 1e30), [1.0, 1.0])
    with pytest.raises(CheckpointError, match="not finite"):
        connectivity.measure(lab)
    assert torch.equal(lab.model.flat(), torch.as_tensor(lab.start, dtype=torch.float32))


def test_the_map_shows_the_axes_that_the_split_cuts() -> None:
    signs = np.array([(4, 1), (4, -1), (5, 1), (5, -1), (-4, 1), (-4, -1), (-5, 1), (-5, -1.0)])
    names = [str(t) for t in range(8)]
    apart = embedding.measure(lab_of(signs, groups=[names[:4], names[4:]]))
    assert (np.array(apart.pca)[:, 0] > 0).tolist() == [apart.pca[0][0] > 0] * 4 + [apart.pca[0][0] < 0] * 4
    assert apart.groups == (0, 0, 0, 0, 1, 1, 1, 1)
    unit = signs / np.linalg.norm(signs, axis=1, keepdims=True)
    distances = 1 - unit @ unit.T
    own = [(distances[t, :4] if t < 4 else distances[t, 4:]).sum() / 3 for t in range(8)]
    other = [(distances[t, 4:] if t < 4 else distances[t, :4]).mean() for t in range(8)]
    exact = np.mean([(b - a) / max(a, b) for a, b in zip(own, other, strict=True)])
    assert apart.silhouette == pytest.approx(exact, rel=1e-6)
    assert apart.verdict == "ready"  # 1 in 35 groupings is as good
    assert embedding.measure(lab_of(signs, groups=[names[::2], names[1::2]])).verdict == "not ready"
    alone = embedding.measure(lab_of(signs))
    assert (alone.silhouette, alone.verdict) == (None, "doubtful")  # the rule cannot be applied


def test_the_probe_forecasts_by_the_exact_gains_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a quadratic loss the prediction is Theorem 3.1 itself, and what is measured is the losses' closed form."""
    monkeypatch.setattr(probe, "HALVES", 20)
    gradients = np.array([(3, 1), (3, -1), (-3, 1), (-3, -1), (2, 0), (-2, 0), (1, 0), (-1, 0.0)])
    groups = [("0", "1", "4", "6"), ("2", "3", "5", "7")]
    changes = -0.01 * np.stack([gradients[:4:2].sum(axis=0), gradients[1:4:2].sum(axis=0)]) @ BASIS[:2]
    lab = lab_of(gradients, groups=groups, changes=changes, weights=[1.0, 1.0])
    found = probe.measure(lab, 3, 0.01)

    def group_loss(k: int, change: np.ndarray) -> float:
        optima = lab.optima.reshape(8, 2, WIDTH)[list(map(int, groups[k]))].reshape(-1, WIDTH)
        away = lab.start + change - optima
        return float(20 + 0.5 * ((away @ DIAGONAL) * away).sum(axis=1).mean())

    zero = np.zeros(WIDTH)
    own = [group_loss(k, zero) - group_loss(k, change) for k, change in enumerate(changes)]
    assert found.own_gain == pytest.approx(own, rel=2e-3, abs=1e-5)
    gain_ = lab.loss(zero) - lab.loss(changes.mean(axis=0))
    assert found.merged_gain == pytest.approx(gain_, rel=2e-3, abs=1e-5)
    assert found.measured_gain == pytest.approx(theory.predicted_gain(changes, DIAGONAL, [1, 1]), rel=2e-3, abs=1e-5)
    matrix = theory.conflict_matrix(gradients @ BASIS[:2], DIAGONAL)
    signs = np.array([1, 1, -1, -1, 1, -1, 1, -1])
    exact = theory.two_group_gain(signs, matrix, 1.0) / theory.expected_random_gain(matrix, 1.0)
    assert found.ratio == pytest.approx(exact, rel=0.1)  # 500 random splits stand for all
    assert found.percentile == pytest.approx(1 - 1 / 35, abs=0.02)  # none of the 35 splits is better; one is this one
    assert found.over_random == pytest.approx(found.measured_gain * (1 - 1 / found.ratio))
    assert found.barrier == pytest.approx(0, abs=1e-6)
