"""Models for a phone: the file answers as its original does, says what it is, and is not written where it differs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import corpus_rows
from typer.testing import CliRunner

from factory import images, records
from factory.cli import app
from factory.fits.card import digest_of, write_card
from factory.fits.classifiers import load_classifier
from factory.models import export, int8
from factory.models.classifier import build_classifier
from factory.models.student import cost
from factory.release import phone
from factory.run import Run

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["melanoma", "nevus", "seborrheic_keratosis"]
STUDENT, VIT = "distill-mobilenetv3_small_050", "finetune-test_vit"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
with_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="needs onnx, onnxscript and onnxruntime"
)

with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def _put(run: Run, directory: Path, name: str, architecture: str, **options: Any) -> None:
    """Weights whose verdicts differ from image to image: those of a fresh network do not."""
    torch.manual_seed(0)
    model = build_classifier(architecture, 3, 32, **options)
    images = torch.from_numpy(_validation(run, False))
    with torch.no_grad():
        model.train()
        for _ in range(20):
            model(images)  # the averages of batch norms
        model.eval()
        head = model.model.get_classifier()
        scale = 1.0 / model(images).std(0).mean()
        head.weight.mul_(scale)
        head.bias.mul_(scale).sub_(model(images).mean(0))
    directory.mkdir()
    save_file(model.model.state_dict(), directory / "model.safetensors")
    fields = {"architecture": architecture, "classes": CLASSES, "licence": "CC0", "num_real": 8, "num_synthetic": 0}
    inputs = {"inputs": {"tables": {"corpus": run.table("corpus").digest()}}}
    write_card(directory, cost(model, 32), fields | inputs)
    run.put_weights(name, directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    found = Run(str(tmp_path_factory.mktemp("run")))
    found.table("corpus").commit(0, records.rows_to_table("corpus", corpus_rows(32, 48)))
    found.table("corpus").seal(1, {"of": "test"}, {})
    folder = tmp_path_factory.mktemp("weights")
    _put(found, folder / "student", STUDENT, "mobilenetv3_small_050")
    _put(found, folder / "vit", VIT, "test_vit", patch_size=8)
    return found


def _validation(run: Run, uint8: bool) -> np.ndarray:
    corpus = run.table("corpus").read(["image", "split", "outcome"])
    return np.asarray(export.as_input(phone._pixels(phone._validation_rows(corpus), 32, 99), uint8))


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student as ONNX by the command, and the ViT in ONNX with pixels in [0, 1]."""
    folder = tmp_path_factory.mktemp("files")
    done = CliRunner().invoke(app, ["export", "distill", "--run", run.uri, "--out", str(folder / "student.onnx")])
    assert done.exit_code == 0, done.output
    assert "100.0% same verdicts on 8 images" in done.output
    vit = phone.export_weights(run, VIT, "onnx", folder / "vit.onnx", uint8=False, echo=lambda line: None)
    return {STUDENT: folder / "student.onnx", VIT: vit}


@with_onnx
@pytest.mark.parametrize(("name", "uint8"), [(STUDENT, True), (VIT, False)])
def test_onnx_answers_as_its_original_at_any_batch_size(
    run: Run, exported: dict[str, Path], name: str, uint8: bool
) -> None:
    pixels = _validation(run, uint8)
    expected = export.original(load_classifier(run.weights_dir(name)), uint8)(pixels)
    for count in (1, 3, 8):
        np.testing.assert_allclose(export.opened(exported[name])(pixels[:count]), expected[:count], atol=1e-5)
    assert len(set(expected.argmax(1))) > 1  # the verdicts say something


@with_onnx
def test_the_graph_holds_the_normalisation_the_classes_and_the_digests(run: Run, exported: dict[str, Path]) -> None:
    import onnx

    graph = onnx.load(str(exported[STUDENT]))
    onnx.checker.check_model(graph, full_check=True)
    assert {one.domain: one.version for one in graph.opset_import}[""] == export.OPSET
    taken = graph.graph.input[0].type.tensor_type
    assert taken.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in taken.shape.dim] == ["batch", 32, 32, 3]
    known = {one.key: one.value for one in graph.metadata_props}
    assert json.loads(known["classes"]) == CLASSES
    assert known["weights_digest"] == digest_of(run.weights_dir(STUDENT) / "model.safetensors")
    assert json.loads(known["tables"]) == {"corpus": run.table("corpus").digest()}


