import math
from xml.etree import ElementTree

import pytest
import torch

from merit.errors import MergeError
from merit.merge.curve import trade_off_svg
from merit.merge.line import Line
from merit.merge.weights import Losses, Point, ScaleSearch, pick_scale, search_scale


def states(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)).to(dtype)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    merged = {n: t + torch.randn(t.shape).to(dtype) if t.is_floating_point() else t + 7 for n, t in base.items()}
    return model, base, merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_line_points_are_on_the_line_and_exact_at_its_ends(dtype):
    model, base, merged = states(dtype)
    line = Line(model, base, merged)
    for scale in [1.0, 0.25, 0.0, 1.5]:
        line.move(scale)
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
    Line(model, base, merged).move(0.5)
    torch.testing.assert_close(model["a"].weight.data, base["a.weight"] + 0.5)


def test_states_that_do_not_fit_are_refused():
    model, base, merged = states()
    with pytest.raises(MergeError, match=r"0\.weight.*merged state"):
        Line(model, base, {n: t for n, t in merged.items() if n != "0.weight"})
    with pytest.raises(MergeError, match="shares memory"):
        Line(model, model.state_dict(), merged)
    with pytest.raises(MergeError, match="differs between the model and the base"):
        Line(model, base | {"0.weight": torch.zeros(2, 2)}, merged)


def test_search_measures_every_point_in_order_and_the_two_ends():
    asked = []

    def losses(scale):
        asked.append(scale)
        return Losses(5 - scale, scale)

    search = search_scale(losses, [1.5, 0.5], "learned")
    assert asked == [0.0, 0.5, 1.0, 1.5] == [p.scale for p in search.points]
    assert [(p.learned, p.kept) for p in search.points] == [(5 - x, x) for x in asked]
    assert search.chosen == 1.5
    with pytest.raises(MergeError, match=r"scale 0\.5 is not finite"):
        search_scale(lambda scale: Losses(1.0, math.nan if scale == 0.5 else 1.0), [0.5], "balanced")


def point(scale, learned, kept):
    return Point(scale=scale, learned=learned, kept=kept)


CURVE = [
    point(0.0, 5.0, 1.0),
    point(0.25, 3.0, 1.02),
    point(0.5, 2.0, 1.2),
    point(0.75, 1.5, 1.5),
    point(1.0, 1.4, 2.0),
]


def test_rules_pick_what_they_promise():
    assert pick_scale(CURVE, "learned").scale == 1.0
    assert pick_scale(CURVE, "keep").scale == 0.25
    assert pick_scale(CURVE, "keep", tolerance=0.3).scale == 0.5
    assert pick_scale(CURVE, "balanced").scale == 0.5  # regrets (1, 0) (.44, .02) (.17, .2) (.03, .5) (0, 1)
    flat = [point(s, 1.0, 1.0) for s in (0.0, 0.5, 1.0)]
    assert {pick_scale(flat, rule).scale for rule in ("balanced", "learned", "keep")} == {1.0}


@pytest.mark.parametrize("points", [CURVE, CURVE[:1], [point(0.0, 1.0, 1.0), point(1.0, 1.0, 1.0)]])
def test_the_curve_is_drawn_inside_its_frame_with_every_scale(points):
    chosen = pick_scale(points)
    search = ScaleSearch("balanced", chosen.scale, tuple(points))
    root = ElementTree.fromstring(trade_off_svg(search, "a < b"))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == len(points)
    assert all(70 <= float(c.get("cx")) <= 540 and 40 <= float(c.get("cy")) <= 345 for c in circles)
    texts = [t.text for t in root.findall(f"{space}text")]
    assert f"λ = {chosen.scale:g}, chosen" in texts
    assert "a < b" in texts


def test_keep_spends_what_it_may_where_the_base_is_at_zero():
    """A divergence from the base is 0 at the base: a share of it would allow nothing but the base itself."""
    points = [point(0.0, 4.0, 0.0), point(0.5, 3.0, 0.02), point(1.0, 2.0, 0.3)]
    assert pick_scale(points, "keep").scale == 0.5
    assert pick_scale(points, "keep", tolerance=0.5).scale == 1.0
    assert pick_scale(points, "keep", tolerance=0.0).scale == 0.0
