"""Export an encoder of texts to the runtimes that recipes/benchmark_encoder.py measures beside ours.

    python recipes/exports/text.py TEACHER FOLDER

FOLDER then holds int8.onnx, int8-fused.onnx, int8.xml (OpenVINO), int8 (CTranslate2) and st, the float32 model with both
ONNX files where sentence-transformers looks for them.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import nncf
import openvino
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    teacher, folder = sys.argv[1], Path(sys.argv[2])
    model, fused = folder / "onnx" / "model.onnx", folder / "fused.onnx"
    exporter = ["optimum-cli", "export", "onnx", "--task", "feature-extraction", "--library-name", "transformers"]
    run(*exporter, "--model", teacher, model.parent)
    optimizer = [sys.executable, "-m", "onnxruntime.transformers.optimizer", "--model_type", "bert", "--opt_level", "1"]
    run(*optimizer, "--input", model, "--output", fused)
    SentenceTransformer(teacher, device="cpu").save(str(folder / "st"))
    (folder / "st" / "onnx").mkdir()
    for source, name in (model, "int8.onnx"), (fused, "int8-fused.onnx"):
        options = {"DefaultTensorType": 1}
        quantize_dynamic(source, folder / name, weight_type=QuantType.QInt8, per_channel=True, extra_options=options)
        shutil.copy(folder / name, folder / "st" / "onnx")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [line for topic in topics.values() for line in topic.splitlines() if len(line) > 60][:300]
    calibration = nncf.Dataset(texts, lambda text: dict(tokenizer(text, return_tensors="np")))
    quantized = nncf.quantize(openvino.convert_model(model), calibration, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "int8.xml")
    # Last, as it does not know MPNet.
    run("ct2-transformers-converter", "--model", teacher, "--quantization", "int8", "--output_dir", folder / "int8")


if __name__ == "__main__":
    main()
