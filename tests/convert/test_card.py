"""A model card names the shape that a generator was trained on, and calls the pipeline with it."""

import json

import pytest

from megatron_apt.checkpoint.store import CheckpointError
from megatron_apt.convert.card import _datasets, _shape_arguments

CLIPS = {"frames": 49, "height": 480, "width": 832, "fps": 16.0, "stride": 1}
PICTURES = {"frames": 1, "height": 64, "width": 32, "fps": 0.0, "stride": 1}


def state(*datasets: tuple[str, dict | None], text_length: int = 512) -> dict:
    """What a checkpoint says of the datasets of its run, by folder and recorded shape."""
    records = [
        {"path": folder, "samples": 3, "digest": "0"} | ({"shape": shape} if shape else {})
        for folder, shape in datasets
    ]
    shards = [folder for folder, _ in datasets]
    return {"config": {"data": {"shards": shards, "text_length": text_length}}, "data": records}


def test_the_call_and_the_words_are_of_the_recorded_shape():
    trained = state(("far/clips", CLIPS), ("far/pictures", PICTURES))
    assert _shape_arguments(trained, "text-to-video") == ", num_frames=49, height=480, width=832"
    assert _datasets(trained) == [
        "- `clips`: clips of 49 frames at 16 a second, 480 pixels high, 832 wide",
        "- `pictures`: pictures, 64 pixels high, 32 wide",
        "- prompts padded or cut to 512 tokens",
    ]


def test_models_of_pictures_are_asked_for_no_frames():
    assert _shape_arguments(state(("a", PICTURES)), "text-to-image") == ", height=64, width=32"


@pytest.mark.parametrize(("stride", "taken"), [(1, "all of their"), (3, "one in 3 of their")])
def test_sources_own_frames_are_said_to_be_taken(stride, taken):
    (line, prompts) = _datasets(state(("a", CLIPS | {"fps": 0.0, "stride": stride}), text_length=0))
    assert line == f"- `a`: clips of 49 frames ({taken} sources' frames), 480 pixels high, 832 wide"
    assert prompts == "- prompts of their own length, without padding"


@pytest.mark.parametrize("records", ["none", "without shape"])
def test_an_older_checkpoint_is_helped_by_its_dataset_where_that_is_found(tmp_path, records):
    info = {"format": 1, "samples": 3, "rejected": 0, "codec": {}, "text_encoder": {}, "conditions": "c"}
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"settings": CLIPS | {"codec": "wan"}}))
    trained = state((str(tmp_path), None), ("gone", None))
    if records == "none":
        del trained["data"]
    assert _shape_arguments(trained, "text-to-video") == ", num_frames=49, height=480, width=832"
    assert _datasets(trained)[1] == "- `gone`"
    assert _shape_arguments(state(("gone", None)), "text-to-video") == ""


@pytest.mark.parametrize("shape", [{"frames": 0, "height": 1, "width": 1}, {"frames": 1}, "5x8x8"])
def test_a_damaged_record_is_named(shape):
    with pytest.raises(CheckpointError, match=r"state\.json: data: .*shape.*older checkpoint"):
        _datasets(state(("a", shape)))
