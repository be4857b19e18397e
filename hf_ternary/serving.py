"""``hf_ternary.load(path).encode(texts)``: embeddings from a packed model with neither torch nor transformers.

For servers and functions, where start-up and memory count: only numpy, safetensors, tokenizers and, for a model on the Hub,
huggingface_hub are imported. The folder is the one SentenceTransformer reads, and the embeddings are the same.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from .architectures import ARCHITECTURES, MODEL_TYPES, UnsupportedError, find_layout
from .files import RESAVE, model_folder, read_config, read_json
from .native_encoder import NativeEncoder
from .ops import backends
from .threads import cores

_POOLINGS = {"mean": "mean", "cls": "first"}
# Texts that are tokenized at once, and tokens that one native call encodes: Ctrl-C waits for no more.
_TEXTS, _TOKENS = 256, 4096


def load(
    model: str | Path,
    revision: str | None = None,
    threads: int | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> "Encoder":
    """Load a packed sentence-transformers model for inference on the CPU.

    Args:
        model: a folder, or a repository on the Hugging Face Hub.
        revision: branch, tag or commit of the repository.
        threads: that a call uses; default: ``HF_TERNARY_NUM_THREADS``, else ``OMP_NUM_THREADS``, and at most as many as this
            process, or its container, has CPUs.
        token, cache_dir, local_files_only: as in ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: there is no such model or revision, or it is not ternary, damaged, or of a kind that needs
            SentenceTransformer (the message says why); or ``HF_TERNARY_NUM_THREADS`` is no positive number.
        ImportError: the C++ kernels are not built or cannot be loaded.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return Encoder(model_folder(str(model), ["*.json", "*.safetensors"], revision, **options), threads)


