"""A made-up machine with a GPU, so that what comes after the measuring can be tested without one."""

from flash_gsa.benchmarking import measurements, op
from flash_gsa.benchmarking.decoding import measure_decoding
from flash_gsa.benchmarking.layer import SURROUNDINGS, measure_layer
from flash_gsa.benchmarking.worker import Failed

ABOUT = {
    "command": "flash-gsa bench op",
    "date": "2031-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "device": "made-up GPU",
    "cores": 4,
    "threads": 2,
    "load_before": 0.0,
    "versions": {"python": "3.12.0", "flash-gsa": "0.1.0", "torch": "2.11.0"},
}
HERE = {
    "about": ABOUT,
    "device": "cuda:0",
    "implementations": ["auto", "recompute", "triton", "chunk", "reference", "sdpa-cudnn", "sdpa-flash", "fla"],
    "backends": ["triton", "chunk"],
    "decoders": ["auto", "triton", "chunk", "reference", "fla"],
}
SLOWNESS = {
    "auto": 1.0,
    "recompute": 1.25,
    "chunk": 30.0,
    "fla": 5.0,
    "sdpa-cudnn": 2.0,
    "sdpa-flash": 0.5,
    "copy": 0.9,
    "separate": 1.5,
}


def cost(seconds, memory=None):
    return {"seconds": seconds, "low": 0.99 * seconds, "high": 1.01 * seconds, "calls": 9, "peak_bytes": memory}


class MadeUpWorker:
    """Answers at once: FLA is `wrong` at the 340M shape, the flash kernel fails at the 7B shape, and the host needs
    20 µs to launch what it launches of ours outside of a graph.

    `asked` collects (function, implementation, shape), `operations` those of layers, `limits` what time was left.
    """

    def __init__(self):
        self.asked, self.operations, self.limits = [], [], []

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        pass

    def call(self, function, *arguments, limit):
        if function is measurements.describe:
            return HERE | {"about": ABOUT | {"command": arguments[1]}}
        if function is measurements.measure_ceilings:
            copied = cost(1.0) | {"bytes": 10**12, "bytes_per_second": 1e12}
            product = cost(1.0) | {"size": 8192, "dtype": "bfloat16", "flops_per_second": 5e14}
            return {"copy": copied, "product": product}
        _, name, shape = arguments[:3]
        self.asked.append((function, name, shape))
        self.limits.append(limit)
        backend = {"auto": "triton", "recompute": "triton", "chunk": "chunk"}.get(name)
        errors = {"o": (0.002, 0.03)}
        if function is measure_decoding:
            time = 1e-6 * shape.B * SLOWNESS[name]
            state_bytes = {"float32": 4, "bfloat16": 2}[arguments[3]] * shape.state_numbers
            return {"backend": backend, "errors": errors, "state_bytes": state_bytes} | cost(time)
        if name == "triton":
            return {"problem": "not run: it is what auto runs"}
        if shape.lengths and name.startswith("sdpa"):
            return {"problem": "not run: packed sequences are not measured with it"}
        if (name, shape.name) == ("fla", "340M"):
            return {"problem": "wrong: dg is off by 2.0e-01 of its norm (allowed: 3.3e-02)"}
        if (name, shape.name) == ("sdpa-flash", "7B"):
            raise Failed("out of memory")
        operation = arguments[3] if function is measure_layer else None
        time = 1e-8 * shape.tokens * (0.25 if operation == "projections" else SLOWNESS[name])
        without_least = name.startswith("sdpa") or operation in ("layer", "projections")
        least = {} if without_least else {"least_bytes": 1000 * shape.tokens}
        if operation:
            self.operations.append((operation, name, shape.label))
        memory = None if operation in SURROUNDINGS else 2**20
        in_graph = {}
        if function is measurements.measure_shape and arguments[7:] == (True,):
            in_graph = {"in_graph": {"forward": cost(time), "forward_backward": cost(3 * time)}}
            whole_shape = arguments[5]
            time += 0 if whole_shape else 20e-6
        if operation in ("layer", "projections"):
            in_graph = {"in_graph": {"forward": cost(time), "forward_backward": cost(3 * time)}}
        return in_graph | {
            "backend": backend,
            "dtype": "bfloat16",
            "first_call_seconds": 2.0,
            "problem": None,
            "errors": errors,
            "full_size_errors": {"o": (0.004, 0.03)} if least else {},
            "forward": cost(time, memory) | least,
            "forward_backward": cost(3 * time, memory and (3 if name == "recompute" else 4) * memory)
            | {name: 3 * value for name, value in least.items()},
        }


def cold_start(device, name, shape, limit):
    return {"first": {"seconds": 20.0}, "second": {"seconds": 5.0}}


def made_up_result(monkeypatch, **options):
    """What the benchmark finds on that machine."""
    monkeypatch.setattr(op, "measure_cold_start", cold_start)
    return op.benchmark(op.Options(**options), say=lambda line: None, worker=MadeUpWorker())
