"""The readers of what anybody may have made, each fed with bytes.

Whatever the bytes, a reader returns or raises an error of ours that it promises, whose message is one
line, or where it tells every mistake, one for each; and it takes little time and memory. `make test`
tries a few bytes of each, tools/fuzz.py millions.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import torch
import toy_plugin
from comfyui_fake import FakeComfyUI
from outcomes import a_recipe
from PIL import Image
from safetensors.torch import save
from test_adopt import CARGO, INI, SETTINGS
from test_fuzz import GOOD, opens
from test_guide import OLD as GUIDE
from test_lora import BASE, CONV_MODULE, LINEAR_MODULE, factors, random
from test_workflow import MODEL, PLAIN, PROMPT, class_of
from webui_fake import A1111, FakeWebUI

import bayesian_merger
from bayesian_merger import adopt, config, guide, infotext, metadata, prompts, recipes, toml
from bayesian_merger.backends import backend as backends
from bayesian_merger.backends.comfyui import ComfyUI
from bayesian_merger.backends.webui import WebUI
from bayesian_merger.checkpoint import Checkpoint, Layout
from bayesian_merger.data import Model, Prompt, Recipe
from bayesian_merger.delivery import ByFile
from bayesian_merger.errors import (
    CheckpointError,
    ConfigError,
    MergerError,
    RunError,
    TrialError,
)
from bayesian_merger.lora import Lora
from bayesian_merger.merge import Merger
from bayesian_merger.pictures import decoded
from bayesian_merger.scorers import scorer as scorers
from bayesian_merger.workflow import Workflow

LONGEST = 1000
"""Characters of a line that is told to the user."""
_SMALL = Prompt(0, "portrait", "a portrait", 17, width=64, height=64)
_INIT = Path(bayesian_merger.__file__).parent / "templates" / "init"


class Reader(NamedTuple):
    """What reads, bytes that it takes, what it may raise, and whether it tells every mistake."""

    read: Callable[[bytes], object]
    seeds: Sequence[bytes]
    errors: tuple[type[MergerError], ...] = (ConfigError,)
    tells_all: bool = False


def require_held(reader: Reader, data: bytes) -> None:
    """AssertionError, or what was raised, if the reader breaks its promise."""
    told = "nothing"
    try:
        reader.read(data)
    except reader.errors as error:
        told = str(error)
    lines = told.splitlines()
    assert lines
    assert reader.tells_all or len(lines) == 1, told
    assert all(line and len(line) <= LONGEST for line in lines), told


def _of_file(
    path: Path,
    read: Callable[[Path], object],
    seeds: Sequence[bytes],
    errors: tuple[type[MergerError], ...] = (ConfigError,),
    tells_all: bool = False,
) -> Reader:
    def read_bytes(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Reader(read_bytes, seeds, errors, tells_all)


def _framed(path: Path, data: bytes) -> None:
    """A safetensors file; where the data are a header and after a line's end its tensors, of these."""
    if data.startswith(b"{"):
        header, _, rest = data.partition(b"\n")
        data = len(header).to_bytes(8, "little") + header + rest
    path.write_bytes(data)


def _unframed(data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end] + b"\n" + data[end:]


def safetensors(folder: Path) -> Reader:
    def read(data: bytes) -> None:
        _framed(folder / "fuzzed.safetensors", data)
        opens(folder / "fuzzed.safetensors")

    good = GOOD[".safetensors"]
    return Reader(read, [good, _unframed(good)])


def ckpt(folder: Path) -> Reader:
    path = folder / "fuzzed.ckpt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        if data.startswith(b"\x80"):  # a pickle, which an archive with its checksums is made of
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", data)
                archive.writestr("archive/version", "3\n")
                archive.writestr("archive/data/0", bytes(24))
        opens(path)

    path.write_bytes(GOOD[".ckpt"])
    with zipfile.ZipFile(path) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".pkl"))
        pickled = archive.read(name)
    return Reader(read, [GOOD[".ckpt"], pickled])


def lora(folder: Path) -> Reader:
    layout = {name: Layout(shape, torch.float16) for name, shape in BASE.items()}
    path = folder / "fuzzed.safetensors"

    def read(data: bytes) -> None:
        _framed(path, data)
        found = Lora(Checkpoint(path), layout, "sd1")
        for name in found.tensors:
            assert found.delta(name).shape == layout[name].shape

    plain = factors(LINEAR_MODULE)
    hada = {
        f"{LINEAR_MODULE}.hada_w{i}_{side}": random(*shape)
        for i in (1, 2)
        for side, shape in {"a": (6, 2), "b": (2, 4)}.items()
    }
    lokr = {f"{CONV_MODULE}.lokr_w1": random(2, 2), f"{CONV_MODULE}.lokr_w2": random(3, 2, 3, 3)}
    peft = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 1}}
    told = {"lora_adapter_metadata": json.dumps(peft)}
    seeds = [save(plain), save(plain, told), save(hada), save(lokr)]
    return Reader(read, list(map(_unframed, seeds)), (CheckpointError,))


