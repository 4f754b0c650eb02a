"""Weighted sums of tensors at the speed of memory: out = c0 x0 + c1 x1 + ...

On a CPU with llvmlite (the extra "fast") one compiled loop reads each input once and writes the
result once; without it, or with tensors that it cannot take, torch does the same arithmetic, bit for
bit, in pieces. On other devices it is torch's sum in float64, or its interpolation of two models.

The arithmetic: where every type has 16 bits or less, a coefficient is split into its upper 12 bits
and the rest. A value's product with the former is exact in float32, so that only the sums are rounded,
and all but the last carry their error along (two-sum: Knuth, The Art of Computer Programming 2,
section 4.2.2, theorem B). Otherwise float64. Either way the result is rounded correctly but for
about one value in 4,000, even where terms cancel.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 22  # values at once: enough to hide the cost of a call, few enough to share fairly
_TORCH_PIECE = 1 << 17  # the same for torch, whose every step goes over all of the piece
_STREAMED = 1 << 17  # values from which a result is too large to stay in the cache anyway
_LANES = 32
# What the compiled loop takes: the integer of a type's bits, and what infinity is in it.
_STORED = {
    torch.float16: ("i16", 0x7C00),
    torch.bfloat16: ("i16", 0x7F80),
    torch.float32: ("i32", 0x7F800000),
}


@dataclass(frozen=True)
class Sum:
    """One weighted sum to be written into `out`.

    `inputs` have the shape and device of `out`, and floating point types; one may be `out` itself, but
    they must not overlap it otherwise. `coefficients` are finite, one for each input. Values are
    rounded to `precision`, which is the type of `out` unless it is given.
    """

    coefficients: tuple[float, ...]
    inputs: tuple[Tensor, ...]
    out: Tensor
    precision: torch.dtype | None = None


def combine(sums: Iterable[Sum]) -> list[int]:
    """Compute every sum with all of torch's threads; the places of those with NaN or infinity.

    `sums` are asked for one after the other while earlier ones are computed. An input that is not
    finite shows even where its coefficient is 0.
    """
    pieces = _pieces(sums)
    first = list(islice(pieces, 2))
    if len(first) < 2:
        return [place for place, run in first if run()]
    todo, lock = chain(first, pieces), Lock()

    def work(_: int) -> set[int]:
        strange: set[int] = set()
        while True:
            with lock:
                piece = next(todo, None)
            if piece is None:
                return strange
            place, run = piece
            if run():
                strange.add(place)

    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        return sorted(set().union(*pool.map(work, range(n_threads))))


def stays_finite(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `values` are finite and are so still when they are rounded to `dtype`."""
    if not values.numel():
        return True
    # NaN is both the smallest and the largest of what it is among.
    low, high = values.aminmax()
    largest = torch.maximum(-low, high)
    if dtype == torch.float8_e4m3fn:  # has no infinity: torch makes 448 of all that is larger
        return bool(largest <= torch.finfo(dtype).max)
    return bool(torch.isfinite(largest.to(dtype).float()))


def _pieces(sums: Iterable[Sum]) -> Iterator[tuple[int, Callable[[], int]]]:
    """For each piece of the sums its sum's place, and what computes it; not 0 if it is not finite."""
    for place, item in enumerate(sums):
        factors, inputs, out = item.coefficients, item.inputs, item.out
        precision = item.precision or out.dtype
        if not _is_for_loop((out, *inputs), precision):
            yield place, partial(_by_torch, factors, inputs, out, precision)
            continue
        start, n = out.data_ptr(), out.numel()
        streams = start % 64 == 0 and n >= _STREAMED
        loop = _loop(tuple(x.dtype for x in inputs), precision, out.dtype, streams)
        numbers = (ctypes.c_double * len(factors))(*factors)
        starts = [(t.data_ptr(), t.element_size()) for t in (out, *inputs)]
        for first in range(0, n, _PIECE):
            addresses = (start + first * size for start, size in starts)
            yield place, partial(_run, item, loop, min(_PIECE, n - first), numbers, *addresses)


def _run(item: Sum, loop: Callable[..., int], *arguments: Any) -> int:
    """Call the loop, which lets other threads of Python run, while `item` keeps the memory alive."""
    return loop(*arguments)


