import math
from xml.etree import ElementTree

import pytest
import torch

from merit.errors import MergeError
from merit.merge.scale import GRID, Point, as_record, line_points, pick_scale, search_scale, trade_off_svg


def states(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)).to(dtype)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    merged = {n: t + torch.randn(t.shape).to(dtype) if t.is_floating_point() else t + 7 for n, t in base.items()}
    return model, base, merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_line_points_are_on_the_line_and_exact_at_its_ends(dtype):
    model, base, merged = states(dtype)
    for scale in line_points(model, base, merged, [1.0, 0.25, 0.0, 1.5]):
        for name, tensor in model.state_dict().items():
            if scale == 0:
                assert torch.equal(tensor, base[name])
            elif scale == 1 or not tensor.is_floating_point():
                assert torch.equal(tensor, merged[name])
            else:
                want = base[name].double() + scale * (merged[name].double() - base[name].double())
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(tensor.double(), want, rtol=eps, atol=4 * min(eps, 1e-7))


def test_tied_parameters_move_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    base = {n: t.clone() for n, t in model.state_dict().items()}
    merged = {n: t + 1 for n, t in base.items()}
    next(line_points(model, base, merged, [0.5]))
    torch.testing.assert_close(model["a"].weight.data, base["a.weight"] + 0.5)


def test_states_that_do_not_fit_are_refused():
    model, base, merged = states()
    with pytest.raises(MergeError, match=r"0\.weight.*merged state"):
        next(line_points(model, base, {n: t for n, t in merged.items() if n != "0.weight"}, [1]))
    with pytest.raises(MergeError, match="shares memory"):
        next(line_points(model, model.state_dict(), merged, [1]))
    with pytest.raises(MergeError, match="does not agree"):
        next(line_points(model, base | {"0.weight": torch.zeros(2, 2)}, merged, [1]))


def test_search_measures_every_point_in_order():
    model, base, merged = states()
    zero, one = base["0.weight"].sum().item(), merged["0.weight"].sum().item()

    def evaluate(m):
        value = m.state_dict()["0.weight"].sum().item()
        return value, -value

    points = search_scale(model, base, merged, evaluate)
    assert [p.scale for p in points] == list(GRID)
    for p in points:
        assert p.learned == pytest.approx(zero + p.scale * (one - zero), abs=1e-5)
        assert p.kept == -p.learned


CURVE = [
    Point(0.0, 5.0, 1.0),
    Point(0.25, 3.0, 1.02),
    Point(0.5, 2.0, 1.2),
    Point(0.75, 1.5, 1.5),
    Point(1.0, 1.4, 2.0),
]


def test_rules_pick_what_they_promise():
    assert pick_scale(CURVE, "learned").scale == 1.0
    assert pick_scale(CURVE, "keep").scale == 0.25
    assert pick_scale(CURVE, "keep", tolerance=0.3).scale == 0.5
    assert pick_scale(CURVE, "balanced").scale == 0.5  # regrets (1, 0) (.44, .02) (.17, .2) (.03, .5) (0, 1)
    flat = [Point(s, 1.0, 1.0) for s in (0.0, 0.5, 1.0)]
    assert {pick_scale(flat, rule).scale for rule in ("balanced", "learned", "keep")} == {1.0}


def test_impossible_searches_are_refused():
    with pytest.raises(MergeError, match="no points"):
        pick_scale([])
    with pytest.raises(MergeError, match=r"scale 0\.5 is not finite"):
        pick_scale([Point(0.5, math.nan, 1.0)])
    with pytest.raises(MergeError, match="rule must be"):
        pick_scale(CURVE, "best")


@pytest.mark.parametrize("points", [CURVE, CURVE[:1], [Point(0.0, 1.0, 1.0), Point(1.0, 1.0, 1.0)]])
def test_the_curve_is_drawn_inside_its_frame_with_every_scale(points):
    chosen = pick_scale(points)
    root = ElementTree.fromstring(trade_off_svg(points, chosen, "a < b"))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == len(points)
    assert all(70 <= float(c.get("cx")) <= 540 and 40 <= float(c.get("cy")) <= 345 for c in circles)
    texts = [t.text for t in root.findall(f"{space}text")]
    assert f"λ = {chosen.scale:g}, chosen" in texts
    assert "a < b" in texts


def test_record_is_plain():
    assert as_record(CURVE[:1], CURVE[0], "keep") == {
        "rule": "keep",
        "chosen": 0.0,
        "points": [{"scale": 0.0, "learned": 5.0, "kept": 1.0}],
    }


def test_keep_spends_what_it_may_where_the_base_is_at_zero():
    """A divergence from the base is 0 at the base: a share of it would allow nothing but the base itself."""
    points = [Point(0.0, 4.0, 0.0), Point(0.5, 3.0, 0.02), Point(1.0, 2.0, 0.3)]
    assert pick_scale(points, "keep").scale == 0.5
    assert pick_scale(points, "keep", tolerance=0.5).scale == 1.0
    assert pick_scale(points, "keep", tolerance=0.0).scale == 0.0
