"""`linearize`: what it judges, keeps and undoes, and that it goes on wherever it was killed."""

import json
import os

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy

from keras_darkformer import linearize
from keras_darkformer.linearizing import pipeline
from keras_darkformer.linearizing.budget import Budget
from keras_darkformer.linearizing.texts import Decoder

from .models import VOCABULARY, forward, gemma, task_of, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting"),
    pytest.mark.usefixtures("few_steps"),
]

ROWS = np.random.default_rng(0).integers(4, VOCABULARY, (24, 14)).astype("int32")
DATA = {"token_ids": ROWS, "padding_mask": np.ones_like(ROWS)}
# Two steps to transfer, six to distil.
OPTIONS = {
    "length": 14,
    "tokens": 8 * 4 * 14,
    "batch_size": 4,
    "num_features": 8,
    "sliding_window": 3,
    "num_sinks": 1,
    "verbose": False,
}
STAGES = ["converted", "calibrated", "transferred", "distilled"]


def one_layer():
    return gemma(num_layers=1)


class KilledError(Exception):
    """Instead of a signal."""


@pytest.fixture(scope="module")
def seen():
    """The model's class at the end of each stage of `undisturbed`."""
    return {}


@pytest.fixture(scope="module")
def undisturbed(seen):
    def see(name, model):
        seen[name] = type(model).__name__

    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_forward_seconds", lambda _: 1.0)
        return linearize(one_layer(), DATA, on_stage_end=see, **OPTIONS)


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_figures(model, source, held_out):
    """In float64, from logits; lookups end with a token that stood in the first third."""
    text = held_out["token_ids"]
    kind = Decoder(14)
    kind.look(source, held_out)  # which tokens come again
    lookups, first = kind.judged["lookups"]
    assert first == 13
    for row in lookups:
        assert any((row[-2:] == row[i : i + 2]).all() for i in range(4))
        assert (row[:-2] == text[:, :-2]).all(axis=1).any()
    found, distance = {}, []
    for name, (rows, first) in {"text": (text, 1), "lookups": (lookups, 13)}.items():
        batch = {"token_ids": rows, "padding_mask": np.ones_like(rows)}
        ours, theirs = (
            log_softmax(to_numpy(forward(x)(batch)).astype("float64"))[:, first - 1 : -1]
            for x in (model, source)
        )
        found[name] = -np.take_along_axis(ours, rows[:, first:, None], axis=-1).mean()
        distance.append((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean())
    return found | {"divergence": np.mean(distance)}


def test_figures_are_what_float64_says(undisturbed):
    model, report = undisturbed
    held_out = {name: x[-2:] for name, x in DATA.items()}
    source = one_layer()
    found = {name: report["exact"][name] for name in report.figures()}
    assert found == pytest.approx(expected_figures(source, source, held_out), rel=1e-3, abs=1e-5)
    last = [stage for stage in report["stages"] if stage["kept"]][-1]
    expected = expected_figures(model, source, held_out)
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=2e-3)


def test_every_stage_is_told(undisturbed, seen):
    model, report = undisturbed
    assert seen == {"exact": "GemmaCausalLM"} | dict.fromkeys(STAGES, "DarkGemmaCausalLM")
    assert [stage["name"] for stage in report["stages"]] == STAGES
    assert [stage["tokens"] for stage in report["stages"]] == [0, 22 * 14, 2 * 56, 6 * 56]
    assert report["data"]["held_out_tokens"] == 2 * 14
    assert (report["layers"], report["exact_layers"]) == (1, [])
    assert model.linearization == dict(report)
    json.dumps(dict(report))
    assert "distilled" in str(report)
    assert len(report.plot().axes) == 3