def _is_for_loop(tensors: Sequence[Tensor], precision: torch.dtype) -> bool:
    """Whether the loop is there, and the tensors' memory is their values, of types that it knows."""
    if _compiler() is None or precision not in _STORED:
        return False
    if tensors[0].dtype not in (precision, torch.float32):
        return False
    return all(
        t.dtype in _STORED and t.is_cpu and t.is_contiguous() and not t.is_neg() and t.data_ptr()
        for t in tensors
    )


def _by_torch(
    factors: Sequence[float], inputs: Sequence[Tensor], out: Tensor, precision: torch.dtype
) -> bool:
    """The same sum by torch; whether a value is not finite."""
    is_lerp = len(inputs) == 2 and sum(factors) == 1.0 and precision in _STORED
    if is_lerp and not out.is_cpu and {t.dtype for t in (*inputs, out)} == {precision}:
        # One pass over the GPU's memory, with float32 inside.
        torch.lerp(inputs[0], inputs[1], factors[1], out=out)
        return not stays_finite(out, precision)
    if not out.is_contiguous():
        whole = torch.empty(out.shape, dtype=precision, device=out.device)
        strange = _by_torch(factors, inputs, whole, precision)
        out.copy_(whole)
        return strange
    is_narrow = out.is_cpu and precision.itemsize <= 2 and all(x.itemsize <= 2 for x in inputs)
    add = _split_sum if is_narrow else _wide_sum
    values, flat = out.view(-1), [x.reshape(-1) for x in inputs]
    size = _TORCH_PIECE if out.is_cpu else _PIECE
    strange = False
    for first in range(0, len(values), size):
        some = slice(first, first + size)
        total = add(factors, [x[some] for x in flat])
        strange = strange or not stays_finite(total, precision)
        values[some] = total.to(precision)
    return strange


def _split_sum(factors: Sequence[float], inputs: Sequence[Tensor]) -> Tensor:
    upper, lower = torch.zeros(()), torch.zeros(())
    for number, (factor, x) in enumerate(zip(factors, inputs, strict=True)):
        high, low = _split(factor)
        value = x.float()
        exact, rest = value * high, value * low
        if number == 0:
            upper, lower = exact, rest
            continue
        lower = lower + rest
        total = upper + exact
        if number < len(inputs) - 1:
            there = total - upper
            lower = lower + ((upper - (total - there)) + (exact - there))
        upper = total
    return upper + lower


def _wide_sum(factors: Sequence[float], inputs: Sequence[Tensor]) -> Tensor:
    total = inputs[0].double() * factors[0]
    for factor, x in zip(factors[1:], inputs[1:], strict=True):
        total = total + x.double() * factor
    return total


def _split(factor: float) -> tuple[float, float]:
    """The factor's upper 12 bits, and the rest."""
    bits = torch.tensor(factor, dtype=torch.float32).view(torch.int32)
    high = (bits & -4096).view(torch.float32).item()
    return high, factor - high