class Encoder:
    """A packed embedding model; make one with :func:`load`. Calls from several threads at once are fine.

    Copying and unpickling read the folder again.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        if backends.native() is None or backends.choose().backend == "reference":
            raise ImportError(
                f"hf_ternary.load needs the C++ kernels ({backends.choose().reason}). Fix: {backends.REINSTALL}, or use "
                "SentenceTransformer"
            )
        self._folder = folder.absolute()
        self.threads = threads or cores()
        self._default_threads = None if threads else self.threads
        transformer, self._pooling, self._dense, self._normalize = _modules(folder)
        config = read_json(transformer / "config.json")
        self._native = _native_encoder(transformer, config)
        widths = [self._native.hidden, *(dense.dimension for dense in self._dense)]
        if widths[:-1] != [dense.inputs for dense in self._dense]:
            raise ValueError(f"{folder}: a Dense module reads another width than the module before it gives. {RESAVE}")
        self._tokenizer = _tokenizer(transformer, config, self._native.longest)
        options = read_json(folder / "config_sentence_transformers.json")
        # The first two are always there in sentence-transformers.
        self.prompts: dict[str, str] = {"query": "", "document": "", **(options.get("prompts") or {})}
        self.default_prompt_name: str | None = options.get("default_prompt_name")
        self._truncate_dim = _checked_dimension(options.get("truncate_dim"))

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it is unpickled there may be other CPUs.
        return type(self), (self._folder, None if self.threads == self._default_threads else self.threads)

    @property
    def max_seq_length(self) -> int:
        """Tokens that a text is cut to."""
        return self._truncation()["max_length"]

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if not 2 < length <= self._native.longest:
            raise ValueError(f"max_seq_length={length} is not allowed: use 3 to {self._native.longest} tokens")
        self._tokenizer.enable_truncation(length, direction=self._truncation()["direction"])

    def _truncation(self) -> dict[str, Any]:
        assert self._tokenizer.truncation is not None
        return self._tokenizer.truncation

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return self._cut(self._truncate_dim)

    def _cut(self, truncate_dim: int | None) -> int:
        width = self._dense[-1].dimension if self._dense else self._native.hidden
        return min(width, truncate_dim or width)

    def encode_query(
        self, texts: str | Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None, **options: Any
    ) -> np.ndarray:
        """:meth:`encode` with the model's prompt ``"query"``, unless another is given."""
        return self.encode(texts, prompt=prompt, prompt_name=prompt_name or self._first_prompt("query"), **options)

    def encode_document(
        self, texts: str | Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None, **options: Any
    ) -> np.ndarray:
        """:meth:`encode` with the first of the prompts ``"document"``, ``"passage"``, ``"corpus"``, unless another is given.

        As in sentence-transformers ``"document"`` is always there, if empty.
        """
        name = prompt_name or self._first_prompt("document", "passage", "corpus")
        return self.encode(texts, prompt=prompt, prompt_name=name, **options)

    def _first_prompt(self, *names: str) -> str | None:
        return next((name for name in names if name in self.prompts), None)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Embeddings of texts; the same bits for a text whatever stands beside it.

        Args:
            texts: one text, or several.
            prompt: put before every text; default: the model's prompt of the name ``prompt_name``, if it has any.
            prompt_name: one of ``prompts``; default: the model's ``default_prompt_name``.
            normalize: scale embeddings to length 1; default: what the model's files say.
            truncate_dim: keep at most so many numbers of an embedding; default: what the model's files say.

        Returns:
            float32 ``[dimension]`` for one text, ``[len(texts), dimension]`` for several.

        Raises:
            ValueError: a text is no string, an unknown ``prompt_name``, a ``truncate_dim`` below 1, or an embedding is not
                finite (damaged model).
        """
        many = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in many if not isinstance(text, str)]:
            raise ValueError(f"texts holds {wrong[0]!r} of type {type(wrong[0]).__name__}: use strings")
        prefix = self._prompt(prompt, prompt_name)
        if prefix:
            many = [prefix + text for text in many]
        unit = self._normalize if normalize is None else normalize
        cut = self._truncate_dim if truncate_dim is None else _checked_dimension(truncate_dim)
        y = np.empty((len(many), self._cut(cut)), np.float32)
        done = 0
        for ids in self._tokenize(many):
            rows = self._native.embeddings(ids, self._pooling, unit and not self._dense, self.threads)
            for dense in self._dense:
                rows = dense(rows)
            if unit and self._dense:
                rows = _unit(rows)
            y[done : done + len(ids)] = rows[:, : y.shape[1]]
            done += len(ids)
        if normalize and cut:  # the model's own Normalize comes before the cut, as in sentence-transformers
            y = _unit(y)
        if not np.isfinite(y).all():
            raise ValueError(f"an embedding is not finite: the model holds numbers that are too large. {RESAVE}")
        return y[0] if isinstance(texts, str) else y

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name={name!r} is unknown: use one of {', '.join(self.prompts)}")
        return self.prompts[name]

    def _tokenize(self, texts: list[str]) -> Iterator[list[list[int]]]:
        """Token ids of the texts; a few thousand tokens at a time."""
        for first in range(0, len(texts), _TEXTS):
            some = texts[first : first + _TEXTS]
            alone = len(some) == 1 or self.threads == 1  # one by one: no thread of the tokenizer's is started or woken
            encode = self._tokenizer.encode
            encodings = [encode(text) for text in some] if alone else self._tokenizer.encode_batch_fast(some)
            rows: list[list[int]] = []
            for encoding in encodings:
                rows.append(encoding.ids)
                if sum(map(len, rows)) >= _TOKENS:
                    yield rows
                    rows = []
            if rows:
                yield rows


def _checked_dimension(truncate_dim: Any) -> int | None:
    if truncate_dim is None:
        return None
    if isinstance(truncate_dim, (int, np.integer)) and truncate_dim > 0:
        return int(truncate_dim)
    raise ValueError(f"truncate_dim={truncate_dim!r} is no length of an embedding. Fix: give a whole number from 1 on")


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class _Dense:
    """sentence-transformers' module of that name: a matrix, a bias and an activation function, all in float32."""

    def __init__(self, folder: Path) -> None:
        options = read_json(folder / "config.json")
        name = str(options.get("activation_function", "Tanh")).rpartition(".")[2]
        if name not in ("Identity", "Tanh") or not _is_of_embedding(options) or options.get("use_residual"):
            raise UnsupportedError(
                f"{folder} is no Dense module that hf_ternary.load knows: Identity or Tanh, of the embedding alone. "
                "Fix: use SentenceTransformer"
            )
        self._tanh = name == "Tanh"
        arrays = _read(folder)
        weight = arrays.get("linear.weight", np.empty(0))
        bias = arrays.get("linear.bias", np.zeros(len(weight)))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"{folder} holds a weight {list(weight.shape)} and a bias {list(bias.shape)}. {RESAVE}")
        self._weight, self._bias = weight.astype(np.float32), bias.astype(np.float32)
        self.dimension, self.inputs = weight.shape

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Row by row: a product of all rows at once would give a row other bits in another batch."""
        y = np.stack([np.einsum("oi,i->o", self._weight, row) for row in x]) + self._bias
        return np.tanh(y) if self._tanh else y


def _is_of_embedding(options: dict[str, Any]) -> bool:
    """Whether a module reads and writes the embedding, and nothing else."""
    names = [options.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")]
    return names == ["sentence_embedding"] * 2


def _modules(folder: Path) -> tuple[Path, str, list[_Dense], bool]:
    """From modules.json: the transformer's folder, the pooling, the Dense modules, and whether embeddings are normalized."""
    try:
        modules = [(m["type"].rpartition(".")[2], folder / m["path"]) for m in read_json(folder / "modules.json", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'modules.json'} is damaged ({error!r}). {RESAVE}") from error
    kinds = [kind for kind, _ in modules]
    normalize = kinds[-1:] == ["Normalize"] and _is_of_embedding(read_json(modules[-1][1] / "config.json"))
    dense = modules[2 : len(modules) - normalize]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind, _ in dense):
        raise UnsupportedError(
            f"{folder} consists of {', '.join(kinds) or 'no sentence-transformers modules'}; hf_ternary.load runs "
            "Transformer, Pooling, Dense and Normalize. Fix: use SentenceTransformer"
        )
    pooling = _pooling_mode(read_json(modules[1][1] / "config.json"), folder)
    return modules[0][1], pooling, [_Dense(path) for _, path in dense], normalize