@on_one_backend
@pytest.mark.parametrize("length", [4, 9, 14, 128])
def test_decoders_learn_from_rows_with_something_to_look_up(length, rng):
    rows = np.arange(6 * length, dtype="int32").reshape(6, length)  # no token twice
    found = Decoder(length).to_learn({"token_ids": rows}, rng)
    assert found["padding_mask"].all()
    assert (rows == np.arange(6 * length).reshape(6, length)).all()
    sizes = set()
    for row, text in zip(found["token_ids"], rows, strict=True):
        (changed,) = (row != text).nonzero()
        size = len(changed)
        sizes.add(size)
        if size:
            (start,) = (text == row[changed[0]]).nonzero()[0]
            assert start + size <= changed[0]
            assert (row[changed] == text[start : start + size]).all()
            assert (changed == changed[0] + np.arange(size)).all()
    assert sizes == {0} if length < 9 else 4 <= min(sizes) <= max(sizes) <= max(4, length // 4)
    assert len(sizes) > 1 or length < 128


@on_one_backend
def test_distillation_is_validated_on_text_and_lookups():
    source, kind = one_layer(), Decoder(14)
    kind.look(source, {name: x[:5] for name, x in DATA.items()})
    rows, targets = kind.known(3)
    expected = [kind.judged["text"][0][0], kind.judged["lookups"][0][0], kind.judged["text"][0][1]]
    assert [x["token_ids"][0].tolist() for x in rows] == [x.tolist() for x in expected]
    for row, noted in zip(rows, targets, strict=True):
        exact = log_softmax(to_numpy(forward(source)(row)).astype("float64")).max(axis=-1)
        np.testing.assert_allclose(noted.log_probs.max(axis=-1), exact, rtol=1e-3, atol=1e-4)


@on_one_backend
def test_a_stage_that_makes_it_worse_is_undone(monkeypatch):
    def spoil(self):
        for variable in self.maps:
            variable.assign(3.0 * np.ones(variable.shape))
        return 1

    monkeypatch.setattr(pipeline.Pipeline, "calibrate", spoil)
    monkeypatch.setattr(pipeline.Pipeline, "transfer", lambda self: 0)
    monkeypatch.setattr(pipeline.Pipeline, "distil", lambda self, train: 0)
    model, report = linearize(one_layer(), DATA, **OPTIONS)
    assert [stage["kept"] for stage in report["stages"]] == [True, False, True, True]
    (feature_map,) = [x.feature_map for x in model.backbone.dark_layers.values()]
    assert not (to_numpy(feature_map.projection.value) == 3.0).all()
    assert "undone" in str(report)


@on_one_backend
def test_it_goes_on_from_wherever_it_was_killed(undisturbed, tmp_path, monkeypatch):
    """Killed again and again, whenever it has written something."""
    monkeypatch.setattr(pipeline.Pipeline, "_forward_seconds", lambda _: 1.0)
    replace, left, loses = os.replace, 0, False

    def killed(source, target):
        nonlocal left
        left -= 1
        if left or not loses:
            replace(source, target)
        if not left:
            raise KilledError

    monkeypatch.setattr(os, "replace", killed)
    deaths = 0
    while True:
        # Before the second thing is written, or when it is.
        left, loses = 2, deaths % 3 == 0
        try:
            found = linearize(one_layer(), DATA, work_dir=tmp_path, **OPTIONS)
            break
        except KilledError:
            deaths += 1
            assert deaths < 60  # it gets nowhere
    assert deaths > 6
    for path, value in values(undisturbed.model).items():
        np.testing.assert_allclose(
            values(found.model)[path], value, rtol=1e-5, atol=1e-6, err_msg=path
        )
    for ours, theirs in zip(found.report["stages"], undisturbed.report["stages"], strict=True):
        numbers = [{**x, "name": STAGES.index(x["name"]), "seconds": 0} for x in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        *(f"{x['name']}.npz" for x in found.report["stages"][1:] if x["kept"]),
    }


@on_one_backend
def test_another_run_and_damaged_ones_are_refused(tmp_path):
    options = {**OPTIONS, "work_dir": tmp_path}
    linearize(one_layer(), DATA, **options)
    model = one_layer()
    with pytest.raises(ValueError, match=r"holds another run\. batch_size: 4 there, 2 here"):
        linearize(model, DATA, **{**options, "batch_size": 2})
    with pytest.raises(ValueError, match=r"holds another run\. training: "):
        linearize(model, {name: x[::-1] for name, x in DATA.items()}, **options)
    assert type(model).__name__ == "GemmaCausalLM"
    (tmp_path / "calibrated.npz").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"calibrated\.npz.* is damaged"):
        linearize(one_layer(), DATA, **options)
    (tmp_path / "run.json").write_text('{"plan"')
    with pytest.raises(ValueError, match=r"run\.json.* is damaged"):
        linearize(model, DATA, **options)