@cache
def _compiler() -> Callable[[], Any] | None:
    """What makes LLVM's machine for this processor; None where it is not installed or of no use."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    is_x86 = binding.get_process_triple().startswith(("x86_64", "amd64"))
    if is_x86 and not features.get("f16c"):
        return None  # half precision would need a library that is not there
    return partial(
        binding.Target.from_default_triple().create_target_machine,
        cpu=binding.get_host_cpu_name(),
        features=features.flatten(),
        opt=3,
        jit=True,
    )


@cache
def _loop(
    inputs: tuple[torch.dtype, ...], precision: torch.dtype, out: torch.dtype, streams: bool
) -> Callable[..., int]:
    """The compiled loop f(n, coefficients, out, *inputs) -> not 0 if a result is not finite."""
    from llvmlite import binding

    compiler = _compiler()
    assert compiler is not None
    machine = compiler()  # a new one each time, as the engine owns and frees it
    module = binding.parse_assembly(_ir(inputs, precision, out, streams=streams))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, *[ctypes.c_void_p] * (2 + len(inputs)))
    call = kind(engine.get_function_address("sum"))
    # The code lives as long as its engine.
    return lambda *arguments, engine=engine: call(*arguments)


def _ir(
    inputs: Sequence[torch.dtype], precision: torch.dtype, out: torch.dtype, *, streams: bool
) -> str:
    """LLVM's text of the loop for inputs, rounding and output of these types.

    It goes by `_LANES` values at once and then one by one. If it `streams`, results go to memory past
    the cache, from an address that is a multiple of 64.
    """
    n = len(inputs)
    stored, exponent = _STORED[precision]
    is_wide = any(kind.itemsize > 2 for kind in (*inputs, precision))
    before = [f"%c{k} = call double @factor(ptr %factors, i64 {k})" for k in range(n)]
    for k in range(n):
        before += [] if is_wide else _split_factor(k)
        for name in [f"c{k}"] if is_wide else [f"high{k}", f"low{k}"]:
            before += _spread(name, "double" if is_wide else "float")
    many, one = _Lanes(_LANES), _Lanes(1)
    names = "".join(f", ptr noalias readonly %in{k}" for k in range(n))
    lines = [
        *dict.fromkeys(line for lanes in (many, one) for line in _declared(lanes, stored)),
        f"declare {stored} @llvm.vector.reduce.umax.v{_LANES}{stored}({many.of(stored)})",
        "define internal double @factor(ptr %factors, i64 %k) {",
        "%place = getelementptr double, ptr %factors, i64 %k",
        "%value = load double, ptr %place",
        "ret double %value",
        "}",
        f"define i32 @sum(i64 %n, ptr readonly %factors, ptr noalias %out{names}) {{",
        "entry:",
        *before,
        f"%whole = and i64 %n, {-_LANES}",
        "br label %many",
        *_steps(many, "many", "%whole", "0", "entry", inputs, precision, out, streams=streams),
        "many.end:",
        f"%most.both = call {stored} @llvm.vector.reduce.umax.v{_LANES}{stored}"
        f"({many.of(stored)} %many.most)",
        "fence seq_cst",  # what was streamed is there for all to see
        "br label %one",
        *_steps(one, "one", "%n", "%whole", "many.end", inputs, precision, out, streams=False),
        "one.end:",
        f"%strange.both = icmp uge {stored} %most.both, {exponent}",
        f"%strange.one = icmp uge {stored} %one.most, {exponent}",
        "%strange = or i1 %strange.both, %strange.one",
        "%flag = zext i1 %strange to i32",
        "ret i32 %flag",
        "}",
        "!0 = !{i32 1}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Lanes:
    """How many values one step takes, and what the types and constants for them are called."""

    n: int

    def of(self, kind: str) -> str:
        return f"<{self.n} x {kind}>" if self.n > 1 else kind

    def constant(self, kind: str, value: object) -> str:
        return f"<{', '.join([f'{kind} {value}'] * self.n)}>" if self.n > 1 else str(value)

    def function(self, name: str, kind: str) -> str:
        bits = {"float": "f32"}.get(kind, kind)
        return f"@llvm.{name}.v{self.n}{bits}" if self.n > 1 else f"@llvm.{name}.{bits}"


def _declared(lanes: _Lanes, stored: str) -> list[str]:
    real, whole = lanes.of("float"), lanes.of(stored)
    return [
        f"declare {real} {lanes.function('fma', 'float')}({real}, {real}, {real})",
        f"declare {whole} {lanes.function('umax', stored)}({whole}, {whole})",
    ]


def _spread(name: str, kind: str) -> list[str]:
    """The number %name in every lane, as %name.many."""
    many = _Lanes(_LANES).of(kind)
    return [
        f"%{name}.first = insertelement {many} undef, {kind} %{name}, i32 0",
        f"%{name}.many = shufflevector {many} %{name}.first, {many} undef, "
        f"<{_LANES} x i32> zeroinitializer",
    ]


def _split_factor(k: int) -> list[str]:
    """The coefficient %c as %high + %low, as `_split` does it."""
    return [
        f"%cf{k} = fptrunc double %c{k} to float",
        f"%cbits{k} = bitcast float %cf{k} to i32",
        f"%top{k} = and i32 %cbits{k}, -4096",
        f"%high{k} = bitcast i32 %top{k} to float",
        f"%highd{k} = fpext float %high{k} to double",
        f"%lowd{k} = fsub double %c{k}, %highd{k}",
        f"%low{k} = fptrunc double %lowd{k} to float",
    ]


def _steps(
    lanes: _Lanes,
    label: str,
    end: str,
    start: str,
    previous: str,
    inputs: Sequence[torch.dtype],
    precision: torch.dtype,
    out: torch.dtype,
    *,
    streams: bool,
) -> list[str]:
    """The loop `label` from `start` to `end`; %label.most keeps the largest bits of a result."""
    (stored, _), (kept, _) = _STORED[precision], _STORED[out]
    whole, real = lanes.of(stored), lanes.of("float")
    is_wide = any(kind.itemsize > 2 for kind in (*inputs, precision))
    body: list[str] = []
    for k, kind in enumerate(inputs):
        body += _load(lanes, k, kind)
        if is_wide:
            body += _add_wide(lanes, k)
        else:
            body += _add_split(lanes, k, is_last=k == len(inputs) - 1)
    last = len(inputs) - 1
    if is_wide:
        body += [f"%sum = fptrunc {lanes.of('double')} %s{last} to {real}"]
    else:
        body += [f"%sum = fadd {real} %s{last}, %l{last}"]
    body += [*_round(lanes, precision), *_widened(lanes, precision, out)]
    aligned = f", align {min(64, lanes.n * out.itemsize)}, !nontemporal !0" if streams else ""
    body += [
        f"%place = getelementptr {kept}, ptr %out, i64 %i",
        f"store {lanes.of(kept)} %kept, ptr %place{aligned or f', align {out.itemsize}'}",
        # Without their sign, infinity and NaN are the largest of all bits.
        f"%size = and {whole} %check, {lanes.constant(stored, 2 ** (8 * precision.itemsize - 1) - 1)}",
        f"%most.next = call {whole} {lanes.function('umax', stored)}({whole} %most, {whole} %size)",
        f"%i.next = add i64 %i, {lanes.n}",
    ]
    # Each loop has its own names for the same things.
    body = [re.sub(r"%(?!in\d|c\d|high\d|low\d|out\b)", f"%{label}.", line) for line in body]
    if lanes.n > 1:
        body = [re.sub(r"%((?:c|high|low)\d)\b", r"%\1.many", line) for line in body]
    zero = lanes.constant(stored, 0)
    return [
        f"{label}:",
        f"%{label}.i = phi i64 [{start}, %{previous}], [%{label}.i.next, %{label}.step]",
        f"%{label}.most = phi {whole} [{zero}, %{previous}], [%{label}.most.next, %{label}.step]",
        f"%{label}.more = icmp slt i64 %{label}.i, {end}",
        f"br i1 %{label}.more, label %{label}.step, label %{label}.end",
        f"{label}.step:",
        *body,
        f"br label %{label}",
    ]


def _load(lanes: _Lanes, k: int, kind: torch.dtype) -> list[str]:
    """Input `k` at %i as the float32 %x."""
    if kind == torch.bfloat16:
        # The upper half of a float32; LLVM's own type may need a library that is not there.
        bits, wide = lanes.of("i16"), lanes.of("i32")
        return [
            f"%p{k} = getelementptr i16, ptr %in{k}, i64 %i",
            f"%b{k} = load {bits}, ptr %p{k}, align 2",
            f"%w{k} = zext {bits} %b{k} to {wide}",
            f"%u{k} = shl {wide} %w{k}, {lanes.constant('i32', 16)}",
            f"%x{k} = bitcast {wide} %u{k} to {lanes.of('float')}",
        ]
    if kind == torch.float16:
        return [
            f"%p{k} = getelementptr half, ptr %in{k}, i64 %i",
            f"%h{k} = load {lanes.of('half')}, ptr %p{k}, align 2",
            f"%x{k} = fpext {lanes.of('half')} %h{k} to {lanes.of('float')}",
        ]
    return [
        f"%p{k} = getelementptr float, ptr %in{k}, i64 %i",
        f"%x{k} = load {lanes.of('float')}, ptr %p{k}, align 4",
    ]


def _add_wide(lanes: _Lanes, k: int) -> list[str]:
    """One step of `_wide_sum`."""
    real = lanes.of("double")
    start = f"%s{k - 1}" if k else lanes.constant("double", "-0.0")
    return [
        f"%v{k} = fpext {lanes.of('float')} %x{k} to {real}",
        f"%t{k} = fmul {real} %v{k}, %c{k}",
        f"%s{k} = fadd {real} {start}, %t{k}",
    ]


def _add_split(lanes: _Lanes, k: int, *, is_last: bool) -> list[str]:
    """One step of `_split_sum`: %x into the upper sum %s and the lower sum %l."""
    real = lanes.of("float")
    fma = f"call {real} {lanes.function('fma', 'float')}"
    rest = f"%rest{k} = fmul {real} %x{k}, %low{k}"
    if k == 0:
        return [f"%s0 = fmul {real} %x0, %high0", f"%l0 = fmul {real} %x0, %low0"]
    # The product is exact, so that it makes no difference if it is fused with the sum.
    total = f"%s{k} = {fma}({real} %x{k}, {real} %high{k}, {real} %s{k - 1})"
    if is_last:
        return [rest, f"%l{k} = fadd {real} %l{k - 1}, %rest{k}", total]
    return [
        rest,
        f"%m{k} = fadd {real} %l{k - 1}, %rest{k}",
        total,
        f"%there{k} = fsub {real} %s{k}, %s{k - 1}",
        f"%back{k} = fsub {real} %s{k}, %there{k}",
        f"%lost{k} = fsub {real} %s{k - 1}, %back{k}",
        f"%minus{k} = fneg {real} %there{k}",
        f"%over{k} = {fma}({real} %x{k}, {real} %high{k}, {real} %minus{k})",
        f"%error{k} = fadd {real} %lost{k}, %over{k}",
        f"%l{k} = fadd {real} %m{k}, %error{k}",
    ]


def _round(lanes: _Lanes, kind: torch.dtype) -> list[str]:
    """The float32 %sum to nearest even as %bits, and %check, which is not finite where either is not."""
    real, wide, narrow = lanes.of("float"), lanes.of("i32"), lanes.of("i16")
    if kind == torch.float16:
        return [
            f"%r = fptrunc {real} %sum to {lanes.of('half')}",
            f"%bits = bitcast {lanes.of('half')} %r to {narrow}",
            f"%check = or {narrow} %bits, {lanes.constant('i16', 0)}",
        ]
    if kind == torch.float32:
        return [
            f"%bits = bitcast {real} %sum to {wide}",
            f"%check = or {wide} %bits, {lanes.constant('i32', 0)}",
        ]
    return [
        f"%sbits = bitcast {real} %sum to {wide}",
        f"%upper = lshr {wide} %sbits, {lanes.constant('i32', 16)}",
        f"%odd = and {wide} %upper, {lanes.constant('i32', 1)}",
        f"%half = add {wide} %odd, {lanes.constant('i32', 32767)}",
        f"%moved = add {wide} %sbits, %half",
        f"%cut = lshr {wide} %moved, {lanes.constant('i32', 16)}",
        f"%bits = trunc {wide} %cut to {narrow}",
        # Rounded so, a NaN may come out as a number.
        f"%nan = fcmp uno {real} %sum, %sum",
        f"%check = select {lanes.of('i1')} %nan, {narrow} {lanes.constant('i16', 32767)}, "
        f"{narrow} %bits",
    ]


def _widened(lanes: _Lanes, precision: torch.dtype, out: torch.dtype) -> list[str]:
    """The rounded %bits as %kept, the bits of the same number in the type that is stored."""
    bits, wide = lanes.of(_STORED[precision][0]), lanes.of("i32")
    if out == precision:
        return [f"%kept = or {bits} %bits, {lanes.constant(_STORED[precision][0], 0)}"]
    if precision == torch.bfloat16:
        return [
            f"%above = zext {bits} %bits to {wide}",
            f"%kept = shl {wide} %above, {lanes.constant('i32', 16)}",
        ]
    return [
        f"%rounded = bitcast {bits} %bits to {lanes.of('half')}",
        f"%full = fpext {lanes.of('half')} %rounded to {lanes.of('float')}",
        f"%kept = bitcast {lanes.of('float')} %full to {wide}",
    ]