def metadata_of_models(folder: Path) -> Reader:
    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        said = {"modelspec.architecture": text, "sd_merge_recipe": text, "sd_merge_models": text}
        metadata.carried([said, said], "x")
        metadata.prediction(["v_pred", text], said)
        for found in metadata.sd_merge(a_recipe(), [said, said], "ab").values():
            json.loads(found)

    good = metadata.sd_merge(a_recipe(), [{}, {}], "ab")
    return Reader(read, [text.encode() for text in good.values()])


def configuration(folder: Path) -> Reader:
    def read(path: Path) -> None:
        found = config.load(path)
        json.dumps(config.as_plain(found))
        backends.check(found.backend.name, found.backend.options)
        for name, one in found.scorers.items():
            scorers.check(one.scorer or name, one.options)

    seeds = [(_INIT / "config.toml").read_bytes(), SPARSE.encode()]
    return _of_file(folder / "fuzzed.toml", read, seeds, tells_all=True)


def _payload(suffix: str, *seeds: str) -> Callable[[Path], Reader]:
    def read(path: Path) -> None:
        payloads = prompts.read_payloads([path], {"steps": 30})
        if prompts.n_images(payloads) < 100:
            panel = prompts.draw_panel(payloads, {"subject": ["lake"]}, rounds=2, seed="x")
            json.dumps([prompt.to_dict() for prompt in panel]).encode()

    def of(folder: Path) -> Reader:
        encoded = [seed.encode() for seed in seeds]
        return _of_file(folder / f"fuzzed{suffix}", read, encoded, tells_all=True)

    return of


def wildcards(folder: Path) -> Reader:
    fields = 'prompt = "__place__ by __sub/hand__"\nbatch_size = 3\n'
    (folder / "payload.toml").write_text(fields)
    payloads = prompts.read_payloads([folder / "payload.toml"], {})
    (folder / "wild" / "sub").mkdir(parents=True)
    (folder / "wild" / "sub" / "hand.txt").write_text("# nobody\nme\n")

    def read(path: Path) -> None:
        found = prompts.read_wildcards(folder / "wild")
        for prompt in prompts.draw_panel(payloads, found, rounds=2, seed="x"):
            assert len(prompt.prompt) <= 20_000

    seeds = [b"lake\nvalley\n", b"# a\nlake\n\n __sub/hand__\n"]
    return _of_file(folder / "wild" / "place.txt", read, seeds)


def settings(suffix: str, good: str) -> Callable[[Path], Reader]:
    def read(path: Path) -> None:
        toml.loads(adopt.adopted(path).text)

    def of(folder: Path) -> Reader:
        cargo = folder / "conf" / "payloads" / "cargo"
        cargo.mkdir(parents=True)
        (cargo.parent / "cargo.yaml").write_text(CARGO)
        for place in (cargo, folder / "conf" / "payloads"):
            for name in ("portrait", "lake"):
                (place / f"{name}.yaml").write_text("lake:\n  prompt: a lake\n")
        return _of_file(folder / "conf" / f"config{suffix}", read, [good.encode()])

    return of


def recipe(folder: Path) -> Reader:
    seeds = [recipes.to_toml(a_recipe(), {"a" * 64: Path("x.safetensors")}).encode()]
    return _of_file(folder / "fuzzed.toml", recipes.read, seeds)


def workflow(folder: Path) -> Reader:
    def read(path: Path) -> None:
        found = Workflow(path, class_of)
        json.dumps(found.of(MODEL, PROMPT))

    return _of_file(folder / "fuzzed.json", read, [json.dumps(PLAIN).encode()])


def texts_of_image(folder: Path) -> Reader:
    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for key in (infotext.KEY, "prompt"):
            infotext.read({key: text})

    return Reader(read, [infotext.written(PROMPT).encode(), json.dumps(PLAIN).encode()])


def image(folder: Path) -> Reader:
    def read(data: bytes) -> None:
        assert decoded(data, (8, 8)).size == (8, 8)

    seeds = []
    for kind in ("PNG", "JPEG", "WEBP"):
        for mode in ("RGB", "RGBA", "L", "P"):
            file = io.BytesIO()
            with contextlib.suppress(OSError):  # JPEG has no such modes
                Image.new(mode, (8, 8), 7).save(file, kind)
                seeds.append(file.getvalue())
    return Reader(read, seeds, (TrialError,))