def _pooling_mode(options: dict[str, Any], folder: Path) -> str:
    mode = options.get("pooling_mode")
    if mode is None:  # sentence-transformers before 6
        names = {"cls_token": "cls", "mean_tokens": "mean"}
        found = [
            names.get(key.removeprefix("pooling_mode_"), key) for key, on in options.items() if on is True and "mode" in key
        ]
        mode = found[0] if len(found) == 1 else found
    if not isinstance(mode, str) or mode not in _POOLINGS or not options.get("include_prompt", True):
        without = "" if options.get("include_prompt", True) else " without the prompt"
        raise UnsupportedError(
            f"{folder} pools by {mode!r}{without}; hf_ternary.load knows {' and '.join(_POOLINGS)}. "
            "Fix: use SentenceTransformer"
        )
    return _POOLINGS[mode]


def _native_encoder(folder: Path, config: dict[str, Any]) -> NativeEncoder:
    read_config(folder)  # raises if there is none
    if config.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UnsupportedError(
            f"model_type {config.get('model_type')!r} is not one of {known}. Fix: use SentenceTransformer"
        )
    name, prefix = MODEL_TYPES[config["model_type"]]
    arrays = _read(folder, prefix)
    try:
        return NativeEncoder(find_layout(ARCHITECTURES[name], arrays), config, arrays)
    except UnsupportedError as error:
        raise UnsupportedError(f"{folder}: {error}. Fix: use SentenceTransformer") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read(folder: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Every tensor of the folder's safetensors files, named as in the base model."""
    arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    array = file.get_tensor(name)
                    if array.dtype.kind == "f" and not np.isfinite(array).all():
                        raise ValueError(f"{path}: {name} holds a NaN or an infinity. {RESAVE}")
                    if name.endswith(".weight_scale") and (array < 0).any():
                        raise ValueError(f"{path}: {name} holds a negative value. {RESAVE}")
                    name = name.removeprefix(f"{prefix}.")
                    # BERT's first names, in which transformers 5.0 still saves some models
                    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                    arrays[name] = array
        except (SafetensorError, TypeError, AttributeError) as error:  # the last two: bfloat16, which numpy has not
            raise ValueError(
                f"{path} cannot be read ({error}): damaged, or not saved in float32. Fix: download it again, or save the "
                'model again, loaded with model_kwargs={"dtype": "float32"}'
            ) from error
    if not arrays:
        raise ValueError(f"{folder} holds no safetensors file. {RESAVE}")
    return arrays


# Settings of sentence-transformers that change what becomes of a text.
_OTHER_TOKENS = ("processing_kwargs", "query_length", "document_length", "query_expansion")


def _tokenizer(folder: Path, config: dict[str, Any], longest: int) -> Tokenizer:
    """The tokenizer, which cuts texts to the model's own limit, ``longest`` tokens at most."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(f"{path} is missing; hf_ternary.load reads no other tokenizer. Fix: use SentenceTransformer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is damaged ({error}). {RESAVE}") from error
    settings = read_json(next(iter(sorted(folder.glob("sentence_*_config.json"))), folder / "sentence_bert_config.json"))
    if unknown := [key for key in _OTHER_TOKENS if settings.get(key)]:
        raise UnsupportedError(
            f"{folder} sets {unknown[0]}, which hf_ternary.load does not know. Fix: use SentenceTransformer"
        )
    length = settings.get("max_seq_length")
    told = read_json(folder / "tokenizer_config.json")
    if length is None:
        limits = [told.get("model_max_length"), config.get("max_position_embeddings")]
        length = min(limit for limit in limits if limit is not None)
    if settings.get("do_lower_case"):
        rest = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = Normalizers([Lowercase(), *rest])
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(int(length), longest), direction=told.get("truncation_side", "right"))
    return tokenizer
