import io
import math
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipq.report.plots import MAX_POINTS, draw, smooth, thin
from clipq.report.runs import read_runs

from .conftest import eval_row, train_row


def bare(step: int, loss: float | None = None) -> dict[str, Any]:
    """A row that only the loss is drawn of: most tests need no more, and each plot takes a moment."""
    row = train_row(step) if loss is None else train_row(step, loss=loss)
    return {key: row[key] for key in ("kind", "step", "seconds", "loss")}


ROWS = [train_row(step) for step in range(1, 41)]
BARE = [bare(step) for step in range(1, 41)]
TOP1 = {"top1": 0.5, "chance": 0.02, "unseen_combinations_top1": 0.4}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def close_to(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - color).max(-1) < 12).sum())


BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_plots_are_images_that_differ_and_are_not_blank(write_run):
    rows = [*ROWS, eval_row(20, "shapes", TOP1), eval_row(40, "shapes", {**TOP1, "top1": 0.6})]
    plots = draw(read_runs([write_run(rows=rows)]))
    assert [p.name for p in plots] == ["loss", "accuracy_shapes", "throughput", "learning_rate", "stability"]
    assert len({p.png for p in plots}) == len(plots)
    for plot in plots:
        image = pixels(plot.png)
        left, right = np.array_split(image, 2, axis=1)
        assert close_to(left, BLUE) > 200, plot.name
        assert close_to(right, BLUE) > 200, plot.name


def test_every_run_is_drawn_in_its_own_colour(write_run):
    a, b = ([bare(step, loss) for step in range(1, 41)] for loss in (None, 2.0))
    (plot,) = draw(read_runs([write_run("a", a), write_run("b", b)]))
    image = pixels(plot.png)
    assert close_to(image, BLUE) > 500
    assert close_to(image, VERMILION) > 500


def test_a_curve_shows_its_values(write_run):
    low, high = ([bare(step, loss) for step in range(1, 41)] for loss in (1.0, 3.0))
    image = pixels(draw(read_runs([write_run("low", low), write_run("high", high)]))[0].png)
    # The median is on the curve: the legend has far fewer pixels of the colour.
    height = [np.median(np.nonzero(np.abs(image.astype(int) - c).max(-1) < 12)[0]) for c in (BLUE, VERMILION)]
    assert height[0] > height[1] + 100  # rows of an image count downwards


def test_tasks_have_plots_of_their_own_with_safe_distinct_names(write_run):
    rows = [*BARE, *(eval_row(40, task, TOP1) for task in ("a/b", "a b", "../x"))]
    names = [plot.name for plot in draw(read_runs([write_run(rows=rows)]))]
    accuracy = [name for name in names if name.startswith("accuracy_")]
    assert len(set(accuracy)) == 3
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz_0123456789") for name in accuracy)


def test_retrieval_and_no_evaluation(write_run):
    recall = {"image_to_text_r1": 0.3, "text_to_image_r1": 0.2, "images": 10, "texts": 50}
    a, b = write_run("a", [*BARE, eval_row(40, "flickr", recall)]), write_run("b", BARE)
    plots = {plot.name: plot for plot in draw(read_runs([a, b]))}
    assert plots["accuracy_flickr"].caption == "Image → text R@1, text → image R@1."
    assert close_to(pixels(plots["accuracy_flickr"].png), VERMILION) == 0
    assert "accuracy" not in " ".join(plot.name for plot in draw(read_runs([b])))


def test_a_resume_is_marked(write_run):
    resume = [{"kind": "resume", "step": 20, "seconds": 6.0}]
    plain, marked = (
        draw(read_runs([write_run(name, BARE[:20] + extra + BARE[20:])]))[0].png
        for name, extra in (("run", []), ("other/run", resume))
    )
    assert plain != marked


@pytest.mark.parametrize(
    "rows",
    [
        BARE[:1],
        [bare(step, math.nan) for step in range(1, 30)],
        [bare(step, math.inf if step > 20 else 1.0) for step in range(1, 30)],
        [{"kind": "train", "step": 1}],
        [bare(step, 1e6 if step == 7 else 1.0) for step in range(1, 30)],
    ],
    ids=["one step", "all nan", "diverges", "bare row", "spike"],
)
@pytest.mark.filterwarnings("error")
def test_awkward_runs_are_drawn_without_a_warning(write_run, rows):
    assert pixels(draw(read_runs([write_run(rows=rows)]))[0].png).std() > 0


@pytest.mark.filterwarnings("error")
def test_any_name_can_be_drawn(write_run):
    names = ["_hidden", "a$b$c", "$\\frac{1$", "名前", "x" * 150]
    plots = draw(read_runs([write_run(name, BARE[:3]) for name in names]))
    assert pixels(plots[0].png).std() > 0


def test_equal_runs_give_equal_bytes_whatever_the_users_settings(write_run):
    import matplotlib

    runs = read_runs([write_run(rows=BARE)])
    first = [plot.png for plot in draw(runs)]
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        assert [plot.png for plot in draw(runs)] == first
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_touched(write_run):
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        draw(read_runs([write_run(rows=BARE)]))
        assert plt.get_fignums() == []
    else:
        draw(read_runs([write_run(rows=BARE)]))
        assert "matplotlib.pyplot" not in sys.modules


def test_thinning_keeps_spikes_and_ends():
    y = np.ones(300_000)
    y[123_456] = 50.0
    x_thin, y_thin = thin(np.arange(300_000), y)
    assert len(x_thin) == len(y_thin) < 2 * MAX_POINTS
    assert x_thin[y_thin.argmax()] == 123_456
    assert (x_thin[0], x_thin[-1]) == (0, 299_999)


@pytest.mark.parametrize("reach", [0, 1, 7])
def test_smooth_is_the_mean_of_the_window(reach):
    values = np.random.default_rng(0).normal(size=30)
    values[[3, 4, 5]] = math.nan
    expected = []
    for i in range(30):
        near = min(i // 5, reach)
        window = [v for v in values[i - near : i + near + 1] if math.isfinite(v)]
        expected.append(sum(window) / len(window) if window else math.nan)
    np.testing.assert_allclose(smooth(values, reach), expected, rtol=1e-12)


def test_smoothing_follows_a_steep_beginning():
    loss = 8.0 / np.arange(1, 200_001) ** 0.2
    assert np.abs(smooth(loss, 3000) / loss - 1).max() < 0.01