class _Replies:
    """What a server has answered, by path, and answers again, but for one path."""

    def __init__(self) -> None:
        self.good: dict[str, Any] = {}

    def note(self, path: str, answer: Any) -> Any:
        self.good[path] = answer
        return answer

    def reader(self, server: Any, use: Callable[[], object]) -> Reader:
        """The first byte of an input chooses a path, and whether it is a refusal; the rest is sent."""
        paths = sorted(self.good)
        sent = {
            p: found if isinstance(found, bytes) else json.dumps(found).encode()
            for p, (_, found) in self.good.items()
        }
        asked: list[Any] = ["", 0, b""]

        def reply(request: httpx.Request) -> httpx.Response:
            path = request.url.path
            if path == asked[0]:
                return httpx.Response(asked[1], content=asked[2])
            status = self.good[path][0] if path in sent else 404
            return httpx.Response(status, content=sent.get(path, b""))

        def read(data: bytes) -> None:
            first = data[0] if data else 0
            asked[:] = paths[first % len(paths)], 200 if first < 128 else 400, data[1:]
            use()

        server.wait = lambda seconds: None
        server.close()
        server._client = httpx.Client(base_url=server.url, transport=httpx.MockTransport(reply))
        seeds = [bytes([i]) + sent[path] for i, path in enumerate(paths)]
        return Reader(read, seeds, (ConfigError, TrialError, RunError), tells_all=True)


def webui(folder: Path) -> Reader:
    path = toy_plugin.write_model(folder / "merge.safetensors", 0.3)
    fake, replies = FakeWebUI(A1111, folder), _Replies()
    fake.twist = lambda path, body, answer: replies.note(path, answer)
    backend = WebUI(fake.url, wait_for_server=0)

    def use() -> None:
        backend.check([_SMALL], "sd1", {})
        delivery = backend._delivery
        assert isinstance(delivery, ByFile)
        delivery._held, delivery.name = path, path.stem
        list(backend.generate([_SMALL]))

    use()
    backend._choose()
    fake.stop()
    return replies.reader(backend._server, use)


def comfyui(folder: Path) -> Reader:
    files = [
        toy_plugin.write_model(folder / f"{n}.safetensors", float(n), vae=True) for n in (0, 1)
    ]
    merger = Merger([Checkpoint(file) for file in files])
    models = tuple(Model(model.name, model.sha256) for model in merger.models)
    weights = {"alpha": dict.fromkeys(merger.architecture.blocks, 0.5)}
    even = Recipe("weighted_sum", "sd1", models, weights)
    merged = merger.merge(even)
    fake, replies = _Recorded(folder), _Replies()
    fake.replies = replies
    backend = ComfyUI(fake.url, wait_for_server=0)

    def use() -> None:
        backend.check([_SMALL], "sd1", {name: (2, 2) for name in merged})
        backend.load(even, merged)
        list(backend.generate([_SMALL]))

    backend._mute_at = 0
    use()
    backend._server.get("/queue")
    fake.stop()
    backend._timeout_s = 0.02
    return replies.reader(backend._server, use)


class _Recorded(FakeComfyUI):
    replies: _Replies

    def answer(self, path: str, query: Mapping[str, list[str]], body: Any) -> tuple[int, Any]:
        found = super().answer(path, query, body)
        if path.startswith("/history/") and not found[1]:
            return found  # not yet
        return cast(tuple[int, Any], self.replies.note(path, found))


SPARSE = """
models = { a = "a", b = "~/b", c = 'c' }
search.start = ["GRAD_V", { IN00 = 0.5 }]
search.ranges = { "OUT*" = [0, 1] }
search.groups = [["a", "b"]]
search.stop = { min_gain = 0.1 }
panel = { payloads = ["*.yaml"], defaults = { day = 2001-01-01, n = 0xff } }
backend = { name = "webui", url = "http://x:1", timeout_s = 1e2 }
scorers = { exposure = { target = 0.6, weight = 2 } }
guards = { blank = "off", noise = 1.5 }
plugins = ["x.py"]
"""
PAYLOAD = """
portrait:
  prompt: "a __subject__"
  neg_prompt: blurry
  cfg: 5
  width: 64
  styles: [a, b]
  override_settings: {CLIP_stop_at_last_layers: 2}
"""
READERS: Mapping[str, Callable[[Path], Reader]] = {
    "safetensors": safetensors,
    "ckpt": ckpt,
    "lora": lora,
    "metadata": metadata_of_models,
    "config": configuration,
    "payload-toml": _payload(".toml", (_INIT / "payloads" / "portrait.toml").read_text()),
    "payload-yaml": _payload(".yaml", PAYLOAD, "prompt: &p a\nx: [*p, !!int 3, ~, 1_0.5]\n"),
    "payload-txt": _payload(".txt", "a __subject__\na valley\n"),
    "wildcards": wildcards,
    "guide": lambda folder: _of_file(
        folder / "guide.yaml", guide.read, [GUIDE.encode()], tells_all=True
    ),
    "settings-yaml": settings(".yaml", SETTINGS),
    "settings-ini": settings(".ini", INI),
    "recipe": recipe,
    "workflow": workflow,
    "texts": texts_of_image,
    "image": image,
    "webui": webui,
    "comfyui": comfyui,
}
