"""The page builder: well-formed, self-contained, escaped, and true to its numbers and pixels."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from phone import needs_chromium, sideways
from PIL import Image

from hpcdistill.sweep.charts import DASHES, SERIES, Chart, Line, chart_svg
from hpcdistill.sweep.report import (
    Card,
    Cards,
    Charts,
    Commands,
    Crop,
    Crops,
    Download,
    Facts,
    Page,
    Row,
    Section,
    Table,
    Text,
    View,
    render,
    write_page,
)

HOSTILE = """<script>alert('x')</script> & "quoted" """
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Strict(HTMLParser):
    """Fails on a tag that is not closed in order; keeps every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chart(**options: object) -> Chart:
    values: dict[str, object] = {
        "title": f"PSNR {HOSTILE}",
        "x_label": "step",
        "y_label": "PSNR [dB]",
        "lines": (Line(f"a {HOSTILE}", 1, ((0, 20.0), (50, 21.0), (100, 22.0))), Line("one point", 2, ((100, 21.5),))),
        "levels": (Line("level", 0, ((0.0, 21.0),)),),
    }
    return Chart(**{**values, **options})  # type: ignore[arg-type]


def page(name: str = HOSTILE) -> Page:
    crops = tuple(Crop(f"{name} {seed}", picture(8, 8, seed), name, f"alt {name}", seed) for seed in range(2))
    return Page(
        title=f"title {name}",
        kicker=name,
        lead=name,
        sections=(
            Section(
                "", (Cards((Card(name, "29.58", "dB", name, 1), Card("b", "1", "dB", "n"))), Text((name,), "caution"))
            ),
            Section(name, (Table(name, ("Method", "PSNR"), (Row((name, "29.58"), 0), Row(("b", "-"))), name),)),
            Section("Crops", (Crops(name, picture(40, 80), name, (View(name, (10, 20, 8, 16), crops),), name),)),
            Section("Curves", (Charts((chart(), chart(log_y=True, note=name))), Text((name,)))),
            Section("Facts", (Facts(((name, name),)), Commands(((name, name),)))),
        ),
        footer=name,
    )


def test_the_page_is_well_formed_and_accessible() -> None:
    html = render(page())
    assert html.startswith("<!DOCTYPE html>")
    parsed = Strict(html)
    assert parsed.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in parsed.elements].count("h1") == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert len(parsed.all("img")) == 3
    assert all(image["alt"] for image in parsed.all("img"))
    assert {header["scope"] for header in parsed.all("th")} == {"row", "col"}
    drawings = [drawing for drawing in parsed.all("svg") if drawing.get("role") == "img"]
    assert len(drawings) == 2
    assert all("20.00 at 0, 22.00 at 100" in (drawing["aria-label"] or "") for drawing in drawings)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10


def test_the_page_is_self_contained() -> None:
    html = render(page())
    parsed = Strict(html)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value}>"
    assert not parsed.all("script")
    assert not re.search(r"https?:|@import|url\((?!#)", html)


def test_references_inside_the_drawings_lead_somewhere() -> None:
    html = render(page())
    ids = {attributes["id"] for _, attributes in Strict(html).elements if "id" in attributes}
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', html))
    assert references
    assert references <= ids


def test_every_text_is_escaped() -> None:
    html = render(page())
    assert "alert(" in html
    assert "<script" not in html
    # Nothing is lost either: what a reader sees is what was given.
    assert "".join(Strict(html).text).count(HOSTILE.strip()) >= 15


def test_no_number_is_lost_and_the_same_page_has_the_same_bytes() -> None:
    html = render(page("plain"))
    assert html == render(page("plain"))
    text = " ".join("".join(Strict(html).text).split())
    for part in ("29.58", "title plain", "20.00", "21.50", "plain 1"):
        assert part in text


def test_crops_keep_every_pixel() -> None:
    html = render(page())
    addresses = [image["src"] or "" for image in Strict(html).all("img")]
    pngs = [address.partition("base64,")[2] for address in addresses if address.startswith("data:image/png")]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in pngs]
    assert len(shown) == 2
    for seed, image in enumerate(shown):
        np.testing.assert_array_equal(image, picture(8, 8, seed))
    assert "image-rendering: pixelated" in html


def test_the_box_is_where_the_crop_is() -> None:
    view = View("", (10, 20, 8, 16), ())
    block = Crops("", picture(40, 80), "", (view,))
    assert block.frame(view) == {"top": 25.0, "left": 25.0, "height": 20.0, "width": 20.0}
    assert "top: 25.0%; left: 25.0%; height: 20.0%; width: 20.0%;" in render(page())


def test_light_and_dark_define_every_series_and_no_two_look_alike() -> None:
    html = render(page())
    assert "prefers-color-scheme: dark" in html
    assert len(DASHES) == SERIES
    for series in range(SERIES):
        colours = re.findall(rf"--series-{series}: (#[0-9a-f]{{6}})", html)
        assert len(set(colours)) == 2, f"series {series} needs a light and a dark colour"


