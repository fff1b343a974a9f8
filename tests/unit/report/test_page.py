import base64
import re
from html.parser import HTMLParser

import pytest

from clipq.report import read_runs, write_report
from clipq.report.page import page

from .conftest import PIXEL, eval_row, train_row

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Collects what a page holds; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def content(self) -> str:
        return " ".join(" ".join(self.text).split())


def example(truth: object = "a red circle", image: str = PIXEL, **best: float) -> dict:
    return {"image": image, "truth": truth, "best": [[k.replace("_", " "), v] for k, v in best.items()]}


@pytest.fixture
def rich(write_run):
    rows = [train_row(step) for step in range(1, 41)]
    rows += [eval_row(s, "shapes", {"top1": s / 60, "chance": 0.02, "unseen_top1": 0.4, "images": 9}) for s in (20, 40)]
    return write_run(
        "rich",
        rows,
        config="name: rich\nsteps: 100\nmodel: {name: ViT-S-8}\noptim: {lr: 0.001}\n",
        environment={"torch": "2.11.0", "device": "cpu", "parameters": 1_234_567, "gflops_per_image": 1.5},
        examples={
            "shapes": [
                example(a_red_circle=0.83, a_red_square=0.1),
                example(a_blue_ring=0.6, a_red_circle=0.3),
            ]
        },
    )


def shown(folders) -> Page:
    """The page without its plots, which take a moment to draw."""
    return Page(page(read_runs(folders), []))


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(rich, write_run, tmp_path):
    target = write_report([rich, write_run("plain")], tmp_path / "out")
    text = target.read_text(encoding="utf-8")
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "a", "form"}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_images_of_the_page_are_the_files(rich, tmp_path):
    target = write_report([rich], tmp_path / "out")
    sources = [attributes["src"] for tag, attributes in read(target).tags if tag == "img"]
    files = {path.read_bytes() for path in target.parent.glob("*.png")}
    assert len(files) == 5
    assert files <= {base64.b64decode(source.split(",")[1]) for source in sources}


def test_headline_numbers(rich):
    content = shown([rich]).content
    for text in (
        "step 40 of 100, not finished",
        "shapes: top-1 66.7 % 33.3x chance (2.0 %)",
        "shapes: unseen top-1 40.0 % 20.0x chance (2.0 %)",
        "parameters 1.235 M",
        "GFLOPs per image 1.5",
        "optim.lr 0.001",
        "torch 2.11.0",
    ):
        assert text in content


def test_examples_are_marked_right_and_wrong(rich):
    found = shown([rich])
    assert "1 of these 2 right" in found.content
    assert "✓ right · truth: a red circle ✓ a red circle 0.830 a red square 0.100" in found.content
    assert "✗ wrong · truth: a red circle a blue ring 0.600 ✓ a red circle 0.300" in found.content


def test_any_of_several_captions_is_right(write_run):
    run = write_run(examples={"flickr": [example(["a dog", "a hound"], a_hound=7.5)]})
    assert "✓ right · truth: a dog a hound ✓ a hound 7.5" in shown([run]).content


def test_differences_between_runs_are_highlighted(rich, write_run):
    config = "name: other\nsteps: 100\nmodel: {name: ViT-S-8}\noptim: {lr: 0.002}\n"
    environment = {"torch": "2.15.0", "device": "cpu", "parameters": 1_234_567, "gflops_per_image": 1.5}
    other = write_run("other", config=config, environment=environment)
    found = shown([rich, other])
    assert "Settings that differ" in found.content
    assert found.content.count("optim.lr 0.001 0.002") == 2  # there and among all settings
    assert "torch 2.11.0 2.15.0" in found.content
    assert sum(attributes.get("class") == "differs" for _, attributes in found.tags) == 2


def test_texts_cannot_break_out(write_run):
    item = {"image": PIXEL, "truth": EVIL, "best": [[EVIL, 0.5]]}
    run = write_run(
        "<b>run & co",
        [train_row(1), eval_row(1, EVIL, {"top1": 0.1, EVIL: 0.3})],
        config=f"'{EVIL.replace(chr(39), chr(39) * 2)}': '<i>'\n",
        environment={EVIL: EVIL},
        examples={"x": [item]},
    )
    found = shown([run, write_run("other")])
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "b", "i"}
    assert all((a["src"] or "").startswith("data:image/") for tag, a in found.tags if tag == "img")
    assert EVIL in " ".join(found.text)
    assert "<b>run & co" in found.content


@pytest.mark.parametrize(
    "image",
    [
        "http://evil.example/x.png",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AA" onload="x',
        "",
        PIXEL + "\n",
    ],
)
def test_what_is_no_image_data_is_not_shown(write_run, tmp_path, image):
    run = write_run(examples={"x": [example(image=image, a=0.5)]})
    found = shown([run])
    assert "no image" in found.content
    assert all((a["src"] or "").startswith("data:image/png;base64,iVBOR") for tag, a in found.tags if tag == "img")


def test_the_least_run_has_a_page(write_run, tmp_path):
    assert "final loss" in read(write_report([write_run(rows=[train_row(1)])], tmp_path / "out")).content


def test_notes_are_shown(write_run):
    run = write_run(rows=[train_row(1), train_row(2, loss=float("nan"))])
    assert "the loss is not finite at 1 of 2 steps" in shown([run]).content


def test_equal_runs_give_equal_files(rich, write_run, tmp_path):
    runs = [rich, write_run("plain")]
    folders = [write_report(runs, tmp_path / name).parent for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert first == second
