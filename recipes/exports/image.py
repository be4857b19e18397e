"""Export an encoder of images to the runtimes that recipes/benchmark_encoder.py measures beside ours.

    python recipes/exports/image.py TEACHER SIZE FOLDER

SIZE is the side of an image in pixels. FOLDER then holds int8.onnx, int8-fused.onnx and int8.xml (OpenVINO).
"""

import subprocess
import sys
from pathlib import Path

import nncf
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoImageProcessor, AutoModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from photographs import photograph


def main() -> None:
    teacher, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir()
    plain, fused = folder / "model.onnx", folder / "fused.onnx"
    model = AutoModel.from_pretrained(teacher, attn_implementation="eager", return_dict=False).eval()
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    with torch.no_grad():  # the position table is resized once, not for every image
        tokens = torch.zeros(1, (size // model.config.patch_size) ** 2 + 1, width)
        table = model.embeddings.interpolate_pos_encoding(tokens, size, size)
    model.embeddings.interpolate_pos_encoding = lambda *_: table
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size),),
        plain,
        input_names=["pixel_values"],
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_axes={"pixel_values": {0: "batch"}},
        dynamo=False,
    )
    processor = AutoImageProcessor.from_pretrained(teacher, size=size, crop_size=size)
    pixels = [processor(photograph(10_000 + i), return_tensors="np")["pixel_values"] for i in range(40)]
    calibration = nncf.Dataset(pixels, lambda image: {"pixel_values": image})
    quantized = nncf.quantize(openvino.convert_model(plain), calibration, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "int8.xml")
    optimizer = [sys.executable, "-m", "onnxruntime.transformers.optimizer", "--model_type", "vit", "--opt_level", "1"]
    sizes = ["--num_heads", str(heads), "--hidden_size", str(width)]
    subprocess.run([*optimizer, *sizes, "--input", plain, "--output", fused], check=True)
    for source, name in (plain, "int8.onnx"), (fused, "int8-fused.onnx"):
        layers = ["MatMul", "Gemm", "Attention"]  # of the patches' convolution ONNX Runtime has no fast int8 kernel
        options = {"DefaultTensorType": 1}
        quantize_dynamic(source, folder / name, layers, weight_type=QuantType.QInt8, per_channel=True, extra_options=options)


if __name__ == "__main__":
    main()