@on_one_backend
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 0}, "length"),
        ({"keep_exact": -1}, "keep_exact"),
        ({"keep_exact": 1, "layers": [0]}, "keep_exact"),
        ({"minutes": 0.0, "tokens": None}, "minutes"),
        ({"minutes": 3.0}, "`tokens` or `minutes`"),
        ({"tokens": 0}, "tokens"),
        ({"length": 15}, "length=15"),
        ({"sliding_window": 13}, "`length` must be more than the 14 tokens"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(wrong, message):
    model = one_layer()
    with pytest.raises(ValueError, match=message):
        linearize(model, DATA, **{**OPTIONS, **wrong})
    assert type(model).__name__ == "GemmaCausalLM"


@on_one_backend
def test_layers_are_chosen_and_features_may_be_off(tmp_path):
    options = {**OPTIONS, "keep_exact": 1, "feature_map": "none", "work_dir": tmp_path}
    found = linearize(gemma(num_layers=2), DATA, **options)
    assert [stage["name"] for stage in found.report["stages"]] == ["converted", "distilled"]
    assert len(found.report["exact_layers"]) == 1
    again = linearize(gemma(num_layers=2), DATA, **options)
    assert again.report["exact_layers"] == found.report["exact_layers"]


@on_one_backend
def test_an_encoder_is_judged_by_its_embeddings():
    rows = np.random.default_rng(1).integers(4, VOCABULARY, (12, 14)).astype("int32")
    mask = (np.arange(14) < np.arange(3, 15)[:, None]).astype("int32")
    data = {"token_ids": rows, "padding_mask": mask, "segment_ids": np.zeros_like(rows)}
    options = {"length": 14, "tokens": 2 * 56, "batch_size": 4, "num_features": 16}
    model = task_of("Bert", num_layers=1).backbone
    before = to_numpy(model(dict(data), training=False)["sequence_output"])[-1:]
    found = linearize(model, data, verbose=False, **options)
    assert [stage["name"] for stage in found.report["stages"]] == STAGES[:-1]
    after = to_numpy(found.model(dict(data), training=False)["sequence_output"])[-1:]
    pooled = [(x * mask[-1:, :, None]).sum(axis=1)[0].astype("float64") for x in (before, after)]
    cosine = pooled[0] @ pooled[1] / np.prod([np.linalg.norm(x) for x in pooled])
    last = [stage for stage in found.report["stages"] if stage["kept"]][-1]
    assert last["cosine"] == pytest.approx(cosine, abs=1e-4)


@on_one_backend
def test_texts_are_put_together_and_cut_into_rows(preprocessor, texts):
    model = gemma(preprocessor=preprocessor)
    rows = Decoder(10).rows(model, texts[:20])["token_ids"]
    tokenizer = preprocessor.tokenizer
    assert (rows[:, 0] == tokenizer.start_token_id).all()
    whole = np.concatenate([to_numpy(tokenizer(text)) for text in texts[:20]])
    np.testing.assert_array_equal(rows[:, 1:].ravel(), whole[: rows[:, 1:].size])
    assert len(whole) - rows[:, 1:].size < 9


@on_one_backend
def test_minutes_become_tokens_by_the_time_of_one_row(monkeypatch):
    clock, looks = [0.0], []

    def slow(model, rows):
        looks.append(rows["token_ids"].shape)
        clock[0] += 14.0  # a second a token
        return np.zeros(1)

    monkeypatch.setattr(pipeline, "look", slow)
    monkeypatch.setattr(pipeline.time, "time", lambda: clock[0])
    # A quarter of 56 minutes, 3 s a token, rows of 14: 20 steps of one row; three of 6 s: 30.
    options = {**OPTIONS, "tokens": None, "minutes": 56.0, "batch_size": 1}
    report = linearize(one_layer(), DATA, **options).report
    assert looks == [(1, 14)] * 2
    assert [stage["tokens"] // 14 for stage in report["stages"][2:]] == [20, 30]


def test_a_budget_is_shared_out():
    assert Budget(10_000, None).steps(0.25, 1.0, 100) == 25
    assert Budget(10, None).steps(0.25, 1.0, 100) == 1
    timed = Budget(None, 10.0)
    assert timed.steps(0.25, 0.01, 100) == 150
    timed.spend(300.0)
    assert timed.steps(0.75, 0.01, 100) == 300  # no more than is left
    assert "5 minutes left" in timed.told()
