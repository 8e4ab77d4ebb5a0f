"""The report: one self-contained page whose numbers and pictures are those it was given."""

import base64
import io
import math
import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_apt.demo.content import FLOOR, Report, Row, Section
from megatron_apt.demo.machine import Machine, _processor, described, this_machine
from megatron_apt.demo.report import render, write_report
from megatron_apt.demo.strip import strip
from megatron_apt.sample.media import GAP
from support.page import Page

PROMPTS = ("a handwritten one", "a handwritten one", "a handwritten <two>")
MACHINE = Machine(
    processor="A processor",
    cores=2,
    accelerator="",
    system="Linux x86_64",
    versions={"Python": "3.11", "torch": "2.13"},
    date="2026-01-31",
)


def rows(stage_length=40):
    return [
        {
            "iteration": i + 1,
            "d/loss": 1.3 - 0.01 * i,
            "g/loss": 0.7,
            "d/logit_real": 0.1,
            "d/logit_fake": -0.1,
            "d/logit_gap": 0.2,
            "d/ar1": 1e-3,
            "d/accuracy": 0.6,
        }
        for i in range(stage_length)
    ]


def full_report() -> Report:
    generator = torch.Generator().manual_seed(0)
    grids = {
        name: torch.rand(3, 3, 1, 8, 8, generator=generator) * 2 - 1
        for name in ("real", "diffusion 25 steps", "consistency 1 step", "APT 1 step")
    }
    clips = {"real": torch.rand(3, 3, 5, 8, 16, generator=generator) * 2 - 1}
    table = (
        Row(FLOOR, 0.2871, 0.9749, 0.755, math.nan, math.nan),
        Row("consistency 1 step", 2.5, 0.871, 0.61, 1, 0.00125),
        Row("APT 1 step", 0.5, 0.982, 0.74, 1, 1.5),
    )
    images = Section(
        "images",
        PROMPTS,
        grids,
        table=table,
        curves={"diffusion": [{"iteration": 1, "loss": 1.5}, {"iteration": 2, "loss": 1.0}], "APT": rows()},
        ablation=rows(),
    )
    videos = Section("videos", PROMPTS, clips, fps=4.0)
    return Report(
        "A <title>",
        (images, videos),
        {"images/flow": 75.0, "images/apt": 3.5},
        '{"lr": "<1e-4>"}',
        ("A note & more.",),
        ("videos/flow",),
    )


def test_the_page_is_self_contained_and_well_formed():
    page = Page(render(full_report()))
    assert page.open == []
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert "@import" not in render(full_report()) and "url(http" not in render(full_report())


def test_every_number_of_the_table_is_on_the_page():
    text = Page(render(full_report())).text
    for number in (
        "0.287",
        "0.975",
        "0.755",
        "2.500",
        "0.871",
        "0.610",
        "0.500",
        "0.982",
        "0.740",
        "1.25 ms",
        "1.50 s",
        "1 min 15 s",
    ):
        assert number in text, number
    assert "0.20 ×" in text  # APT against consistency
    assert "–" in text  # what is not measured
    for part in (
        "A <title>",
        "a handwritten <two>",
        '{"lr": "<1e-4>"}',
        "A note & more.",
        "videos/flow",
        FLOOR,
    ):
        assert part in text, part
    assert "0.925 with aR1" in text  # the median of 1.3 - 0.01 i over the last four of 40 updates