def test_pt2_answers_as_its_original_and_carries_its_metadata(run: Run, tmp_path: Path) -> None:
    out = phone.export_weights(run, VIT, "pt2", tmp_path / "m.pt2", echo=lambda line: None)
    inside = {export.METADATA: ""}
    torch.export.load(out, extra_files=inside)
    assert json.loads(inside[export.METADATA])["classes"] == CLASSES
    pixels = _validation(run, True)
    expected = export.original(load_classifier(run.weights_dir(VIT)), True)(pixels)
    np.testing.assert_allclose(export.opened(out)(pixels[:5]), expected[:5], atol=1e-6)
    card = json.loads((tmp_path / "m.pt2.card.json").read_text())
    assert card["digest"] == digest_of(out) and card["checked"]["num_images"] == 8
    own, usual = card["cost"]
    assert (own["image_size"], usual["image_size"]) == (32, 224) and usual["flops"] > 40 * own["flops"]
    assert card["latency"]["p95_ms"] >= card["latency"]["median_ms"] > 0
    assert f"sha256 `{card['digest']}`" in (tmp_path / "m.pt2.md").read_text()


@with_onnx
def test_int8_of_a_vit_computes_its_linear_layers_in_eight_bits(
    run: Run, exported: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    small = phone.export_weights(run, VIT, "int8", tmp_path / "s.onnx", echo=lambda line: None)
    assert small.stat().st_size < 0.34 * exported[VIT].stat().st_size
    card = json.loads((tmp_path / "s.onnx.card.json").read_text())
    assert card["num_calibration"] == 16  # the training images
    assert 0 < card["checked"]["max_difference"] <= card["bound"]["max_difference"] == 0.15
    assert card["bound"]["min_agreement"] == 0.98
    linear = sum(isinstance(one, torch.nn.Linear) for one in load_classifier(run.weights_dir(VIT)).modules()) - 1
    assert card["layers"] == {"computed_in_int8": linear, "stored_in_int8": 1, "float32": 1}  # patches, head
    graph = onnx.load(str(small))
    made = {out: node.op_type for node in graph.graph.node for out in node.output}
    eight = [{made.get(name) for name in node.input} == {"DequantizeLinear"} for node in _products(graph)]
    assert eight.count(True) == linear and eight.count(False) > 0  # those of two activations, in attention
    assert json.loads({one.key: one.value for one in graph.metadata_props}["layers"]) == card["layers"]
    assert f"{linear} linear layers computed in eight bits" in (tmp_path / "s.onnx.md").read_text()


def _products(graph: Any) -> list[Any]:
    return [node for node in graph.graph.node if node.op_type == "MatMul"]


@with_onnx
def test_int8_of_a_cnn_only_stores_its_larger_weights_in_eight_bits(
    run: Run, exported: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    loose = export.Bound(0.05, 0.8)  # of eight verdicts of a random network one is close
    small = phone.export_weights(run, STUDENT, "int8", tmp_path / "s.onnx", echo=lambda line: None, bound=loose)
    card = json.loads((tmp_path / "s.onnx.card.json").read_text())
    weights = [
        one.weight.numel()
        for one in load_classifier(run.weights_dir(STUDENT)).modules()
        if isinstance(one, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    large = sum(count >= int8.SMALLEST for count in weights)
    assert card["layers"] == {
        "computed_in_int8": 0, "stored_in_int8": large, "float32": len(weights) - large,
    }  # fmt: skip
    assert 0 < large < len(weights)
    graph = onnx.load(str(small))
    assert not any("Quantize" in node.op_type for node in graph.graph.node)
    kept = [one for one in graph.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert len(kept) == large
    assert small.stat().st_size < 0.4 * exported[STUDENT].stat().st_size


def test_a_weight_is_rounded_by_its_largest_of_each_output_channel() -> None:
    weight = np.array([[1.27, -0.5], [0.0, 0.0], [0.02, 2.54]], np.float32)
    whole, scale = int8.rounded(weight, 0)
    assert whole.tolist() == [[127, -50], [0, 0], [1, 127]] and whole.dtype == np.int8
    np.testing.assert_allclose(scale, [[0.01], [1.0], [0.02]], rtol=1e-6)
    assert int8.rounded(weight, 1)[1].shape == (1, 2)


@with_onnx
def test_a_network_that_eight_bits_would_break_is_computed_in_float(run: Run, tmp_path: Path) -> None:
    model = load_classifier(run.weights_dir(VIT))
    with torch.no_grad():
        for block in model.model.blocks:  # one place a thousand times as large as the others, and as little heard
            block.norm2.weight[0] *= 1e4
            block.mlp.fc1.weight[:, 0] /= 1e4
    images = _validation(run, True)
    layers = export.export(model, "int8", tmp_path / "m.onnx", 32, {}, calibration=np.concatenate([images] * 4))[
        "layers"
    ]
    assert layers["computed_in_int8"] == 0 and layers["float32"] == 1
    found = export.compared(export.original(model, True), export.opened(tmp_path / "m.onnx"), images)
    assert found["max_difference"] < 0.05


@with_torchao
def test_int8_for_gpus_is_a_program_that_another_process_loads(run: Run, tmp_path: Path) -> None:
    out = phone.export_weights(run, VIT, "int8", tmp_path / "m.pt2", echo=lambda line: None)
    card = json.loads((tmp_path / "m.pt2.card.json").read_text())
    linear = sum(isinstance(one, torch.nn.Linear) for one in load_classifier(run.weights_dir(VIT)).modules()) - 1
    assert card["layers"] == {"computed_in_int8": linear, "stored_in_int8": 0, "float32": 2}
    assert card["num_calibration"] == 0 and card["opset"] is None
    assert 0 < card["checked"]["max_difference"] < card["bound"]["max_difference"]
    assert "tried on no GPU" in (tmp_path / "m.pt2.md").read_text()
    inside = {export.METADATA: ""}
    program = torch.export.load(out, extra_files=inside)
    assert json.loads(inside[export.METADATA])["layers"] == card["layers"]
    assert "aten._int_mm.default" in {str(node.target) for node in program.graph.nodes}
    pixels = _validation(run, True)[:3]
    np.save(tmp_path / "pixels.npy", pixels)
    script = (
        "import sys, numpy, torch; torch.set_num_threads(1);"
        "answer = torch.export.load(sys.argv[1]).module()(torch.from_numpy(numpy.load(sys.argv[2])));"
        "numpy.save(sys.argv[3], answer.detach().numpy())"
    )
    files = [str(out), str(tmp_path / "pixels.npy"), str(tmp_path / "answer.npy")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, capture_output=True)
    expected = export.original(load_classifier(run.weights_dir(VIT)), True)(pixels)
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), expected, atol=0.05)


@with_torchao
def test_int8_for_gpus_of_a_cnn_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have linear layers beside its head.*export int8 as \.onnx"):
        phone.export_weights(run, STUDENT, "int8", tmp_path / "m.pt2", echo=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@with_onnx
def test_an_export_that_differs_is_refused_with_the_figure_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    tight = export.Bound(1e-9, 1.0)
    with pytest.raises(export.ExportDiffers, match=r"within 1e-09 of the original's .* got a difference of 0\.\d+ and"):
        phone.export_weights(run, VIT, "int8", tmp_path / "m.onnx", echo=lambda line: None, bound=tight)
    assert list(tmp_path.iterdir()) == []


def test_another_model_and_one_without_numbers_are_told_from_the_original(run: Run) -> None:
    pixels, bound = _validation(run, True), export.BOUNDS["pt2"]
    student, vit = (export.original(load_classifier(run.weights_dir(name)), True) for name in (STUDENT, VIT))
    found = export.compared(student, vit, pixels)
    by_hand = np.abs(student(pixels) - vit(pixels)).max()
    assert found["max_difference"] == pytest.approx(float(by_hand))
    with pytest.raises(export.ExportDiffers, match="export onnx, or fit longer"):
        export.check(found, bound, "pt2")
    broken = export.compared(student, lambda given: np.full((len(given), 3), np.nan, np.float32), pixels)
    assert broken["max_difference"] == float("inf")
    export.check(export.compared(student, student, pixels), bound, "pt2")
    with pytest.raises(ValueError, match=r"must be checked on validation images, got none; raise corpus\.val_share"):
        export.check(export.compared(student, student, pixels[:0]), bound, "pt2")


@with_onnx
@pytest.mark.parametrize(("name", "uint8"), [(STUDENT, True), (VIT, False)])
def test_the_example_needs_neither_torch_nor_the_factory(
    run: Run, exported: dict[str, Path], tmp_path: Path, name: str, uint8: bool
) -> None:
    rows = phone._validation_rows(run.table("corpus").read(["image", "split", "outcome"]))
    picture = tmp_path / "lesion.png"
    picture.write_bytes(rows["image"][0].as_py()["bytes"])
    script = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['factory'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(ROOT / "examples" / "phone.py"), str(exported[name]), str(picture)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ), cwd=tmp_path)
    shares = {line.split()[1]: float(line.split("%")[0]) / 100 for line in told.stdout.splitlines()}
    image = Image.open(io.BytesIO(picture.read_bytes()))
    assert image.size == (48, 48)  # so it was reduced, by Pillow there and by the factory here
    expected = export.original(load_classifier(run.weights_dir(name)), uint8)(_validation(run, uint8)[:1])[0]
    assert [shares[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=0.05)


def test_what_cannot_be_exported_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out must end in \.pt2 for pt2, got m\.onnx"):
        phone.export_weights(run, STUDENT, "pt2", tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"--out must end in \.onnx or \.pt2 for int8, got m\.tflite"):
        phone.export_weights(run, STUDENT, "int8", tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="--format must be a known word, got 'onxx'; did you mean 'onnx'"):
        phone.export_weights(run, STUDENT, "onxx", tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="weights must be among those of .*got 'mae'"):
        phone.export_weights(run, "mae", "onnx", tmp_path / "m.onnx")
    encoder = tmp_path / "mae"
    encoder.mkdir()
    (encoder / "card.json").write_text(json.dumps({"objective": "mae", "image_size": 32}))
    run.put_weights("mae-test_vit", encoder)
    with pytest.raises(ValueError, match="an export must be of a classifier, got mae-test_vit"):
        phone.export_weights(run, "mae", "onnx", tmp_path / "m.onnx")


def test_missing_packages_and_calibration_are_said_before_anything_is_made() -> None:
    with pytest.raises(ValueError, match=r"must have onnx_of_2040 installed.*install dermafactory\[export\]"):
        export.needs("onnx_of_2040")


@with_onnx
def test_int8_without_training_images_is_refused(tmp_path: Path) -> None:
    model = build_classifier("mobilenetv3_small_050", 2, 32)
    with pytest.raises(ValueError, match="int8 must be calibrated on training images, got none"):
        export.export(model, "int8", tmp_path / "m.onnx", 32, {}, calibration=np.zeros((0, 32, 32, 3), np.uint8))


def test_the_example_shows_a_model_the_pixels_that_training_does(tmp_path: Path) -> None:
    import runpy

    upright = runpy.run_path(str(ROOT / "examples" / "phone.py"))["upright_rgb"]
    rng = np.random.default_rng(0)
    pixels, clear = rng.integers(0, 256, (40, 30, 3), np.uint8), rng.integers(0, 256, (40, 30), np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    pictures = {
        "plain.png": (Image.fromarray(pixels), {}), "turned.jpg": (Image.fromarray(pixels), {"exif": turned}),
        "clear.png": (Image.fromarray(np.dstack([pixels, clear])), {}), "grey.png": (Image.fromarray(clear), {}),
        "deep.png": (Image.fromarray(clear.astype(np.uint16) * 257), {}),
    }  # fmt: skip
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
        found = np.asarray(upright(Image.open(tmp_path / name))).astype(int)
        wanted = images.decode_rgb((tmp_path / name).read_bytes(), name).astype(int)
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1, name


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "efficientvit_m0", "mobilenetv3_small_050"])
def test_the_cost_of_any_student_is_counted_at_both_sizes(name: str) -> None:
    found = phone._costs(build_classifier(name, 3, 64), {"architecture": name, "classes": ["a", "b", "c"]}, 64)
    assert [one["image_size"] for one in found] == [64, 224] and found[0]["flops"] < found[1]["flops"]
