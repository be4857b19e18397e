"""One way to embed texts or images on a CPU, in a process of its own: what benchmark_encoder.py starts for each contender.

    python recipes/runtimes.py RUNTIME MODEL FOLDER MAX_LENGTH THREADS

RUNTIME is one of the functions below and MODEL what it loads; FOLDER holds tokenizer.json, or is empty where MODEL reads
images. Requests and answers are pickles on stdin and stdout: (calls, batch size), a call being a list of texts or an array
of pixels, is answered by (seconds of each call, float32 embeddings [all inputs, dimension], peak memory of the process in
bytes). Nothing is imported that the runtime does not need.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Encode = Callable[[Any, int], Any]  # inputs and batch size -> float32 [inputs, dimension], unit length
Run = Callable[[dict[str, Any]], Any]  # arrays by the names that transformers gives them -> hidden states, float32


def ternary(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import hf_ternary

    encoder = hf_ternary.load(model, threads=threads)
    return lambda texts, batch_size: encoder.encode(texts)


def sentence_transformers(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    encoder = SentenceTransformer(model, device="cpu")
    encoder.max_seq_length = max_length
    return lambda texts, batch_size: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)


def sentence_transformers_onnx(model: str, folder: str, max_length: int, threads: int) -> Encode:
    """``model`` is FOLDER/onnx/FILE of a folder that sentence-transformers loads."""
    import torch
    from onnxruntime import SessionOptions
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    options = SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    file = Path(model)
    keywords = {"provider": "CPUExecutionProvider", "file_name": file.name, "session_options": options}
    encoder = SentenceTransformer(str(file.parents[1]), device="cpu", backend="onnx", model_kwargs=keywords)
    encoder.max_seq_length = max_length
    return lambda texts, batch_size: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)


def transformers(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    encoder = AutoModel.from_pretrained(model).eval()

    @torch.inference_mode()
    def run(arrays: dict[str, Any]) -> Any:
        return encoder(**{name: torch.from_numpy(array) for name, array in arrays.items()}).last_hidden_state.numpy()

    return batched(folder, max_length, run)


def onnxruntime(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    return batched(folder, max_length, lambda arrays: session.run(None, known(names, arrays))[0])


def openvino(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    names = {name for node in compiled.inputs for name in node.get_names()}

    def run(arrays: dict[str, Any]) -> Any:
        outputs = request.infer(known(names, arrays), share_inputs=True, share_outputs=True)
        return next(iter(outputs.values()))

    return batched(folder, max_length, run)


def ctranslate2(model: str, folder: str, max_length: int, threads: int) -> Encode:
    import ctranslate2
    import numpy as np

    encoder = ctranslate2.Encoder(model, compute_type="int8", inter_threads=1, intra_threads=threads)

    def run(arrays: dict[str, Any]) -> Any:
        lengths = arrays["attention_mask"].sum(1)
        tokens = [row[:length].tolist() for row, length in zip(arrays["input_ids"], lengths, strict=True)]
        return np.asarray(encoder.forward_batch(tokens).last_hidden_state)

    return batched(folder, max_length, run)


def tokenizer(model: str, folder: str, max_length: int, threads: int) -> Encode:
    """No embeddings: the share of the tokenizer, which is the same for all."""
    import numpy as np

    tokenize = load_tokenizer(folder, max_length)

    def encode(texts: list[str], batch_size: int) -> Any:
        tokenize(texts)
        return np.empty((len(texts), 0), np.float32)

    return encode


def load_tokenizer(folder: str, max_length: int) -> Callable[[list[str]], list[Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()
    # One text alone: encode() spares waking the tokenizer's threads.
    return lambda texts: [tokenizer.encode(texts[0])] if len(texts) == 1 else tokenizer.encode_batch_fast(texts)


def known(names: set[str], arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name in names}


def batched(folder: str, max_length: int, run: Run) -> Encode:
    """What is around the layers: batches, the tokenizer, pooling and normalization."""
    return batched_texts(folder, max_length, run) if folder else batched_images(run)


def batched_texts(folder: str, max_length: int, run: Run) -> Encode:
    """Tokenize, pad, pool by mean and normalize; batches are of texts of about one length."""
    import numpy as np

    tokenize = load_tokenizer(folder, max_length)

    def embed(texts: list[str]) -> Any:
        encodings = tokenize(texts)
        ids = np.array([e.ids for e in encodings], np.int64)
        mask = np.array([e.attention_mask for e in encodings], np.int64)
        hidden = run({"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids})
        pooled = np.einsum("bt,btn->bn", mask.astype(np.float32), hidden) / mask.sum(1, keepdims=True)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def encode(texts: list[str], batch_size: int) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        embeddings = np.concatenate([embed([texts[i] for i in batch]) for batch in batches])
        return embeddings[np.argsort(order)].astype(np.float32)

    return encode


def batched_images(run: Run) -> Encode:
    """The class token, normalized."""
    import numpy as np

    def encode(pixels: Any, batch_size: int) -> Any:
        batches = [pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)]
        tokens = np.concatenate([run({"pixel_values": batch})[:, 0] for batch in batches])
        return tokens / np.linalg.norm(tokens, axis=1, keepdims=True)

    return encode


RUNTIMES = {
    f.__name__: f
    for f in (
        ternary,
        sentence_transformers,
        sentence_transformers_onnx,
        transformers,
        onnxruntime,
        openvino,
        ctranslate2,
        tokenizer,
    )
}


def peak_memory() -> int | None:
    """Bytes that the process had in memory at most; None where the system does not say (other than Linux)."""
    status = Path("/proc/self/status")  # not getrusage: on Linux its peak is never below the parent's memory
    if not status.exists():
        return None
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(kilobytes)


def main() -> None:
    runtime, model, folder, max_length, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    os.environ |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    encode = RUNTIMES[runtime](model, folder, int(max_length), int(threads))
    import numpy as np

    while True:
        try:
            calls, batch_size = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        seconds, embeddings = [], []
        for inputs in calls:
            start = time.perf_counter()
            embeddings.append(encode(inputs, batch_size))
            seconds.append(time.perf_counter() - start)
        pickle.dump((seconds, np.concatenate(embeddings), peak_memory()), answers)
        answers.flush()


if __name__ == "__main__":
    main()