def test_every_picture_is_the_sample_it_stands_for():
    report = full_report()
    page = Page(render(report))
    images = [image for image in page.images if "width" in image]  # without the strip
    assert len(images) == 3 * 4 + 3 and len(page.images) == len(images) + 1
    for attributes in images:
        kind, data = attributes["src"].removeprefix("data:image/").split(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format.lower() == kind
        assert getattr(picture, "n_frames", 1) == (5 if kind == "gif" else 1)
        assert picture.size[0] % (16 if kind == "gif" else 8) == 0
        assert int(attributes["width"]) == picture.size[0]
    first = images[0]
    stored = (
        Image.open(io.BytesIO(base64.b64decode(first["src"].split("base64,")[1])))
        .convert("RGB")
        .resize((8, 8), Image.Resampling.NEAREST)
    )
    want = ((report.sections[0].grids["real"][0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    got = torch.frombuffer(bytearray(stored.tobytes()), dtype=torch.uint8).view(8, 8, 3)
    assert torch.equal(got, want)


def test_a_report_of_nothing_yet_says_what_is_to_come(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, Report("Begun", (), {}, "", (), ("images/encode", "images/flow")))
    page = Page(path.read_text(encoding="utf-8"))
    assert "images/encode" in page.text and "still to come" in page.text
    write_report(path, full_report())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_grid_that_does_not_fit_its_prompts_is_refused():
    with pytest.raises(ValueError, match=r"grid 'real' of images is \(2, 3, 1, 8, 8\)"):
        Section("images", PROMPTS, {"real": torch.zeros(2, 3, 1, 8, 8)})


def test_pictures_come_first_then_quality_then_curves_and_times_last():
    text = Page(render(replace(full_report(), machine=MACHINE))).text
    order = ("Images", "Videos", "Quality and cost", "Training", "How it works", "Notes", "This run")
    places = [text.index(f"\n{heading}") for heading in order]
    assert places == sorted(places)
    run = text[places[-1] :]
    assert "A processor, 2 cores · Linux x86_64 · Python 3.11 · torch 2.13 · 2026-01-31" in run
    assert run.index("A processor") < run.index("1 min 15 s") < run.index('{"lr"')


def test_a_trial_says_so_instead_of_what_its_figures_would_show():
    whole, trial = (Page(render(replace(full_report(), trial=trial))).text for trial in (False, True))
    assert (
        "Trial run." in trial and "expected to look unfinished" in trial and "What to look for" not in trial
    )
    assert "Trial run." not in whole and "What to look for" in whole


def test_nothing_is_wider_than_a_narrow_screen():
    style = files("megatron_apt.demo").joinpath("report.html.template").read_text(encoding="utf-8")
    assert not [width for width in re.findall(r"min-width: (\d+)px", style) if int(width) > 380]
    assert not re.findall(r"[ {;]width: \d+px", style.replace("width: 14px", ""))
    page = render(full_report())
    assert page.count("<table") == page.count('<div class="scroll"><table')


def test_the_strip_has_a_panel_for_each_method_that_is_there():
    section = full_report().sections[0]
    assert strip(replace(section, grids={"real": section.grids["real"]})) is None
    data, kind = strip(section)
    picture = np.asarray(Image.open(io.BytesIO(data)))
    # Three samples of (1 + 8 + 1) pixels, five times as large; white between them and the panels.
    panel = 3 * 50 + 2 * GAP
    assert kind == "png" and picture.shape == (44 + 50, 4 * panel + 3 * 20, 3)
    for number, name in enumerate(("real", "diffusion 25 steps", "consistency 1 step", "APT 1 step")):
        found = picture[44 + 5 + 2 :: 5, number * (panel + 20) + 5 + 2 :: 5][:8, :8]
        want = ((section.grids[name][0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0)
        assert np.array_equal(found, want.numpy()), name
    assert strip(section) == (data, "png") and strip(section, trial=True)[0] != data


def test_the_strip_of_clips_moves():
    clips = {name: torch.zeros(3, 3, 5, 8, 16) for name in ("real", "diffusion 25 steps")}
    clips["real"][:, :, 3] = 1
    data, kind = strip(Section("videos", PROMPTS, clips, fps=4.0))
    assert kind == "gif" and Image.open(io.BytesIO(data)).n_frames == 3  # equal ones are one


def test_a_processor_is_named_as_the_system_lists_it(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : AMD X 5\nprocessor : 1\n")
    assert _processor(tmp_path / "cpuinfo") == "AMD X 5"
    assert _processor(tmp_path / "nothing") != ""
    assert described(this_machine()).count("megatron-core") == 1