def curve_path(svg: str, series: int) -> np.ndarray:
    """The points [N, 2] of the drawn line of a series, in the drawing's units."""
    for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg):
        if f"stroke: var(--series-{series})" in style and "fill: none" in style:
            return np.array([[float(part) for part in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])
    pytest.fail(f"no line of series {series}")


def test_a_curve_is_drawn_to_scale() -> None:
    line = Line("a", 1, ((0.0, 20.0), (50.0, 21.0), (100.0, 24.0)))
    level = Line("b", 0, ((0.0, 21.0),))
    svg = chart_svg(chart(lines=(line,), levels=(level,)), "c")
    start, middle, end = curve_path(svg, 1)
    assert middle[0] == pytest.approx((start[0] + end[0]) / 2, abs=1e-3)
    assert middle[1] == pytest.approx(start[1] + (end[1] - start[1]) / 4, abs=1e-3)
    assert start[1] > end[1]  # up is more
    across = curve_path(svg, 0)
    np.testing.assert_allclose(across[:, 1], middle[1], atol=1e-3)
    assert across[0, 0] < start[0] < end[0] < across[-1, 0]


def test_a_logarithmic_curve_is_drawn_to_scale() -> None:
    line = Line("a", 1, ((0.0, 0.001), (1.0, 0.01), (2.0, 1.0)))
    first, second, third = curve_path(chart_svg(chart(lines=(line,), levels=(), log_y=True), "c"), 1)
    assert (first[1] - second[1]) * 2 == pytest.approx(second[1] - third[1], abs=1e-2)


def test_a_drawing_takes_its_colours_and_font_from_the_page() -> None:
    svg = chart_svg(chart(), "c")
    assert "var(--ink)" in svg
    assert "var(--rule)" in svg
    assert "font-family" not in svg
    assert "<style" not in svg
    assert not re.search(r"(?:fill|stroke): #", svg)
    assert "[dB]" in svg  # text stays text


def test_the_numbers_behind_a_chart() -> None:
    assert chart().rows == (("0", "20.00", ""), ("50", "21.00", ""), ("100", "22.00", "21.50"))
    lines = (Line("a", 1, ((1500, 0.02346),)),)
    assert chart(lines=lines, digits=4).rows == (("1,500", "0.0235"),)


def test_a_single_point_is_visible() -> None:
    svg = chart_svg(chart(lines=(Line("a", 2, ((5.0, 1.0),)),), levels=()), "c")
    assert re.search(r"<use [^>]*var\(--series-2\)", svg)


def test_a_written_page_replaces_the_old_one_whole(tmp_path: Path) -> None:
    file = tmp_path / "report" / "index.html"
    write_page(file, page("first"))
    write_page(file, page("second"))
    assert file.read_text(encoding="utf-8") == render(page("second"))
    with pytest.raises(AssertionError):
        write_page(
            file, Page("t", "k", "l", (Section("", (Charts((chart(lines=(Line("a", SERIES, ((0, 1.0),)),)),)),)),))
        )
    assert file.read_text(encoding="utf-8") == render(page("second"))
    assert [entry.name for entry in file.parent.iterdir()] == ["index.html"]


@needs_chromium
@pytest.mark.parametrize("name", ["short words that wrap", "one_word_of_a_file_or_a_run_that_is_wider_than_a_phone_is"])
def test_a_page_fits_a_phone(name: str, tmp_path: Path) -> None:
    made = page(name)
    lines = (Line(name, 1, ((0, 20.0), (50, 21.0))),)
    charts = Section(name, (Charts((chart(title=name, lines=lines, levels=(), note=name),)),))
    assert sideways(render(replace(made, sections=(*made.sections, charts))), tmp_path) == 0


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(AssertionError):
        Table("t", ("a", "b"), (Row(("only one",)),))


def test_a_file_travels_inside_the_page() -> None:
    content = bytes(range(256)) * 9
    block = Download("Weights <of> it", "a.safetensors", content)
    parsed = Strict(render(Page("t", "k", "l", (Section("", (block,)),))))
    [link] = [attributes for tag, attributes in parsed.elements if tag == "a"]
    assert link["download"] == "a.safetensors"
    head, _, packed = str(link["href"]).partition("base64,")
    assert head == "data:application/octet-stream;"
    assert base64.b64decode(packed) == content
    assert "2 kB" in " ".join(parsed.text)


@pytest.mark.parametrize(("pictures", "columns"), [(1, 1), (7, 7), (8, 4), (10, 5), (15, 5), (0, 0)])
def test_no_line_of_pictures_has_one_alone(pictures: int, columns: int) -> None:
    """At most seven side by side, in as few lines as that takes, and as many in each as can be."""
    crop = Crop("a", np.zeros((4, 4, 3), np.uint8), "", "a")
    assert View("v", None, (crop,) * pictures).columns == columns
